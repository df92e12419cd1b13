"""Identification against distractors: loops over single scores, chunk boundaries, ties."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrepro.protocols import identification as module
from mvrepro.protocols import (
    identify,
    megaface,
    nearest_people,
    rank1_by_person,
    tpr_at_fpr,
    trillion_pairs,
)

often = settings(max_examples=100, deadline=None, derandomize=True)


def signs(rng: np.random.Generator, rows: int) -> np.ndarray:
    """±1 in 16 dimensions: cosines are exact eighths, in float32 too, and tie often."""
    return rng.choice([-1.0, 1.0], (rows, 16))


def exact(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / 16


def rank(mate: float, competitors: list[float]) -> int:
    return 1 + sum(score >= mate for score in competitors)


@often
@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(["distractors", "gallery"]), st.integers(1, 9))
def test_rates_are_those_of_counting_one_by_one(seed: int, chunk: int, among, tile: int) -> None:
    rng = np.random.default_rng(seed)
    people = np.arange(4)
    gallery_ids = np.concatenate([people, rng.integers(0, 4, 3)])  # one image at least, some have more
    probe_ids = rng.integers(0, 4, 9)
    centres = signs(rng, 4)
    noisy = lambda ids: centres[ids] * rng.choice([-1, 1], (len(ids), 16), p=[0.25, 0.75])
    probes, gallery, distractors = noisy(probe_ids), noisy(gallery_ids), signs(rng, 17)
    sizes, ranks = [0, 1, 5, 16, 17], (1, 2, 5, 40)
    before, module.PROBES = module.PROBES, tile  # so that there are boundaries between probes, too
    try:
        found = identify(
            probes, probe_ids, gallery, gallery_ids, distractors, sizes=sizes, ranks=ranks, among=among, chunk=chunk
        )
    finally:
        module.PROBES = before
    for size, rates in zip(sizes, found.rates, strict=True):
        each = []
        for p, who in zip(probes, probe_ids, strict=True):
            competitors = [exact(p, d) for d in distractors[:size]]
            if among == "gallery":
                competitors += [exact(p, g) for g, whose in zip(gallery, gallery_ids, strict=True) if whose != who]
            each += [
                rank(exact(p, g), competitors) for g, whose in zip(gallery, gallery_ids, strict=True) if whose == who
            ]
        assert len(found.found) == len(each)
        assert rates.tolist() == pytest.approx([np.mean([r <= k for r in each]) for k in ranks])


def test_more_distractors_never_help_and_a_higher_rank_never_hurts() -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(40)
    gallery = rng.normal(size=(40, 32)).astype(np.float32)
    probes = gallery + rng.normal(size=(40, 32)).astype(np.float32)
    found = identify(
        probes, ids, gallery, ids, rng.normal(size=(3000, 32)), sizes=[10, 100, 1000, 3000], ranks=(1, 5, 20)
    )
    assert (np.diff(found.rates, axis=0) <= 0).all()
    assert (np.diff(found.rates, axis=1) >= 0).all()
    assert 0 < found.rates[-1, 0] < found.rates[0, 0]


def test_distractors_may_be_a_memory_map_of_small_floats(tmp_path) -> None:
    rng = np.random.default_rng(0)
    probes, distractors = signs(rng, 6), signs(rng, 50).astype(np.float16)
    np.save(tmp_path / "d.npy", distractors)
    ids = np.array(["a", "a", "b", "b", "c", "c"])
    asked = {"sizes": [7, 49], "fars": [0.02, 0.5], "chunk": 8, "distractor_noise": [3]}
    mapped = megaface(probes, ids, np.load(tmp_path / "d.npy", mmap_mode="r"), **asked)
    held = megaface(probes, ids, distractors.astype(np.float64), **asked)
    assert mapped.rank1.tolist() == held.rank1.tolist()
    assert mapped.points == held.points and len(held.points) == 2


@often
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_tpr_at_far_is_that_of_all_scores_at_once(seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    probes, distractors, ids = signs(rng, 12), signs(rng, 25), rng.permutation(np.arange(12) % 5)
    genuine = [exact(probes[i], probes[j]) for i, j in combinations(range(12), 2) if ids[i] == ids[j]]
    impostor = [exact(p, d) for p in probes for d in distractors]
    fars = [1 / 300, 0.01, 0.2, 1.0]
    found = megaface(probes, ids, distractors, sizes=[25], fars=fars, chunk=chunk)
    assert found.points == tpr_at_fpr(genuine, impostor, fars)


@often
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_megaface_without_its_noise_is_identification_and_verification_of_the_rest(seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(14) % 5)
    probes = (signs(rng, 5)[ids] * rng.choice([-1, 1], (14, 16), p=[0.2, 0.8])).astype(np.float32)
    distractors = signs(rng, 30)
    probe_noise, distractor_noise = rng.permutation(14)[:2].tolist(), rng.permutation(30)[:4].tolist()
    sizes = [1, 9, 20]
    found = megaface(
        probes,
        ids,
        distractors,
        sizes=sizes,
        fars=[0.01],
        probe_noise=probe_noise,
        distractor_noise=distractor_noise * 2,
        chunk=chunk,
    )
    left = [i for i in range(14) if i not in probe_noise]
    rest = [d for k, d in enumerate(distractors) if k not in distractor_noise]
    pairs = [(i, j) for i, j in permutations(left, 2) if ids[i] == ids[j]]
    for size, rate in zip(sizes, found.rank1, strict=True):
        first = [exact(probes[i], probes[j]) > max(exact(probes[i], d) for d in rest[:size]) for i, j in pairs]
        assert rate == pytest.approx(np.mean(first))
    keep = np.array(left)
    alone = megaface(probes[keep], ids[keep], np.array(rest), sizes=sizes, fars=[0.01])
    assert found.points == alone.points


@often
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 9))
def test_rank_1_by_person_is_that_of_counting_one_by_one(seed: int, chunk: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    ids, distractors = rng.integers(0, 5, 12), signs(rng, 17)
    x = signs(rng, 5)[ids] * rng.choice([-1, 1], (12, 16), p=[0.3, 0.7])
    before, module.PROBES = module.PROBES, tile
    try:
        people, pairs, found = rank1_by_person(x, ids, distractors, chunk=chunk)
    finally:
        module.PROBES = before
    several = [who for who in range(5) if (ids == who).sum() > 1]
    assert people.tolist() == several
    for who, all_, right in zip(several, pairs, found, strict=True):
        both = list(permutations(x[ids == who], 2))
        assert all_ == len(both)
        assert right == sum(all(exact(a, b) > exact(a, d) for d in distractors) for a, b in both)


@often
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.25, 0.6]))
def test_trillion_pairs_are_those_of_counting_one_by_one(seed: int, far: float) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(14) % 5)
    probes = signs(rng, 5)[ids] * rng.choice([-1, 1], (14, 16), p=[0.2, 0.8])
    distractors = signs(rng, 30)
    found = trillion_pairs(probes, ids, distractors, far_identification=far, far_verification=0.01, chunk=7)
    nearest = [max(exact(p, d) for d in distractors) for p in probes]
    refused = sorted(nearest, reverse=True)[math.floor(far * 14)]
    pairs = [(i, exact(probes[i], probes[j])) for i, j in permutations(range(14), 2) if ids[i] == ids[j]]
    expected = np.mean([score > refused and score > nearest[i] for i, score in pairs])
    assert found.identification.tpr == pytest.approx(expected)
    assert found.identification.false_accepts == sum(score > refused for score in nearest)
    assert [found.verification] == megaface(probes, ids, distractors, sizes=[30], fars=[0.01]).points


@often
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_the_two_nearest_people_are_those_of_comparing_all(seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(14, 5)), rng.normal(size=(9, 5))
    ids, others = np.array(list("abcde"))[rng.permutation(14) % 5], np.array(list("fgh"))[rng.permutation(9) % 3]
    people, whom, cosines = nearest_people(x, ids, 3 * y, others, chunk=chunk)
    assert people.tolist() == list("abcde")

    def mean(rows: np.ndarray) -> np.ndarray:
        direction = sum(row / np.linalg.norm(row) for row in rows)
        return direction / np.linalg.norm(direction)

    for person, two, found in zip(people, whom, cosines, strict=True):
        scores = sorted(((mean(x[ids == person]) @ mean(y[others == other]), other) for other in "fgh"), reverse=True)
        assert two.tolist() == [other for _, other in scores[:2]]
        np.testing.assert_allclose(found, [score for score, _ in scores[:2]], atol=1e-6)
    with pytest.raises(ValueError, match="others must be two people at least, got 1"):
        nearest_people(x, ids, y, np.full(9, "f"))
    with pytest.raises(ValueError, match=r"the mean of each person's images must be .* row 0 is not"):
        nearest_people(np.array([[1.0, 0], [-1, 0], [0, 1]]), ["a", "a", "b"], np.eye(2), ["f", "g"])


def call(function, **changes):
    rng = np.random.default_rng(0)
    ids = np.array([0, 0, 1, 1])
    asked = {"probes": signs(rng, 4), "probe_ids": ids, "distractors": signs(rng, 10), "sizes": [1, 10]}
    if function is identify:
        asked |= {"gallery": signs(rng, 4), "gallery_ids": ids}
    if function is megaface:
        asked |= {"fars": [0.1]}
    return function(**asked | changes)


bad_row = np.ones((10, 16))
bad_row[7] = 0


@pytest.mark.parametrize("function", [identify, megaface])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": []}, r"sizes must rise within \[0, 10\]"),
        ({"sizes": [5, 5]}, r"sizes must rise .* got \[5, 5\]"),
        ({"sizes": [1, 11]}, r"sizes must rise within \[0, 10\]"),
        ({"sizes": [-1, 2]}, "sizes must rise"),
        ({"distractors": np.ones((10, 15))}, r"distractors must be \(N, 16\) as the probes are, got \(10, 15\)"),
        ({"distractors": np.ones(10)}, r"distractors must be \(N, 16\)"),
        ({"distractors": bad_row, "chunk": 3}, "distractors must be finite and of length > 0; row 7 is not"),
        ({"probe_ids": [0, 0, 1, 1, 1]}, r"must be \(N, D\) and ids \(N,\)"),
        ({"chunk": 0}, "chunk must be 1 or more"),
    ],
)
def test_bad_input_is_named(function, changes, message: str) -> None:
    call(function)
    with pytest.raises(ValueError, match=message):
        call(function, **changes)


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (identify, {"ranks": (0,)}, r"ranks must be 1 or more, got \[0\]"),
        (identify, {"ranks": ()}, "ranks must be 1 or more"),
        (identify, {"among": "all"}, 'among must be "distractors" or "gallery"'),
        (identify, {"gallery_ids": [0, 0, 2, 2]}, "each probe needs a gallery image of its person; row 2 has none"),
        (identify, {"gallery": np.ones((4, 3))}, r"gallery must be \(N, 16\) as the probes are"),
        (megaface, {"fars": [1e-6]}, "40 impostor pairs can't show a false-positive rate of 1e-06"),
        (megaface, {"distractor_noise": [8], "distractors": bad_row}, "row 7 is not"),
        (megaface, {"distractor_noise": [0, 1], "distractors": bad_row, "sizes": [8]}, "row 7 is not"),
        (megaface, {"distractor_noise": [1]}, r"sizes must rise within \[0, 9\]"),
        (megaface, {"distractor_noise": [10]}, "distractor_noise must be row numbers, integers from 0 to 9"),
        (megaface, {"probe_noise": [0.5]}, "probe_noise must be row numbers"),
        (megaface, {"probe_noise": [0, 2]}, "genuine scores must be numbers, one at least"),
    ],
)
def test_bad_input_of_one_is_named(function, changes, message: str) -> None:
    if "distractors" in changes:
        changes = {"sizes": [1, 8]} | changes
    with pytest.raises(ValueError, match=message):
        call(function, **changes)


def test_trillion_pairs_refuse_a_far_that_is_too_small() -> None:
    rng = np.random.default_rng(0)
    asked = (signs(rng, 4), [0, 0, 1, 1], signs(rng, 10))
    with pytest.raises(ValueError, match=r"^4 impostor pairs can't show a false-positive rate of 0.001"):
        trillion_pairs(*asked)
    with pytest.raises(ValueError, match=r"^40 impostor pairs can't show a false-positive rate of 1e-09"):
        trillion_pairs(*asked, far_identification=0.5)
