"""One to many: is a probe's mate found among up to millions of distractors? MegaFace, Trillion Pairs.

Products are in float32 and never all held. A pair is scored in float64 and rounded; its score and a
distractor's can thus be told apart, or not, by rounding where they differ by less than about 1e-6.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvrepro.protocols.scores import Floats, Largest, cosines, positive_chunk, row_numbers, rows_and_ids, unit
from mvrepro.protocols.verification import (
    Operating,
    check_fprs,
    check_scores,
    operating_points,
    to_keep,
    tpr_at_fpr,
)

Rows = NDArray[np.intp]
Scores = NDArray[np.float32]

PROBES = 4096  # rows of a block of scores, so that memory doesn't grow with the number of probes


@dataclass(frozen=True)
class Identification:
    """rates (S, R) float64: the share of the pairs whose mate is within rank ranks[r] among sizes[s] distractors.
    found (pairs,) bool: whose mate is within ranks[0] among sizes[-1], in the order of probes, then of the gallery."""

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    rates: NDArray[np.float64]
    found: NDArray[np.bool_]


@dataclass(frozen=True)
class MegaFace:
    """rank1 (S,) float64 by number of distractors; points: verification at each FAR, all distractors."""

    sizes: tuple[int, ...]
    rank1: NDArray[np.float64]
    points: list[Operating]


@dataclass(frozen=True)
class TrillionPairs:
    """Id and Ver, each with its threshold."""

    identification: Operating
    verification: Operating


def identify(
    probes: ArrayLike,
    probe_ids: ArrayLike,
    gallery: ArrayLike,
    gallery_ids: ArrayLike,
    distractors: Floats,
    *,
    sizes: Sequence[int],
    ranks: Sequence[int] = (1,),
    among: Literal["distractors", "gallery"] = "distractors",
    chunk: int = 1024,
) -> Identification:
    """The closed-set identification rate at each rank, with each number of distractors.

    probes (P, D) with probe_ids (P,); gallery (G, D) with gallery_ids (G,), which must not hold the
    probes' own images; distractors (N, D), of people in neither, a memory map if need be: it is read in
    chunks of rows. sizes: rising; size n means the first n distractors. Each pair of a probe and a gallery
    image of the same person, its mate, counts once. The mate's rank is 1 + the number of competitors with
    a score that is at least the mate's (ties count against it), and competitors are
    - among="distractors": the distractors only, as in MegaFace's challenge 1 (Kemelmacher-Shlizerman et
      al., "The MegaFace benchmark", 2016);
    - among="gallery": the gallery images of other people as well.
    The person's other gallery images never compete. Raises ValueError for shapes that don't match, rows
    without a direction, sizes that don't rise within [0, N], ranks < 1 and a probe without a mate.
    """
    if among not in ("distractors", "gallery"):
        raise ValueError(f'among must be "distractors" or "gallery", got {among!r}')
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks must be 1 or more, got {list(ranks)}")
    x, who = rows_and_ids(probes, probe_ids)
    y, whose = rows_and_ids(gallery, gallery_ids)
    _check(x, y, "gallery")
    _check(x, distractors, "distractors")
    _check_sizes(sizes, len(distractors))
    own = who[:, None] == whose
    if not own.any(axis=1).all():
        raise ValueError(
            f"each probe needs a gallery image of its person; row {int(np.argmin(own.any(axis=1)))} has none"
        )
    probe, mate = np.nonzero(own)
    score = cosines(x, probe, y, mate)
    best = _Best(len(x), max(ranks))
    small = x.astype(np.float32)
    if among == "gallery":
        for a in range(0, len(x), PROBES):
            block = small[a : a + PROBES] @ y.T.astype(np.float32)
            block[own[a : a + PROBES]] = -np.inf
            best.add(a, block, block.max(axis=1))
    scan = _scan(small, distractors, sizes, chunk, best.add)
    rates = [[float(best.within(probe, score, rank).mean()) for rank in ranks] for _ in scan]
    return Identification(tuple(sizes), tuple(ranks), np.array(rates), best.within(probe, score, ranks[0]))


def megaface(
    probes: ArrayLike,
    probe_ids: ArrayLike,
    distractors: Floats,
    *,
    sizes: Sequence[int],
    probe_noise: Sequence[int] = (),
    distractor_noise: Sequence[int] = (),
    fars: Sequence[float] = (1e-6,),
    chunk: int = 1024,
) -> MegaFace:
    """MegaFace challenge 1 (Kemelmacher-Shlizerman et al. 2016): rank-1 by number of distractors, and TPR at the FARs.

    probes (P, D), probe_ids (P,): FaceScrub; distractors (N, D). The noise lists are row numbers, taken
    out first: with the published lists of wrong labels this is "R", refined. sizes count what remains, in
    its order. Rank 1 is that of identify(among="distractors") over the pairs (probe, other probe of the
    same person), both ways round. Verification is that of tpr_at_fpr, with all that remain: genuine are the unordered
    pairs of probes of the same person, impostor the P·N pairs of a probe and a distractor, of which only the largest
    that matter are held. Both come from one pass. A probe that is alone in its person only adds impostor pairs.
    ValueError as those two; a FAR under 1/(P·N) can't be shown.
    """
    x, who = rows_and_ids(probes, probe_ids)
    good = _without("probe_noise", probe_noise, len(x))
    kept = _without("distractor_noise", distractor_noise, len(distractors))
    _check_sizes(sizes, len(kept))
    found = _with_distractors(x[good], who[good], distractors, sizes, fars, chunk, kept)
    rank1 = [found.share_found(best) for best in found.best[: len(sizes)]]
    return MegaFace(tuple(sizes), np.array(rank1), found.points)


def trillion_pairs(
    probes: ArrayLike,
    probe_ids: ArrayLike,
    distractors: Floats,
    *,
    far_identification: float = 1e-3,
    far_verification: float = 1e-9,
    chunk: int = 1024,
) -> TrillionPairs:
    """A reading of the Trillion Pairs test: Id, TPR at FAR 1e-3, and Ver, TPR at FAR 1e-9.

    No source for those FARs, nor for what is counted at them, was at hand; our sources name the two rates
    only. What is computed here: probes (P, D), probe_ids (P,), distractors (N, D).
    - identification: over the pairs (probe, other probe of the same person), both ways round, the share
      whose score is above that of every distractor with the probe and is accepted, at the threshold where
      at most floor(FAR · P) of the probes have a distractor that is accepted.
    - verification: that of megaface.
    ValueError as tpr_at_fpr, for a FAR under 1/P and under 1/(P·N) too.
    """
    check_fprs(len(np.asarray(probes)), [far_identification])
    found = _with_distractors(probes, probe_ids, distractors, (), [far_verification], chunk)
    (point,) = tpr_at_fpr(found.score, found.best[-1], [far_identification])
    share = found.share_found(np.maximum(found.best[-1], np.nextafter(point.threshold, -np.inf)))
    return TrillionPairs(Operating(far_identification, share, point.threshold, point.false_accepts), found.points[0])


def rank1_by_person(
    x: ArrayLike, ids: ArrayLike, distractors: Floats, *, chunk: int = 1024
) -> tuple[NDArray[Any], Rows, Rows]:
    """Rank 1 as MegaFace counts it, a person at a time: people (P,) in order, pairs (P,) and how many are found (P,).

    x (N, D) with ids (N,); distractors (M, D), of people who are not among ids. The pairs of a person are all (probe,
    other image of that person), both ways round; one is found where its score is above that of every distractor with
    the probe. People with one image have no pair and are left out. ValueError as identify, and where nobody has two.
    """
    rows, who = rows_and_ids(x, ids)
    _check(rows, distractors, "distractors")
    left, right = _genuine(who)
    check_scores(genuine=len(left), impostor=len(rows) * len(distractors))
    best = _Best(len(rows), 1)
    for _ in _scan(rows.astype(np.float32), distractors, [len(distractors)], chunk, best.add):
        pass
    score, refused = cosines(rows, left, rows, right), best.top[:, 0]
    people, which = np.unique(who[left], return_inverse=True)
    found = np.add(score > refused[left], score > refused[right], dtype=np.intp)
    return people, 2 * np.bincount(which), np.bincount(which, found, len(people)).astype(np.intp)


def nearest_people(
    x: ArrayLike, ids: ArrayLike, y: ArrayLike, others: ArrayLike, *, chunk: int = 1024
) -> tuple[NDArray[Any], NDArray[Any], Scores]:
    """Which two of `others` each person of `ids` looks like most: people (P,) in order, whom (P, 2), cosines (P, 2).

    x (N, D) with ids (N,), y (M, D) with others (M,), two of them at least. A person is the mean direction of the
    person's images, which a few bad ones turn little; the best of single images would grow with their number.
    ValueError as identify.
    """
    (people, mine), (whose, theirs) = _directions(x, ids), _directions(y, others)
    _check(mine, theirs, "y")
    positive_chunk(chunk)
    if len(whose) < 2:
        raise ValueError(f"others must be two people at least, got {len(whose)}")
    where, cosines = np.empty((len(mine), 2), np.intp), np.empty((len(mine), 2), np.float32)
    for a in range(0, len(mine), chunk):
        block = (mine[a : a + chunk] @ theirs.T).astype(np.float32)
        two = np.argpartition(block, -2, axis=1)[:, -2:]
        order = np.argsort(-np.take_along_axis(block, two, axis=1), axis=1)
        where[a : a + chunk] = np.take_along_axis(two, order, axis=1)
        cosines[a : a + chunk] = np.take_along_axis(block, where[a : a + chunk], axis=1)
    return people, whose[where], cosines


def _directions(x: ArrayLike, ids: ArrayLike) -> tuple[NDArray[Any], NDArray[np.float64]]:
    rows, who = rows_and_ids(x, ids)
    people, codes = np.unique(who, return_inverse=True)
    sums = np.zeros((len(people), rows.shape[1]))
    np.add.at(sums, codes, rows)
    return people, unit(sums, "the mean of each person's images")


# One pass over the distractors


@dataclass(frozen=True)
class _Found:
    """left, right, score: each unordered genuine pair. best: each probe's best distractor, by size and at the end."""

    left: Rows
    right: Rows
    score: Scores
    best: list[Floats]
    points: list[Operating]

    def share_found(self, refused: Floats) -> float:
        """The share of pairs, both ways round, whose score is above what is refused for its probe, (P,)."""
        return float(np.mean([self.score > refused[self.left], self.score > refused[self.right]]))


def _with_distractors(
    probes: ArrayLike,
    probe_ids: ArrayLike,
    distractors: Floats,
    sizes: Sequence[int],
    fars: Sequence[float],
    chunk: int,
    kept: Rows | None = None,
) -> _Found:
    x, who = rows_and_ids(probes, probe_ids)
    _check(x, distractors, "distractors")
    total = len(distractors) if kept is None else len(kept)
    left, right = _genuine(who)
    impostors = len(x) * total
    check_scores(genuine=len(left), impostor=impostors)
    check_fprs(impostors, fars)
    best, top = _Best(len(x), 1), Largest(to_keep(impostors, fars))

    def take(first: int, block: Scores, peaks: Scores) -> None:
        best.add(first, block, peaks)
        top.add(block[peaks > top.bound])

    scan = _scan(x.astype(np.float32), distractors, [*sizes, total], chunk, take, kept)
    by_size: list[Floats] = [best.top[:, 0].copy() for _ in scan]
    score = cosines(x, left, x, right)
    return _Found(left, right, score, by_size, operating_points(score, top.scores(), impostors, fars))


class _Best:
    """Each probe's `count` best scores so far, (P, count), in no order."""

    def __init__(self, probes: int, count: int) -> None:
        self.top = np.full((probes, count), -np.inf, np.float32)
        self.count = count

    def add(self, first: int, block: Scores, peaks: Scores) -> None:
        """Scores (p, c) of the probes from row `first` on, and the best of each row, (p,)."""
        top = self.top[first : first + len(block)]
        if self.count == 1:
            np.maximum(top[:, 0], peaks, out=top[:, 0])
            return
        rows = np.flatnonzero(peaks > top.min(axis=1))  # ever fewer, as the scan goes on
        both = np.concatenate([top[rows], block[rows]], axis=1)
        top[rows] = np.partition(both, both.shape[1] - self.count, axis=1)[:, -self.count :]

    def within(self, probe: Rows, score: Scores, rank: int) -> NDArray[np.bool_]:
        """Which of the pairs have fewer than `rank` competitors at or above their score."""
        at = self.count - rank
        return np.asarray(score > np.partition(self.top, at, axis=1)[probe, at])


def _scan(
    probes: Scores,
    distractors: Floats,
    sizes: Sequence[int],
    chunk: int,
    take: Callable[[int, Scores, Scores], None],
    kept: Rows | None = None,
) -> Iterator[int]:
    """Hand all scores with the first n distractors to take, block by block; yield each n of sizes when it is reached.

    take(first probe, block (p, c), best of each of its rows (p,)) must not keep the block: it is used again.
    """
    positive_chunk(chunk)
    buffer = np.empty(min(len(probes), PROBES) * chunk, np.float32)
    done = 0
    for size in sizes:
        while done < size:
            end = min(done + chunk, size)
            numbers = np.arange(done, end) if kept is None else kept[done:end]
            whole = distractors[done:end] if kept is None else distractors[numbers]
            rows = unit(whole, "distractors", numbers).astype(np.float32)
            for a in range(0, len(probes), PROBES):
                part = probes[a : a + PROBES]
                block = buffer[: len(part) * len(rows)].reshape(len(part), len(rows))
                np.matmul(part, rows.T, out=block)
                take(a, block, block.max(axis=1))
            done = end
        yield size


def _genuine(who: NDArray[np.generic]) -> tuple[Rows, Rows]:
    """The rows of each unordered pair of the same id."""
    order = np.argsort(who, kind="stable")
    counts = np.unique(who, return_counts=True)[1]
    left, right = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for rows in np.split(order, np.cumsum(counts)[:-1]):
        a, b = np.triu_indices(len(rows), k=1)
        left.append(rows[a])
        right.append(rows[b])
    return np.concatenate(left), np.concatenate(right)


def _check(x: NDArray[np.float64], other: Floats, what: str) -> None:
    if np.ndim(other) != 2 or np.shape(other)[1] != x.shape[1]:
        raise ValueError(f"{what} must be (N, {x.shape[1]}) as the probes are, got {np.shape(other)}")


def _check_sizes(sizes: Sequence[int], total: int) -> None:
    if not len(sizes) or sizes[0] < 0 or sizes[-1] > total or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"sizes must rise within [0, {total}], the number of distractors, got {list(sizes)}")


def _without(what: str, noise: Sequence[int], total: int) -> Rows:
    return np.setdiff1d(np.arange(total), row_numbers(what, noise, total))
