"""mvrepro.protocols against brute force, against scikit-learn, and at the edges where counting goes wrong."""

import math
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from mvrepro.protocols import (
    Operating,
    all_pairs,
    check_fprs,
    every_pair,
    impostor_pairs,
    pair_cosines,
    pair_scores,
    tpr_at_fpr,
)
from mvrepro.protocols.scores import Largest

often = settings(max_examples=200, deadline=None, derandomize=True)

# Scores with many ties (a grid of nine values) and with hardly any.
tied = st.integers(-4, 4).map(lambda n: n / 4)
smooth = st.floats(-1, 1, allow_nan=False)
scores = st.one_of(st.lists(tied, min_size=1, max_size=40), st.lists(smooth, min_size=1, max_size=40))
rates = st.sampled_from(["0.01", "0.025", "0.1", "0.2", "0.25", "0.3", "0.5", "0.7", "0.9", "1"])


def brute_force(genuine: list[float], impostor: list[float], allowed: int) -> tuple[Fraction, int]:
    """The best TPR of any threshold that accepts at most `allowed` impostors, and how many it accepts."""
    best = (Fraction(0), 0)
    for threshold in [*genuine, *impostor]:
        accepted = 0
        for score in impostor:
            accepted += score >= threshold
        if accepted <= allowed:
            right = 0
            for score in genuine:
                right += score >= threshold
            best = max(best, (Fraction(right, len(genuine)), accepted))
    return best


@often
@given(scores, scores, rates)
def test_tpr_is_the_best_that_brute_force_finds(genuine: list[float], impostor: list[float], rate: str) -> None:
    allowed = math.floor(Fraction(rate) * len(impostor))
    assume(allowed >= 1)
    (point,) = tpr_at_fpr(genuine, impostor, [float(rate)])
    best, most = brute_force(genuine, impostor, allowed)
    assert point.tpr == pytest.approx(float(best), abs=1e-12)
    assert point.fpr == float(rate)
    assert point.false_accepts <= allowed
    assert point.false_accepts >= most
    # The threshold means what it says: score >= threshold is accepted.
    assert sum(s >= point.threshold for s in impostor) == point.false_accepts
    assert sum(s >= point.threshold for s in genuine) / len(genuine) == pytest.approx(point.tpr, abs=1e-12)


@often
@given(scores, scores, rates)
def test_tpr_is_that_of_scikit_learn(genuine: list[float], impostor: list[float], rate: str) -> None:
    allowed = math.floor(Fraction(rate) * len(impostor))
    assume(allowed >= 1)
    truth = [1] * len(genuine) + [0] * len(impostor)
    fpr, tpr, _ = roc_curve(truth, genuine + impostor, drop_intermediate=False)
    (point,) = tpr_at_fpr(genuine, impostor, [float(rate)])
    assert point.tpr == pytest.approx(tpr[np.round(fpr * len(impostor)) <= allowed].max(), abs=1e-12)


@often
@given(scores, scores)
def test_tpr_rises_with_the_fpr_and_points_keep_their_order(genuine: list[float], impostor: list[float]) -> None:
    steps = [k / len(impostor) for k in range(1, len(impostor) + 1)]
    points = tpr_at_fpr(genuine, impostor, steps)
    assert [p.fpr for p in points] == steps
    assert all(a.tpr <= b.tpr for a, b in pairwise(points))
    assert tpr_at_fpr(genuine, impostor, steps[::-1]) == points[::-1]


@often
@given(st.lists(tied, min_size=1, max_size=40), st.lists(tied, min_size=1, max_size=40), st.randoms())
def test_tpr_depends_on_ranks_only_and_not_on_order(genuine: list[float], impostor: list[float], random) -> None:
    steps = [k / len(impostor) for k in range(1, len(impostor) + 1)]
    before = [(p.tpr, p.false_accepts) for p in tpr_at_fpr(genuine, impostor, steps)]
    good, bad = [math.exp(3 * s) for s in genuine], [math.exp(3 * s) for s in impostor]  # rising, so the ranks stay
    random.shuffle(good), random.shuffle(bad)
    assert [(p.tpr, p.false_accepts) for p in tpr_at_fpr(good, bad, steps)] == before


@pytest.mark.parametrize(
    ("genuine", "impostor", "fpr", "tpr", "false_accepts"),
    [
        # One impostor may pass, but the two best tie: none does, and a genuine score in the tie is refused too.
        ([0.9, 0.8, 0.7, 0.6], [0.8, 0.8, 0.1, 0.0], 0.25, 0.25, 0),
        # Two may pass: the tie passes whole, and so does the genuine score in it.
        ([0.9, 0.8, 0.7, 0.6], [0.8, 0.8, 0.1, 0.0], 0.5, 1.0, 2),
        # Three may, the third ties with the fourth.
        ([0.9, 0.8, 0.1, 0.0], [0.8, 0.8, 0.1, 0.1], 0.75, 0.5, 2),
        # All impostors are the same: nobody at the tie is accepted, whoever it is.
        ([0.5, 0.5], [0.5] * 10, 0.9, 0.0, 0),
        ([0.5, 0.5], [0.5] * 10, 1.0, 1.0, 10),
        # A genuine score just above the refused impostor is accepted.
        ([math.nextafter(0.5, 1), 0.5], [0.6, 0.5], 0.5, 0.5, 1),
        # float32 scores are compared as they are.
        (np.float32([0.1, 0.2]), np.float32([0.2, 0.1]), 0.5, 0.5, 1),
        # −inf is a score that nothing is below.
        ([0.0], [-math.inf, -math.inf], 0.5, 1.0, 0),
    ],
)
def test_ties_are_refused(genuine: list[float], impostor: list[float], fpr: float, tpr: float, false_accepts: int):
    (point,) = tpr_at_fpr(genuine, impostor, [fpr])
    assert (point.tpr, point.false_accepts) == (tpr, false_accepts)


def test_infinite_scores_are_refused_or_counted() -> None:
    (point,) = tpr_at_fpr([1.0], [math.inf, math.inf, 0.0], [1 / 3])
    assert point.false_accepts <= 1


@pytest.mark.parametrize(
    ("fpr", "impostors", "allowed"),
    [
        (0.1, 30, 3),
        (0.1, 10, 1),
        (0.29, 100, 29),  # 0.29 × 100 is 28.999999999999996
        (0.57, 100, 57),  # 56.99999999999999
        (0.07, 100, 7),  # 7.000000000000001
        (0.7, 10, 7),
        (0.001, 1000, 1),
        (0.001, 1999, 1),
        (0.001, 18_000, 18),
        (1e-6, 2_000_000, 2),
        (0.3, 9, 2),  # 2.7: rounded down, never up
        (0.999, 1000, 999),
        (1.0, 7, 7),
    ],
)
def test_boundary_values_accept_just_as_many(fpr: float, impostors: int, allowed: int) -> None:
    (point,) = tpr_at_fpr([0.0], np.arange(impostors), [fpr])
    assert point.false_accepts == allowed


@pytest.mark.parametrize("impostors", [3, 7, 30, 49, 100, 333])
def test_every_k_of_n_accepts_k(impostors: int) -> None:
    steps = range(1, impostors + 1)
    points = tpr_at_fpr([0.0], np.arange(impostors), [k / impostors for k in steps])
    assert [p.false_accepts for p in points] == list(steps)


def test_fpr_of_one_accepts_everything() -> None:
    assert tpr_at_fpr([-5.0, 3.0], [9.0, 0.0], [1.0]) == [Operating(1.0, 1.0, -math.inf, 2)]


@pytest.mark.parametrize(("fpr", "impostors"), [(0.1, 9), (0.01, 99), (1e-6, 1000), (0.001, 100)])
def test_fpr_too_small_for_the_impostors_says_so(fpr: float, impostors: int) -> None:
    message = rf"^{impostors} impostor pairs can't show a false-positive rate of {fpr:g}: 1/{fpr:g} needed$"
    with pytest.raises(ValueError, match=message):
        tpr_at_fpr([0.0], np.arange(impostors), [fpr])
    with pytest.raises(ValueError, match=message):  # a good rate before it changes nothing
        tpr_at_fpr([0.0], np.arange(impostors), [0.5, fpr])


@pytest.mark.parametrize("fpr", [0.0, -0.1, 1.0001, 2.0, math.nan])
def test_rates_outside_their_range_are_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match=rf"must be in \(0, 1\], got {fpr}"):
        tpr_at_fpr([0.0], [0.0], [fpr])


@pytest.mark.parametrize("bad", [[], [0.1, math.nan]], ids=["empty", "NaN"])
@pytest.mark.parametrize("side", ["genuine", "impostor"])
def test_scores_that_are_no_numbers_are_refused(side: str, bad: list[float]) -> None:
    good = np.linspace(0, 1, 10)
    with pytest.raises(ValueError, match=f"^{side} scores must be numbers, one at least, got NaN or none"):
        tpr_at_fpr(*((bad, good) if side == "genuine" else (good, bad)), [0.5])


# Pairs


def some_embeddings(rows: int, people: int, dim: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, dim)), np.arange(rows) % people


def brute_force_pairs(embeddings: np.ndarray, ids: np.ndarray) -> tuple[list[float], list[float]]:
    pairs: tuple[list[float], list[float]] = ([], [])
    for i, j in combinations(range(len(ids)), 2):
        a, b = embeddings[i].tolist(), embeddings[j].tolist()
        cosine = math.fsum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        pairs[0 if ids[i] == ids[j] else 1].append(cosine)
    return pairs


@pytest.mark.parametrize(("people", "shots"), [(2, 1), (1, 4), (3, 2), (7, 5), (20, 10)])
def test_pairs_are_counted_once(people: int, shots: int) -> None:
    rows = people * shots
    genuine, impostor = pair_scores(*some_embeddings(rows, people))
    assert len(genuine) == people * math.comb(shots, 2)
    assert len(genuine) + len(impostor) == math.comb(rows, 2)
    assert genuine.dtype == impostor.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "people", "dim"), [(2, 2, 1), (9, 4, 2), (25, 6, 16)])
def test_pairs_are_those_of_brute_force_in_their_order(rows: int, people: int, dim: int, dtype: type) -> None:
    embeddings, ids = some_embeddings(rows, people, dim)
    embeddings = embeddings.astype(dtype)
    for found, expected in zip(pair_scores(embeddings, ids), brute_force_pairs(embeddings, ids), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_ids_may_be_names() -> None:
    embeddings, ids = some_embeddings(12, 4)
    names = np.array(["Ann", "Bo", "Cy", "Di"])[ids]
    for found, expected in zip(pair_scores(embeddings, names), pair_scores(embeddings, ids), strict=True):
        assert found.tobytes() == expected.tobytes()


@often
@given(st.integers(0, 10_000), st.lists(st.integers(-60, 60), min_size=12, max_size=12))
def test_the_length_of_a_row_does_not_matter(seed: int, exponents: list[int]) -> None:
    """Powers of two scale without rounding, so not a bit may change."""
    embeddings, ids = some_embeddings(12, 4, seed=seed)
    scaled = embeddings * np.exp2(exponents)[:, None]
    for found, expected in zip(pair_scores(scaled, ids), pair_scores(embeddings, ids), strict=True):
        assert found.tobytes() == expected.tobytes()


@often
@given(st.integers(0, 10_000))
def test_the_order_of_rows_and_the_names_of_people_do_not_matter(seed: int) -> None:
    embeddings, ids = some_embeddings(20, 5, seed=seed)
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(20), rng.permutation(5)
    for found, expected in zip(
        pair_scores(embeddings[order], names[ids[order]]), pair_scores(embeddings, ids), strict=True
    ):
        np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=1e-6)
    fprs = [0.1, 0.5]
    before, after = all_pairs(embeddings, ids, fprs), all_pairs(embeddings[order], names[ids[order]], fprs)
    assert [(p.tpr, p.false_accepts) for p in after] == [(p.tpr, p.false_accepts) for p in before]


def test_all_pairs_are_the_tpr_of_the_pairs() -> None:
    embeddings, ids = some_embeddings(30, 6)
    genuine, impostor = brute_force_pairs(embeddings, ids)
    for point in all_pairs(embeddings, ids, [0.01, 0.1]):
        best, most = brute_force(genuine, impostor, math.floor(Fraction(str(point.fpr)) * len(impostor)))
        assert point.tpr == pytest.approx(float(best), abs=1e-12)
        assert point.false_accepts >= most


def test_people_that_are_far_apart_are_told_apart() -> None:
    ids = np.repeat(np.arange(4), 3)
    assert [p.tpr for p in all_pairs(np.eye(4)[ids], ids, [0.05, 1.0])] == [1.0, 1.0]
    assert [p.tpr for p in all_pairs(np.ones((12, 4)), ids, [0.05, 0.99])] == [0.0, 0.0]  # one tie: nobody passes


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3, 8])
def test_rows_without_a_direction_are_named(row: int, value: float) -> None:
    embeddings, ids = some_embeddings(9, 3)
    embeddings[row] = value
    with pytest.raises(ValueError, match=rf"^embeddings must be finite and of length > 0; row {row} is not$"):
        pair_scores(embeddings, ids)


def test_one_bad_value_in_a_row_is_enough_and_the_first_row_is_named() -> None:
    embeddings, ids = some_embeddings(9, 3)
    embeddings[4, 2], embeddings[7] = math.nan, 0
    with pytest.raises(ValueError, match="row 4 is not"):
        pair_scores(embeddings, ids)


@pytest.mark.parametrize(
    ("embeddings", "ids"), [((6, 2), (5,)), ((6,), (6,)), ((6, 2, 1), (6,)), ((6, 2), (6, 1)), ((6, 2), ())]
)
def test_shapes_that_do_not_belong_together_are_refused(embeddings: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(N, D\) and ids \(N,\), got") as caught:
        pair_scores(np.ones(embeddings), np.zeros(ids))
    assert str(embeddings) in str(caught.value)


@pytest.mark.parametrize(("people", "side"), [(1, "impostor"), (8, "genuine")])
def test_no_pair_of_one_kind_is_an_error_that_says_which(people: int, side: str) -> None:
    with pytest.raises(ValueError, match=f"^{side} scores must be numbers"):
        all_pairs(*some_embeddings(8, people), [0.5])


# Every pair, in blocks


@often
@given(st.integers(0, 10_000), st.integers(6, 40), st.integers(1, 6), st.integers(1, 45), st.booleans())
def test_blocks_of_any_size_give_what_all_pairs_at_once_give(
    seed: int, rows: int, people: int, chunk: int, tie: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(rows) % (people + 1))
    # ±1 in 4 dimensions: cosines are exact quarters and nearly all of them tie.
    embeddings = rng.choice([-1.0, 1.0], (rows, 4)) if tie else rng.normal(size=(rows, 5))
    genuine, impostor = pair_scores(embeddings, ids)
    assume(len(genuine))
    steps = [k / len(impostor) for k in range(1, len(impostor) + 1)]
    for fprs in (steps[:1], steps[len(steps) // 2 :], steps):
        found = every_pair(embeddings, ids, fprs, chunk)
        assert found.points == all_pairs(embeddings, ids, fprs, chunk) == tpr_at_fpr(genuine, impostor, fprs)
    assert np.sort(found.genuine).tobytes() == np.sort(genuine).tobytes()
    for person in range(people + 1):
        mine = pair_scores(embeddings[ids == person], ids[ids == person])[0]
        assert np.sort(found.genuine[found.genuine_ids == person]).tobytes() == np.sort(mine).tobytes()
    for row, scores in enumerate((impostor, genuine)):
        bins = [min(max(math.floor((Fraction(float(s)) + 1) * 100), 0), 199) for s in scores]
        assert found.histogram[row].tolist() == np.bincount(bins, minlength=200).tolist()


@pytest.mark.filterwarnings("error")
def test_a_row_too_long_for_float64_is_said_to_be() -> None:
    with pytest.raises(ValueError, match=r"row 1 is not \(its length is beyond what float64 holds\)"):
        pair_scores(np.outer([1, 1e200], np.ones(3)), np.arange(2))


def test_every_pair_keeps_names_and_forgets_no_impostor_of_a_longer_stream() -> None:
    rng = np.random.default_rng(3)
    names = np.array([f"person {n}" for n in rng.integers(0, 60, 700)])
    embeddings = rng.normal(size=(700, 3)).astype(np.float32)
    fprs = [1e-4, 1e-3, 0.02]  # keeps 4,900 of 240,000: the buffer runs over many times
    genuine, impostor = pair_scores(embeddings, names)
    found = every_pair(embeddings, names, fprs, chunk=50)
    assert found.points == tpr_at_fpr(genuine, impostor, fprs)
    assert impostor_pairs(names) == len(impostor) == found.histogram[0].sum()
    assert sorted(set(found.genuine_ids)) == list(found.genuine_ids[np.sort(np.unique(found.genuine_ids, True)[1])])


@often
@given(
    st.one_of(st.lists(st.integers(-3, 3), max_size=60), st.lists(st.floats(0, 1 / 128, width=32), max_size=60)),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_the_largest_of_a_stream(scores: list[float], keep: int, size: int) -> None:
    largest = Largest(keep)
    block = np.empty(size, np.float32)
    for at in range(0, len(scores), size):
        part = np.float32(scores[at : at + size])
        block[: len(part)] = part
        largest.add(block[: len(part)])
        block[:] = 99  # it must not have kept the caller's array
    assert sorted(largest.scores()) == sorted(scores)[-keep:]


def test_every_pair_refuses_what_the_two_it_stands_for_refuse() -> None:
    embeddings, ids = some_embeddings(9, 3)
    with pytest.raises(ValueError, match=r"^27 impostor pairs can't show a false-positive rate of 0.01"):
        every_pair(embeddings, ids, [0.5, 0.01])
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 1.5"):
        every_pair(embeddings, ids, [1.5])
    with pytest.raises(ValueError, match=r"must be \(N, D\) and ids \(N,\)"):
        every_pair(embeddings, ids[:8], [0.5])
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0"):
        every_pair(embeddings, ids, [0.5], chunk=0)
    embeddings[5] = 0
    with pytest.raises(ValueError, match="row 5 is not"):
        every_pair(embeddings, ids, [0.5])


def test_check_fprs_draws_the_line_where_tpr_at_fpr_does() -> None:
    check_fprs(1000, [0.001, 1.0])
    check_fprs(10, [0.1])
    with pytest.raises(ValueError, match=r"^999 impostor pairs can't show a false-positive rate of 0.001"):
        check_fprs(999, [1.0, 0.001])


@often
@given(st.integers(0, 10_000))
def test_cosines_of_given_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(7, 5))
    left, right = rng.integers(0, 7, (2, 20))
    for score, a, b in zip(pair_cosines(embeddings, left, right), left, right, strict=True):
        p, q = embeddings[a].tolist(), embeddings[b].tolist()
        expected = math.fsum(s * t for s, t in zip(p, q, strict=True)) / (math.hypot(*p) * math.hypot(*q))
        assert score == pytest.approx(expected, abs=1e-7)


def test_cosines_of_more_pairs_than_a_chunk_and_of_none() -> None:
    embeddings, _ = some_embeddings(100, 5)
    left, right = np.triu_indices(100, k=1)
    assert len(left) > 4096
    genuine, impostor = pair_scores(embeddings, np.arange(100) // 100)
    assert not len(impostor)
    np.testing.assert_allclose(pair_cosines(embeddings, left, right), genuine, rtol=0, atol=1e-7)
    assert pair_cosines(embeddings, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ([0, 1], [0], r"left and right must be \(P,\) each, got \(2,\) and \(1,\)"),
        ([0, 9], [0, 1], "left must be row numbers, integers from 0 to 8"),
        ([0, 1], [-1, 1], "right must be row numbers"),
        ([0.0, 1.0], [0, 1], "left must be row numbers"),
    ],
)
def test_cosines_refuse_what_is_no_row(left: list[int], right: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_cosines(some_embeddings(9, 3)[0], left, right)


def test_a_threshold_holds_for_float32_scores_in_float64() -> None:
    scores = np.float32([0.1, 0.3, 0.3, 0.7])
    (point,) = tpr_at_fpr([1.0], scores, [0.5])
    assert np.sum(scores >= np.float64(point.threshold)) == point.false_accepts == 1


def test_an_image_of_nobody_known_is_refused() -> None:
    with pytest.raises(ValueError, match="the one of row 2 is NaN"):
        pair_scores(np.eye(4), np.array([0, 0, np.nan, 1]))
