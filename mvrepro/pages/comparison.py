"""Pairs of losses, for all pages that compare them: which have runs, how far they lie apart, and what that says, as
tables, sentences and figures.

A side of a pair is (loss, variant), "" where its runs are the plain ones; they are those at the default t. frame is
runs.table(profile, kind=None) throughout: the noise of a difference is pooled over all runs, as in verdicts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from mvrepro.evidence import claims, runs
from mvrepro.evidence.stats import Estimate, TwoWay, bootstrap_people, detectable_difference, mean_interval, written
from mvrepro.losses import LOSSES
from mvrepro.pages import plots
from mvrepro.pages.plots import Side, short
from mvrepro.pages.report import Report

AFTER = "after AM-Softmax"  # the variant that goes on from a trained AM network
AHEAD, BEHIND, NO_GAIN = "ahead", "behind", "no gain that matters"
UNDECIDED, NOT_TESTABLE = "cannot be told apart", "not testable here"
COLUMNS = ["name", "better", "worse", "over", "mean", "low", "high", "p", "n", "seeds"]
COLUMNS += ["own_low", "own_high", "visible", "matters", "reading"]
SAYS = {
    AHEAD: "{} is ahead of {}",
    BEHIND: "{} is behind {}",
    NO_GAIN: "{} gains nothing that matters over {}",
    UNDECIDED: "{} and {} cannot be told apart",
    NOT_TESTABLE: "{} against {} is not testable here",
}
COUNTED = {NO_GAIN: "without a gain that matters", UNDECIDED: "cannot be told apart", NOT_TESTABLE: "not testable here"}
OVER = {  # what is drawn anew, and how it is drawn beside the others
    "seeds": {"color": "#000000", "marker": "o"},
    "folds": {"color": "#0072B2", "marker": "s"},
    "people": {"color": "#D55E00", "marker": "D"},
    "people and seeds": {"color": "#D55E00", "marker": "D"},
}
# Metrics that are means over people: what `kept` has of each person
OF_PEOPLE = {"rank1": "correct", "rank1_by_person": "share"}
MEASURES = {
    "rank1_by_person": "rank-1 by person (%)",
    "lfw_accuracy": "View 2 of LFW, accuracy (%)",
    "hard_accuracy": "hard pairs (home-made), accuracy (%)",
    "tpr@fpr=0.001": "TPR at FPR 0.1 %, all pairs (%)",
}


class Pair(NamedTuple):
    """Two sides that are compared, as better − worse."""

    better: Side
    worse: Side

    @property
    def name(self) -> str:
        return f"{short(*self.better)} − {short(*self.worse)}"


def sides(losses: Iterable[str], variant: str = "") -> list[Side]:
    """Losses in runs of one variant."""
    return [(loss, variant) for loss in losses]


def pairs(losses: Iterable[tuple[str, str]], variant: str = "") -> list[Pair]:
    """Pairs (better, worse) of losses in runs of one variant."""
    return [Pair((better, variant), (worse, variant)) for better, worse in losses]


AtT = tuple[str, float]  # a loss at a t; 0 where it has none
MARGIN = pairs((f"{f}-Softmax", "Softmax") for f in ("AM", "Arc"))
MV = pairs((f"MV-{f}-Softmax-{form}", f"{f}-Softmax") for f in ("AM", "Arc") for form in "fa")
# The adaptive form from scratch with one thing changed
CHANGED = [Pair(("MV-AM-Softmax-a", v), ("AM-Softmax", "")) for v in ("no easy margin", "stopped gradient")]
MV_AFTER = pairs([(f"MV-AM-Softmax-{form}", "AM-Softmax") for form in "fa"], AFTER)


def here(frame: pd.DataFrame, chosen: Sequence[Side] | None = None) -> list[Side]:
    """Those of the chosen sides that have runs, in the same order; None: all that have, plain ones first."""
    default = frame[frame["default"]]
    there = set(zip(default["loss"], default["variant"], strict=True))
    if chosen is None:
        chosen = [(loss, variant) for variant in sorted({variant for _, variant in there}) for loss in LOSSES]
    return [side for side in chosen if side in there]


def doubts(frame: pd.DataFrame, chosen: Sequence[Side]) -> dict[str, str]:
    """name -> why, of those of the sides whose scores say no order (claims.doubt)."""
    return {short(*side): why for side in chosen if (why := claims.doubt(frame, *side))}


def marked(names: Iterable[str], doubtful: Iterable[str]) -> list[str]:
    """The names, with a † behind the doubtful ones."""
    return [f"{name} †" if name in doubtful else name for name in names]


def footnotes(found: Mapping[str, str]) -> str:
    """What each † stands for, a line each; a sentence where there is none."""
    return "\n".join(f"† {name}: {why}." for name, why in found.items()) or "No loss has a †."


def known(frame: pd.DataFrame, chosen: Sequence[Pair]) -> list[Pair]:
    """Those of the pairs whose sides share two seeds at least."""
    seeds = {side: set(runs.of(frame, *side)["seed"]) for pair in chosen for side in pair}
    return [pair for pair in chosen if len(seeds[pair.better] & seeds[pair.worse]) >= 2]


def waiting(frame: pd.DataFrame, chosen: Sequence[Pair], *, listed: bool = True) -> str:
    """How many of the pairs are not `known`, which sides lack runs and, listed, which pairs they are, as a sentence;
    "" where all are known."""
    there = known(frame, chosen)
    missing = [pair for pair in chosen if pair not in there]
    few = dict.fromkeys(short(*side) for pair in missing for side in pair if len(runs.of(frame, *side)) < 2)
    names = f": {', '.join(pair.name for pair in missing)}" if listed else ""
    count = f"{len(missing)} of {len(chosen)} comparisons {'waits' if len(missing) == 1 else 'wait'}"
    return f"{count} for runs of {', '.join(few) or 'the same seeds'}{names}." if missing else ""


def differences(frame: pd.DataFrame, metric: str, chosen: Sequence[Pair]) -> pd.DataFrame:
    """A row for each of the `known` pairs: better − worse as verdicts have it (claims.difference).

    name; better, worse: the sides; over: what is drawn anew, "seeds"; mean, low, high: points, with the 95 % interval;
    p: one-sided, without correction; n; seeds: the single differences; own_low, own_high: their own interval, without
    the noise of other losses; visible: the true difference that a one-sided
    test at the 5 % level sees four times out of five; matters: the least that anybody would mind, NaN where no verdict
    rests on the metric;
    reading: AHEAD, BEHIND or NO_GAIN (the interval lies above 0, below 0, or below what matters), UNDECIDED, or
    NOT_TESTABLE with the reason, by the gate of claims.toml.
    """
    bounds = {each["column"]: each["matters"] for each in claims.metrics().values() if "matters" in each}
    tested = frame[frame[metric].notna()] if metric in frame else frame[:0]
    matters, rows = 100 * bounds.get(metric, np.nan), []
    for pair in known(tested, chosen):
        (a, x), (b, y) = pair
        claim = {"better": a, "worse": b, "better_variant": x, "worse_variant": y}
        if (e := claims.difference(tested, metric, **claim, min_seeds=2)) is None:
            continue
        one, other = (runs.by_seed(tested[tested["variant"] == variant], metric, loss) for loss, variant in pair)
        apart, pool = 100 * (one - other).dropna(), claims.common_pool(tested, metric, *pair)
        visible = 100 * pool.detectable(e.n) if pool else detectable_difference(apart)
        e, own = replace(e, mean=100 * e.mean, low=100 * e.low, high=100 * e.high), mean_interval(apart)
        reason = claims.unlearned(claim, frame)
        says = f"{NOT_TESTABLE}: {reason}" if reason else reading(e.low, e.high, matters)
        about: dict[str, Any] = {"name": pair.name, **pair._asdict(), "over": "seeds", "seeds": list(apart)}
        about |= {"own_low": own.low, "own_high": own.high, "visible": visible, "matters": matters, "reading": says}
        rows.append(about | asdict(e))
    return pd.DataFrame(rows, columns=COLUMNS)


def over_t(frame: pd.DataFrame, metric: str) -> TwoWay | None:
    """The plain runs at every t whose networks learned, several seeds each, in points, called "loss|t"; None where
    there are none. Verdicts pool those at the default t alone."""
    plain = frame[(frame["variant"] == "") & frame[metric].notna()]
    return claims.pool_of(plain, 100 * plain[metric], plain["loss"] + "|" + plain["t"].map("{:g}".format))


def difference_at(frame: pd.DataFrame, metric: str, better: AtT, worse: AtT) -> Estimate | None:
    """better − worse in points, each a loss at a t in its plain runs; None where no seed has both. At the default t as
    verdicts have it (`differences`), else with the noise of `over_t`, or of the single pairs where one isn't in it."""
    default = frame[(frame["variant"] == "") & frame["default"]]
    if all(((default["loss"] == loss) & (default["t"] == t)).any() for loss, t in (better, worse)):
        for row in differences(frame, metric, pairs([(better[0], worse[0])])).itertuples():
            return Estimate(row.mean, row.low, row.high, row.n, row.p)
    pool, names = over_t(frame, metric), [f"{loss}|{t:g}" for loss, t in (better, worse)]
    if pool and pool.freedom and set(names) <= pool.place.keys():
        return pool.difference(*names)
    apart = own_pairs(frame, metric, better, worse)
    return mean_interval(apart) if len(apart) else None


def own_pairs(frame: pd.DataFrame, metric: str, better: AtT, worse: AtT) -> pd.Series:
    """better − worse in points, seed by seed, each a loss at a t in its plain runs."""
    plain = frame[(frame["variant"] == "") & frame[metric].notna()]
    one, other = (runs.by_seed(plain, metric, loss, t) for loss, t in (better, worse))
    return 100 * (one - other).dropna()


def redrawn(found: pd.DataFrame, over: str, estimates: Sequence[Estimate]) -> pd.DataFrame:
    """The rows of `differences` with estimates, in points, where something else is drawn anew (OVER). visible: by the
    normal approximation to the interval."""
    z, rows = NormalDist().inv_cdf, []
    for row, e in zip(found.to_dict("records"), estimates, strict=True):
        visible = (z(0.95) + z(0.8)) / (2 * z(0.975)) * (e.high - e.low)
        testable = not row["reading"].startswith(NOT_TESTABLE)
        says = reading(e.low, e.high, row["matters"]) if testable else row["reading"]
        about = {"n": row["n"], "over": over, "seeds": [], "visible": visible, "reading": says}
        rows.append(row | asdict(e) | about)
    return pd.DataFrame(rows, columns=COLUMNS)


def within(found: pd.DataFrame, chosen: Sequence[Pair]) -> pd.DataFrame:
    """The rows of `differences` that are about these pairs."""
    return found[found["name"].isin([pair.name for pair in chosen])]


def kept(profile: str, part: str) -> dict[Side, dict[int, dict[str, Any]]]:
    """side -> seed -> what the default runs keep of one part of their test (runs.evidence); of rank1 also "share", of
    each person's pairs that were found."""
    usual, there = runs.default_t(profile), here(runs.table(profile, kind=None))
    found: dict[Side, dict[int, dict[str, Any]]] = {side: {} for side in there}
    for variant in dict.fromkeys(variant for _, variant in there):
        for (loss, t, seed), evidence in sorted(runs.evidence(profile, part, kind=variant).items()):
            if t in (0.0, usual):
                found[loss, variant][seed] = evidence
                if part == "rank1" and "found" in evidence:
                    evidence["share"] = evidence["found"] / evidence["pairs"]
    return {side: seeds for side, seeds in found.items() if seeds}


def gaps(evidence: Mapping[Side, Mapping[int, Mapping[str, Any]]], pair: Pair, key: str) -> NDArray[np.float64]:
    """better − worse of what `kept` has under a key, an array or bits: a row a seed of which both have it."""
    sides = (evidence.get(side, {}).items() for side in pair)
    a, b = ({seed: e[key][: e.get("probes")] for seed, e in kept if key in e} for kept in sides)  # bits fill bytes
    return np.array([np.subtract(a[seed], b[seed], dtype=float) for seed in sorted(a.keys() & b.keys())])


def people(profile: str, found: pd.DataFrame, metric: str, draws: int = 2000) -> pd.DataFrame:
    """The rows of `differences` of a metric OF_PEOPLE where people and seeds are drawn anew (stats.bootstrap_people);
    NaN where the runs don't keep what it is for each person."""
    evidence, estimates, unknown = kept(profile, "rank1"), [], Estimate(np.nan, np.nan, np.nan, 0)
    for row in found.itertuples():
        apart = 100 * gaps(evidence, Pair(row.better, row.worse), OF_PEOPLE[metric])
        everyone = np.arange(apart.shape[-1])
        estimates.append(bootstrap_people(apart, everyone, everyone, draws=draws) if len(apart) else unknown)
    return redrawn(found, "people and seeds", estimates)


def forest(ax: Axes, found: pd.DataFrame, label: str, *, above: bool = False) -> None:
    """Rows of `differences` as a figure, in the better loss's colour. Rows of one pair over several ways of drawing
    anew share a line, in the colours of OVER and without single seeds, with labels for a legend. above: as in
    plots.forest."""
    ways, names = [over for over in OVER if over in set(found["over"])], list(found["name"].unique())
    looks: list[Mapping[str, object]] = [plots.look(loss) for loss, _ in found["better"]]
    if len(ways) > 1:
        looks, found = [OVER[over] for over in found["over"]], found.assign(seeds=[[]] * len(found))
        for over in ways:
            ax.plot([], [], linestyle="", label=f"over {over}", **OVER[over])  # type: ignore[arg-type]
    middle = (len(ways) - 1) / 2
    places = [names.index(row.name) + 0.22 * (ways.index(row.over) - middle) for row in found.itertuples()]
    plots.forest(ax, found, looks, label, places, above=above)
    ax.axvline(0, color="0.5", linewidth=0.8)


def figure(report: Report, found: pd.DataFrame, name: str, label: str, groups: Sequence[int] = ()) -> None:
    """`forest` as a figure of a page, with lines between groups of so many pairs; a line of text where there are no
    rows."""
    if not len(found):
        print("All comparisons of this figure wait for runs.")
        return
    names, ways = found["name"].unique(), found["over"].nunique()
    drawn, axes = plots.new_figure(width=3.4, height=0.9 + (0.36 + 0.12 * (ways - 1)) * len(names))
    forest(axes[0, 0], found, label, above=True)
    for place in dict.fromkeys(np.cumsum(np.array(groups, dtype=int)).tolist()):
        if 0 < place < len(names):
            axes[0, 0].axhline(place - 0.62, color="0.8", linewidth=0.8)
    if ways > 1:
        drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    alt = f"Differences in the score with 95 % intervals: {in_words(found[found['over'] == found['over'].iloc[0]])}"
    report.figure(drawn, name, found, alt=alt, kind="training")


def measures(frame: pd.DataFrame, metric: str, label: str) -> dict[str, str]:
    """Columns of frame and their names for readers: what verdicts rest on, then what is shown beside it."""
    return {metric: label} | {column: name for column, name in MEASURES.items() if column in frame and column != metric}


def scores(frame: pd.DataFrame, chosen: Sequence[Side], columns: Mapping[str, str], digits: int = 1) -> pd.DataFrame:
    """A row for each of the sides that has runs: the `interval` over its seeds, in per cent, of each of columns (column
    -> heading), and how many seeds have it where these are fewer."""
    rows = []
    for side in here(frame, chosen):
        part = runs.of(frame, *side)
        counts = part[list(columns)].count()
        few = [f" ({count})" if 0 < count < len(part) else "" for count in counts]
        cells = [interval(100 * part[name], digits) + note for name, note in zip(columns, few, strict=True)]
        rows.append([short(*side), len(part), *cells])
    return pd.DataFrame(rows, columns=["Loss", "Seeds", *columns.values()])


def as_table(found: pd.DataFrame, points: str, anew: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of `differences` for readers. points: what of; anew: the same rows, `redrawn` over people and seeds."""
    single = [", ".join(map(_signed, row.seeds)) if 0 < len(row.seeds) <= 5 else "" for row in found.itertuples()]
    cells = {
        "Difference": list(found["name"]),
        "Seeds": [f"{n} ({each})" if each else f"{n}" for n, each in zip(found["n"], single, strict=True)],
        f"{points} [95 %]": [measured(row) for row in found.itertuples()],
        "Own pairs alone [95 %]": [_ends(row.own_low, row.own_high) for row in found.itertuples()],
        "p (one-sided)": [written(p) for p in found["p"]],
        "Would have been seen": [f"{x:.2f}" for x in found["visible"]],
    }
    if anew is not None and anew["mean"].notna().any():
        cells["People and seeds drawn anew"] = [measured(row) for row in anew.itertuples()]
    return pd.DataFrame(cells | {"Reading": list(found["reading"])})


def by_measure(frame: pd.DataFrame, chosen: Sequence[Pair], columns: Mapping[str, str]) -> pd.DataFrame:
    """The differences of the pairs in each of the measures, as a table; none of them is corrected for their number."""
    cells = {}
    for column, label in columns.items():
        found = differences(frame, column, chosen)
        cells[label.removesuffix(" (%)")] = {row.name: measured(row) for row in found.itertuples()}
    names = [pair.name for pair in chosen if any(pair.name in column for column in cells.values())]
    rows = [[name, *(column.get(name, "–") for column in cells.values())] for name in names]
    return pd.DataFrame(rows, columns=["Difference in points", *cells])


def interval(values: ArrayLike, digits: int = 1) -> str:
    """ "24.3 [23.1, 25.5]": the mean with its 95 % interval; of one value, no interval; "–" of none."""
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).any():
        return "–"
    e = mean_interval(x[np.isfinite(x)])
    return f"{e.mean:.{digits}f}" + (f" [{e.low:.{digits}f}, {e.high:.{digits}f}]" if e.n > 1 else "")


def measured(row: Any) -> str:
    """ "+0.37 [-0.41, +1.15]" of a row of `differences`, or of an Estimate in points; "–" of NaN."""
    if np.isnan(row.mean):
        return "–"
    return _signed(row.mean) + ("" if np.isnan(row.low) else f" {_ends(row.low, row.high)}")


def in_words(found: pd.DataFrame) -> str:
    """What the rows of `differences` say, as clauses: "MV-AM-f is ahead of AM: +0.37 [+0.11, +0.63] points; …" """
    clauses = []
    for row in found.itertuples():
        says = SAYS[row.reading.partition(":")[0]].format(short(*row.better), short(*row.worse))
        clauses.append(f"{says}: {measured(row)} points")
    return "; ".join(clauses)


def in_names(found: pd.DataFrame) -> str:
    """The rows of `differences` by their readings, without numbers: "ahead: none; behind: MV-AM-a − AM; …" """
    kinds = found["reading"].str.split(":").str[0]
    listed = [(each, ", ".join(found["name"][kinds == each])) for each in (AHEAD, BEHIND, *COUNTED)]
    words = [f"{COUNTED.get(each, each)}: {names or 'none'}" for each, names in listed if names or each == AHEAD]
    return "; ".join(words) if len(found) else ""


def weight(found: pd.DataFrame, what: str) -> str:
    """What rows of `differences` say of what (such as "MV-Softmax"), counted, as a sentence."""
    kinds = Counter(reading.partition(":")[0] for reading in found["reading"])
    if not kinds:
        return f"There are no runs yet that say anything about {what}."
    if set(kinds) == {NOT_TESTABLE}:
        return f"No comparison counts here, so this is no evidence for or against {what}."
    counts = [f"{kinds[AHEAD]} ahead", f"{kinds[BEHIND]} behind"]
    counts += [f"{kinds[each]} {words}" for each, words in COUNTED.items() if kinds[each]]
    return f"Of {kinds.total()} comparisons of {what}: {', '.join(counts)}."


def reading(low: float, high: float, matters: float) -> str:
    """What an interval says of a difference, in points: AHEAD, BEHIND, NO_GAIN or UNDECIDED."""
    return AHEAD if low > 0 else BEHIND if high < 0 else NO_GAIN if high < matters else UNDECIDED


def _ends(low: float, high: float) -> str:
    return f"[{_signed(low)}, {_signed(high)}]"


def _signed(x: float) -> str:
    return f"{round(x, 2) + 0.0:+.2f}"
