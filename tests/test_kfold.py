"""kfold_accuracy against every threshold tried by hand, and at the edges."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeClassifier

from mvrepro.protocols import kfold_accuracy

often = settings(max_examples=200, deadline=None, derandomize=True)
pair = st.tuples(st.one_of(st.integers(-3, 3).map(lambda n: n / 4), st.floats(-1, 1)), st.booleans(), st.integers(0, 3))
pairs = st.lists(pair, min_size=6, max_size=30)


def usable(rows: list[tuple[float, bool, int]]) -> bool:
    folds = {f for _, _, f in rows}
    return len(folds) > 1 and all(len({s for _, s, f in rows if f != out}) == 2 for out in folds)


def by_hand(rows: list[tuple[float, bool, int]], out: int) -> tuple[float, float]:
    others = [(score, same) for score, same, fold in rows if fold != out]
    distinct = sorted({score for score, _ in others})
    candidates = [distinct[0]]
    for low, high in pairwise(distinct):
        middle = low / 2 + high / 2
        candidates.append(middle if low < middle else high)
    candidates.append(math.nextafter(distinct[-1], math.inf))
    right = [sum((score >= t) == same for score, same in others) for t in candidates]
    threshold = candidates[right.index(max(right))]
    inside = [(score >= threshold) == same for score, same, fold in rows if fold == out]
    return threshold, sum(inside) / len(inside)


@often
@given(pairs)
def test_thresholds_and_accuracies_are_those_found_by_hand(rows: list[tuple[float, bool, int]]) -> None:
    assume(usable(rows))
    scores, same, folds = (np.array(column) for column in zip(*rows, strict=True))
    found = kfold_accuracy(scores, same, folds)
    expected = [by_hand(rows, out) for out in sorted(set(folds.tolist()))]
    assert found.thresholds.tolist() == [threshold for threshold, _ in expected]
    np.testing.assert_allclose(found.accuracies, [accuracy for _, accuracy in expected], rtol=0, atol=1e-12)
    assert found.mean == pytest.approx(np.mean([accuracy for _, accuracy in expected]))
    assert found.std == pytest.approx(np.std([accuracy for _, accuracy in expected], ddof=1))
    assert found.standard_error == pytest.approx(found.std / math.sqrt(len(expected)))
    for out, accuracy in zip(sorted(set(folds.tolist())), found.accuracies, strict=True):
        assert found.correct[folds == out].mean() == pytest.approx(accuracy)


@often
@given(pairs, st.randoms())
def test_neither_the_order_nor_the_numbers_of_folds_matter(rows: list[tuple[float, bool, int]], random) -> None:
    assume(usable(rows))
    found = kfold_accuracy(*zip(*rows, strict=True))
    order = list(range(len(rows)))
    random.shuffle(order)
    scores, same, folds = (np.array(column)[order] for column in zip(*rows, strict=True))
    again = kfold_accuracy(scores, same, 7 * folds - 3)
    assert again.accuracies.tolist() == found.accuracies.tolist()
    assert again.thresholds.tolist() == found.thresholds.tolist()
    assert again.correct.tolist() == found.correct[order].tolist()


def test_a_stump_of_scikit_learn_is_as_good_on_the_other_folds() -> None:
    """A tree of one split chooses among the same midpoints, by Gini impurity: never better, and not much worse."""
    rng = np.random.default_rng(0)
    same = np.arange(600) % 2 == 0
    scores = rng.normal(size=600) + 2 * same
    folds = np.arange(600) // 60
    found = kfold_accuracy(scores, same, folds)
    assert len(found.accuracies) == 10
    for k in range(10):
        others = folds != k
        stump = DecisionTreeClassifier(max_depth=1).fit(scores[others, None], same[others])
        best = np.mean((scores[others] >= found.thresholds[k]) == same[others])
        assert best >= stump.score(scores[others, None], same[others])
        assert best == pytest.approx(stump.score(scores[others, None], same[others]), abs=0.01)


def test_what_can_be_told_apart_is_and_a_fold_never_sees_its_own_threshold() -> None:
    same = np.tile([True, False], 10)
    folds = np.repeat(np.arange(5), 4)
    scores = np.where(same, 0.8, 0.2)
    found = kfold_accuracy(scores, same, folds)
    assert (found.mean, found.std, found.correct.all()) == (1.0, 0.0, True)
    assert found.thresholds.tolist() == [0.5] * 5
    scores[folds == 2] = np.where(same[folds == 2], -0.8, -0.9)  # alone it would be perfect, at −0.85
    found = kfold_accuracy(scores, same, folds)
    assert found.accuracies.tolist() == [1, 1, 0.5, 1, 1]
    assert found.thresholds[2] == 0.5


def test_equal_candidates_give_the_lowest_and_extremes_are_considered() -> None:
    # Fold 1's other fold: 0.1 genuine, 0.2 impostor, 0.3 genuine: right at 0.1 (all pass) and at 0.25.
    scores, same, folds = [0.1, 0.2, 0.3, 0.5, 0.6], [True, False, True, False, True], [0, 0, 0, 1, 1]
    assert kfold_accuracy(scores, same, folds).thresholds[1] == 0.1
    # Genuine ones are lowest: best is to refuse all.
    found = kfold_accuracy([0.1, 0.2, 0.3, 0.5, 0.6], [True, False, False, False, True], [0, 0, 0, 1, 1])
    assert found.thresholds[1] == math.nextafter(0.3, 1)


def test_scores_that_are_neighbours_have_no_midpoint() -> None:
    low, high = 0.5, math.nextafter(0.5, 1)
    found = kfold_accuracy([low, high, low, high], [False, True, False, True], [0, 0, 1, 1])
    assert found.mean == 1
    assert found.thresholds.tolist() == [high, high]


@often
@given(pairs)
def test_the_convention_of_insightface_is_its_loop_over_a_grid(rows: list[tuple[float, bool, int]]) -> None:
    assume(usable(rows))
    found = kfold_accuracy(*zip(*rows, strict=True), convention="insightface")
    accuracies = []
    for out in sorted({fold for *_, fold in rows}):
        best, limit = -1.0, math.nan
        for threshold in np.arange(0, 4, 0.01):
            others = [(2 - 2 * score < threshold) == same for score, same, fold in rows if fold != out]
            if np.mean(others) > best:
                best, limit = float(np.mean(others)), threshold
        accuracies.append(np.mean([(2 - 2 * score < limit) == same for score, same, fold in rows if fold == out]))
    np.testing.assert_allclose(found.accuracies, accuracies, rtol=0, atol=1e-12)
    assert (found.mean, found.std) == (pytest.approx(np.mean(accuracies)), pytest.approx(np.std(accuracies)))
    assert found.standard_error == pytest.approx(np.std(accuracies, ddof=1) / math.sqrt(len(accuracies)))


def test_the_two_conventions_choose_from_opposite_ends() -> None:
    same, folds = [True, False] * 2, [0, 0, 1, 1]  # anything between 0.2 and 0.8 tells the first fold's two apart
    scores = [0.803, 0.2, 0.495, 0.1]
    exact, theirs = (kfold_accuracy(scores, same, folds, name) for name in ("exact", "insightface"))
    assert (exact.thresholds[1], exact.accuracies[1]) == (pytest.approx(0.5015), 0.5)
    assert theirs.thresholds[1] == pytest.approx(0.8)  # the first distance of the grid above 2 − 2 · 0.803 is 0.4
    with pytest.raises(ValueError, match="convention must be one of exact, insightface, got 'mine'"):
        kfold_accuracy(scores, same, folds, "mine")


@pytest.mark.parametrize(
    ("scores", "same", "folds", "message"),
    [
        ([0.1], [True, False], [0, 1], r"must be \(N,\), got \(1,\), \(2,\) and \(2,\)"),
        ([0.1, 0.2], [True, False], [0], r"must be \(N,\)"),
        ([[0.1, 0.2]], [[True, False]], [[0, 1]], r"must be \(N,\)"),
        ([0.1, 0.2], [1, 0], [0, 1], "same must be of booleans, got int64"),
        ([0.1, math.nan], [True, False], [0, 1], "scores must be finite; number 1 is not"),
        ([math.inf, 0.1], [True, False], [0, 1], "number 0 is not"),
        ([0.1, 0.2], [True, False], [4, 4], "two folds at least are needed, got 1"),
        ([0.1] * 4, [True, False, True, True], [0, 0, 1, 1], "without fold 0 no impostor pairs are left"),
        ([0.1] * 4, [False, False, True, False], [0, 0, 1, 1], "without fold 1 no genuine pairs are left"),
    ],
)
def test_bad_input_is_named(scores, same, folds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kfold_accuracy(scores, same, folds)
