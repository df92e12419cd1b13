"""mvrepro.pages.comparison: what pages say of pairs of losses, from made-up runs to the words."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mvrepro.evidence import claims, runs
from mvrepro.losses import LOSSES
from mvrepro.pages import comparison

SEEDS = range(4)
NOISE = {"AM-Softmax": [0.2, -0.1, 0.1, -0.2], "MV-AM-Softmax-f": [-0.1, 0.2, -0.2, 0.1]}
MV = "MV-AM-Softmax-f", "MV-AM-Softmax-a"


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


def test_a_difference_is_that_of_the_verdicts_and_counts_runs_of_variants_as_noise(frame):
    more = pd.concat([frame, table(rows("AM-Softmax", 60, "after"), rows(MV[1], 61, "after"))], ignore_index=True)
    plain, after = (MV[1], "AM-Softmax"), ((MV[1], "after"), ("AM-Softmax", "after"))
    found = comparison.differences(more, "rank1", [plain, after])
    expected = claims.difference(more, "rank1", *plain)
    assert list(found.loc[0, ["mean", "low", "high"]]) == pytest.approx(
        [100 * expected.mean, 100 * expected.low, 100 * expected.high]
    )
    assert found.loc[0, "visible"] == pytest.approx(100 * claims.pooled(more, "rank1").detectable(4))
    assert list(found["name"]) == ["MV-AM-a − AM", "MV-AM-a, after − AM, after"]
    assert list(found["mean"].round(6)) == [-5, 1]
    assert found.loc[0, "seeds"] == pytest.approx([-5.1, -4.8, -5.2, -4.9])


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
    frame = table(rows("AM-Softmax", 50), rows(MV[0], 50 + gain, **learned), scatter)
    found = comparison.differences(frame, "rank1", [(MV[0], "AM-Softmax")])
    assert found.loc[0, "reading"].partition(":")[0] == reading


def test_losses_without_runs_are_left_out_and_named(frame):
    pairs = [(MV[0], "AM-Softmax"), (MV[0], "HM-Softmax"), ("AM-Softmax", "Softmax")]
    found = comparison.differences(frame, "rank1", pairs)
    assert list(found["name"]) == ["MV-AM-f − AM"]
    short = comparison.waiting(frame, "faces", pairs, found, listed=False)
    assert short == "2 of 3 comparisons wait for runs on `faces` of HM, Softmax"
    assert comparison.waiting(frame, "faces", pairs, found) == f"{short}: MV-AM-f − HM, AM − Softmax"
    assert comparison.waiting(frame, "faces", pairs[:1], found) == ""
    assert comparison.here(frame, ["Softmax", *MV]) == list(MV)
    assert len(comparison.within(found, pairs)) == 1 and len(comparison.within(found, pairs[1:])) == 0
    none = comparison.differences(frame, "rank1", pairs[1:])
    assert len(none) == len(comparison.within(none, pairs)) == 0


def test_the_words_follow_the_numbers(frame):
    found = comparison.differences(frame, "rank1", [(form, "AM-Softmax") for form in MV])
    says = "MV-AM-f gains nothing that matters over AM (+0.1 points); MV-AM-a is behind AM by 5.0 points"
    assert comparison.plainly(found) == says
    assert comparison.in_words(found).startswith("MV-AM-f − AM +0.10 [")
    assert comparison.weight(found, "MV") == "2 of 2 comparisons speak against MV, none for it."


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ([], "There are no runs yet that say anything about MV."),
        ([comparison.AHEAD], "1 of 1 comparisons speaks for MV, none against it."),
        ([comparison.AHEAD, comparison.UNDECIDED], "1 of 2 comparisons speaks for MV, none against it (1 undecided)."),
        ([comparison.AHEAD, comparison.BEHIND], "1 of 2 comparisons speak for MV and 1 against it."),
        ([comparison.UNDECIDED], "The comparisons speak neither for MV nor against it (1 undecided)."),
        (["not testable here: why"] * 2, "No comparison counts here, so this is no evidence for or against MV."),
    ],
)
def test_what_the_comparisons_speak_for(kinds, says):
    assert comparison.weight(pd.DataFrame({"reading": kinds}), "MV") == says


def test_people_drawn_anew_widen_the_interval(frame, monkeypatch):
    generator = np.random.default_rng(0)
    correct = {
        (loss, t, s): generator.random(400) < p
        for loss, t, p in ((MV[1], 0.2, 0.4), ("AM-Softmax", 0.0, 0.5))
        for s in SEEDS
    }
    kept = {key: {"correct": np.append(bits, [False] * 8), "probes": 400} for key, bits in correct.items()}
    monkeypatch.setattr(runs, "evidence", lambda profile, part, kind: kept)
    monkeypatch.setattr(runs, "default_t", lambda profile: 0.2)
    found = comparison.differences(frame, "rank1", [(form, "AM-Softmax") for form in MV])
    without, interval = comparison.people("faces", found)
    assert without == "–"
    low, high = map(float, interval.strip("[]").split(","))
    mean = 100 * np.mean([correct[MV[1], 0.2, s].mean() - correct["AM-Softmax", 0.0, s].mean() for s in SEEDS])
    assert low < mean < high and 3 < high - low < 20
    shown = comparison.as_table(found, "points", [without, interval])
    assert list(shown["Interval, people and seeds drawn anew"]) == [without, interval]


def test_the_drawing_and_the_tables(frame):
    found = comparison.differences(frame, "rank1", [(form, "AM-Softmax") for form in MV])
    ax = Figure().subplots()
    comparison.draw(ax, found, "points")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["MV-AM-f − AM", "MV-AM-a − AM"]
    columns = comparison.measures(frame.assign(lfw_accuracy=0.9), "rank1", "rank-1 (%)")
    assert list(columns) == ["rank1", "lfw_accuracy"]
    scores = comparison.scores(frame, ["AM-Softmax"], {"rank1": "rank-1 (%)"})
    assert scores.iloc[0].tolist()[:2] == ["AM-Softmax", 4] and scores.loc[0, "rank-1 (%)"].startswith("51.5 [")
    both = comparison.by_measure(frame, [("AM-Softmax", "Softmax"), (MV[1], "AM-Softmax")], {"rank1": "rank-1 (%)"})
    assert both["rank-1"].iloc[0].startswith("-5.00 [") and len(both) == 1
    assert comparison.short("F-Softmax") == "F-Softmax" and comparison.look("F-Softmax") != comparison.look("Softmax")
