"""evidence.stats, evidence.runs and evidence.claims: from made-up runs to the verdicts that follow from them."""

import json
import re
from itertools import count

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from mvrepro.errors import UserError
from mvrepro.evidence import claims, published, runs
from mvrepro.evidence.stats import (
    TwoWay,
    bootstrap_people,
    detectable_difference,
    holm,
    mean_interval,
    written,
)
from mvrepro.losses import LOSSES
from mvrepro.pages import plots, report
from mvrepro.pipeline import plan

METRIC = "tpr@fpr=0.01"
LEARNED = ("top1", "marked_share", "gradient_distance", "other_cosine")

# --- stats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_mean_of_paired_differences_has_the_paired_t_test(seed, n):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(0.6, 0.1, n), generator.normal(0.5, 0.1, n)
    ours, theirs = mean_interval(a - b), scipy_stats.ttest_rel(a, b, alternative="greater")
    both_sides = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    assert ours.n == n
    assert (ours.mean, ours.p) == pytest.approx((np.mean(a - b), theirs.pvalue), rel=1e-9)
    assert (ours.low, ours.high) == pytest.approx((both_sides.low, both_sides.high), rel=1e-9)


def test_one_value_has_a_mean_and_no_interval():
    one = mean_interval([0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert np.isnan([one.low, one.high, one.p]).all()


@pytest.mark.parametrize(("value", "p"), [(0.25, 0.0), (0.0, 1.0), (-0.25, 1.0)])
def test_equal_values_need_no_test(value, p):
    same = mean_interval([value] * 4)
    assert (same.low, same.mean, same.high, same.p) == (value, value, value, p)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf], [[1.0, 2.0]]])
def test_values_must_be_finite_numbers(values):
    with pytest.raises(ValueError, match="finite numbers"):
        mean_interval(values)


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4·0.005, 3·0.01, 2·0.03, and not below the last
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
    ],
)
def test_holm_by_hand(ps, adjusted):
    assert holm(ps) == pytest.approx(adjusted)


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.04996, "0.04996"),
        (0.0496, "0.0496"),
        (float("nan"), "nan"),
        (0.0503, "0.05"),
        (0.049, "0.049"),
        (1.0, "1"),
        (7e-7, "7e-07"),
    ],
)
def test_a_p_shows_on_which_side_of_the_level_it_lies(p, text):
    assert written(p) == text


@pytest.mark.parametrize("n", [3, 10])
def test_the_detectable_difference_is_detected_that_often(n):
    generator = np.random.default_rng(1)
    spread = 0.04
    seen = np.linspace(-1, 1, n)
    seen *= spread / seen.std(ddof=1)
    truth = detectable_difference(seen)
    trials = generator.normal(truth, spread, (40_000, n))
    found = scipy_stats.ttest_1samp(trials, 0, axis=1, alternative="greater").pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_the_detectable_difference_grows_with_the_spread_alone():
    once = detectable_difference([0.1, 0.2, 0.4])
    assert detectable_difference([0.2, 0.4, 0.8]) == pytest.approx(2 * once)
    assert detectable_difference([5.1, 5.2, 5.4]) == pytest.approx(once)
    assert detectable_difference([0.3, 0.3]) == 0
    with pytest.raises(ValueError, match="two differences"):
        detectable_difference([0.1])


def two_way(table, missing=()):
    """Of a table {treatment: scores by seed}, without the (treatment, seed) that are missing."""
    cells = [(y, name, seed) for name, ys in table.items() for seed, y in enumerate(ys) if (name, seed) not in missing]
    return TwoWay(*zip(*cells, strict=True))


def test_two_ways_of_two_treatments_are_the_paired_t_test():
    a, b = [0.6, 0.71, 0.83, 0.4], [0.5, 0.66, 0.8, 0.41]
    found, expected = two_way({"a": a, "b": b}).difference("a", "b"), mean_interval(np.subtract(a, b))
    assert [found.mean, found.low, found.high, found.p] == pytest.approx(
        [expected.mean, expected.low, expected.high, expected.p]
    )
    assert found.n == 4


def test_two_ways_are_those_of_the_textbook():
    """Residuals of a whole table by hand: y − its row's mean − its column's + the mean of all."""
    y = np.random.default_rng(3).normal(size=(5, 4))
    model = two_way({f"loss {i}": row for i, row in enumerate(y)})
    rest = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    assert model.freedom == 4 * 3
    assert model.spread == pytest.approx(np.sqrt((rest**2).sum() / 12))
    found = model.difference("loss 2", "loss 0")
    half = scipy_stats.t.ppf(0.975, 12) * model.spread * np.sqrt(2 / 4)
    assert (found.mean, found.high - found.mean) == pytest.approx((y[2].mean() - y[0].mean(), half))
    assert found.p == pytest.approx(scipy_stats.t.sf(found.mean / (model.spread * np.sqrt(2 / 4)), 12))


def test_two_ways_take_out_what_a_seed_gives_to_all_where_runs_are_missing():
    seeds, losses = [0.0, 0.5, -0.3, 0.9], {"a": 0.0, "b": 0.1, "c": 0.3}
    table = {name: [effect + seed for seed in seeds] for name, effect in losses.items()}
    model = two_way(table, missing={("a", 3), ("c", 1)})
    assert model.difference("c", "a").mean == pytest.approx(0.3)
    assert model.difference("c", "a").n == 3
    assert model.spread == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("treatments", [3, 8])
def test_intervals_of_two_ways_hold_the_truth_that_often(treatments):
    generator, held = np.random.default_rng(5), []
    for _ in range(600):
        y = generator.normal(0, 0.3, (treatments, 3)) + generator.normal(0, 2, 3) + np.arange(treatments)[:, None]
        found = two_way({str(i): row for i, row in enumerate(y)}).difference("2", "0")
        held.append(found.low < 2 < found.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)


def test_two_ways_need_more_runs_than_effects():
    alone = two_way({"a": [1.0], "b": [2.0]}).difference("b", "a")
    assert alone.mean == pytest.approx(1)
    assert np.isnan([alone.low, alone.high, alone.p]).all()
    with pytest.raises(ValueError, match="a finite score, a treatment and a seed a run"):
        TwoWay([1.0, np.nan], ["a", "b"], [0, 0])


def test_what_two_ways_could_see_is_seen_that_often():
    generator, seen = np.random.default_rng(6), []
    truth = two_way({str(i): row for i, row in enumerate(generator.normal(0, 0.2, (6, 5)))})
    shift = truth.detectable(5) / truth.spread * 0.2
    for _ in range(2000):
        y = generator.normal(0, 0.2, (6, 5))
        y[0] += shift
        seen.append(two_way({str(i): row for i, row in enumerate(y)}).difference("0", "1").p < 0.05)
    assert np.mean(seen) == pytest.approx(0.8, abs=0.03)


def test_bootstrap_of_people_who_have_one_pair_each_is_that_of_the_pairs():
    generator = np.random.default_rng(0)
    d = generator.normal(0.1, 1, (1, 400))
    people = np.arange(400)
    found = bootstrap_people(d, people, people)
    exact = scipy_stats.bootstrap((d[0],), np.mean, method="percentile", rng=1).confidence_interval
    assert found.mean == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.02)


def test_bootstrap_keeps_the_pairs_of_a_person_together():
    generator = np.random.default_rng(1)
    people = np.repeat(np.arange(40), 25)
    d = np.repeat(generator.normal(0, 1, 40), 25)[None]  # 40 numbers, not 1,000
    found = bootstrap_people(d, people, people)
    theory = 2 * 1.96 * d.std() / np.sqrt(40)
    assert found.high - found.low == pytest.approx(theory, rel=0.15)
    assert found.n == 40


def test_bootstrap_counts_a_pair_of_two_people_by_both():
    generator = np.random.default_rng(2)
    effect = generator.normal(0, 1, 60)
    left, right = np.triu_indices(60, 1)
    d = (effect[left] + effect[right])[None]
    found = bootstrap_people(d, left, right, draws=4000)
    # Var of the mean of e_i + e_j over all pairs, when people are drawn: (2σ)²/n.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 * effect.std() / np.sqrt(60), rel=0.15)


def test_bootstrap_gives_genuine_and_impostor_pairs_half_each_and_draws_seeds():
    left, right = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 2, 1, 2, 2])
    d = np.array([[1.0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    same = bootstrap_people(d, left, right, draws=50)
    assert (same.mean, same.low, same.high, same.p) == (0.5, 0.5, 0.5, 0.0)
    two = bootstrap_people(np.vstack([d[0], -d[0]]), left, right, draws=400)
    assert (two.mean, two.low, two.high) == (0.0, -0.5, 0.5)
    assert 0.5 < two.p < 0.9  # both seeds, or the same twice: 0 or below in three of four draws
    with pytest.raises(ValueError, match=r"differences must be \(S, P\)"):
        bootstrap_people(d, left[1:], right[1:])


# --- made-up runs ---------------------------------------------------------------------------------------


@pytest.fixture
def add(tmp_path, monkeypatch):
    """add(loss, [metric of seed 0, of seed 1, …], t): records of runs in tmp_path."""
    number = count()
    monkeypatch.setattr(runs, "default_t", lambda profile: 0.2)
    (tmp_path / "runs" / "made-up").mkdir(parents=True)

    def write(loss, values, t=0.2, metric=METRIC, learned=(0.9, 0.02), **settings):
        for seed, value in enumerate(values):
            record = {
                "config": {"loss": loss, "t": t, "seed": seed, "embedding_dim": 8} | settings,
                "metrics": {metric: value},
                "learned": dict(zip(LEARNED, learned, strict=False)) if learned else {},
                "curve": {"loss": [3.0, 2.0], "marked_share": [0.5, 0.25]},
            }
            path = tmp_path / "runs" / "made-up" / f"{next(number):03d}.json"
            path.write_text(json.dumps(record), encoding="utf-8")

    return write


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """judge(claim, …) -> the verdicts on the runs in tmp_path, by claim id."""

    def evaluate(*rows, notebook=None):
        base = {"notebook": "04", "claim": "made up", "source": "nobody", "mark": "D"}
        monkeypatch.setattr(claims, "load", lambda: [base | row for row in rows])
        monkeypatch.setattr(claims, "metric", lambda profile: (METRIC, "a share (%)"))
        return {v.id: v for v in claims.evaluate("made-up", notebook, tmp_path)}

    evaluate.folder = tmp_path
    return evaluate


def greater(id_="g", better="AM-Softmax", worse="Softmax", family="one", **more):
    row = {"id": id_, "rule": "greater", "better": better, "worse": worse, "family": family}
    return row | more


# --- runs -----------------------------------------------------------------------------------------------


def test_the_table_of_runs_is_in_the_order_of_the_losses(add, tmp_path):
    add("MV-AM-Softmax-a", [0.7], t=0.3)
    add("MV-AM-Softmax-a", [0.6, 0.65], t=0.1)
    add("AM-Softmax", [0.5])
    add("HM-Softmax", [0.4])
    frame = runs.table("made-up", tmp_path)
    assert list(frame["loss"]) == ["HM-Softmax", "AM-Softmax", *["MV-AM-Softmax-a"] * 3]
    assert list(frame["t"]) == [0.0, 0.0, 0.1, 0.1, 0.3]
    assert list(frame[METRIC]) == [0.4, 0.5, 0.6, 0.65, 0.7]
    assert list(frame["h"]) == ["–", "–", *["adaptive"] * 3]
    assert list(frame["g"]) == ["HM", *["–"] * 4]


def test_by_seed_takes_the_default_t_or_the_one_asked_for(add, tmp_path):
    add("MV-AM-Softmax-f", [0.7, 0.8])
    add("MV-AM-Softmax-f", [0.1, 0.2], t=0.5)
    frame = runs.table("made-up", tmp_path)
    assert runs.by_seed(frame, METRIC, "MV-AM-Softmax-f").to_dict() == {0: 0.7, 1: 0.8}
    assert runs.by_seed(frame, METRIC, "MV-AM-Softmax-f", 0.5).to_dict() == {0: 0.1, 1: 0.2}
    assert runs.by_seed(frame, METRIC, "Softmax").empty


def test_the_default_run_is_that_of_the_profile_s_own_t(add, judge, tmp_path, monkeypatch):
    """A profile with another t has its claims judged, too."""
    monkeypatch.setattr(runs, "default_t", lambda profile: 0.35)
    add("MV-AM-Softmax-f", [0.7, 0.8, 0.9], t=0.35)
    add("MV-AM-Softmax-f", [0.1, 0.2, 0.3])
    add("AM-Softmax", [0.5, 0.65, 0.7], t=0.1)
    frame = runs.table("made-up", tmp_path)
    assert frame[frame["default"]].groupby("loss")["t"].unique().explode().to_dict() == {
        "AM-Softmax": 0.0,
        "MV-AM-Softmax-f": 0.35,
    }
    assert runs.by_seed(frame, METRIC, "MV-AM-Softmax-f").to_dict() == {0: 0.7, 1: 0.8, 2: 0.9}
    verdict = judge(greater(better="MV-AM-Softmax-f", worse="AM-Softmax"))["g"]
    assert (verdict.verdict, verdict.numbers["seeds"]) == (claims.REPRODUCED, 3)


def test_the_default_t_stands_in_the_settings_of_a_profile():
    assert {runs.default_t(profile) for profile in plan.known()} == {0.2}
    with pytest.raises(UserError, match=r"params.yaml, made-up.train: needs t"):
        runs.default_t("made-up")


def test_the_table_has_plain_runs_unless_it_is_asked_for_others(add, tmp_path):
    add("AM-Softmax", [0.5, 0.6])
    add("AM-Softmax", [0.7], variant="easy margin")
    add("AM-Softmax", [0.8], variant="CFP")
    found = runs.table("made-up", tmp_path, kind=None)
    assert dict(zip(found[METRIC], found["variant"], strict=True)) == {
        0.5: "",
        0.6: "",
        0.7: "easy margin",
        0.8: "CFP",
    }
    assert list(runs.table("made-up", tmp_path)[METRIC]) == [0.5, 0.6]
    assert list(runs.table("made-up", tmp_path, kind="easy margin")[METRIC]) == [0.7]
    assert len(runs.curves("made-up", tmp_path)) == 4
    assert set(runs.curves("made-up", tmp_path, kind="easy margin")["variant"]) == {"easy margin"}
    with pytest.raises(UserError, match="no runs of the variant 'nothing'"):
        runs.table("made-up", tmp_path, kind="nothing")


def test_the_runs_of_a_side_are_its_default_ones(add, tmp_path):
    add("MV-AM-Softmax-f", [0.1, 0.2])
    add("MV-AM-Softmax-f", [0.3], t=0.5)
    add("MV-AM-Softmax-f", [0.4], variant="late")
    add("Softmax", [0.5])
    table, curves = runs.table("made-up", tmp_path, kind=None), runs.curves("made-up", tmp_path, kind=None)
    assert list(runs.of(table, "MV-AM-Softmax-f")[METRIC]) == [0.1, 0.2]
    assert list(runs.of(table, "MV-AM-Softmax-f", "late")[METRIC]) == [0.4]
    assert len(runs.of(curves, "Softmax")) == 2 and not len(runs.of(table, "AM-Softmax"))


def test_two_runs_of_the_same_are_an_error(add, tmp_path):
    add("Softmax", [0.5])
    add("Softmax", [0.6])
    with pytest.raises(UserError, match="two runs of Softmax"):
        runs.by_seed(runs.table("made-up", tmp_path), METRIC, "Softmax")


def test_runs_that_measure_something_else_are_an_error(add, tmp_path):
    add("Softmax", [0.5])
    add("Softmax", [0.6, 0.7], metric="rank1", variant="on mine")
    for frame in (
        runs.table("made-up", tmp_path, kind="on mine"),
        runs.table("made-up", tmp_path, kind=None).query("variant == 'on mine'"),
    ):
        assert runs.by_seed(frame, "rank1", "Softmax").to_dict() == {0: 0.6, 1: 0.7}
        assert runs.by_seed(frame, METRIC, "AM-Softmax").empty
        with pytest.raises(UserError, match=f"Softmax, on mine, don't measure '{METRIC}'; they have: rank1$"):
            runs.by_seed(frame, METRIC, "Softmax")


def test_curves_have_a_row_an_epoch(add, tmp_path):
    add("AM-Softmax", [0.5])
    add("MV-AM-Softmax-f", [0.5], t=0.3)
    frame = runs.curves("made-up", tmp_path)
    assert frame.to_dict("list") == {
        "variant": [""] * 4,
        "loss": ["AM-Softmax"] * 2 + ["MV-AM-Softmax-f"] * 2,
        "t": [0.0, 0.0, 0.3, 0.3],
        "default": [True, True, False, False],
        "seed": [0] * 4,
        "epoch": [1, 2] * 2,
        "training_loss": [3.0, 2.0] * 2,
        "marked_share": [0.5, 0.25] * 2,
    }


def test_default_records_are_those_at_the_profiles_own_t(add, tmp_path):
    add("AM-Softmax", [0.5])
    add("MV-AM-Softmax-f", [0.5], t=0.2)
    add("MV-AM-Softmax-f", [0.6], t=0.3)
    add("AM-Softmax", [0.7], variant="x")
    found = {
        variant: [
            (r["config"]["loss"], r["metrics"][METRIC]) for r in runs.default_records("made-up", variant, tmp_path)
        ]
        for variant in ("", "x", None)
    }
    plain, other = [("AM-Softmax", 0.5), ("MV-AM-Softmax-f", 0.5)], [("AM-Softmax", 0.7)]
    assert (found[""], found["x"], sorted(found[None])) == (plain, other, sorted(plain + other))


def test_no_runs_says_what_makes_them(tmp_path):
    with pytest.raises(UserError, match="make reproduce"):
        runs.records("made-up", tmp_path)


# --- greater --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ([0.60, 0.71, 0.79], claims.REPRODUCED),
        ([0.52, 0.75, 0.70], claims.UNDECIDED),  # above, and chance could do that
        ([0.48, 0.55, 0.69], claims.UNDECIDED),  # below, and chance could do that
        ([0.50, 0.60, 0.70], claims.UNDECIDED),  # equal is not better
        ([0.40, 0.50, 0.60], claims.NOT_REPRODUCED),
    ],
)
def test_greater(add, judge, better, verdict):
    add("Softmax", [0.5, 0.6, 0.7])
    add("AM-Softmax", better)
    found = judge(greater())["g"]
    assert found.verdict == verdict
    assert found.numbers["difference"] == pytest.approx(np.mean(better) - 0.6)
    assert found.numbers["seeds"] == 3
    assert "3 seeds" in found.found and f"{100 * (np.mean(better) - 0.6):+.2f} points" in found.found
    assert found.command == "make reproduce PROFILE=made-up NB=04"


@pytest.mark.parametrize(
    ("learned", "reason"),
    [
        ((0.9, 0.02), ""),
        ((0.9, 0.06), r"\(AM-Softmax ends with 6 % of the classes marked, top-1 90 %\)"),
        ((0.7, 0.02), r"\(AM-Softmax ends with 2 % of the classes marked, top-1 70 %\)"),
        (None, r"\(AM-Softmax ends with 25 % of the classes marked\)"),  # an older record, by its curve
    ],
)
def test_networks_that_have_not_learned_decide_nothing(add, judge, learned, reason):
    """What counts is the margin loss: that an MV loss marks more may be what is to be found out."""
    add("AM-Softmax", [0.5, 0.5, 0.5], learned=learned)
    add("MV-AM-Softmax-a", [0.6, 0.61, 0.62], learned=(0.3, 0.9))
    found = judge(greater(better="MV-AM-Softmax-a", worse="AM-Softmax"))["g"]
    assert found.verdict == (claims.NOT_TESTABLE if reason else claims.REPRODUCED)
    assert found.numbers["difference"] == pytest.approx(0.11)  # which is shown all the same
    assert not reason or re.match(f"the networks have not learned {reason}; \\+11.00 points", found.found)


@pytest.mark.parametrize(("distance", "verdict"), [(0.3, claims.REPRODUCED), (0.01, claims.NOT_TESTABLE)])
def test_a_loss_that_was_one_training_with_its_margin_loss_decides_nothing(add, judge, distance, verdict):
    add("AM-Softmax", [0.5, 0.5, 0.5])
    add("MV-AM-Softmax-f", [0.6, 0.61, 0.62], learned=(0.9, 0.02, distance))
    found = judge(greater(better="MV-AM-Softmax-f", worse="AM-Softmax"))["g"]
    assert found.verdict == verdict
    assert (
        verdict == claims.REPRODUCED or "one training with AM-Softmax (their gradients differ by 1.0 %)" in found.found
    )


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ([0.501, 0.6, 0.7005], claims.NOT_REPRODUCED),  # no gain above 0.01
        ([0.53, 0.57, 0.70], claims.UNDECIDED),  # the interval holds 0 and gains above 0.01
    ],
)
def test_an_interval_without_a_gain_that_matters_decides(add, judge, better, verdict, monkeypatch):
    monkeypatch.setattr(claims, "metrics", lambda: {"made-up": {"matters": 0.01}})
    add("Softmax", [0.5, 0.6, 0.7])
    add("AM-Softmax", better)
    assert judge(greater())["g"].verdict == verdict


def test_noise_is_pooled_over_the_losses_that_learned(add, judge):
    """A steady pair is no surer than the others are noisy; networks that did not learn, and a loss alone, stay out."""
    generator = np.random.default_rng(1)
    add("Softmax", [0.5, 0.6, 0.7])
    add("AM-Softmax", [0.52, 0.6201, 0.7199])
    before = judge(greater())["g"].numbers
    add("Arc-Softmax", generator.normal(0.6, 0.1, 3))
    add("A-Softmax", generator.normal(0.6, 5, 3), learned=(0.2, 0.9))
    add("HM-Softmax", [0.9])
    alone = judge(greater())["g"].numbers
    add("SV-Arc-Softmax", [0.5, 0.6, 0.7])  # the same training as MV-Arc-Softmax-a: no noise of its own
    after = judge(greater())["g"].numbers
    assert after == alone
    assert after["difference"] == pytest.approx(before["difference"])
    assert after["high"] - after["low"] > 3 * (before["high"] - before["low"])
    assert after["high"] - after["low"] < 1


def test_runs_that_follow_a_network_have_a_pool_of_their_own(add, judge):
    generator = np.random.default_rng(2)
    for loss in ("Softmax", "AM-Softmax", "Arc-Softmax"):
        add(loss, generator.normal(0.6, 0.1, 3))
    add("AM-Softmax", [0.6, 0.7, 0.8], variant="after AM-Softmax")
    add("MV-AM-Softmax-f", [0.62, 0.719, 0.821], variant="after AM-Softmax")
    sides = {"better": "MV-AM-Softmax-f", "worse": "AM-Softmax", "better_variant": "after AM-Softmax"}
    both, across = judge(greater("b", **sides, worse_variant="after AM-Softmax"), greater("a", **sides)).values()
    assert both.verdict == claims.REPRODUCED and both.numbers["high"] - both.numbers["low"] < 0.01
    assert across.numbers["high"] - across.numbers["low"] > 0.1  # of pairs


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        ([-0.7, -0.8], claims.REPRODUCED),
        ([-0.7, 0.0], claims.QUALITATIVELY),
        ([0.1, 0.0], claims.NOT_REPRODUCED),
    ],
)
def test_runaway(add, judge, cosines, verdict):
    for cosine in cosines:
        add("AM-Softmax", [0.5])
        add("MV-AM-Softmax-a", [0.5], learned=(0.9, 0.02, 0.3, cosine))
    found = judge({"id": "r", "rule": "runaway", "loss": "MV-AM-Softmax-a", "bound": -0.3})["r"]
    assert found.verdict == verdict
    assert found.numbers["away"] == sum(cosine < -0.3 for cosine in cosines)
    assert judge({"id": "r", "rule": "runaway", "loss": "HM-Softmax", "bound": -0.3})["r"].verdict == claims.NOT_TESTED


def test_greater_needs_seeds_that_both_losses_have(add, judge):
    add("Softmax", [0.5, 0.6])
    add("AM-Softmax", [0.6, 0.8, 0.79])
    elsewhere = greater("elsewhere", profiles=["other"], why="no time")
    found = judge(greater(), greater("two", min_seeds=2), elsewhere)
    assert [v.verdict for v in found.values()] == [claims.NOT_TESTED, claims.UNDECIDED, claims.NOT_TESTED]
    assert (found["g"].found, found["elsewhere"].found) == ("fewer than 3 seeds so far", "no time")
    assert found["g"].numbers == {}


def test_greater_between_variants(add, judge):
    add("AM-Softmax", [0.5, 0.5, 0.5])
    add("AM-Softmax", [0.6, 0.61, 0.62], variant="easy margin")
    claim = greater(better="AM-Softmax", worse="AM-Softmax", better_variant="easy margin")
    assert judge(claim)["g"].numbers["difference"] == pytest.approx(0.11)
    assert judge(claim)["g"].verdict == "reproduced"
    assert judge(claim | {"worse_variant": "easy margin", "better_variant": ""})["g"].verdict == "not reproduced"


@pytest.mark.parametrize(
    ("better", "profiles", "verdict"),
    [
        ([0.51, 0.5, 0.49], ["made-up"], "qualitatively"),
        ([0.6, 0.61, 0.62], ["made-up"], "not reproduced"),
        ([0.51, 0.5, 0.49], ["another"], "not tested"),
        ([0.51, 0.5], ["made-up"], "not tested"),
    ],
)
def test_unclear(add, judge, better, profiles, verdict):
    add("Softmax", [0.5, 0.5, 0.5])
    add("AM-Softmax", better)
    add("Arc-Softmax", [0.4, 0.5, 0.5])
    pairs = [["AM-Softmax", "Softmax"], ["Arc-Softmax", "Softmax"]]
    claim = {"id": "u", "rule": "unclear", "pairs": pairs, "profiles": profiles, "why": "because"}
    assert judge(claim)["u"].verdict == verdict


def test_a_loss_that_is_behind_is_no_unclear_gain(add, judge):
    add("Softmax", [0.5, 0.5, 0.5])
    add("AM-Softmax", [0.505, 0.5, 0.5])
    add("Arc-Softmax", [0.4, 0.405, 0.4])
    claim = {"id": "u", "rule": "unclear", "pairs": [["AM-Softmax", "Softmax"], ["Arc-Softmax", "Softmax"]]}
    found = judge(claim)["u"]
    assert found.verdict == "qualitatively" and found.numbers["behind"] == 1
    unseen = r"\(a true gain below 0\.7 goes mostly unseen\)"
    assert re.fullmatch(rf"AM \+0.17 points, least adjusted p = \S+ {unseen}; behind: Arc -9.83", found.found)
    alone = judge(claim | {"pairs": [["Arc-Softmax", "Softmax"]]})["u"]
    assert (alone.verdict, alone.found) == ("undecided", "no gains; behind: Arc -9.83")


def test_a_claim_is_judged_on_its_profiles_alone(add, judge):
    add("Softmax", [0.5, 0.6, 0.7])
    add("AM-Softmax", [0.60, 0.72, 0.77])
    elsewhere = judge(greater() | {"profiles": ["another"]}, greater("h"))
    assert (elsewhere["g"].verdict, elsewhere["g"].found) == (claims.NOT_TESTED, "judged on another")
    assert "PROFILE=another " in elsewhere["g"].command
    assert elsewhere["h"].numbers["adjusted_p"] == judge(greater())["g"].numbers["adjusted_p"]  # not of the family


@pytest.mark.parametrize("profile", ["quick", "faces"])
def test_the_command_of_every_claim_is_one_that_works(profile):
    for verdict in claims.evaluate(profile):
        named, notebook = re.fullmatch(r"make reproduce PROFILE=(\w+) NB=(\d\d)", verdict.command).groups()
        assert plan.select(named, notebook), verdict


def test_every_profile_with_claims_has_a_metric():
    assert claims.metric("quick")[0] == "tpr@fpr=0.01"
    assert claims.metric("faces")[0] == "rank1"
    known = ", ".join(claims.metrics())
    with pytest.raises(UserError, match=f"claims.toml: no metric for the profile 'other'; it has: {known}$"):
        claims.metric("other")


def test_the_table_of_claims_has_the_profiles_with_a_metric_and_runs(tmp_path, monkeypatch):
    """One of your own, too, in the order of claims.toml; without a metric (the toy) nothing is judged."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "metrics", lambda: {"quick": {}, "mine": {}, "faces": {}})
    monkeypatch.setattr(claims, "metric", lambda name: ("share", "a share (%)"))
    for name in ("mine", "toy", "quick"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    asked = []
    monkeypatch.setattr(claims, "evaluate", lambda name: asked.append(name) or [])
    claims.outdated()
    assert asked == ["quick", "mine"]


def test_greater_takes_the_default_t(add, judge):
    add("AM-Softmax", [0.5, 0.6, 0.7])
    add("MV-AM-Softmax-a", [0.4, 0.5, 0.6])
    add("MV-AM-Softmax-a", [0.9, 0.95, 0.99], t=0.5)
    assert judge(greater(better="MV-AM-Softmax-a", worse="AM-Softmax"))["g"].verdict == claims.NOT_REPRODUCED


def test_holm_counts_the_whole_family_whichever_notebook_asks(add, judge):
    add("Softmax", [0.5, 0.6, 0.7])
    add("AM-Softmax", [0.60, 0.72, 0.77])
    alone = judge(greater())["g"].numbers["adjusted_p"]
    rows = [greater(), greater("h", notebook="05"), greater("i", family="other"), greater("j", worse="HM-Softmax")]
    family = judge(*rows, notebook="04")
    assert set(family) == {"g", "i", "j"}
    assert family["g"].numbers["adjusted_p"] == pytest.approx(3 * alone)
    assert family["i"].numbers["adjusted_p"] == pytest.approx(alone)
    assert family["j"].verdict == claims.NOT_TESTED  # and is counted all the same: others' runs must not move a verdict


def test_the_interval_of_a_comparisons_own_pairs_stands_beside_the_pooled_one(add, judge):
    """Softmax and Arc hardly scatter, AM does: pooled, its interval is narrower than its own pairs allow."""
    add("Softmax", [0.50, 0.501, 0.499, 0.50])
    add("Arc-Softmax", [0.50, 0.499, 0.501, 0.502])
    add("AM-Softmax", [0.55, 0.50, 0.60, 0.53])
    found = judge(greater())["g"]
    own = mean_interval(np.subtract([0.55, 0.50, 0.60, 0.53], [0.50, 0.501, 0.499, 0.50]))
    n = found.numbers
    assert (n["own_low"], n["own_high"]) == pytest.approx((own.low, own.high))
    assert n["low"] > own.low and n["high"] < own.high
    assert found.found.endswith(f"; own pairs [{100 * own.low:+.2f}, {100 * own.high:+.2f}], p = {own.p:.2g}")
    (alone,) = claims.evaluate("made-up", None, judge.folder, pool=False)
    assert alone.numbers["low"] == pytest.approx(own.low) and alone.verdict == claims.UNDECIDED


def test_holm_can_take_a_verdict_away(add, judge):
    add("Softmax", [0.5, 0.6, 0.7])
    add("AM-Softmax", [0.60, 0.73, 0.76])
    assert judge(greater())["g"].verdict == claims.REPRODUCED
    many = judge(*(greater(str(i)) for i in range(4)))
    assert {v.verdict for v in many.values()} == {claims.QUALITATIVELY}


# --- bound ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (1e-12, claims.REPRODUCED),
        (1e-9, claims.REPRODUCED),
        (1e-8, claims.NOT_REPRODUCED),
        (None, claims.NOT_REPRODUCED),  # how NaN is recorded
    ],
)
def test_bound(tmp_path, judge, value, verdict):
    (tmp_path / "figures" / "made-up" / "04").mkdir(parents=True)
    record = {"values": {"error": value}}
    (tmp_path / "figures" / "made-up" / "04" / "derivations.json").write_text(json.dumps(record), encoding="utf-8")
    found = judge({"id": "b", "rule": "bound", "value": "derivations:error", "bound": 1e-9})["b"]
    assert found.verdict == verdict
    assert found.numbers == {"value": value, "bound": 1e-9}
    assert found.artifact == "results/figures/made-up/04/derivations.json"


@pytest.mark.parametrize(
    ("value", "verdict", "words"),
    [
        (0.2, claims.REPRODUCED, "off by 0.20 points, within the bound of 0.4"),
        (1.0, claims.NOT_REPRODUCED, "off by 1.00 points, beyond the bound of 0.4"),
        (None, claims.NOT_REPRODUCED, "off by nan points, beyond the bound of 0.4"),
    ],
)
def test_a_bound_with_a_unit_says_how_far_off_it_is(tmp_path, judge, value, verdict, words):
    (tmp_path / "figures" / "made-up" / "04").mkdir(parents=True)
    record = {"values": {"off": value}}
    (tmp_path / "figures" / "made-up" / "04" / "others.json").write_text(json.dumps(record), encoding="utf-8")
    found = judge({"id": "b", "rule": "bound", "value": "others:off", "bound": 0.4, "unit": "points"})["b"]
    assert (found.verdict, found.found) == (verdict, words)


@pytest.mark.parametrize("content", [None, '{"values": {"other": 1.0}}'])
def test_bound_without_its_value(tmp_path, judge, content):
    (tmp_path / "figures" / "made-up" / "04").mkdir(parents=True)
    if content:
        (tmp_path / "figures" / "made-up" / "04" / "derivations.json").write_text(content, encoding="utf-8")
    found = judge({"id": "b", "rule": "bound", "value": "derivations:error", "bound": 1e-9})["b"]
    assert (found.verdict, found.found, found.numbers) == (claims.NOT_TESTED, "not computed yet", {})


# --- argmax, untested, unknown ----------------------------------------------------------------------------

BEST_T = {
    "id": "t", "rule": "argmax", "metric": METRIC, "range": [0.2, 0.3],
    "losses": ["MV-AM-Softmax-f", "MV-AM-Softmax-a"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("means", "best", "verdict"),
    [
        ({0.1: 0.5, 0.2: 0.7, 0.3: 0.6}, 0.2, claims.QUALITATIVELY),
        ({0.1: 0.5, 0.3: 0.6}, 0.3, claims.QUALITATIVELY),
        ({0.1: 0.8, 0.2: 0.7, 0.3: 0.6}, 0.1, claims.NOT_REPRODUCED),
    ],
)
def test_argmax(add, judge, means, best, verdict):
    for t, mean in means.items():
        add("MV-AM-Softmax-f", [mean - 0.2, mean - 0.1], t)
        add("MV-AM-Softmax-a", [mean + 0.1, mean + 0.2], t)
    add("MV-AM-Softmax-f", [0.99, 0.99], 0.5)  # no run of the other loss at this t: it can't win
    add("AM-Softmax", [0.99, 0.99])
    found = judge(BEST_T)["t"]
    assert (found.verdict, found.numbers) == (verdict, {"best_t": best})
    inside = sum(0.2 <= t <= 0.3 for t in means)
    assert found.found == f"best mean at t = {best:g}; {inside} of {len(means)} tried lie there"


def test_argmax_counts_the_seeds_that_every_t_has(add, judge):
    for loss in BEST_T["losses"]:
        add(loss, [0.5, 0.5, 0.99], 0.2)  # the third seed has no other t
        add(loss, [0.6, 0.6], 0.3)
    assert judge(BEST_T)["t"].numbers == {"best_t": 0.3}


def test_argmax_needs_a_choice(add, judge):
    add("MV-AM-Softmax-f", [0.5], 0.2)
    add("MV-AM-Softmax-a", [0.5], 0.2)
    assert judge(BEST_T)["t"].verdict == claims.NOT_TESTED


def test_untested_gives_its_reason(add, judge):
    add("Softmax", [0.5])
    found = judge({"id": "u", "rule": "untested", "why": "needs GPUs"})["u"]
    assert (found.verdict, found.found, found.numbers) == (claims.NOT_TESTED, "needs GPUs", {})


def test_no_runs_at_all_tests_nothing(judge):
    found = judge(greater(), BEST_T, {"id": "u", "rule": "untested", "why": "needs GPUs"})
    assert {v.verdict for v in found.values()} == {claims.NOT_TESTED}


def test_runs_without_a_usual_t_are_not_taken_for_none(add, judge, monkeypatch):
    add("MV-AM-Softmax-a", [0.5])
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"params.yaml, made-up.train: needs t"):
        judge(greater())


def test_unknown_rule(judge):
    with pytest.raises(UserError, match="claim x: unknown rule 'bigger'"):
        judge({"id": "x", "rule": "bigger"})


def test_the_project_s_claims_are_well_formed():
    rows = claims.load()
    needed = {
        "bound": {"value", "bound"},
        "greater": {"family", "better", "worse"},
        "unclear": {"pairs", "profiles", "why"},
        "runaway": {"loss", "bound"},
        "argmax": {"losses", "range"},
        "untested": {"why"},
    }
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert {"id", "notebook", "claim", "source", "mark"} | needed[row["rule"]] <= row.keys()
        assert row["mark"] in published.marks()
        names = [row[side] for side in ("better", "worse") if side in row] + row.get("losses", [])
        names += [name for pair in row.get("pairs", []) for name in pair]
        assert set(names) <= set(LOSSES)


# --- what readers see of it -------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds():
    ax = Figure().subplots()
    frame = pd.DataFrame({"epoch": [1, 2, 1, 2], "training_loss": [4.0, 2.0, 2.0, 1.0]})
    assert plots.curve(ax, frame, "training_loss", "AM-Softmax", plots.look("AM-Softmax")) == [3.0, 1.5]


def test_contents_lists_the_notebooks_that_exist(tmp_path):
    header = 'report.header(\n    section="4.2: margins, "\n    "again",\n    tested="x",\n)'
    cells = [
        {"cell_type": "markdown", "source": ["# A claim\n", "and text"]},
        {"cell_type": "code", "source": "profile: str = 'quick'"},
        {"cell_type": "code", "source": header},
    ]
    (tmp_path / "04-margins.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    (tmp_path / "01-losses.ipynb").write_text(json.dumps({"cells": cells[:2]}), encoding="utf-8")
    (tmp_path / "scratch.ipynb").write_text("{}", encoding="utf-8")
    assert [tuple(row) for row in report.contents(tmp_path).itertuples(index=False)] == [
        ("01", "[A claim](01-losses.ipynb)", "–"),
        ("04", "[A claim](04-margins.ipynb)", "4.2: margins, again"),
    ]


def test_treatments_that_no_seed_connects_have_no_difference():
    ys, seeds = [0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.2, 0.1, 0.3], [0, 1, 2, 3, 4, 5, 0, 1, 2]
    found = TwoWay(ys, ["a"] * 3 + ["b"] * 3 + ["c"] * 3, seeds)
    apart, known = found.difference("a", "b"), found.difference("a", "c")
    assert np.isnan([apart.mean, apart.low, apart.high]).all()
    assert np.isfinite([known.mean, known.low, known.high]).all()
