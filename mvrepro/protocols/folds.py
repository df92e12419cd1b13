"""Accuracy on given pairs in given folds: LFW View 2, CFP, AgeDB-30, CALFW, CPLFW, RFW."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONVENTIONS = ("exact", "insightface")


@dataclass(frozen=True)
class KFold:
    """F folds in the rising order of their numbers. accuracies, thresholds (F,) float64; correct (N,) bool.

    mean is over the folds' accuracies, std their standard deviation (ddof = 1; InsightFace's: 0).
    """

    mean: float
    std: float
    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    correct: NDArray[np.bool_]

    @property
    def standard_error(self) -> float:
        """S_E = σ / √F with ddof = 1, what LFW reports beside the mean (Huang et al. 2007, View 2)."""
        return float(self.accuracies.std(ddof=1) / np.sqrt(len(self.accuracies)))


def kfold_accuracy(scores: ArrayLike, same: ArrayLike, folds: ArrayLike, convention: str = "exact") -> KFold:
    """Each fold's accuracy at the threshold that is best on the other folds; score >= threshold is accepted.

    scores (N,) floats, same (N,) bool: whether the pair is one person, folds (N,) int. The protocol is
    LFW's View 2 (Huang, Ramesh, Berg, Learned-Miller 2007, UMass Amherst Technical Report 07-49), which
    leaves the choice of threshold open. convention:
    - "exact", without a grid: considered are the midpoints between neighbouring distinct scores of the other
      folds, their lowest score (all are accepted) and the number above their highest (none is); of those with
      the best accuracy, the lowest is taken.
    - "insightface": squared distances 2 − 2 score below one of 0, 0.01, … 3.99 are accepted, and of the best the
      smallest is taken: the highest cosine, 1 − distance/2 (arcface_torch, eval/verification.py, calculate_roc).
    Raises ValueError for shapes that differ, scores that aren't finite, fewer than two folds, a fold whose other
    folds lack genuine or impostor pairs, and another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    value, truth, fold = np.asarray(scores, dtype=np.float64), np.asarray(same), np.asarray(folds)
    if value.ndim != 1 or truth.shape != value.shape or fold.shape != value.shape:
        raise ValueError(f"scores, same and folds must be (N,), got {value.shape}, {truth.shape} and {fold.shape}")
    if truth.dtype != np.bool_:
        raise ValueError(f"same must be of booleans, got {truth.dtype}")
    if not np.isfinite(value).all():
        raise ValueError(f"scores must be finite; number {int(np.flatnonzero(~np.isfinite(value))[0])} is not")
    numbers = np.unique(fold)
    if len(numbers) < 2:
        raise ValueError(f"two folds at least are needed, got {len(numbers)}")
    correct = np.zeros(len(value), bool)
    thresholds, accuracies = np.empty(len(numbers)), np.empty(len(numbers))
    for k, number in enumerate(numbers):
        inside = fold == number
        others = truth[~inside]
        if others.all() or not others.any():
            raise ValueError(f"without fold {number} no {'impostor' if others.all() else 'genuine'} pairs are left")
        if convention == "exact":
            thresholds[k] = _best_threshold(value[~inside], others)
            accepted = value[inside] >= thresholds[k]
        else:
            limit = _best_distance(2 - 2 * value[~inside], others)
            thresholds[k], accepted = 1 - limit / 2, 2 - 2 * value[inside] < limit
        correct[inside] = accepted == truth[inside]
        accuracies[k] = correct[inside].mean()
    std = float(accuracies.std(ddof=int(convention == "exact")))
    return KFold(float(accuracies.mean()), std, accuracies, thresholds, correct)


def _best_distance(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    grid = np.arange(0, 4, 0.01)
    genuine, impostor = (np.searchsorted(np.sort(distances[side]), grid) for side in (same, ~same))  # so many below
    return float(grid[np.argmax(genuine - impostor)])  # the first


def _best_threshold(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    distinct, where = np.unique(scores, return_inverse=True)
    genuine = np.bincount(where, weights=same, minlength=len(distinct))
    impostor = np.bincount(where, weights=~same, minlength=len(distinct))
    # Right with the threshold below the k-th distinct score: impostors under it, genuine ones from it on.
    right = np.concatenate([[0], np.cumsum(impostor)]) + genuine.sum() - np.concatenate([[0], np.cumsum(genuine)])
    k = int(np.argmax(right))  # the first, so the lowest
    if k == 0:
        return float(distinct[0])
    if k == len(distinct):
        return float(np.nextafter(distinct[-1], np.inf))
    low, high = distinct[k - 1], distinct[k]
    middle = low / 2 + high / 2
    return float(middle if low < middle <= high else high)  # between two neighbouring floats there is none
