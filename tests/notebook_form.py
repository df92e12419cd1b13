"""The form of a source notebook: what makes it a page to read, and one that papermill and nbval can run."""

import ast
import io
import itertools
import re
import statistics
import tokenize
from pathlib import Path

from mvrepro.pages.check import ABSOLUTE, Node, Rules, name, read, tags
from mvrepro.pages.notebook import literals

MAX_LINES, MAX_MEDIAN = 25, 8
_SHELL = re.compile(r"^\s*(?:[\w, ]+=\s*)?[!%]", re.MULTILINE)
_UNSTABLE = re.compile(r"(?<![\w.])input(?=\()|\b(?:Out(?=\[)|clear_output|tqdm|get_ipython)\b")
_SHADE = re.compile(r"\b(?:white|black|darker|lighter)\b", re.IGNORECASE)
_VALUES = {"parameters", "injected-parameters"}


def source_problems(path: Path) -> list[str]:
    """What keeps a notebook in notebooks/ from being a page to read and papermill's to run: [] where nothing does."""
    cells = read(path)["cells"]
    first = cells[0] if cells else {"cell_type": "none", "source": ""}
    tagged = sum("parameters" in tags(cell) for cell in cells)
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
            (
                "parameters" in tags(cell) and literals(cell["source"]) is None,
                "may only assign literals: `steps: int = 100`",
            ),
            (both_code and not (tags(before) | tags(cell)) & _VALUES, "needs markdown between it and the last"),
            (
                cell["cell_type"] == "markdown" and _SHADE.search(cell["source"]),
                "names a shade, which is another in the book's dark mode: name a colour, a mark or a line",
            ),
            *(_code_rules(cell) if cell["cell_type"] == "code" else []),
        ]
        problems += [f"{name(number, cell)} {problem}" for broken, problem in rules if broken]
    return problems


def _code_rules(cell: Node) -> Rules:
    source, unstable = cell["source"], _UNSTABLE.search(cell["source"])
    executed = cell.get("outputs") or cell.get("execution_count") is not None
    yield executed, "has outputs or an execution count; clear them"
    yield not source.strip(), "is empty, so it would never be executed; remove it"
    yield _lines(cell) > MAX_LINES, f"has {_lines(cell)} lines; {MAX_LINES} at most: move code to mvrepro/"
    yield unstable, f"uses {unstable and unstable.group()}, which cannot be run unattended and give the same twice"
    yield ABSOLUTE.search(source), "names an absolute path, which other machines lack; start from mvrepro.files"
    try:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        kept = [token.string for token in tokens if token.string.strip() and token.type != tokenize.COMMENT]
        yield kept[-1:] == [";"], "ends in ';', whose effect nbval cannot repeat; write `_ = ...` or plt.show()"
        ast.parse(source)
    except (SyntaxError, tokenize.TokenError) as error:
        shell = "runs a shell command or a magic (! or %); write plain Python"
        yield True, shell if _SHELL.search(source) else f"is not Python: {error}"


def _lines(cell: Node) -> int:
    return len(cell["source"].splitlines())
