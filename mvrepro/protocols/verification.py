"""One to one: is a pair of images the same person? The true-positive rate at a false-positive rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvrepro.protocols.scores import Floats, Largest, cosines, positive_chunk, row_numbers, rows_and_ids, unit

BINS = 200


@dataclass(frozen=True)
class Operating:
    """One point of a ROC: at this threshold, score >= threshold is accepted.

    Compare in float64: NumPy rounds a Python float to the float32 of an array of scores, and the
    threshold, the next float64 above a refused score, then falls back on that score.
    """

    fpr: float
    tpr: float
    threshold: float
    false_accepts: int


@dataclass(frozen=True)
class AllPairs:
    """Every unordered pair of N rows. G genuine pairs, M impostor pairs, G + M = N(N−1)/2.

    points: as of tpr_at_fpr, one per FPR asked for. genuine (G,) float32 and genuine_ids (G,): the score
    of each genuine pair and whose it is, grouped by person, for a bootstrap over people. histogram
    (2, 200) int64: how many impostor scores (row 0) and genuine scores (row 1) lie in each of 200 equal
    bins of [−1, 1]; bin k holds floor((score + 1)·100) = k, and the last one the score 1 as well.
    """

    points: list[Operating]
    genuine: NDArray[np.float32]
    genuine_ids: NDArray[Any]
    histogram: NDArray[np.int64]


def allowed(impostors: int, fpr: float) -> int:
    """How many of the impostor scores may be accepted at this FPR."""
    return int(np.floor(fpr * impostors + 1e-9))  # 0.1 × 30 is 3.0000000000000004 or 2.9999999999999996


def check_fprs(impostors: int, fprs: Sequence[float]) -> None:
    """ValueError for an FPR outside (0, 1], or one so small that it allows less than one of the impostor pairs."""
    for fpr in fprs:
        if not 0 < fpr <= 1:
            raise ValueError(f"a false-positive rate must be in (0, 1], got {fpr}")
        if allowed(impostors, fpr) < 1:
            raise ValueError(
                f"{impostors} impostor pairs can't show a false-positive rate of {fpr:g}: 1/{fpr:g} needed"
            )


def to_keep(impostors: int, fprs: Sequence[float]) -> int:
    """How many of the largest impostor scores settle these FPRs: those accepted, and the first refused."""
    return min(impostors, allowed(impostors, max(fprs, default=0)) + 1)


def operating_points(genuine: Floats, top: Floats, impostors: int, fprs: Sequence[float]) -> list[Operating]:
    """tpr_at_fpr, where only the to_keep largest scores of that many impostors are at hand."""
    genuine, top = genuine.astype(np.float64), top.astype(np.float64)
    points = []
    for fpr in fprs:
        count = allowed(impostors, fpr)
        if count == impostors:
            threshold = -np.inf
        else:
            # The largest score that must be refused; the threshold is the next number above it.
            refused = np.partition(top, len(top) - count - 1)[len(top) - count - 1]
            threshold = np.nextafter(refused, np.inf) if refused < np.inf else np.nan  # nothing is >= NaN
        accepted = int(np.sum(top >= threshold))
        points.append(Operating(fpr, float(np.mean(genuine >= threshold)), float(threshold), accepted))
    return points


def check_scores(**sides: int) -> None:
    for what, count in sides.items():
        if not count:
            raise ValueError(f"{what} scores must be numbers, one at least, got NaN or none")


def tpr_at_fpr(genuine: ArrayLike, impostor: ArrayLike, fprs: Sequence[float]) -> list[Operating]:
    """The true-positive rate at each false-positive rate, from exact counts.

    genuine (N,), impostor (M,) scores. At FPR a, at most floor(a·M) impostors may be accepted; where
    impostors tie at the edge, all of the tie is refused (the stricter side). Raises ValueError for
    empty or NaN scores, for a outside (0, 1], and where a·M < 1: then no threshold measures that FPR.
    """
    good, bad = (np.asarray(x, dtype=np.float64).ravel() for x in (genuine, impostor))
    check_scores(genuine=len(good) and not np.isnan(good).any(), impostor=len(bad) and not np.isnan(bad).any())
    check_fprs(len(bad), fprs)
    return operating_points(good, bad, len(bad), fprs)


def pair_scores(embeddings: ArrayLike, ids: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines of every unordered pair of rows: (genuine, impostor). embeddings (N, D), ids (N,).

    Holds all N(N−1)/2 of them, in the order of np.triu_indices; every_pair doesn't.
    """
    x, who = rows_and_ids(embeddings, ids)
    upper = np.triu_indices(len(x), k=1)
    scores = (x @ x.T)[upper].astype(np.float32)
    same = who[upper[0]] == who[upper[1]]
    return scores[same], scores[~same]


def pair_cosines(embeddings: ArrayLike, left: ArrayLike, right: ArrayLike) -> NDArray[np.float32]:
    """The cosine of rows left[i] and right[i]: (P,) float32 from embeddings (N, D) and two (P,) of row numbers.

    Raises ValueError for rows without a direction, and for row numbers that are no integers in [0, N).
    """
    x = unit(embeddings)
    a, b = np.asarray(left), np.asarray(right)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"left and right must be (P,) each, got {a.shape} and {b.shape}")
    return cosines(x, row_numbers("left", a, len(x)), x, row_numbers("right", b, len(x)))


def impostor_pairs(ids: ArrayLike) -> int:
    """How many of the N(N−1)/2 unordered pairs of ids (N,) are of two different people."""
    who = np.asarray(ids).ravel()
    return len(who) * (len(who) - 1) // 2 - _genuine_pairs(who)


def _genuine_pairs(who: NDArray[Any]) -> int:
    return sum(n * (n - 1) // 2 for n in np.unique(who, return_counts=True)[1].tolist())


def every_pair(embeddings: ArrayLike, ids: ArrayLike, fprs: Sequence[float], chunk: int = 1024) -> AllPairs:
    """tpr_at_fpr over every unordered pair of the N rows, in blocks of chunk × chunk scores.

    embeddings (N, D) of any float type, ids (N,) of numbers or names. The points are exactly those of
    tpr_at_fpr(*pair_scores(embeddings, ids), fprs). Beside a block, memory holds every genuine score and
    the impostor scores that may still matter: about 3·max(fprs)·M of them. Raises ValueError as those
    two do, before any product where the ids alone tell.
    """
    x, who = rows_and_ids(embeddings, ids)
    positive_chunk(chunk)
    impostors = impostor_pairs(who)
    check_scores(genuine=_genuine_pairs(who), impostor=impostors)
    check_fprs(impostors, fprs)
    people, codes = np.unique(who, return_inverse=True)
    top = Largest(to_keep(impostors, fprs))
    histogram = np.zeros((2, BINS), np.int64)
    genuine, owners = scan_pairs(x, codes, top, chunk, histogram)
    points = operating_points(genuine, top.scores(), impostors, fprs)
    return AllPairs(points, genuine, people[owners], histogram)


def all_pairs(embeddings: ArrayLike, ids: ArrayLike, fprs: Sequence[float], chunk: int = 1024) -> list[Operating]:
    """The points of every_pair: tpr_at_fpr over every unordered pair of the N rows, in bounded memory."""
    return every_pair(embeddings, ids, fprs, chunk).points


def scan_pairs(
    x: NDArray[np.float64],
    codes: NDArray[np.intp],
    top: Largest,
    chunk: int,
    histogram: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Every genuine score with its person's code, grouped by person; impostor scores go to top.

    x (N, D): rows of length one. codes (N,): one whole number per person. Counts into histogram (2, 200).
    """
    order = np.argsort(codes, kind="stable")  # a person's rows are neighbours, so few blocks have genuine pairs
    genuine, owners = [np.empty(0, np.float32)], [np.empty(0, np.intp)]
    for scores, owner in _blocks(x[order], codes[order], chunk):
        if owner is None:
            impostor = scores
        else:
            same = owner >= 0
            impostor = scores[~same]
            genuine.append(scores[same])
            owners.append(owner[same])
        if histogram is not None:
            histogram[0] += _counts(impostor)
        top.add(impostor)
    scores, owner = np.concatenate(genuine), np.concatenate(owners)
    if histogram is not None:
        histogram[1] += _counts(scores)
    grouped = np.argsort(owner, kind="stable")
    return scores[grouped], owner[grouped]


def _blocks(
    x: NDArray[np.float64], codes: NDArray[np.intp], chunk: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.intp] | None]]:
    """Blocks of the upper triangle: scores, and for each its person's code, −1 for an impostor pair (None: all are)."""
    for a in range(0, len(x), chunk):
        rows, row_codes = x[a : a + chunk], codes[a : a + chunk]
        for b in range(a, len(x), chunk):
            scores = np.matmul(rows, x[b : b + chunk].T).astype(np.float32)
            column_codes = codes[b : b + chunk]
            if a == b:
                upper = np.triu_indices(len(rows), k=1)
                left = row_codes[upper[0]]
                yield scores[upper], np.where(left == column_codes[upper[1]], left, -1)
            elif row_codes[-1] == column_codes[0]:
                yield scores, np.where(row_codes[:, None] == column_codes, row_codes[:, None], -1)
            else:
                yield scores, None


def _counts(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """In float64, where score + 1 is exact: in float32 a score could round across the edge of its bin."""
    where = np.add(scores.ravel(), 1, dtype=np.float64)
    where *= BINS / 2
    counts = np.bincount(np.clip(where.astype(np.intp), 0, BINS - 1), minlength=BINS)  # rounding may pass ±1
    return counts.astype(np.int64)
