"""What several pages say of pairs of losses: which have runs, how far they lie apart, what that says, in words and as
tables. A side of a pair is a loss, or (loss, variant) where its runs are not the plain ones; each at its default t.

frame is runs.table(profile, kind=None) throughout: the noise of a difference is pooled over all runs, as in verdicts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mvrepro.evidence import claims, runs
from mvrepro.evidence.stats import bootstrap_people, detectable_difference, mean_interval
from mvrepro.losses import LOSSES
from mvrepro.pages import plots
from mvrepro.pages.report import Report

Side = str | Sequence[str]
AHEAD, BEHIND, NO_GAIN = "ahead", "behind", "no gain that matters"
UNDECIDED, NOT_TESTABLE = "undecided", "not testable here"
MINED = {  # plots.look tells margins and emphases apart; what is mined looks otherwise
    "HM": {"color": "#D55E00", "linestyle": "--", "marker": "^"},
    "F": {"color": "#56B4E9", "linestyle": "-.", "marker": "v"},
}
MEASURES = {
    "lfw_accuracy": "View 2 of LFW, accuracy (%)",
    "hard_accuracy": "hard pairs (home-made), accuracy (%)",
    "tpr@fpr=0.001": "TPR at FPR 0.1 %, all pairs (%)",
}


def side(given: Side) -> tuple[str, str]:
    """(loss, variant) of a side."""
    return (given, "") if isinstance(given, str) else (given[0], given[1])


def short(given: Side) -> str:
    """A side in few letters, for axes: "MV-AM-Softmax-f" -> "MV-AM-f"."""
    loss, variant = side(given)
    brief = loss.replace("-Softmax", "")
    return f"{brief if len(brief) > 1 else loss}{', ' if variant else ''}{variant}"


def look(given: Side) -> dict[str, object]:
    """Colour, marker and line style of a side's loss."""
    loss = side(given)[0]
    return plots.look(loss) | MINED.get(LOSSES[loss].g or "", {})


def here(frame: pd.DataFrame, losses: Sequence[str]) -> list[str]:
    """Those of the losses that have plain runs at their default t, in the same order."""
    plain = frame[(frame["variant"] == "") & frame["default"].astype(bool)]
    return [loss for loss in losses if loss in set(plain["loss"])]


def measures(frame: pd.DataFrame, metric: str, label: str) -> dict[str, str]:
    """Columns of frame and their names for readers: what verdicts rest on, then what is shown beside it."""
    return {metric: label} | {column: name for column, name in MEASURES.items() if column in frame and column != metric}


def differences(frame: pd.DataFrame, metric: str, pairs: Sequence[tuple[Side, Side]]) -> pd.DataFrame:
    """A row a pair (better, worse) that has two seeds: better − worse as verdicts have it (claims.difference).

    name: short; mean, low, high: points, with the 95 % interval; p: one-sided, without correction; n; seeds: the single
    differences; visible: the true difference that a one-sided test at the 5 % level sees four times out of five;
    reading: AHEAD (p < 0.05), BEHIND or NO_GAIN (the interval lies below 0, or below what would matter), UNDECIDED,
    or NOT_TESTABLE with the reason, by the gate of claims.toml.
    """
    rows, pool = [], claims.pooled(frame, metric) if metric in frame else None
    known = {each["column"]: each.get("matters", 0.01) for each in claims.metrics().values()}
    matters = known.get(metric, 0.01)
    for better, worse in pairs:
        (a, x), (b, y) = side(better), side(worse)
        pair = {"better": a, "worse": b, "better_variant": x, "worse_variant": y}
        e = claims.difference(frame, metric, **pair, min_seeds=2)
        if e is None:
            continue
        one, other = (runs.by_seed(frame[frame["variant"] == v], metric, loss) for loss, v in ((a, x), (b, y)))
        seeds = (100 * (one - other)).dropna()
        visible = 100 * detectable_difference(seeds / 100)
        if pool and pool.freedom and pool.place.keys() >= {f"{a}|{x}", f"{b}|{y}"}:
            visible = 100 * pool.detectable(e.n)
        reading = AHEAD if e.p < 0.05 else BEHIND if e.high < 0 else NO_GAIN if e.high < matters else UNDECIDED
        if reason := claims._unlearned(pair, frame):
            reading = f"{NOT_TESTABLE}: {reason}"
        found = {"mean": 100 * e.mean, "low": 100 * e.low, "high": 100 * e.high, "p": e.p, "n": e.n}
        about = {"name": f"{short(better)} − {short(worse)}", **pair, **found}
        rows.append(about | {"seeds": list(seeds), "visible": visible, "reading": reading})
    names = ["name", "better", "worse", "better_variant", "worse_variant", "mean", "low", "high", "p", "n", "seeds"]
    return pd.DataFrame(rows, columns=[*names, "visible", "reading"])


def within(found: pd.DataFrame, pairs: Sequence[tuple[Side, Side]]) -> pd.DataFrame:
    """The rows of `differences` that are about these pairs."""
    names = [f"{short(better)} − {short(worse)}" for better, worse in pairs]
    return found[found["name"].isin(names)]


def waiting(
    frame: pd.DataFrame, profile: str, pairs: Sequence[tuple[Side, Side]], found: pd.DataFrame, *, listed: bool = True
) -> str:
    """How many of the pairs have no row in found, for runs of which losses they wait and, listed, which they are, as
    a line; "" where none waits."""
    known = set(found["name"])
    missing = [pair for pair in pairs if f"{short(pair[0])} − {short(pair[1])}" not in known]
    seeds = frame[frame["default"].astype(bool)].groupby(["loss", "variant"])["seed"].nunique()
    few = dict.fromkeys(short(each) for pair in missing for each in pair if seeds.get(side(each), 0) < 2)
    names = ", ".join(f"{short(better)} − {short(worse)}" for better, worse in missing)
    line = f"{len(missing)} of {len(pairs)} comparisons wait for runs on `{profile}` of {', '.join(few)}"
    return (f"{line}: {names}" if listed else line) if missing else ""


def people(profile: str, found: pd.DataFrame) -> list[str]:
    """Of each row of `differences` of rank1 its 95 % interval where people and seeds are drawn anew, in points
    (stats.bootstrap_people); "–" where the runs don't keep which people were found."""
    kept: dict[str, dict[tuple[str, float, int], np.ndarray]] = {}
    for variant in {*found["better_variant"], *found["worse_variant"]}:
        records = runs.evidence(profile, "rank1", kind=variant)
        kept[variant] = {key: each["correct"][: each["probes"]] for key, each in records.items() if "correct" in each}
    usual, cells = runs.default_t(profile), []
    for row in found.itertuples():
        sides = []
        for loss, variant in ((row.better, row.better_variant), (row.worse, row.worse_variant)):
            own = {s: bits for (name, t, s), bits in kept[variant].items() if name == loss and t in (0.0, usual)}
            sides.append(own)
        seeds = sorted(sides[0].keys() & sides[1].keys())
        if not seeds:
            cells.append("–")
            continue
        apart = np.array([sides[0][seed].astype(float) - sides[1][seed] for seed in seeds])
        everyone = np.arange(apart.shape[1])
        e = bootstrap_people(apart, everyone, everyone)
        cells.append(f"[{100 * e.low:+.2f}, {100 * e.high:+.2f}]")
    return cells


def draw(ax: Axes, found: pd.DataFrame, label: str) -> None:
    """Rows of `differences`: the mean with its interval as a large mark, single seeds as small dots below it."""
    for place, row in enumerate(found.itertuples()):
        style, ends = look(row.better), [[row.mean - row.low], [row.high - row.mean]]
        colour, mark = str(style["color"]), str(style["marker"])
        ax.plot(row.seeds, [place + 0.25] * len(row.seeds), ".", color=colour, alpha=0.6, markersize=4)
        ax.errorbar(row.mean, place, xerr=ends, fmt=mark, color=colour, capsize=2, markersize=5)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(found)), found["name"])
    ax.set_ylim(max(len(found), 1) - 0.4, -0.5)
    ax.set_xlabel(label)


def figure(report: Report, found: pd.DataFrame, name: str, label: str, groups: Sequence[int] = ()) -> None:
    """Rows of `differences` as a figure of a page, with lines between groups of so many rows; a line of text where
    there are no rows."""
    if not len(found):
        print(f"no comparison has two seeds on {report.profile} yet")
        return
    drawn, axes = plots.new_figure(width=4.8, height=1.1 + 0.28 * len(found))
    draw(axes[0, 0], found, label)
    for place in dict.fromkeys(np.cumsum(np.array(groups, dtype=int)).tolist()):
        if 0 < place < len(found):
            axes[0, 0].axhline(place - 0.4, color="0.8", linewidth=0.8)
    alt = f"Differences in the score with 95 % intervals: {in_words(found)}"
    report.figure(drawn, name, found, alt=alt, kind="training")


def course(
    report: Report, sides: Sequence[Side], name: str, looks: Sequence[Mapping[str, object]] | None = None
) -> None:
    """report.course for sides of pairs, mined ones told apart; a line where none has runs. looks: one a side."""
    curves, kinds = runs.curves(report.profile, kind=None), {}
    for given, style in zip(sides, looks or [look(each) for each in sides], strict=True):
        loss, variant = side(given)
        rows = curves[(curves["loss"] == loss) & (curves["variant"] == variant) & curves["default"]]
        if len(rows):
            kinds[short(given)] = rows, style
    if not kinds:
        print(f"no runs on {report.profile} yet of {', '.join(map(short, sides))}")
        return
    figure, data = plots.course(kinds)
    alt = f"Training loss, training top-1, share of marked classes and median p_y by epoch, of {', '.join(kinds)}"
    report.figure(figure, name, data, alt=alt, kind="training")


def as_table(found: pd.DataFrame, points: str, over_people: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows of `differences` for readers. over_people: what `people` gave."""
    cells = {
        "Difference": list(found["name"]),
        "Seeds": list(found["n"]),
        points: [measured(row) for row in found.itertuples()],
        "p (one-sided)": [f"{p:.2g}" for p in found["p"]],
        "Would have been seen": [f"{x:.2f}" for x in found["visible"]],
    }
    if over_people is not None and set(over_people) - {"–"}:
        cells["Interval, people and seeds drawn anew"] = list(over_people)
    return pd.DataFrame(cells | {"Reading": list(found["reading"])})


def scores(frame: pd.DataFrame, losses: Sequence[Side], columns: Mapping[str, str]) -> pd.DataFrame:
    """Means over seeds with their 95 % intervals, per cent, a row a loss: columns as in `measures`."""
    rows = []
    for given in losses:
        loss, variant = side(given)
        chosen, cells = frame[frame["variant"] == variant], []
        for column in columns:
            e = mean_interval(100 * runs.by_seed(chosen, column, loss))
            cells.append(f"{e.mean:.1f}" if e.n < 2 else f"{e.mean:.1f} [{e.low:.1f}, {e.high:.1f}]")
        rows.append([f"{loss}, {variant}" if variant else loss, e.n, *cells])
    return pd.DataFrame(rows, columns=["Loss", "Seeds", *columns.values()])


def by_measure(frame: pd.DataFrame, pairs: Sequence[tuple[Side, Side]], columns: Mapping[str, str]) -> pd.DataFrame:
    """The differences of the pairs in each of the measures, as a table; none of them is corrected for their number."""
    tables = {}
    for column, label in columns.items():
        found = differences(frame, column, pairs)
        tables[label.removesuffix(" (%)")] = pd.Series([measured(r) for r in found.itertuples()], index=found["name"])
    joined = pd.DataFrame(tables).fillna("–").rename_axis("Difference in points of").reset_index()
    order = {f"{short(better)} − {short(worse)}": place for place, (better, worse) in enumerate(pairs)}
    return joined.sort_values(joined.columns[0], key=lambda names: names.map(order), ignore_index=True)


def measured(row: object) -> str:
    """ "+0.37 [-0.41, +1.15]" of a row of `differences`."""
    mean, low, high = (getattr(row, name) for name in ("mean", "low", "high"))
    return f"{mean:+.2f}" if low != low else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def in_words(found: pd.DataFrame) -> str:
    """ "MV-AM-f − AM +0.37 [-0.41, +1.15] (undecided); …" """
    return "; ".join(f"{r.name} {measured(r)} ({r.reading.partition(':')[0]})" for r in found.itertuples(index=False))


def plainly(found: pd.DataFrame) -> str:
    """What the rows of `differences` say, as clauses without intervals."""
    clauses = []
    for r in found.itertuples(index=False):
        better, worse = r.name.split(" − ")
        says = {
            AHEAD: f"{better} is ahead of {worse} by {r.mean:.1f} points",
            BEHIND: f"{better} is behind {worse} by {-r.mean:.1f} points",
            NO_GAIN: f"{better} gains nothing that matters over {worse} ({r.mean:+.1f} points)",
            UNDECIDED: f"{better} and {worse} can't be told apart ({r.mean:+.1f} points)",
            NOT_TESTABLE: f"{better} against {worse} is not testable here",
        }
        clauses.append(says[r.reading.partition(":")[0]])
    return "; ".join(clauses)


def weight(found: pd.DataFrame, what: str) -> str:
    """Whether rows of `differences` speak for what (such as "MV-Softmax"), against it or for neither, as a sentence."""
    kinds = [reading.partition(":")[0] for reading in found["reading"]]
    for_, against = kinds.count(AHEAD), kinds.count(BEHIND) + kinds.count(NO_GAIN)
    rest = [f"{kinds.count(kind)} {kind}" for kind in (UNDECIDED, NOT_TESTABLE) if kind in kinds]
    more = f" ({', '.join(rest)})" if rest else ""
    if not kinds:
        return f"There are no runs yet that say anything about {what}."
    if set(kinds) == {NOT_TESTABLE}:
        return f"No comparison counts here, so this is no evidence for or against {what}."
    if for_ and against:
        return f"{for_} of {len(kinds)} comparisons speak for {what} and {against} against it{more}."
    if for_ or against:
        way, other = ("for", "against") if for_ else ("against", "for")
        verb = "speaks" if for_ + against == 1 else "speak"
        return f"{for_ + against} of {len(kinds)} comparisons {verb} {way} {what}, none {other} it{more}."
    return f"The comparisons speak neither for {what} nor against it{more}."
