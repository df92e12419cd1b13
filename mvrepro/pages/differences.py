"""Losses and variants side by side, for the pages that compare more than the plain runs: tables of scores and of
differences, a figure, and sentences. All leave out what has no runs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mvrepro.evidence import claims, runs
from mvrepro.evidence.stats import Estimate, mean_interval
from mvrepro.pages import plots

Kind = tuple[str, str]  # a loss and a variant, "" for the plain runs
Pair = tuple[Kind, Kind]  # better − worse


def called(kind: Kind) -> str:
    """The name of a loss and variant in a table: "AM-Softmax, after AM-Softmax"."""
    return ", ".join(filter(None, kind))


def brief(loss: str) -> str:
    """A loss's name where there is little room: "MV-AM-f"."""
    return loss.replace("-Softmax", "")


def by_seed(frame: pd.DataFrame, kind: Kind, column: str) -> pd.Series:
    """The default runs of a loss and variant, by seed. frame: runs.table(…, kind=None)."""
    return runs.by_seed(frame[frame["variant"] == kind[1]], column, kind[0])


def there(frame: pd.DataFrame, kinds: Sequence[Kind]) -> list[Kind]:
    """Those of kinds that have default runs."""
    default = frame[frame["default"].astype(bool)]
    known = set(zip(default["loss"], default["variant"], strict=True))
    return [kind for kind in kinds if kind in known]


def estimate(frame: pd.DataFrame, pair: Pair, column: str) -> Estimate | None:
    """better − worse by claims.difference; of one seed the difference without an interval; None of none."""
    (better, one), (worse, other) = pair
    found = claims.difference(
        frame, column, better, worse, better_variant=one, worse_variant=other, min_seeds=2
    )  # fmt: skip
    if found is None and column in frame:
        single = (by_seed(frame, pair[0], column) - by_seed(frame, pair[1], column)).dropna()
        found = mean_interval(single) if len(single) else None
    return found


def cell(e: Estimate | None, sign: str = "", digits: int = 1) -> str:
    """Mean and 95 % interval of shares, in per cent or points: "78.2 [77.0, 79.4]"."""
    if e is None:
        return "–"
    ends = "" if math.isnan(e.low) else f" [{100 * e.low:{sign}.{digits}f}, {100 * e.high:{sign}.{digits}f}]"
    return f"{100 * e.mean:{sign}.{digits}f}{ends}"


def scores(frame: pd.DataFrame, kinds: Sequence[Kind], columns: Mapping[str, str]) -> pd.DataFrame:
    """A row each of kinds: its seeds, and of each of columns (column -> name) the mean [95 % interval] in per cent."""
    rows = []
    for kind in there(frame, kinds):
        values = [by_seed(frame, kind, column) for column in columns]
        rows.append([called(kind), len(values[0]), *(cell(mean_interval(x)) for x in values)])
    return pd.DataFrame(rows, columns=["Loss", "Seeds", *columns.values()])


def gains(frame: pd.DataFrame, pairs: Mapping[str, Pair], columns: Mapping[str, str]) -> pd.DataFrame:
    """A row each of pairs (name -> pair) that has runs: the difference [95 % interval] in points in each of columns."""
    known = {name: pair for name, pair in pairs.items() if len(there(frame, pair)) == 2}
    rows = [
        [name, *(cell(estimate(frame, pair, c), "+", 1 if c != "lfw_accuracy" else 2) for c in columns)]
        for name, pair in known.items()
    ]
    return pd.DataFrame(rows, columns=["Difference", *columns.values()])


def draw(ax: Axes, frame: pd.DataFrame, pairs: Mapping[str, Pair], column: str, label: str) -> pd.DataFrame:
    """The same of one column as a figure: a row a pair, seeds as small dots, the mean with its interval as a large
    mark. Returns what is drawn."""
    rows = []
    for place, (name, pair) in enumerate((n, p) for n, p in pairs.items() if len(there(frame, p)) == 2):
        seeds = 100 * (by_seed(frame, pair[0], column) - by_seed(frame, pair[1], column)).dropna()
        e, style = estimate(frame, pair, column), plots.look(pair[0][0])
        mean, low, high = (100 * x for x in ((e.mean, e.low, e.high) if e else (np.nan,) * 3))
        ax.plot(seeds, [place + 0.25] * len(seeds), ".", color=str(style["color"]), alpha=0.6, markersize=4)
        bars, colour = [[mean - low], [high - mean]], str(style["color"])
        ax.errorbar(mean, place, xerr=bars, fmt=str(style["marker"]), color=colour, capsize=2, markersize=5)
        rows.append({"what": name, "mean": mean, "low": low, "high": high, "seeds": list(seeds)})
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [str(row["what"]) for row in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label)
    return pd.DataFrame(rows)


def told(e: Estimate | None, than: str, matters: float = 0.0) -> str:
    """In words, to follow the name of what comes first: whether it lies above or below `than`, or neither. matters:
    the least difference that anybody would mind, as a share."""
    if e is None:
        return f"has no run yet to compare with {than}"
    points = f"{cell(e, '+')} points"
    if math.isnan(e.low):
        return f"is {points} from {than} in the only seed so far"
    if e.low > 0 or e.high < 0:
        return f"lies {'above' if e.low > 0 else 'below'} {than}: {points}"
    if e.p < 0.05:
        return f"lies above {than} by a one-sided test alone: {points}"
    small = e.high < matters
    return f"{'gains nothing that would matter over' if small else 'cannot be told apart from'} {than}: {points}"
