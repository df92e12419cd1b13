"""Are these the same? Two values, two printed texts, and all that was computed here against the last commit.

A run's metrics come out of training. On the same kind of processor they are the same bits; elsewhere the last bits
differ, and what is tolerable is how far a metric moves when a run is trained again with other last bits: params.yaml,
<profile>.tolerance, measured by `python -m mvrepro runs PROFILE --tolerance N`. So it is with the loss of the first
epoch (first_loss, relative), which hardly moves yet: there another loss's run shows. Exact mathematics gets 1e-6;
measured times are not compared. Reports that follow from runs are compared where all the runs behind them are the
same; a verdict is compared always.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvrepro.files import display
from mvrepro.provenance import committed, git

EXACT = 1e-6  # of values: relative, or absolute below 1
PRINTED = {"rel_tol": 1e-6, "abs_tol": 1e-9}  # last bits pass; a short printed number such as 57.3 is exact

# A number stands alone: versions (1.10.0), names (m0.35) and units (4.2px) are text, and so are integers. An exponent
# without a point follows one digit, as Python prints it: 1234567e8 may be the hash of a commit.
_NUMBER = re.compile(
    r"(?<![\w.])[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[0-9]e[+-]?[0-9]+|(?i:nan|inf))(?!\w|\.[0-9])"
)


def same(old: Any, new: Any, tolerance: float = 0.0) -> bool:
    """Numbers within an absolute tolerance of one another, NaN and NaN, and all else where it is equal."""
    if not _numbers(old, new):
        return bool(old == new)
    return old == new or abs(new - old) <= tolerance or (math.isnan(old) and math.isnan(new))


def leaves(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, old, new) for each leaf of two nested values; where they differ in shape, the whole differing parts
    are one leaf. An item of a list is named by its "id" where it has one, else by its number."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from leaves(old[key], new[key], f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            name = a["id"] if isinstance(a, dict) and "id" in a else i
            yield from leaves(a, b, f"{where}[{name}]")
    else:
        yield where, old, new


def difference(old: Any, new: Any, where: str = "", tolerance: float = EXACT) -> str | None:
    """The first place where two nested values aren't the same, in words, or None: numbers agree within the tolerance
    (relative, or absolute below 1), all else exactly."""
    for place, a, b in leaves(old, new, where):
        if not same(a, b, tolerance * _scale(a)):
            return f"{place} is {a!r} there and {b!r} here"
    return None


def text_difference(recorded: str, computed: str) -> str | None:
    """What keeps two printed texts from agreeing, or None: numbers agree within PRINTED, all other text exactly."""
    for was, now in itertools.zip_longest(recorded.split("\n"), computed.split("\n")):
        if was is None or now is None or _NUMBER.split(was) != _NUMBER.split(now):
            old, new = ("no such line" if line is None else repr(line) for line in (was, now))
            return f"recorded {old}, running it again gives {new}"
        for old, new in zip(_NUMBER.findall(was), _NUMBER.findall(now), strict=True):
            if not _printed_alike(old, new):
                return f"recorded {old}, running it again gives {new}, in the line {was.strip()!r}"
    return None


def _printed_alike(old: str, new: str) -> bool:
    x, y = float(old), float(new)
    if not (math.isfinite(x) and math.isfinite(y)) or (old.endswith(".") and new.endswith(".")):
        return old == new  # nan, inf, and integers before a full stop are text
    return math.isclose(x, y, **PRINTED)


@dataclass
class Comparison:
    """What came out, a line for each value that is not the same."""

    identical: int = 0
    within: list[tuple[float, str]] = field(default_factory=list)  # share of its tolerance
    different: list[str] = field(default_factory=list)
    derived: int = 0  # follow from runs that differ here: not compared on their own
    new: list[str] = field(default_factory=list)  # files that are not committed yet
    same_bits: bool = False  # metrics, curve and evidence of all runs that are committed, one at least

    def add(self, where: str, old: Any, new: Any, tolerance: float) -> None:
        """Count one value; `tolerance` is absolute, and for numbers alone."""
        if same(old, new):
            self.identical += 1
        elif _numbers(old, new):
            text = f"{where}: {old:.6g} committed, {new:.6g} here, "
            if same(old, new, tolerance):
                self.within.append((abs(new - old) / tolerance, f"{text}tolerance {tolerance:.2g}"))
            else:
                self.different.append(f"{text}by {new - old:+.3g} with a tolerance of {tolerance:.2g}")
        elif found := _words_differ(old, new):
            self.different.append(f"{where}: {found}")
        else:
            self.identical += 1

    def summary(self) -> str:
        text = f"{self.identical} identical, {len(self.within)} within tolerance, {len(self.different)} different"
        if self.derived:
            text += f", {self.derived} that follow from runs that differ here not compared on their own"
        if self.new:
            text += f", {len(self.new)} files that are not committed yet"
        return f"compared with the committed values: {text}"


def compare(files: Sequence[Path], tolerances: Mapping[str, Mapping[str, float]]) -> Comparison:
    """Compare files of results/ with the last commit. tolerances: profile -> metric -> how far it may move."""
    result, runs_differ = Comparison(), False
    status = git("status", "--porcelain", "-z", "--no-renames", "-uall", "--", "results")  # -z: names as they are
    changed = {line.split(maxsplit=1)[1] for line in (status or "").split("\0") if line}
    for path in sorted(files, key=lambda p: "runs" not in p.parts):
        now = path.read_bytes()
        before = committed(path) if status is None or display(path) in changed else now
        if before is None:
            result.new.append(display(path))
        elif "runs" not in path.parts:
            _compare_report(result, path, before, now, runs_differ)
        else:
            same_bits = before == now
            if path.suffix == ".json":
                same_bits = _compare_run(result, path, before, now, tolerances.get(path.parent.name, {}))
            runs_differ |= not same_bits
            result.same_bits = not runs_differ
    return result


def _compare_run(result: Comparison, path: Path, before: bytes, now: bytes, tolerances: Mapping[str, float]) -> bool:
    """Count metrics and first loss; True where all that pages show of the run is the same bits."""
    old, new = json.loads(before), json.loads(now)
    for metric in sorted(old["metrics"].keys() | new["metrics"].keys()):
        values = old["metrics"].get(metric), new["metrics"].get(metric)
        result.add(f"{display(path)} {metric}", *values, tolerances.get(metric, 0.0))
    for a, b in zip(old["curve"]["loss"][:1], new["curve"]["loss"][:1], strict=False):
        result.add(f"{display(path)} loss of the first epoch", a, b, tolerances.get("first_loss", 0.0) * abs(a))
    # a newer version of the code may watch more than an older one did
    curve = all(new["curve"].get(name) == values for name, values in old["curve"].items())
    return curve and all(old.get(part) == new.get(part) for part in ("metrics", "evidence"))


def _compare_report(result: Comparison, path: Path, before: bytes, now: bytes, runs_differ: bool) -> None:
    if path.suffix not in (".json", ".ipynb"):
        return  # pixels depend on the fonts; the data behind them is compared
    old, new = (_shown(json.loads(data)) if path.suffix == ".ipynb" else json.loads(data) for data in (before, now))
    kind = old.get("kind") if isinstance(old, dict) else None
    for where, a, b in leaves(old, new):
        if before != now and (kind == "measured" or where.endswith("sha256")):
            continue  # nobody expects times and memory twice
        if before == now or not runs_differ or kind == "exact" or where.endswith(".verdict"):
            result.add(f"{display(path)}{where}", a, b, EXACT * _scale(a))
        else:
            result.derived += 1


def _shown(notebook: Any) -> dict[str, str]:
    """The text that each code cell of an executed notebook shows."""
    cells = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = [[(o.get("text", ""), o.get("data", {}).get("text/markdown", "")) for o in outputs] for outputs in cells]
    return {f"code cell {n}": "".join(itertools.chain(*itertools.chain(*t))) for n, t in enumerate(texts, 1)}


def _words_differ(old: Any, new: Any) -> str | None:
    if isinstance(old, str) and isinstance(new, str):
        return text_difference(old, new)
    short = (repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}…" for value in (old, new))
    return "{} committed, {} here".format(*short)


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _scale(value: Any) -> float:
    return max(1.0, abs(value)) if _numbers(value) else 1.0
