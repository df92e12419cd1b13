"""mvrepro.pages.comparison: what pages say of pairs of losses, from made-up runs to the words."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mvrepro.evidence import claims, runs
from mvrepro.evidence.stats import Estimate, mean_interval
from mvrepro.losses import LOSSES
from mvrepro.pages import comparison, plots
from mvrepro.pages.comparison import AFTER, Pair

SEEDS = range(4)
NOISE = {"AM-Softmax": [0.2, -0.1, 0.1, -0.2], "MV-AM-Softmax-f": [-0.1, 0.2, -0.2, 0.1]}
AM, F, A = ("AM-Softmax", ""), ("MV-AM-Softmax-f", ""), ("MV-AM-Softmax-a", "")
FIXED, ADAPTIVE = Pair(F, AM), Pair(A, AM)


def rows(loss, score, variant="", seeds=SEEDS, **learned):
    """Runs whose scores, per cent, are a loss's, a seed's and a little noise."""
    noise = NOISE.get(loss, [0.1, 0.1, -0.1, -0.1])
    known = {"top1": 0.9, "marked_share": 0.01, "gradient_distance": 0.2} | learned
    about = {"variant": variant, "loss": loss, "t": 0.2 if LOSSES[loss].h else 0.0, "default": True}
    return [about | known | {"seed": s, "rank1": (score + s + noise[s]) / 100} for s in seeds]


def table(*parts):
    return pd.DataFrame([row for part in parts for row in part])


@pytest.fixture
def frame():
    return table(rows("AM-Softmax", 50), rows("MV-AM-Softmax-f", 50.1), rows("MV-AM-Softmax-a", 45))


def test_names_are_short_and_say_the_variant():
    assert plots.short("MV-AM-Softmax-f") == "MV-AM-f"
    assert plots.short("AM-Softmax", AFTER) == "AM (after AM)"
    assert [plots.short(loss) for loss in ("Softmax", "F-Softmax", "HM-Softmax")] == ["Softmax", "F-Softmax", "HM"]
    assert Pair(("MV-AM-Softmax-f", AFTER), AM).name == "MV-AM-f (after AM) − AM"
    assert comparison.MV_AFTER[0] == Pair(("MV-AM-Softmax-f", AFTER), ("AM-Softmax", AFTER))
    assert comparison.sides(["Softmax"], AFTER) == [("Softmax", AFTER)]


def test_a_difference_is_that_of_the_verdicts_and_counts_runs_of_variants_as_noise(frame):
    more = pd.concat([frame, table(rows("AM-Softmax", 60, "on"), rows(A[0], 61, "on"))], ignore_index=True)
    on = Pair((A[0], "on"), ("AM-Softmax", "on"))
    found = comparison.differences(more, "rank1", [ADAPTIVE, on])
    expected = claims.difference(more, "rank1", A[0], AM[0])
    assert list(found.loc[0, ["mean", "low", "high"]]) == pytest.approx(
        [100 * expected.mean, 100 * expected.low, 100 * expected.high]
    )
    assert found.loc[0, "visible"] == pytest.approx(100 * claims.pooled(more, "rank1").detectable(4))
    assert list(found["name"]) == ["MV-AM-a − AM", "MV-AM-a (on) − AM (on)"]
    assert list(found["mean"].round(6)) == [-5, 1]
    assert found.loc[0, "seeds"] == pytest.approx([-5.1, -4.8, -5.2, -4.9])


def test_a_dagger_marks_a_single_seed_and_networks_that_have_not_learned(frame):
    more = table(rows("Arc-Softmax", 50, marked_share=0.4), rows("AM-Softmax", 50, "on", seeds=[0]))
    frame = pd.concat([frame, more], ignore_index=True)
    found = comparison.doubts(frame, [AM, F, ("Arc-Softmax", ""), ("AM-Softmax", "on")])
    assert found == {
        "Arc": "the networks have not learned (Arc-Softmax ends with 40 % of the classes marked, top-1 90 %)",
        "AM (on)": "one seed",
    }
    assert comparison.marked(["AM", "Arc"], found) == ["AM", "Arc †"]
    assert comparison.footnotes(found).splitlines()[1] == "† AM (on): one seed."
    assert comparison.footnotes({}) == "No loss has a †."
    both = table(rows("AM-Softmax", 50, seeds=[0], top1=0.5))
    assert claims.doubt(both, "AM-Softmax").startswith("one seed; the networks have not learned")


def test_between_any_two_t_the_noise_of_every_t_is_pooled(frame):
    weak = table(rows(A[0], 51, seeds=[0, 1])).assign(t=0.1, default=False)
    lost = table(rows(A[0], 20, top1=0.3)).assign(t=0.5, default=False)
    more = pd.concat([frame, weak, lost, table(rows(AM[0], 90, "on"))], ignore_index=True)
    at = {t: (A[0], t) for t in (0.1, 0.2, 0.5)}
    margin = (AM[0], 0.0)
    usual = comparison.difference_at(more, "rank1", at[0.2], margin)
    (row,) = comparison.differences(more, "rank1", [ADAPTIVE]).itertuples()
    assert (usual.mean, usual.low, usual.high) == (row.mean, row.low, row.high), "at the default as verdicts have it"
    pool = comparison.over_t(more, "rank1")
    assert set(pool.place) == {"AM-Softmax|0", "MV-AM-Softmax-f|0.2", "MV-AM-Softmax-a|0.2", "MV-AM-Softmax-a|0.1"}
    assert comparison.difference_at(more, "rank1", at[0.1], margin) == pool.difference(
        "MV-AM-Softmax-a|0.1", "AM-Softmax|0"
    )
    apart = comparison.own_pairs(more, "rank1", at[0.1], margin)
    assert list(apart) == pytest.approx([0.9, 1.2]) and list(apart.index) == [0, 1]
    alone = comparison.difference_at(more, "rank1", at[0.5], margin)  # it has not learned, so its noise is not theirs
    assert alone == mean_interval(comparison.own_pairs(more, "rank1", at[0.5], margin))
    assert comparison.difference_at(more, "rank1", (A[0], 0.7), margin) is None


def test_runs_after_another_have_a_noise_of_their_own(frame):
    more = pd.concat([frame, table(rows("AM-Softmax", 60, AFTER), rows(A[0], 61, AFTER))], ignore_index=True)
    on, mixed = Pair((A[0], AFTER), ("AM-Softmax", AFTER)), Pair((A[0], AFTER), A)
    found = comparison.differences(more, "rank1", [on, mixed])
    assert found.loc[0, "visible"] == pytest.approx(100 * claims.pooled(more, "rank1", after=True).detectable(4))
    alone = mean_interval(
        runs.by_seed(more[more["variant"] == AFTER], "rank1", A[0]) - runs.by_seed(frame, "rank1", A[0])
    )
    assert found.loc[1, "low"] == pytest.approx(100 * alone.low)
    assert found.loc[1, "visible"] > 0


def test_seeds_that_both_have_are_compared_in_points(frame):
    values = {"AM-Softmax": [0.60, 0.72, 0.77, 0.9], "Softmax": [0.5, 0.6, 0.7]}
    few = table(*(rows(loss, 0, seeds=range(len(scores))) for loss, scores in values.items()))
    few["rank1"] = [score for scores in values.values() for score in scores]
    found = comparison.differences(few, "rank1", comparison.MARGIN)
    expected = mean_interval([10, 12, 7])
    assert found.loc[0, "seeds"] == pytest.approx([10, 12, 7])
    assert list(found.loc[0, ["mean", "low", "high"]]) == pytest.approx([expected.mean, expected.low, expected.high])


@pytest.mark.parametrize(
    ("gain", "learned", "reading"),
    [
        (5, {}, comparison.AHEAD),
        (-5, {}, comparison.BEHIND),
        (0, {}, comparison.NO_GAIN),
        (0.9, {"seeds": [0, 1]}, comparison.UNDECIDED),
        (5, {"gradient_distance": 0.001}, comparison.NOT_TESTABLE),
    ],
)
def test_readings(gain, learned, reading):
    wild = [0.01, 0, -0.01, 0] if reading == comparison.UNDECIDED else [0] * 4
    scatter = [row | {"rank1": row["rank1"] + more} for row, more in zip(rows("Arc-Softmax", 50), wild, strict=True)]
    frame = table(rows("AM-Softmax", 50), rows(F[0], 50 + gain, **learned), scatter)
    found = comparison.differences(frame, "rank1", [FIXED])
    assert found.loc[0, "reading"].partition(":")[0] == reading


def test_losses_without_runs_are_left_out_and_named(frame):
    chosen = [FIXED, Pair(F, ("HM-Softmax", "")), Pair(AM, ("Softmax", ""))]
    found = comparison.differences(frame, "rank1", chosen)
    assert list(found["name"]) == ["MV-AM-f − AM"] and comparison.known(frame, chosen) == chosen[:1]
    short = comparison.waiting(frame, chosen, listed=False)
    assert short == "2 of 3 comparisons wait for runs of HM, Softmax."
    assert comparison.waiting(frame, chosen) == f"{short[:-1]}: MV-AM-f − HM, AM − Softmax."
    assert comparison.waiting(frame, chosen[:1]) == ""
    assert comparison.here(frame, [("Softmax", ""), F, A]) == [F, A]
    assert comparison.here(frame) == [AM, F, A]
    assert len(comparison.within(found, chosen)) == 1 and len(comparison.within(found, chosen[1:])) == 0
    none = comparison.differences(frame, "rank1", chosen[1:])
    assert len(none) == len(comparison.within(none, chosen)) == 0
    assert comparison.in_words(none) == "" and len(comparison.differences(frame, "unknown", chosen)) == 0


def test_one_seed_is_no_comparison_yet(frame):
    one = frame[(frame["loss"] == "AM-Softmax") | (frame["seed"] == 0)]
    assert not len(comparison.differences(one, "rank1", [FIXED]))
    assert comparison.waiting(one, [FIXED]) == "1 of 1 comparisons waits for runs of MV-AM-f: MV-AM-f − AM."
    assert comparison.scores(one, [AM, F], {"rank1": "rank-1 (%)"})["rank-1 (%)"].tolist()[1] == "50.0"


def test_runs_that_lack_a_measure_wait_for_it(frame):
    more = frame.assign(lfw_accuracy=np.where(frame["loss"] == A[0], np.nan, 0.9 + frame["rank1"] / 100))
    cells = comparison.by_measure(more, [FIXED, ADAPTIVE], {"rank1": "rank-1 (%)", "lfw_accuracy": "LFW (%)"})
    assert cells["LFW"].tolist()[1] == "–" and cells["LFW"][0].startswith("+0.00 [")
    assert comparison.scores(more, [A], {"lfw_accuracy": "LFW (%)"}).iloc[0].tolist() == ["MV-AM-a", 4, "–"]


def test_the_words_follow_the_numbers(frame):
    found = comparison.differences(frame, "rank1", [FIXED, ADAPTIVE])
    fixed, adaptive = comparison.in_words(found).split("; ")
    assert fixed.startswith("MV-AM-f gains nothing that matters over AM: +0.10 [") and fixed.endswith("] points")
    assert adaptive.startswith("MV-AM-a is behind AM: -5.00 [")
    assert comparison.weight(found, "MV") == "Of 2 comparisons of MV: 0 ahead, 1 behind, 1 without a gain that matters."
    names = "ahead: none; behind: MV-AM-a − AM; without a gain that matters: MV-AM-f − AM"
    assert comparison.in_names(found) == names and comparison.in_names(found[:0]) == ""


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ([], "There are no runs yet that say anything about MV."),
        ([comparison.AHEAD], "Of 1 comparisons of MV: 1 ahead, 0 behind."),
        (
            [comparison.AHEAD, comparison.UNDECIDED],
            "Of 2 comparisons of MV: 1 ahead, 0 behind, 1 cannot be told apart.",
        ),
        (
            [comparison.BEHIND, comparison.NO_GAIN],
            "Of 2 comparisons of MV: 0 ahead, 1 behind, 1 without a gain that matters.",
        ),
        (["not testable here: why"] * 2, "No comparison counts here, so this is no evidence for or against MV."),
    ],
)
def test_what_the_comparisons_speak_for(kinds, says):
    assert comparison.weight(pd.DataFrame({"reading": kinds}), "MV") == says


@pytest.mark.parametrize("metric", ["rank1", "rank1_by_person"])
def test_people_drawn_anew_widen_the_interval(frame, monkeypatch, metric):
    generator, pairs = np.random.default_rng(0), np.arange(400) % 3 + 1
    one, every = {}, {}
    for loss, t, p in ((A[0], 0.2, 0.4), ("AM-Softmax", 0.0, 0.5)):
        for s in SEEDS:
            one[loss, t, s] = generator.random(400) < p
            every[loss, t, s] = generator.binomial(pairs, p)
    kept = {
        key: {"correct": np.append(bits, [False] * 8), "probes": 400, "pairs": pairs, "found": every[key]}
        for key, bits in one.items()
    }
    kept[A[0], 0.5, 0] = kept[A[0], 0.2, 0]  # a run at another t
    monkeypatch.setattr(runs, "evidence", lambda profile, part, kind: kept)
    monkeypatch.setattr(runs, "default_t", lambda profile: 0.2)
    monkeypatch.setattr(runs, "table", lambda profile, kind: frame)
    found = comparison.differences(frame, "rank1", [FIXED, ADAPTIVE])
    anew = comparison.people("faces", found, metric)
    assert list(anew["over"]) == ["people and seeds"] * 2 and comparison.measured(next(anew.itertuples())) == "–"
    row = anew.iloc[1]
    whole = one if metric == "rank1" else {key: found / pairs for key, found in every.items()}
    apart = [whole[A[0], 0.2, s].mean() - whole["AM-Softmax", 0.0, s].mean() for s in SEEDS]
    assert row["mean"] == pytest.approx(100 * np.mean(apart))
    assert row["low"] < row["mean"] < row["high"] and 3 < row["high"] - row["low"] < 20
    assert row["reading"] == comparison.BEHIND
    of_each = comparison.gaps(comparison.kept("faces", "rank1"), ADAPTIVE, comparison.OF_PEOPLE[metric])
    assert of_each.shape == (4, 400)
    shown = comparison.as_table(found, "points", anew)
    assert list(shown["People and seeds drawn anew"]) == [comparison.measured(each) for each in anew.itertuples()]


def test_the_tables(frame):
    found = comparison.differences(frame, "rank1", [FIXED, ADAPTIVE])
    shown = comparison.as_table(found, "points")
    assert shown["Seeds"][1] == "4 (-5.10, -4.80, -5.20, -4.90)"
    assert shown["points [95 %]"][1].startswith("-5.00 [") and shown["Reading"][1] == comparison.BEHIND
    own = mean_interval([-5.10, -4.80, -5.20, -4.90])
    assert shown["Own pairs alone [95 %]"][1] == f"[{own.low:+.2f}, {own.high:+.2f}]"
    columns = comparison.measures(frame.assign(lfw_accuracy=0.9), "rank1", "rank-1 (%)")
    assert list(columns) == ["rank1", "lfw_accuracy"]
    scores = comparison.scores(frame, [("Softmax", ""), AM], {"rank1": "rank-1 (%)"})
    assert scores.iloc[0].tolist()[:2] == ["AM", 4] and scores.loc[0, "rank-1 (%)"].startswith("51.5 [")
    both = comparison.by_measure(frame, [*comparison.MARGIN, ADAPTIVE], {"rank1": "rank-1 (%)"})
    assert both["rank-1"].iloc[0].startswith("-5.00 [") and len(both) == 1


def test_one_value_has_no_interval_and_none_is_a_dash():
    assert comparison.interval([24.31]) == "24.3" and comparison.interval([24, 25], 2).startswith("24.50 [")
    assert comparison.interval([np.nan]) == comparison.interval([]) == "–"
    assert comparison.measured(Estimate(-0.001, np.nan, np.nan, 1)) == "+0.00"


def test_a_forest_has_a_line_a_pair_and_a_mark_for_each_way_of_drawing_anew(frame):
    after = pd.concat([frame, table(rows("AM-Softmax", 60, AFTER))], ignore_index=True)
    found = comparison.differences(after, "rank1", [ADAPTIVE, Pair(("AM-Softmax", AFTER), AM)])
    ax = Figure().subplots()
    comparison.forest(ax, found, "points")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["MV-AM-a − AM", "AM (after AM) − AM"]
    above = Figure().subplots()
    comparison.forest(above, found, "points of a score with a name that is too long for one line", above=True)
    assert [text.get_text() for text in above.texts] == ["MV-AM-a − AM", "AM (after AM) − AM"]
    assert not above.get_yticklabels() and "\n" in above.get_xlabel()
    assert all(text.xy[1] < place for place, text in enumerate(above.texts))  # above its line, as y goes down
    assert ax.containers[0].lines[0].get_color() == plots.look(A[0])["color"]
    assert list(ax.lines[0].get_xdata()) == pytest.approx(found.loc[0, "seeds"])  # the dots
    folds = comparison.redrawn(found, "folds", [Estimate(-4, -6, -2, 10, 0.9), Estimate(1, -1, 0.9, 10, 0.2)])
    ax = Figure().subplots()
    comparison.forest(ax, pd.concat([found, folds], ignore_index=True), "points")
    assert len(ax.get_yticklabels()) == 2 and len(ax.containers) == 4
    assert ax.get_legend_handles_labels()[1] == ["over seeds", "over folds"]
    places = [bar.lines[0].get_ydata()[0] for bar in ax.containers]
    assert places == pytest.approx([-0.11, 0.89, 0.11, 1.11])
    comparison.forest(Figure().subplots(), found[:0], "points")
