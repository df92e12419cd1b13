"""What the pages of the tests share: which losses are compared, and their differences as tables, sentences, pictures.

A page takes whatever runs there are: what has none is left out, and `waiting` names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mvrepro.evidence import claims, runs
from mvrepro.evidence.stats import Estimate, mean_interval
from mvrepro.losses import LOSSES

AFTER = "after AM-Softmax"  # the variant that goes on from a converged AM network
OVER = {"seeds": ("#000000", "o"), "folds": ("#0072B2", "s"), "people and seeds": ("#D55E00", "D")}


def short(loss: str, variant: str = "") -> str:
    """ "MV-AM-Softmax-f", "after AM-Softmax" -> "MV-AM-f (after AM)"."""
    return (f"{loss} ({variant})" if variant else loss).replace("-Softmax", "")


@dataclass(frozen=True)
class Pair:
    """Two losses that are compared, in runs of one variant."""

    better: str
    worse: str
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{short(self.better)} − {short(self.worse, self.variant)}"


MARGIN = (Pair("AM-Softmax", "Softmax"), Pair("Arc-Softmax", "Softmax"))
MV = tuple(Pair(f"MV-{f}-Softmax-{form}", f"{f}-Softmax") for f in ("AM", "Arc") for form in "fa")
MV_AFTER = tuple(Pair(f"MV-AM-Softmax-{form}", "AM-Softmax", AFTER) for form in "fa")


def known(frame: pd.DataFrame, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of the pairs whose two losses share two seeds at least. frame: runs.table() of all variants."""
    return [pair for pair in pairs if len(_seeds(frame, pair)) >= 2]


def waiting(frame: pd.DataFrame, pairs: Sequence[Pair]) -> str:
    """A sentence that names those of the pairs that can't be compared yet, "" where there is none."""
    missing = [pair.name for pair in pairs if pair not in known(frame, pairs)]
    return f"No runs yet, or too few seeds, for: {', '.join(missing)}." if missing else ""


def estimate(frame: pd.DataFrame, column: str, pair: Pair) -> Estimate:
    """The difference of one of the `known` pairs, as verdicts have it (claims.difference)."""
    kinds = {"better_variant": pair.variant, "worse_variant": pair.variant}
    found = claims.difference(frame, column, pair.better, pair.worse, min_seeds=2, **kinds)
    assert found is not None
    return found


def side(e: Estimate) -> str:
    """Where an interval lies."""
    return "above 0" if e.low > 0 else "below 0" if e.high < 0 else "holds 0"


def points(e: Estimate, digits: int = 2) -> str:
    """An estimate of shares, in points: "+0.31 [-0.12, +0.74]"."""
    mean, low, high = (f"{100 * x + 0.0:+.{digits}f}" for x in (e.mean, e.low, e.high))
    return f"{mean} [{low}, {high}]"


def kinds(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(loss, variant) of the default runs, plain ones first, then in the order of LOSSES."""
    chosen = frame[frame["default"].astype(bool)]
    there = set(zip(chosen["loss"], chosen["variant"], strict=True))
    variants = sorted({variant for _, variant in there})
    return [(loss, variant) for variant in variants for loss in LOSSES if (loss, variant) in there]


def scores(frame: pd.DataFrame, columns: Mapping[str, str], digits: int = 1) -> pd.DataFrame:
    """A row a loss and variant: the mean over its seeds with Student's 95 % interval, in per cent, of each of columns
    (column of runs.table() -> heading)."""
    rows = []
    for loss, variant in kinds(frame):
        part = frame[(frame["loss"] == loss) & (frame["variant"] == variant) & frame["default"].astype(bool)]
        rows.append([short(loss, variant), len(part), *(interval(100 * part[name], digits) for name in columns)])
    return pd.DataFrame(rows, columns=["Loss", "Seeds", *columns.values()])


def interval(values: Any, digits: int = 1) -> str:
    """ "24.3 [23.1, 25.5]": the mean with its 95 % interval; of one value, no interval."""
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return "–"
    e = mean_interval(x)
    ends = "" if np.isnan(e.low) else f" [{e.low:.{digits}f}, {e.high:.{digits}f}]"
    return f"{e.mean:.{digits}f}{ends}"


def differences(frame: pd.DataFrame, pairs: Sequence[Pair], columns: Mapping[str, str]) -> pd.DataFrame:
    """A row a pair and column: the difference in points with its 95 % interval, where that lies, each seed's own
    difference, and the true difference that so many seeds would find four times out of five."""
    rows = []
    for column, heading in columns.items():
        for pair in known(frame, pairs):
            pool = claims.pooled(frame, column, after=pair.variant.startswith(claims.AFTER))
            e, (a, b) = estimate(frame, column, pair), _sides(frame, column, pair)
            seen = 100 * pool.detectable(e.n) if pool and pool.freedom else np.nan
            single = ", ".join(f"{100 * x + 0.0:+.2f}" for x in (a - b).dropna())
            single = single if e.n <= 5 else f"{e.n} seeds"
            rows.append([heading, pair.name, points(e), side(e), single, "–" if np.isnan(seen) else f"{seen:.2f}"])
    names = ["Score", "Difference", "Points [95 %]", "Interval", "Single seeds", "Would be seen from (points)"]
    table = pd.DataFrame(rows, columns=names)
    return table if len(columns) > 1 else table.drop(columns="Score")


def in_words(frame: pd.DataFrame, pairs: Sequence[Pair], column: str) -> str:
    """Which of the pairs speak for MV-Softmax (interval above 0), against it (below 0), or for neither."""
    found: dict[str, list[str]] = {"above 0": [], "below 0": [], "holds 0": []}
    for pair in known(frame, pairs):
        e = estimate(frame, column, pair)
        found[side(e)].append(f"{pair.name} {points(e)}")
    if not any(found.values()):
        return "no MV loss shares two seeds with its margin loss yet"
    texts = zip(("for MV-Softmax", "against it", "neither (the interval holds 0)"), found.values(), strict=True)
    return "; ".join(f"**{what}**: {', '.join(listed) or 'none'}" for what, listed in texts)


def kept(profile: str, part: str) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """(loss, variant) -> seed -> what the default runs keep of one part of their test (runs.evidence)."""
    every, usual = runs.table(profile, kind=None), runs.default_t(profile)
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {key: {} for key in kinds(every)}
    for variant in dict.fromkeys(variant for _, variant in found):
        for (loss, t, seed), evidence in sorted(runs.evidence(profile, part, kind=variant).items()):
            if not LOSSES[loss].h or abs(t - usual) < 1e-9:
                found[loss, variant][seed] = evidence
    return {key: seeds for key, seeds in found.items() if seeds}


def gaps(
    evidence: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]], pair: Pair, key: str
) -> NDArray[np.float64]:
    """better − worse of what `kept` has under a key, an array or bits: a row a seed that both have."""
    a, b = (evidence.get((loss, pair.variant), {}) for loss in (pair.better, pair.worse))
    rows = [np.asarray(a[seed][key], np.float64) - np.asarray(b[seed][key], np.float64) for seed in a if seed in b]
    return np.array(rows)


def forest(ax: Axes, frame: pd.DataFrame, label: str) -> None:
    """Differences as rows, each with an interval for each way of drawing anew (OVER): frame with pair, over, mean,
    low, high."""
    names = list(dict.fromkeys(frame["pair"]))
    ways = [over for over in OVER if over in set(frame["over"])]
    for place, over in enumerate(ways):
        colour, marker = OVER[over]
        part = frame[frame["over"] == over].set_index("pair").reindex(names)
        ends = np.maximum([part["mean"] - part["low"], part["high"] - part["mean"]], 0)
        rows = np.arange(len(names)) + 0.22 * (place - (len(ways) - 1) / 2)
        ax.errorbar(
            part["mean"], rows, xerr=ends, fmt=marker, color=colour, capsize=2, markersize=4, label=f"over {over}"
        )
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(names)), [name.replace(" (", "\n(") for name in names])
    ax.set(xlabel=label, ylim=(max(len(names), 1) - 0.5, -0.5))


def _sides(frame: pd.DataFrame, column: str, pair: Pair) -> tuple[pd.Series, pd.Series]:
    chosen = frame[frame["variant"] == pair.variant]
    return runs.by_seed(chosen, column, pair.better), runs.by_seed(chosen, column, pair.worse)


def _seeds(frame: pd.DataFrame, pair: Pair) -> set[int]:
    chosen = frame[(frame["variant"] == pair.variant) & frame["default"].astype(bool)]
    seeds = [set(chosen["seed"][chosen["loss"] == loss]) for loss in (pair.better, pair.worse)]
    return seeds[0] & seeds[1]
