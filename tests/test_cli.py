"""The door: python -m mvrepro. What goes wrong is one message that says what would be right, never a traceback."""

import dataclasses
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mvrepro.__main__ import COMMANDS, main
from mvrepro.errors import UserError
from mvrepro.files import ROOT, read_json
from mvrepro.pages import notebook
from mvrepro.training.config import TrainConfig

TOY = ["train", "--profile", "toy", "--loss", "AM-Softmax", "--embedding-dim", "2", "--epochs", "1"]


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mvrepro", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Commands set variables for what they start; called in this process, they would set them for other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Call a command in this process; it must exit with 1 and one line. Returns the line."""
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err.rstrip("\n")


# Help


def test_help_names_every_command() -> None:
    done = call("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("    ") and line[4] != " "]
    assert [line[0] for line in lines] == list(COMMANDS)


def test_help_of_train_lists_every_setting() -> None:
    done = call("train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    settings = {field.name: field.metadata["help"] for field in dataclasses.fields(TrainConfig)}
    names = {*settings, "out", "save", "start_from", "resume", "despite_changes"}
    options = {f"--{name.replace('_', '-')}" for name in names}
    assert {option for option in options if f"\n  {option} " not in done.stdout.replace(",", " ")} == set()
    texts = [text for name, text in settings.items() if name != "profile"]
    assert all("".join(text.split()) in "".join(done.stdout.split()) for text in texts)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: python -m mvrepro {name}" in capsys.readouterr().out


# Training


def test_train_writes_the_record_of_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    out, model = tmp_path / "a" / "run.json", tmp_path / "model"
    options = [
        "--seed",
        "3",
        "--lr",
        "0.02",
        "--t",
        "0.4",
        "--weight-decay",
        "0",
        "--milestones",
        "1",
        "2",
        "--flip",
        "--easy-margin",
    ]
    done = call(*TOY, "--loss", "MV-AM-Softmax-f", *options, "--out", out, "--save", model)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(out.read_text())
    given = {
        "seed": 3,
        "lr": 0.02,
        "t": 0.4,
        "weight_decay": 0.0,
        "milestones": [1, 2],
        "flip": True,
        "easy_margin": True,
    }
    from_params = {"backbone": "toy", "batch_size": 64, "s": 16.0, "device": "cpu"}
    wanted = given | from_params | {"loss": "MV-AM-Softmax-f", "embedding_dim": 2, "epochs": 1}
    assert {name: record["config"][name] for name in wanted} == wanted
    accuracy = f"{100 * record['metrics']['accuracy']:.1f}"
    assert done.stdout.startswith(f"MV-AM-Softmax-f_t0.4_2d_seed3: accuracy {accuracy} % (")
    assert done.stdout.endswith(f" s) -> {out}\n")
    assert (model / "manifest.json").is_file()
    # The settings that make the bits the same are in force, whatever the shell had.
    assert record["provenance"]["flags"] == {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONHASHSEED": "0",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "MV-Softmax"], "unknown loss 'MV-Softmax'; known are: Softmax, HM-Softmax, "),
        (["--t", "-0.5", "--loss", "MV-AM-Softmax-a"], "t must be a number in 0 … 1000000, got -0.5"),
        (["--lr", "1e30"], "the loss became nan at step 2 (epoch 1) of AM-Softmax_2d_seed0 with lr 1e+30, "),
    ],
    ids=["unknown loss", "negative t", "diverging"],
)
def test_train_in_a_process_fails_with_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = call(*TOY, *arguments, "--out", tmp_path / "run.json", "--save", tmp_path / "model")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mvrepro train: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--profile", "huge"],
            "unknown profile 'huge'; params.yaml has: quick, faces, cfp, tuning,",
        ),
        (["--device", "gpu"], "device 'gpu' can't be used: "),
        (["--device", "cuda:99"], "device 'cuda:99' can't be used: "),
        (
            ["--data", "mnist"],
            "unknown data 'mnist'; known are: orl, digits, lfw, cfp, development, synthetic; and there is no such file",
        ),
        (["--backbone", "vgg"], "unknown backbone 'vgg'; known are: toy, "),
        (["--m", "-1"], "m must be a number in 0 … 1000, got -1.0"),
        (["--start-from", "/nowhere/model"], "/nowhere/model is not a readable checkpoint: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_fails_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    said = fails(capsys, *TOY, *arguments, "--out", tmp_path / "run.json")
    assert said.startswith(f"mvrepro train: {message}")
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_profile_that_are_missing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The toy profile leaves the dimensions to whoever calls."""
    said = fails(capsys, "train", "--profile", "toy", "--loss", "Softmax")
    assert said == "mvrepro train: params.yaml, toy.train: lacks embedding_dim"


def test_a_run_writes_nothing_into_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("people/ann", "people/bo", "net", "d.json"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "net" / "manifest.json").write_text("{}")
    (tmp_path / "v.bin").write_bytes(b"")
    people, net, out = tmp_path / "people", tmp_path / "net", ["--out", tmp_path / "out.json"]
    for options, message in (
        (["--data", people, *out, "--save", people / "net"], f"{people / 'net'} lies in {people}, which is read"),
        (["--data", people, "--out", people / "r.json"], f"r.json lies in {people}, which is read"),
        (["--data", people, *out, "--verify", tmp_path / "v.bin", "--save", tmp_path / "v.bin"], "which is read"),
        (["--start-from", net, "--out", net / "manifest.json"], f"manifest.json lies in {net}, which is read"),
        (["--start-from", net, *out, "--save", net / "next"], f"next lies in {net}, which is read"),
        (["--out", tmp_path / "d.json"], f"could not write {tmp_path / 'd.json'}: it is a folder; name a file"),
    ):
        assert message in fails(capsys, *TOY, *options)
    assert (tmp_path / "net" / "manifest.json").read_text() == "{}" and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("option", ["--out", "--save"])
def test_a_place_that_cannot_be_written_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "file").write_text("old")
    target = tmp_path / "file" / "run.json"
    said = fails(capsys, *TOY, "--epochs", "0", "--out", tmp_path / "other.json", option, target)
    assert said.startswith(f"mvrepro train: could not write {target}")
    assert said.endswith("; nothing half-written was kept")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
        ([*TOY, "--margin", "1"], "unrecognized arguments: --margin 1"),
        ([*TOY, "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        ([*TOY, "--t", "a-lot"], "argument --t: invalid float value: 'a-lot'"),
        (["notebook"], "the following arguments are required: name"),
        (["notebook", "04", "-p", "t"], "argument -p/--parameter: expected 2 arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_understood(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_ctrl_c_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    """On a terminal of its own: the bar that it shows tells when the training is on its way."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a bar needs some width
    command = [sys.executable, "-m", "mvrepro", *TOY, "--epochs", "1000000", "--out", str(tmp_path / "run.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A shell that starts jobs in the background lets them ignore Ctrl-C, and so would the training.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=end, stderr=end, preexec_fn=default) as training:
        os.close(end)
        shown, sent = b"", False
        try:
            while select.select([terminal], [], [], 60)[0]:
                try:
                    part = os.read(terminal, 4096)
                except OSError:  # its other end is closed: the process is over
                    break
                if not part:
                    break
                shown += part
                if not sent and b"loss=" in shown:
                    training.send_signal(signal.SIGINT)
                    sent = True
                assert len(shown) < 1_000_000, "Ctrl-C has no effect"
            code = training.wait(timeout=60)
        finally:
            training.kill()
            os.close(terminal)
    assert sent, shown
    assert code == 130
    assert shown.count(b"mvrepro train: stopped; nothing half-written was kept") == 1
    assert b"Traceback" not in shown
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parts[0] == "run" for path in left)  # the log, and snapshots that are whole
    assert len(list(tmp_path.glob("run/snapshots/*/manifest.json"))) == len(list(tmp_path.glob("run/snapshots/*")))


# Notebooks


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of notebooks that stands in for notebooks/; results go beside it, and nothing is written elsewhere."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(notebook, "NOTEBOOKS", folder)
    monkeypatch.setattr(notebook, "RESULTS", tmp_path / "results")
    return folder


def write(folder: Path, *code: str, name: str = "01-try.ipynb") -> Path:
    """A notebook with the parameters profile and x, and these cells of code."""
    cells = [
        new_markdown_cell("# A title", id="title"),
        new_code_cell('profile: str = "none"\nx: float = 0.5', id="parameters", metadata={"tags": ["parameters"]}),
        *(new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(code)),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.write(made, folder / name)
    return folder / name


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def texts(path: Path) -> list[str]:
    """What the cells of an executed notebook printed or showed as text."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            found.append(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])
    return found


WORKS = """\
import os
from IPython.display import display
import mvrepro
display(profile, x)
print({"one", "two", "three", "four"}, os.environ["OMP_NUM_THREADS"], os.environ["ATEN_CPU_CAPABILITY"])"""


def test_a_notebook_executed_twice_is_the_same_bytes(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # what the shell has must not matter
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    source = write(notebooks, WORKS, "x * 2")
    before = source.read_bytes()
    out = tmp_path / "results" / "executed" / "quick" / "01-try.ipynb"
    contents = []
    for _ in range(2):
        out_folder = ["--out", str(tmp_path / "results")]
        assert main(["notebook", "01", "--profile", "quick", "-p", "x", "0.25", *out_folder]) == 0
        assert capsys.readouterr().out == f"executed {out}\n"
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert source.read_bytes() == before
    assert files_below(tmp_path) == ["notebooks/01-try.ipynb", "results/executed/quick/01-try.ipynb"]
    printed = texts(out)
    assert printed[:2] == ["'quick'", "0.25"]
    assert printed[2].endswith("} 1 avx2\n")
    assert printed[3:] == ["0.5"]
    assert b"papermill" not in contents[0]  # its times and its paths
    assert str(tmp_path).encode() not in contents[0]
    assert [cell.execution_count for cell in nbformat.reads(contents[0].decode(), 4).cells if "outputs" in cell] == [
        1, 2, 3, 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("print('so far')\n1 / 0", "01-try.ipynb, cell [3] failed:\n"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "the kernel of 01-try.ipynb died (killed, or out"),
    ],
    ids=["fails", "is killed"],
)
@pytest.mark.parametrize("old", [None, "the old one"], ids=["new", "over"])
def test_a_notebook_that_does_not_finish_leaves_what_was_there(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str, message: str, old: str | None
) -> None:
    write(notebooks, cell, "print('never')")
    out = tmp_path / "results" / "executed" / "quick" / "01-try.ipynb"
    if old:
        out.parent.mkdir(parents=True)
        out.write_text(old)
    assert main(["notebook", "01"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("mvrepro notebook: ") == 1
    assert f"mvrepro notebook: {message}" in said.err
    if "failed" in message:
        assert said.err.endswith("ZeroDivisionError: division by zero\n")
    assert "papermill" not in said.err  # the traceback of the cell, not of what ran it
    assert files_below(tmp_path) == [
        "notebooks/01-try.ipynb",
        *(["results/executed/quick/01-try.ipynb"] if old else []),
    ]
    assert not old or out.read_text() == old


def test_a_cell_that_takes_too_long_is_one_message(
    monkeypatch: pytest.MonkeyPatch, notebooks: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(notebook, "CELL_TIMEOUT_S", 1)
    source = write(notebooks, "import time\ntime.sleep(30)")
    try:
        with pytest.raises(UserError, match=r"01-try\.ipynb"):
            notebook.execute(source, "quick")
    finally:
        assert files_below(tmp_path) == ["notebooks/01-try.ipynb"]


def test_no_time_limit_is_short(monkeypatch: pytest.MonkeyPatch, notebooks: Path, tmp_path: Path) -> None:
    """A slow machine may take minutes to start a kernel or to send an output; papermill waits 60 and 4 s."""
    import papermill

    asked, real = {}, papermill.execute_notebook
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *given, **more: asked.update(more) or real(*given, **more)
    )
    notebook.execute(write(notebooks, "x"), "quick")
    limits = [asked[name] for name in ("start_timeout", "iopub_timeout", "execution_timeout")]
    assert limits == [600, 600, 1800]


def test_a_kernel_that_does_not_start_is_one_message(
    monkeypatch: pytest.MonkeyPatch, notebooks: Path, tmp_path: Path
) -> None:
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "slow.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("import time\ntime.sleep(20)")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(notebook, "START_TIMEOUT_S", 1)
    with pytest.raises(UserError, match=r"the kernel of 01-try\.ipynb did not start within 1 s; nothing was written"):
        notebook.execute(write(notebooks, "x"), "quick")
    assert not (tmp_path / "results").exists()


CUT = """\
import sys, time
for text in ("one\\n", "two\\n"):
    print(text, end="", flush=True)
    time.sleep(1)
print("no number", file=sys.stderr)
display(3)
print("two")"""


def test_where_a_printed_text_was_cut_changes_no_page(notebooks: Path) -> None:
    """A loaded machine sends what a cell prints in other pieces; what stands between two texts stays there."""
    page = read_json(notebook.execute(write(notebooks, CUT), "quick"))
    outputs = next(cell["outputs"] for cell in page["cells"] if "two" in str(cell["source"]))
    assert [(o["output_type"], o.get("name"), "".join(o.get("text", ""))) for o in outputs] == [
        ("stream", "stdout", "one\ntwo\n"), ("stream", "stderr", "no number\n"), ("display_data", None, ""),
        ("stream", "stdout", "two\n"),
    ]  # fmt: skip


DRAWS = """\
import os
from pathlib import Path
folder = Path(os.environ["MVREPRO_OUT"], "figures", profile, "01")
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / f"{name}.json").write_text("{}")"""


def test_a_figure_that_the_page_no_longer_has_goes(notebooks: Path, tmp_path: Path) -> None:
    """But only when the whole page was executed."""
    write(notebooks, 'name = "old"', DRAWS)
    assert main(["notebook", "01"]) == 0
    write(notebooks, 'name = "new"', DRAWS, "1 / 0")
    assert main(["notebook", "01"]) == 1
    figures = tmp_path / "results" / "figures" / "quick" / "01"
    assert files_below(figures) == ["new.json", "old.json"]
    write(notebooks, 'name = "new"', DRAWS)
    assert main(["notebook", "01"]) == 0
    assert files_below(figures) == ["new.json"]


def test_a_page_with_other_parameters_goes_to_scratch(
    monkeypatch: pytest.MonkeyPatch, notebooks: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(notebook, "SCRATCH", tmp_path / "scratch")
    write(notebooks, 'name = "one"', DRAWS)
    assert main(["notebook", "01", "-p", "x", "1"]) == 0
    assert files_below(tmp_path) == [
        "notebooks/01-try.ipynb", "scratch/executed/quick/01-try.ipynb", "scratch/figures/quick/01/one.json",
    ]  # fmt: skip


def test_a_failed_write_of_a_notebook_is_one_message(notebooks: Path, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("no folder")
    with pytest.raises(UserError, match=r"could not write .*01-try.ipynb .*; nothing half-written was kept$"):
        notebook.execute(write(notebooks), "quick")
    assert files_below(tmp_path) == ["notebooks/01-try.ipynb", "results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99"], "'99' names 0 notebooks; notebooks/ holds: 01-try, 02-other"),
        (["0"], "'0' names 2 notebooks; notebooks/ holds: 01-try, 02-other"),
        (["01", "-p", "y", "1"], "01-try.ipynb has no parameter y; it has: profile, x"),
        (["01-try.ipynb", "-p", "z", "1", "-p", "a", "2"], "01-try.ipynb has no parameter a, z; it has: profile, x"),
        (["01", "-p", "x", "[1"], "parameter x: '[1' is not a YAML value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_notebook_fails_with_one_message(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(notebooks), write(notebooks, name="02-other.ipynb")
    assert fails(capsys, "notebook", *arguments) == f"mvrepro notebook: {message}"
    assert not (tmp_path / "results").exists()


def test_notebooks_of_the_project_are_found_by_number() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert notebook.find(path.name[:2]) == notebook.find(path.name) == path


# The other commands wait for a `make reproduce` that is at work, so they are not called here.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc.*")
def test_an_unknown_profile_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "validate", "--profile", "huge")
    assert said.startswith(
        "mvrepro validate: profile 'huge' has no stages in dvc.yaml; known are: quick, faces, cfp, tuning, early, toy"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interruption_of_any_command_is_one_message(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mvrepro.commands.{name}.run", interrupted)
    needed = {
        "train": ["--loss", "Softmax"],
        "notebook": ["01"],
        "runs": ["quick"],
        "data": ["inspect", "x"],
        "embed": ["x", "x", "x"],
        "judge": ["--protocol", "lfw", "--embeddings", "x"],
    }
    assert main([name, *needed.get(name, [])]) == 130
    assert capsys.readouterr().err == f"mvrepro {name}: stopped; nothing half-written was kept\n"
