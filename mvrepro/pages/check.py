"""Hold executed notebooks to what they claim: rules for them, and a pytest plugin that closes nbval's holes.

nbval re-executes a notebook and compares outputs. On its own it trips over the last bit of a number, and it passes a
notebook that never ran, warnings, swallowed errors and any picture. With this plugin numbers are compared by tolerance
and text exactly, nothing is written, and each notebook has one more test, `rules`, which fails where
`executed_problems` (it runs nothing) finds anything:

    pytest -p mvrepro.pages.check --nbval --nbval-current-env results/executed/quick
"""

import base64
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mvrepro.evidence.compare import text_difference
from mvrepro.pages.notebook import START_TIMEOUT_S, literals

MAX_BYTES = 1_000_000

_TIME = re.compile(r'[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}|"(?:start_time|end_time|duration)": [^n]')
ABSOLUTE = re.compile(  # a string that starts with a root, or a usual root anywhere, in a comment too
    r"""(?:^|[\s(\[{,=:+])[rbfRBF]{0,2}["']+(?:/[\w.]|~/|[A-Za-z]:[\\/])"""
    r"|(?<![\w./~)}-])/(?:home|root|tmp|Users|mnt|media|opt|srv|var|usr|etc)/",
    re.MULTILINE,
)
_NBVAL = re.compile(r"^\s*#+\s*(?:NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)
_NBVAL_TAGS = {"nbval-skip", "nbval-raises-exception", "raises-exception", "pytest-validate-ignore-output"}

Node = dict[str, Any]
Rules = Iterable[tuple[object, str]]  # (is it broken?, what to say then)


def executed_problems(executed_path: Path, source_path: Path | None, figures_dir: Path | None) -> list[str]:
    """What keeps an executed notebook from being evidence: [] where nothing does.

    Without a source nothing is compared with it; without a folder of figures no figure counts as recorded.
    """
    notebook, size = read(executed_path), executed_path.stat().st_size
    cells, metadata = notebook["cells"], notebook.get("metadata", {})
    code = {name(number, cell): cell for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"}
    counts = [cell.get("execution_count") for cell in code.values()]
    described = json.dumps([metadata, *(cell.get("metadata") for cell in cells)])
    unstable = _TIME.search(described) or ABSOLUTE.search(described)
    unrun = [which for which, count in zip(code, counts, strict=True) if count is None]
    ordered = unrun or counts == [*range(1, len(counts) + 1)]
    failed = (metadata.get("papermill") or {}).get("exception")
    ignored = sum("nbval-ignore-output" in tags(cell) for cell in cells)
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
        problems += [f"{name(number, cell)} {problem}" for broken, problem in found if broken]
    return problems


def beside(executed_path: Path) -> tuple[Path | None, Path]:
    """The source of results/executed/<profile>/NN-name.ipynb (None elsewhere), and the folder of its figures' data."""
    profile, executed, results, root = list(executed_path.absolute().parents)[:4]
    paired = (results.name, executed.name) == ("results", "executed") and (root / "notebooks").is_dir()
    figures = results / "figures" / profile.name / executed_path.name[:2]
    return root / "notebooks" / executed_path.name if paired else None, figures


def _source_rules(cells: list[Node], source_path: Path) -> Rules:
    """papermill adds one cell of values after the parameters; the rest must be the source notebook, word for word."""
    if not source_path.is_file():
        yield True, f"has no source {source_path.parent.name}/{source_path.name}; remove it, or restore the source"
        return
    source = read(source_path)["cells"]
    pairs = list(itertools.pairwise([{}, *cells]))
    added = [cell for before, cell in pairs if "injected-parameters" in tags(cell) and "parameters" in tags(before)]
    rest = [cell for cell in cells if all(cell is not one for one in added)]
    known = set().union(*(literals(cell["source"]) or set() for cell in source if "parameters" in tags(cell)))
    strange = any((names := literals(cell["source"])) is None or names - known for cell in added)
    yield strange, "has injected parameters that its source does not know"
    for number, (ours, theirs) in enumerate(itertools.zip_longest(rest, source), 1):
        if not (ours and theirs) or any(ours[key] != theirs[key] for key in ("cell_type", "source")):
            yield True, f"is not its source executed: {name(number, theirs or ours)} of the source differs"
            return


def _executed_rules(cell: Node, recorded: set[Any]) -> Rules:
    failed = "papermill-error-cell-tag" in tags(cell) or (cell["metadata"].get("papermill") or {}).get("exception")
    yield failed, "is where papermill's run failed; repair the cause and execute the notebook again"
    yield _NBVAL.search(cell["source"]) or tags(cell) & _NBVAL_TAGS, "tells nbval to look away, which hides its output"
    for output in cell.get("outputs", []):
        stderr, text = output.get("name") == "stderr", "".join(output.get("text", ""))
        yield output["output_type"] == "error", f"holds the error {output.get('ename')}: {output.get('evalue')}"
        yield stderr, f"writes to stderr, {text.strip()[:200]!r}; remove the cause of the warning"
        for mime, content in output.get("data", {}).items():
            # nbval never compares pictures, so each must be, byte for byte, one that was recorded with its data
            png = base64.b64decode("".join(content)) if mime == "image/png" else b""
            unknown = mime.startswith("image/") and hashlib.sha256(png).hexdigest() not in recorded
            yield unknown, f"shows a figure ({mime}) that is not one that results/figures/ records for this profile"


def read(path: Path) -> Node:
    """As plain JSON: nbformat would repair, on reading, some of what must be found here."""
    notebook: Node = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def name(number: int, cell: Node) -> str:
    return f"cell {number} ({cell['source'].strip().partition(chr(10))[0][:60]!r})"


def tags(cell: Node) -> set[str]:
    return set(cell.get("metadata", {}).get("tags", []))


def pytest_configure(config: pytest.Config) -> None:
    """Let nbval compare numbers by tolerance, and miss no figure; and give a slow machine time."""
    os.environ["MVREPRO_VALIDATE"] = "1"  # the kernels' reports compare what they would write
    config.option.nbval_kernel_startup_timeout = max(START_TIMEOUT_S, config.option.nbval_kernel_startup_timeout)
    cell_class = importlib.import_module("nbval.plugin").IPyNbCell
    config.add_cleanup(functools.partial(setattr, cell_class, "compare_outputs", cell_class.compare_outputs))
    cell_class.compare_outputs = _same_outputs


def _same_outputs(cell: Any, test: list[Node], ref: list[Node], skip_compare: Any = None) -> bool:
    """nbval's IPyNbCell.compare_outputs."""
    where = f"{cell.path.name}, {name(cell.parent.nb.cells.index(cell.cell) + 1, cell.cell)}"
    recorded, computed = _shown(ref), _shown(test)
    found = {kind: text_difference(recorded[kind], computed[kind]) for kind in recorded.keys() | computed.keys()}
    differences = [f"{where}, {kind}: {difference}" for kind, difference in sorted(found.items()) if difference]
    cell.comparison_traceback = differences
    return not differences


def _shown(outputs: list[Node]) -> defaultdict[str, str]:
    """All that a cell shows of each kind, such as "stdout" or "text/markdown"; of figures, which they are."""
    shown: defaultdict[str, str] = defaultdict(str)
    for output in outputs:
        if output["output_type"] == "stream":
            shown[output["name"]] += output["text"]
        for kind, content in output.get("data", {}).items():
            figure = kind.startswith("image/")
            shown["figures" if figure else kind] += f"{kind}\n" if figure else f"{content}\n"
    return shown


def pytest_itemcollected(item: Any) -> None:
    if hasattr(item, "output_timeout"):  # nbval's own: 5 s between a cell's end and its output
        item.output_timeout = START_TIMEOUT_S


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Add the test `rules` to each notebook that nbval is asked to run."""
    wanted = parent.config.getoption("nbval", False) or parent.config.getoption("nbval_lax", False)
    return _Notebook.from_parent(parent, path=file_path) if wanted and file_path.suffix == ".ipynb" else None


class _Notebook(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield _Rules.from_parent(self, name="rules")


class _Rules(pytest.Item):
    def runtest(self) -> None:
        problems = executed_problems(self.path, *beside(self.path))
        if not any(item.path == self.path and item is not self for item in self.session.items):
            problems.append("has no cell that pytest collected, so nothing would be executed")
        if problems:
            pytest.fail("\n".join(f"{self.path.name}: {problem}" for problem in problems), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.nodeid
