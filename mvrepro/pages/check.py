"""Hold committed notebooks to what they claim: rules for notebooks, and a pytest plugin that closes nbval's holes.

nbval re-executes a notebook and compares outputs. On its own it trips over the last bit of a number, and it passes a
notebook that never ran, warnings, swallowed errors and any picture. With this plugin numbers are compared by tolerance
and text exactly, and each notebook has one more test, `rules`, which fails where `executed_problems` finds anything:

    pytest -p mvrepro.pages.check --nbval --nbval-current-env results/executed/quick

`source_problems` and `executed_problems` run nothing, so the tests of notebook hygiene can ask them every time.
"""

import ast
import base64
import copy
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import re
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

RTOL, ATOL = 1e-6, 1e-9  # noise in the last bits passes; a short printed number such as 57.3 is exact
MAX_LINES, MAX_MEDIAN, MAX_BYTES = 25, 8, 1_000_000
TEXTS = {"stdout", "stderr", "text/plain", "text/html", "text/markdown", "text/latex"}

# A number stands alone: versions (1.10.0), names (m0.35) and units (4.2px) are text, and so are integers. An exponent
# without a point follows one digit, as Python prints it: 1234567e8 may be the hash of a commit.
_NUMBER = re.compile(
    r"(?<![\w.])[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[0-9]e[+-]?[0-9]+|(?i:nan|inf))(?!\w|\.[0-9])"
)
_TIME = re.compile(r'[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}|"(?:start_time|end_time|duration)": [^n]')
_ABSOLUTE = re.compile(  # a string that starts with a root, or a usual root anywhere, in a comment too
    r"""(?:^|[\s(\[{,=:+])[rbfRBF]{0,2}["']+(?:/[\w.]|~/|[A-Za-z]:[\\/])"""
    r"|(?<![\w./~)}-])/(?:home|root|tmp|Users|mnt|media|opt|srv|var|usr|etc)/",
    re.MULTILINE,
)
_SHELL = re.compile(r"^\s*(?:[\w, ]+=\s*)?[!%]", re.MULTILINE)
_UNSTABLE = re.compile(r"(?<![\w.])input(?=\()|\b(?:Out(?=\[)|clear_output|tqdm|get_ipython)\b")
_NBVAL = re.compile(r"^\s*#+\s*(?:NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)
_NBVAL_TAGS = {"nbval-skip", "nbval-raises-exception", "raises-exception", "pytest-validate-ignore-output"}
_VALUES = {"parameters", "injected-parameters"}

Node = dict[str, Any]
Rules = Iterable[tuple[object, str]]  # (is it broken?, what to say then)


def difference(recorded: str, computed: str) -> str | None:
    """What keeps two outputs from agreeing, or None: numbers agree within RTOL or ATOL, all other text exactly."""
    for was, now in itertools.zip_longest(recorded.split("\n"), computed.split("\n")):
        if was is None or now is None or _NUMBER.split(was) != _NUMBER.split(now):
            old, new = ("no such line" if line is None else repr(line) for line in (was, now))
            return f"recorded {old}, running it again gives {new}"
        for old, new in zip(_NUMBER.findall(was), _NUMBER.findall(now), strict=True):
            if not _close(old, new):
                return f"recorded {old}, running it again gives {new}, in the line {was.strip()!r}"
    return None


def _close(old: str, new: str) -> bool:
    x, y = float(old), float(new)
    if not (math.isfinite(x) and math.isfinite(y)) or (old.endswith(".") and new.endswith(".")):
        return old == new  # nan, inf, and integers before a full stop are text
    return math.isclose(x, y, rel_tol=RTOL, abs_tol=ATOL)


def source_problems(path: Path) -> list[str]:
    """What keeps a notebook in notebooks/ from being a page to read and papermill's to run: [] where nothing does."""
    cells = _read(path)["cells"]
    first = cells[0] if cells else {"cell_type": "none", "source": ""}
    tagged = sum("parameters" in _tags(cell) for cell in cells)
    median = statistics.median([_lines(cell) for cell in cells if cell["cell_type"] == "code"] or [0])
    rules = [
        (first["cell_type"] != "markdown" or not first["source"].startswith("# "), "must start with a title, '# ...'"),
        (tagged != 1, f"has {tagged} cells tagged 'parameters', not exactly one"),
        (median > MAX_MEDIAN, f"has code cells of {median:g} lines in the median; {MAX_MEDIAN} at most"),
    ]
    problems = [problem for broken, problem in rules if broken]
    ids = [cell.get("id") for cell in cells]
    for number, (before, cell) in enumerate(itertools.pairwise([{}, *cells]), 1):
        both_code = cell["cell_type"] == before.get("cell_type") == "code"
        rules = [
            (not cell.get("id") or ids.count(cell["id"]) > 1, "needs an id that no other cell has"),
            ("parameters" in _tags(cell) and _literals(cell) is None, "may only assign literals: `steps: int = 100`"),
            (both_code and not (_tags(before) | _tags(cell)) & _VALUES, "needs markdown between it and the last"),
            *(_code_rules(cell) if cell["cell_type"] == "code" else []),
        ]
        problems += [f"{_name(number, cell)} {problem}" for broken, problem in rules if broken]
    return problems


def _code_rules(cell: Node) -> Rules:
    source, unstable = cell["source"], _UNSTABLE.search(cell["source"])
    executed = cell.get("outputs") or cell.get("execution_count") is not None
    yield executed, "has outputs or an execution count; clear them"
    yield not source.strip(), "is empty, so it would never be executed; remove it"
    yield _lines(cell) > MAX_LINES, f"has {_lines(cell)} lines; {MAX_LINES} at most: move code to mvrepro/"
    yield unstable, f"uses {unstable and unstable.group()}, which cannot be run unattended and give the same twice"
    yield _ABSOLUTE.search(source), "names an absolute path, which other machines lack; start from mvrepro.files"
    try:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        kept = [token.string for token in tokens if token.string.strip() and token.type != tokenize.COMMENT]
        yield kept[-1:] == [";"], "ends in ';', whose effect nbval cannot repeat; write `_ = ...` or plt.show()"
        ast.parse(source)
    except (SyntaxError, tokenize.TokenError) as error:
        shell = "runs a shell command or a magic (! or %); write plain Python"
        yield True, shell if _SHELL.search(source) else f"is not Python: {error}"


def executed_problems(executed_path: Path, source_path: Path | None, figures_dir: Path | None) -> list[str]:
    """What keeps an executed notebook from being evidence: [] where nothing does.

    Without a source nothing is compared with it; without a folder of figures no figure counts as recorded.
    """
    notebook, size = _read(executed_path), executed_path.stat().st_size
    cells, metadata = notebook["cells"], notebook.get("metadata", {})
    code = [_name(number, cell) for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"]
    counts = [cell.get("execution_count") for cell in cells if cell["cell_type"] == "code"]
    described = json.dumps([metadata, *(cell.get("metadata") for cell in cells)])
    unstable = _TIME.search(described) or _ABSOLUTE.search(described)
    unrun = [name for name, count in zip(code, counts, strict=True) if count is None]
    ordered = unrun or counts == list(range(1, len(counts) + 1))
    failed = (metadata.get("papermill") or {}).get("exception")
    ignored = sum("nbval-ignore-output" in _tags(cell) for cell in cells)
    records = [json.loads(path.read_text("utf-8")) for path in figures_dir.glob("*.json")] if figures_dir else []
    recorded = {record.get("sha256") for record in records if isinstance(record, dict)}
    rules: list[tuple[object, str]] = [
        *(_source_rules(cells, source_path) if source_path else []),
        (size > MAX_BYTES, f"has {size:,} bytes; {MAX_BYTES:,} at most: show less, or smaller figures"),
        (unrun, f"was not executed to the end, or was stripped: no execution count in {', '.join(unrun)}"),
        (not ordered, f"was not executed once from start to end: counts {counts}, not 1 to {len(counts)}"),
        (ignored > 1, f"has {ignored} cells tagged nbval-ignore-output; at most one, on provenance, may be"),
        (failed, "was marked by papermill as a failed run; repair the cause and execute it again"),
        (unstable, f"has a time or a path in its metadata, which no two runs share: {unstable and unstable.group()}"),
    ]
    problems = [problem for broken, problem in rules if broken]
    for number, cell in enumerate(cells, 1):
        found = _executed_rules(cell, recorded)
        problems += [f"{_name(number, cell)} {problem}" for broken, problem in found if broken]
    return problems


def _source_rules(cells: list[Node], source_path: Path) -> Rules:
    """papermill adds one cell of values after the parameters; the rest must be the source notebook, word for word."""
    if not source_path.is_file():
        yield True, f"has no source {source_path.parent.name}/{source_path.name}; remove it, or restore the source"
        return
    source = _read(source_path)["cells"]
    pairs = list(itertools.pairwise([{}, *cells]))
    added = [cell for before, cell in pairs if "injected-parameters" in _tags(cell) and "parameters" in _tags(before)]
    rest = [cell for cell in cells if all(cell is not one for one in added)]
    known = set().union(*(_literals(cell) or set() for cell in source if "parameters" in _tags(cell)))
    strange = any((names := _literals(cell)) is None or names - known for cell in added)
    yield strange, "has injected parameters that its source does not know"
    for number, (ours, theirs) in enumerate(itertools.zip_longest(rest, source), 1):
        if not (ours and theirs) or any(ours[key] != theirs[key] for key in ("cell_type", "source")):
            yield True, f"is not its source executed: {_name(number, theirs or ours)} of the source differs"
            return


def _executed_rules(cell: Node, recorded: set[Any]) -> Rules:
    failed = "papermill-error-cell-tag" in _tags(cell) or (cell["metadata"].get("papermill") or {}).get("exception")
    yield failed, "is where papermill's run failed; repair the cause and execute the notebook again"
    yield _NBVAL.search(cell["source"]) or _tags(cell) & _NBVAL_TAGS, "tells nbval to look away, which hides its output"
    for output in cell.get("outputs", []):
        stderr, text = output.get("name") == "stderr", "".join(output.get("text", ""))
        yield output["output_type"] == "error", f"holds the error {output.get('ename')}: {output.get('evalue')}"
        yield stderr, f"writes to stderr, {text.strip()[:200]!r}; remove the cause of the warning"
        for mime, content in output.get("data", {}).items():
            # nbval never compares pictures, so each must be, byte for byte, one that was recorded with its data
            png = base64.b64decode("".join(content)) if mime == "image/png" else b""
            unknown = mime.startswith("image/") and hashlib.sha256(png).hexdigest() not in recorded
            yield unknown, f"shows a figure ({mime}) that is not one that results/figures/ records for this profile"


def _read(path: Path) -> Node:
    """As plain JSON: nbformat would repair, on reading, some of what must be found here."""
    notebook: Node = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def _lines(cell: Node) -> int:
    return len(cell["source"].splitlines())


def _name(number: int, cell: Node) -> str:
    return f"cell {number} ({cell['source'].strip().partition(chr(10))[0][:60]!r})"


def _tags(cell: Node) -> set[str]:
    return set(cell.get("metadata", {}).get("tags", []))


def _literals(cell: Node) -> set[str] | None:
    """The names that a cell gives literal values, or None where it does anything else."""
    names = set()
    try:
        for node in ast.parse(cell["source"]).body:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    ast.literal_eval(value)
                    names.add(name)
                case _:
                    return None
    except (SyntaxError, ValueError, TypeError):
        return None
    return names


def pytest_configure(config: pytest.Config) -> None:
    """Show nbval the recorded text wherever the re-computed one agrees with it; it compares the rest as ever."""
    cell_class = importlib.import_module("nbval.plugin").IPyNbCell
    original = cell_class.compare_outputs

    def compare_outputs(cell: Any, test: list[Node], ref: list[Node], skip_compare: Any = None) -> bool:
        where = f"{cell.path.name}, {_name(cell.parent.nb.cells.index(cell.cell) + 1, cell.cell)}"
        test, recorded, differences = copy.deepcopy(test), _texts(ref), []
        for kind, places in _texts(test).items():
            for (output, key), (old, old_key) in zip(places, recorded[kind], strict=False):
                found = difference(cell.sanitize(old[old_key]), cell.sanitize(output[key]))
                if found is None:
                    output[key] = old[old_key]
                else:
                    differences.append(f"{where}, {kind}: {found}")
        agree: bool = original(cell, test, ref, skip_compare)
        was, now = _images(ref), _images(test)
        if was != now:
            differences.append(f"{where}: recorded figures {was}, running it again gives {now}")
        cell.comparison_traceback[:0] = differences
        return agree and was == now

    cell_class.compare_outputs = compare_outputs
    config.add_cleanup(functools.partial(setattr, cell_class, "compare_outputs", original))


def _images(outputs: list[Node]) -> list[str]:
    """The kinds of the pictures shown: nbval would not even miss one that was removed."""
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


def _texts(outputs: list[Node]) -> defaultdict[str, list[tuple[Node, str]]]:
    """Where each kind of text stands, in order; nbval, too, pairs outputs by kind and order."""
    places: defaultdict[str, list[tuple[Node, str]]] = defaultdict(list)
    for output in outputs:
        if output["output_type"] == "stream":
            places[output["name"]].append((output, "text"))
        for kind in TEXTS & set(output.get("data", {})):
            places[kind].append((output["data"], kind))
    return places


@pytest.hookimpl(tryfirst=True)  # the rules judge the recorded figures before re-executed cells may write new ones
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Add the test `rules` to each notebook that nbval is asked to run."""
    wanted = parent.config.getoption("nbval", False) or parent.config.getoption("nbval_lax", False)
    return _Notebook.from_parent(parent, path=file_path) if wanted and file_path.suffix == ".ipynb" else None


class _Notebook(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield _Rules.from_parent(self, name="rules")


class _Rules(pytest.Item):
    def runtest(self) -> None:
        profile, executed, root = self.path.parent, self.path.parents[1], self.path.parents[3]
        paired = executed.parts[-2:] == ("results", "executed") and (root / "notebooks").is_dir()
        source = root / "notebooks" / self.path.name if paired else None
        problems = executed_problems(self.path, source, executed.parent / "figures" / profile.name)
        if not any(item.path == self.path and item is not self for item in self.session.items):
            problems.append("has no cell that pytest collected, so nothing would be executed")
        if problems:
            pytest.fail("\n".join(f"{self.path.name}: {problem}" for problem in problems), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.nodeid
