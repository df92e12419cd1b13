"""What was computed here against what is committed, value by value.

A run's metrics come out of training. On the same kind of processor they are the same bits; elsewhere they
may move, and what is tolerable is three times their standard deviation over seeds (pooled over the
committed runs of the profile). Exact mathematics gets 1e-6; measured times are not compared. Reports that
follow from runs are compared where all the runs behind them are the same; a verdict is compared always.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvrepro.evidence.values import leaves
from mvrepro.files import display, read_json
from mvrepro.pipeline import Stage, committed

EXACT = 1e-6
SPREADS = 3.0


@dataclass
class Comparison:
    """Counts, and a line for each value that is not the same."""

    identical: int = 0
    within: int = 0
    derived: int = 0  # follow from runs that differ here: not compared on their own
    different: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    same_bits: bool = True  # metrics, curve and evidence of all runs that are committed, one at least
    largest: str = ""  # the largest deviation within its tolerance
    _worst: float = 0.0

    def add(self, where: str, old: Any, new: Any, tolerance: float) -> None:
        """Count one value; `tolerance` is absolute."""
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new))
        if old == new or (numbers and math.isnan(old) and math.isnan(new)):
            self.identical += 1
        elif numbers and abs(new - old) <= tolerance:
            self.within += 1
            if tolerance and abs(new - old) / tolerance >= self._worst:
                self._worst = abs(new - old) / tolerance
                self.largest = f"{where}: {old:.6g} committed, {new:.6g} here, tolerance {tolerance:.2g}"
        else:
            by = f", by {new - old:+.3g} with a tolerance of {tolerance:.2g}" if numbers else ""
            self.different.append(f"{where}: {_short(old)} committed, {_short(new)} here{by}")

    def summary(self) -> str:
        parts = [
            f"{self.identical} identical",
            f"{self.within} within tolerance",
            f"{len(self.different)} different",
        ]
        if self.derived:
            parts.append(f"{self.derived} that follow from runs that differ here not compared on their own")
        if self.new:
            parts.append(f"{len(self.new)} files that are not committed yet")
        return "compared with the committed values: " + ", ".join(parts)


def compare(stages: Sequence[Stage]) -> Comparison:
    """Compare every output of these stages with the last commit."""
    result = Comparison()
    paths = [path for stage in stages for path in stage.writes]
    known = {path: committed(path) for path in paths}
    tolerances = _spreads(known)
    runs_differ, compared = False, 0
    for path in (p for p in paths if "runs" in p.parts):
        before = known[path]
        compared += before is not None
        if before is None:
            result.new.append(display(path))
        elif path.suffix == ".json":
            old, new = json.loads(before), read_json(path)
            profile = path.parent.name
            for metric in sorted(old["metrics"].keys() | new["metrics"].keys()):
                tolerance = tolerances.get((profile, metric), 0.0)
                where = f"{display(path)} {metric}"
                result.add(where, old["metrics"].get(metric), new["metrics"].get(metric), tolerance)
            runs_differ |= any(old.get(k) != new.get(k) for k in ("metrics", "curve", "evidence"))
        else:
            runs_differ |= before != path.read_bytes()
    result.same_bits = compared > 0 and not runs_differ
    for path in (p for p in paths if "runs" not in p.parts):
        _compare_report(result, path, known[path], runs_differ)
    return result


def _compare_report(result: Comparison, path: Path, before: bytes | None, runs_differ: bool) -> None:
    if before is None:
        result.new.append(display(path))
    elif before == path.read_bytes():
        values = _content(before, path)
        result.identical += sum(1 for _ in leaves(values, values, ""))
    elif path.suffix == ".ipynb":
        from mvrepro.pages import same

        for where, old, new in _outputs(json.loads(before), read_json(path)):
            if runs_differ:
                result.derived += 1
            elif difference := same.text_difference(old, new):
                result.different.append(f"{display(path)}, {where}: {difference}")
            else:
                result.identical += 1
    elif path.suffix == ".json":
        old, new = json.loads(before), read_json(path)
        kind = old.get("kind") if isinstance(old, dict) else None
        if kind == "measured":
            return  # times and memory, which nobody expects twice
        exact = kind == "exact"
        for where, a, b in leaves(old, new, ""):
            if where.endswith("sha256"):
                continue  # pixels depend on the fonts; the data behind them is compared
            if where.endswith(".verdict") or exact or not runs_differ:
                size = abs(a) if isinstance(a, int | float) else 1.0
                result.add(f"{display(path)}{where}", a, b, EXACT * max(1.0, size))
            else:
                result.derived += 1


def _spreads(known: Mapping[Path, bytes | None]) -> dict[tuple[str, str], float]:
    """(profile, metric) -> three pooled standard deviations over the seeds of the committed runs."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path, before in known.items():
        if before and "runs" in path.parts and path.suffix == ".json":
            record = json.loads(before)
            config = {k: v for k, v in record["config"].items() if k != "seed"}
            for metric, value in record["metrics"].items():
                groups[path.parent.name, metric][json.dumps(config, sort_keys=True)].append(value)
    spreads = {}
    for key, group in groups.items():
        variances = [float(np.var(v, ddof=1)) for v in group.values() if len(v) > 1]
        # One seed only (the toy): no spread is known, so a value must be close to the committed one.
        spreads[key] = SPREADS * math.sqrt(float(np.mean(variances))) if variances else 0.05
    return spreads


def _content(data: bytes, path: Path) -> Any:
    """What counts as the values of a report: the numbers of a JSON file, the cells of a notebook, a picture as one."""
    if path.suffix == ".ipynb":
        return [cell["id"] for cell in json.loads(data)["cells"] if cell["cell_type"] == "code"]
    return json.loads(data) if path.suffix == ".json" else 1


def _outputs(old: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    """The texts that two executed notebooks show, cell by cell."""
    before, after = (
        [
            "".join(
                "".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", ""))
                for o in cell.get("outputs", [])
            )
            for cell in notebook["cells"]
            if cell["cell_type"] == "code"
        ]
        for notebook in (old, new)
    )
    if len(before) != len(after):
        yield "cells", f"{len(before)} code cells", f"{len(after)} code cells"
    for i, (a, b) in enumerate(zip(before, after, strict=False)):
        yield f"code cell {i + 1}", a, b


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
