"""The gate has teeth: notebooks in tests/notebooks/ that must pass or fail, and each rule on its own."""

import base64
import copy
import hashlib
import json
import os
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notebook_form import source_problems

from mvrepro.evidence.compare import text_difference
from mvrepro.pages import check

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "tests" / "notebooks"
Node = dict[str, Any]
Change = Callable[[list[Node]], object]


# The plugin, as `make validate` runs it

MUST_FAIL = {
    "fail_number": ("Cell 1", "recorded 0.7649, running it again gives 0.7648"),
    "fail_verdict": ("Cell 1", "recorded 'not reproduced at 0.70', running it again gives 'reproduced at 0.70'"),
    "fail_text": ("Cell 1", "'AM-Softmax', 'AM-Softmax', 0.7"),
    "fail_never_executed": ("rules", "no execution count in cell 6"),
    "fail_stripped": ("rules", "no execution count in cell 2"),
    "fail_stderr": ("rules", "writes to stderr, 'angle is large'"),
    "fail_error_cell": ("rules", "is where papermill's run failed"),
    "fail_figure": ("rules", "that is not one that results/figures/ records"),
    "fail_figure_missing": ("Cell 1", "figures: recorded '', running it again gives 'image/png'"),
}


def run_nbval(*arguments: str) -> subprocess.CompletedProcess[str]:
    """nbval with the plugin in a process of its own, untouched by the options of the pytest that runs this test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    options = ["-p", "mvrepro.pages.check", "-p", "no:cacheprovider", "-o", "addopts=", "--color=no", "-q", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, "--nbval", "--nbval-current-env", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_noise_in_the_last_digits_passes() -> None:
    result = run_nbval("tests/notebooks/pass_noise.ipynb")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 passed" in result.stdout


@pytest.mark.parametrize("name", MUST_FAIL)
def test_notebook_that_must_fail_does_for_its_one_reason(name: str) -> None:
    item, reason = MUST_FAIL[name]
    result = run_nbval(f"tests/notebooks/{name}.ipynb")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed" in result.stdout  # the other tests pass, so nothing but the reason below made it fail
    assert f"FAILED tests/notebooks/{name}.ipynb::{item}" in result.stdout
    assert any(f"{name}.ipynb" in line and reason in line for line in result.stdout.splitlines()), result.stdout


def test_every_notebook_of_the_folder_is_tried() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {*MUST_FAIL, "pass_noise"}


def test_notebook_without_code_fails(tmp_path: Path) -> None:
    write(tmp_path / "words.ipynb", [markdown("title", "# Words")])
    result = run_nbval(str(tmp_path / "words.ipynb"))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "has no cell that pytest collected" in result.stdout


def test_no_time_limit_of_nbval_is_short() -> None:
    """nbval gives a kernel 60 s to start, and a cell's output 5 s."""
    cleanups: list[Callable[[], object]] = []
    option = SimpleNamespace(nbval_kernel_startup_timeout=60.0)
    check.pytest_configure(SimpleNamespace(option=option, add_cleanup=cleanups.append))
    for undo in cleanups:
        undo()
    assert option.nbval_kernel_startup_timeout == 600
    cell = SimpleNamespace(output_timeout=5)
    check.pytest_itemcollected(cell)
    assert cell.output_timeout == 600


# The comparison of numbers and text

words = st.text(string.ascii_letters + " ,:()[]%|<>/", max_size=12).map(lambda text: f"{text} ")


@given(words, st.floats(allow_nan=False, allow_infinity=False), st.floats(-1e-7, 1e-7), words)
def test_noise_agrees(before: str, value: float, noise: float, after: str) -> None:
    noisy = value * (1 + noise)
    if abs(noisy) < 1e300:
        assert text_difference(f"{before}{value!r} {after}", f"{before}{noisy!r} {after}") is None


@given(words, st.floats(1e-4, 1e12), st.floats(1e-4, 10), st.sampled_from([1, -1]), st.sampled_from([1, -1]), words)
def test_changed_number_differs(before: str, size: float, change: float, sign: int, way: int, after: str) -> None:
    value = sign * size
    changed = value * (1 + way * change)
    assert text_difference(f"{before}{value!r} {after}", f"{before}{changed!r} {after}")


@given(words, st.floats(), st.integers(), words, st.data())
def test_changed_letter_or_integer_differs(
    before: str, value: float, count: int, after: str, data: st.DataObject
) -> None:
    text = f"{before}x{value!r} {value!r} of {count} {after}"
    place = data.draw(st.sampled_from([place for place, letter in enumerate(text) if letter in string.ascii_letters]))
    letter = data.draw(st.sampled_from(string.ascii_letters).filter(lambda letter: letter != text[place]))
    assert text_difference(text, text[:place] + letter + text[place + 1 :])
    assert text_difference(text, text.replace(f" of {count} ", f" of {count + 1} "))


@pytest.mark.parametrize(
    ("recorded", "computed"),
    [
        ("0.1", "0.10000000000000001"),
        ("-0.0", "0.0"),
        ("gradient error 1.1e-16", "gradient error 3.2e-15"),
        ("1.0", "0.99999999"),
        ("[1. 0.5]", "[1.00000001 0.5]"),
        ("<td>0.30000000000000004</td>", "<td>0.3</td>"),
        ("np.float64(0.30000000000000004)", "np.float64(0.3)"),
        ("nan and -inf", "nan and -inf"),
    ],
)
def test_texts_that_agree(recorded: str, computed: str) -> None:
    assert text_difference(recorded, computed) is None
    assert text_difference(computed, recorded) is None


@pytest.mark.parametrize(
    ("recorded", "computed"),
    [
        ("57.3", "57.4"),  # no unit in the last digit is given away
        ("128", "129"),
        ("128", "128.0"),
        ("3000000.", "3000001."),  # an integer at the end of a sentence
        ("1.10.0", "1.1.0"),
        ("SV-m0.350", "SV-m0.35"),
        ("8.0px", "8.00px"),
        ("1234567e8", "1234568e8"),
        ("nan", "0.5"),
        ("inf", "-inf"),
        ("0.5", "-0.5"),
        ("a\n", "a"),
        ("a", "a "),
        ("0.5\n0.6", "0.5"),
        ("0.5 0.6", "0.5  0.6"),
    ],
)
def test_texts_that_differ(recorded: str, computed: str) -> None:
    assert text_difference(recorded, computed)
    assert text_difference(computed, recorded)


# The rules, on notebooks made here


def markdown(name: str, source: str) -> Node:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}


def code(name: str, source: str, *tags: str) -> Node:
    metadata = {"tags": list(tags)} if tags else {}
    cell = {"cell_type": "code", "id": name, "metadata": metadata, "source": source}
    return {**cell, "execution_count": None, "outputs": []}


def write(path: Path, cells: list[Node], **metadata: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def source_cells() -> list[Node]:
    return [
        markdown("title", "# A claim"),
        code("parameters", 'steps: int = 100  # of SGD\nlosses = ["AM", "Arc"]\nshift: float = -0.5', "parameters"),
        code("setup", "import math"),
        markdown("words", "The value:"),
        code("value", 'print(f"{shift}/tmp/{steps}", "/", math.exp(shift) / steps)\n_ = 1;  x = 2  # kept;'),
    ]


PNG = b"\x89PNG, in spirit"


def executed_cells() -> list[Node]:
    cells = source_cells()
    cells.insert(2, code("injected", "# Parameters\nsteps = 20\n", "injected-parameters"))
    for count, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
        cell["execution_count"] = count
    picture = {"image/png": base64.encodebytes(PNG).decode(), "text/plain": ["<Figure>"]}
    cells[-1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["-0.5 0.03\n"]},
        {"output_type": "display_data", "metadata": {}, "data": picture},
    ]
    return cells


def change_source(place: int, source: str) -> Change:
    return lambda cells: cells[place].update(source=source)


def add_output(output: Node) -> Change:
    return lambda cells: cells[-1]["outputs"].append(output)


def tag(place: int, *tags: str) -> Change:
    return lambda cells: cells[place]["metadata"].update(tags=[*cells[place]["metadata"].get("tags", []), *tags])


SOURCE_RULES: list[tuple[str, Change]] = [
    ("has outputs or an execution count", lambda cells: cells[-1].update(execution_count=1)),
    ("has outputs or an execution count", add_output({"output_type": "stream", "name": "stdout", "text": "1"})),
    ("has 0 cells tagged 'parameters'", lambda cells: cells[1]["metadata"].clear()),
    ("has 2 cells tagged 'parameters'", tag(2, "parameters")),
    ("may only assign literals", change_source(1, "import math")),
    ("may only assign literals", change_source(1, "steps = 10 * 10")),
    ("may only assign literals", change_source(1, "steps: int")),
    ("may only assign literals", change_source(1, "a, b = 1, 2")),
    ("may only assign literals", change_source(1, "run.steps = 1")),
    ("must start with a title", lambda cells: cells.pop(0)),
    ("must start with a title", change_source(0, "A claim")),
    ("must start with a title", change_source(0, "## A claim")),
    ("needs an id", lambda cells: cells[3].pop("id")),
    ("needs an id", lambda cells: cells[3].update(id="value")),
    ("ends in ';'", change_source(-1, "math.exp(shift);")),
    ("ends in ';'", change_source(-1, "math.exp(shift);  # hidden\n\n")),
    ("shell command or a magic", change_source(-1, "!ls")),
    ("shell command or a magic", change_source(-1, "files = !ls")),
    ("shell command or a magic", change_source(-1, "%matplotlib inline")),
    ("shell command or a magic", change_source(-1, "%%time\nmath.exp(1)")),
    ("shell command or a magic", change_source(-1, "took = %timeit math.exp(1)")),
    ("uses get_ipython", change_source(-1, "get_ipython().run_line_magic('pip', 'list')")),
    ("is not Python", change_source(-1, "print(")),
    ("is not Python", change_source(-1, "def f(:\n    pass")),
    ("absolute path", change_source(-1, 'open("/data/lfw.npz")')),
    ("absolute path", change_source(-1, "open(f'/data/{steps}.npz')")),
    ("absolute path", change_source(-1, 'Path("~/faces")')),
    ("absolute path", change_source(-1, r'open(r"C:\faces\lfw.npz")')),
    ("absolute path", change_source(-1, "x = 1  # see /home/somebody/notes")),
    ("uses input", change_source(-1, "name = input('Who? ')")),
    ("uses Out", change_source(-1, "Out[3]")),
    ("uses clear_output", change_source(-1, "clear_output()")),
    ("uses tqdm", change_source(-1, "from tqdm import tqdm")),
    ("has 26 lines", change_source(-1, "x = 1\n" * 26)),
    ("9 lines in the median", lambda cells: [cells[place].update(source="x = 1\n" * 9) for place in (2, 4)]),
    ("is empty", change_source(-1, " \n")),
    ("needs markdown between", lambda cells: cells.pop(3)),
    ("names a shade", change_source(0, "# Title\n\nThe darker line is the margin loss.")),
]


def test_good_source_has_no_problem(tmp_path: Path) -> None:
    assert source_problems(write(tmp_path / "a.ipynb", source_cells())) == []


@pytest.mark.parametrize(("problem", "change"), SOURCE_RULES)
def test_rule_for_sources(tmp_path: Path, problem: str, change: Change) -> None:
    cells = source_cells()
    change(cells)
    found = source_problems(write(tmp_path / "a.ipynb", cells))
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    "source",
    [
        'print("%d steps"\n      % steps)',
        'url = "https://example.org/home/page"\nhalf = "a"/b',
        "axis.set_xlabel(r'$s/\\theta$')\nhead.input(1)",
        "x = 1\n" * 25,
        "x = f'{root}/data'",
    ],
)
def test_harmless_code_passes(tmp_path: Path, source: str) -> None:
    cells = source_cells()
    cells[-1]["source"] = source
    assert source_problems(write(tmp_path / "a.ipynb", cells)) == []


EXECUTED_RULES: list[tuple[str, Change]] = [
    ("cell 5 ('print(f", change_source(-1, "print(1)")),
    ("cell 4 ('The value:') of the source differs", change_source(4, "A value:")),
    ("of the source differs", lambda cells: cells.pop()),
    ("of the source differs", lambda cells: cells.append(markdown("more", "More."))),
    ("of the source differs", lambda cells: cells.append(code("late", "steps = 1", "injected-parameters"))),
    ("source does not know", change_source(2, "stepz = 20")),
    ("source does not know", change_source(2, "steps = 10 + 10")),
    ("no execution count in cell 6", lambda cells: cells[-1].update(execution_count=None)),
    ("counts [1, 2, 3, 5], not 1 to 4", lambda cells: cells[-1].update(execution_count=5)),
    ("counts [2, 1, 3, 4], not 1 to 4", lambda cells: [cells[i].update(execution_count=3 - i) for i in (1, 2)]),
    (
        "holds the error ValueError: no class",
        add_output({"output_type": "error", "ename": "ValueError", "evalue": "no class", "traceback": []}),
    ),
    ("papermill's run failed", tag(-2, "papermill-error-cell-tag")),
    ("papermill's run failed", lambda cells: cells[-1]["metadata"].update(papermill={"exception": True})),
    ("writes to stderr, 'a warning'", add_output({"output_type": "stream", "name": "stderr", "text": "a warning\n"})),
    (
        "shows a figure (image/png) that is not one that results/figures/ records",
        add_output({"output_type": "display_data", "data": {"image/png": base64.b64encode(PNG + b"!").decode()}}),
    ),
    ("shows a figure (image/jpeg)", add_output({"output_type": "display_data", "data": {"image/jpeg": "AAAA"}})),
    ("bytes; 1,000,000 at most", add_output({"output_type": "stream", "name": "stdout", "text": "x" * 1_000_001})),
    ("2 cells tagged nbval-ignore-output", lambda cells: [tag(i, "nbval-ignore-output")(cells) for i in (3, 5)]),
    ("tells nbval to look away", tag(-1, "nbval-skip")),
    ("tells nbval to look away", tag(-1, "raises-exception")),
    ("tells nbval to look away", change_source(-1, "# NBVAL_IGNORE_OUTPUT\nprint(1)")),
    ("tells nbval to look away", change_source(-1, "x = 1\n  #NBVAL_SKIP")),
    ("has a time", lambda cells: cells[-1]["metadata"].update(execution={"iopub": "2026-11-24T07:48:00.1Z"})),
    ("has a time", lambda cells: cells[-1]["metadata"].update(papermill={"duration": 1.5})),
    ("or a path", lambda cells: cells[-1]["metadata"].update(papermill={"input_path": "/data/a.ipynb"})),
]


@pytest.fixture
def checked(tmp_path: Path) -> Callable[..., list[str]]:
    """Write an executed notebook with its source and its recorded figure, and ask for its problems."""
    source = write(tmp_path / "notebooks" / "a.ipynb", source_cells())
    figures = tmp_path / "results" / "figures" / "quick" / "01"
    figures.mkdir(parents=True)
    record = {"name": "curve", "sha256": hashlib.sha256(PNG).hexdigest()}
    (figures / "curve.json").write_text(json.dumps(record), encoding="utf-8")
    (figures / "table.json").write_text("[1, 2]", encoding="utf-8")

    def problems(cells: list[Node], **metadata: object) -> list[str]:
        executed = write(tmp_path / "results" / "executed" / "quick" / "a.ipynb", cells, **metadata)
        return check.executed_problems(executed, source, figures)

    return problems


def test_good_executed_notebook_has_no_problem(checked: Callable[..., list[str]]) -> None:
    cells = executed_cells()
    assert checked(cells) == []
    cells[-1]["metadata"] = {"tags": ["nbval-ignore-output"], "papermill": {"exception": False, "start_time": None}}
    assert checked(cells, papermill={"duration": None, "exception": None, "parameters": {"steps": 20}}) == []


@pytest.mark.parametrize(("problem", "change"), EXECUTED_RULES)
def test_rule_for_executed_notebooks(checked: Callable[..., list[str]], problem: str, change: Change) -> None:
    cells = copy.deepcopy(executed_cells())
    change(cells)
    found = checked(cells)
    assert any(problem in line for line in found), found


def test_papermill_metadata_of_the_notebook(checked: Callable[..., list[str]]) -> None:
    assert any("failed run" in line for line in checked(executed_cells(), papermill={"exception": True}))
    assert any("has a time" in line for line in checked(executed_cells(), papermill={"start_time": "2026-11-24 07:48"}))


def test_without_a_source_or_figures(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", executed_cells())
    for figures in (None, tmp_path / "nowhere"):
        (problem,) = check.executed_problems(path, None, figures)
        assert "is not one that results/figures/ records" in problem
    assert "has no source notebooks/a.ipynb" in check.executed_problems(path, tmp_path / "notebooks/a.ipynb", None)[0]
