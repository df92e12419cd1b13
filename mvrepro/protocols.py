"""Verification protocols on arrays of embeddings, scores and ids: they know nothing of models.

A score is a cosine, larger is more alike. Rates are shares in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Operating:
    """One point of a ROC: at this threshold, score >= threshold is accepted."""

    fpr: float
    tpr: float
    threshold: float
    false_accepts: int


def tpr_at_fpr(genuine: ArrayLike, impostor: ArrayLike, fprs: Sequence[float]) -> list[Operating]:
    """The true-positive rate at each false-positive rate, from exact counts.

    genuine (N,), impostor (M,) scores. At FPR a, at most floor(a·M) impostors may be accepted; where
    impostors tie at the edge, all of the tie is refused (the stricter side). Raises ValueError for
    empty or NaN scores, for a outside (0, 1], and where a·M < 1: then no threshold measures that FPR.
    """
    good, bad = (np.asarray(x, dtype=np.float64).ravel() for x in (genuine, impostor))
    for what, scores in (("genuine", good), ("impostor", bad)):
        if not len(scores) or np.isnan(scores).any():
            raise ValueError(f"{what} scores must be numbers, one at least; got {len(scores)} with NaN or none")
    points = []
    for fpr in fprs:
        if not 0 < fpr <= 1:
            raise ValueError(f"a false-positive rate must be in (0, 1], got {fpr}")
        allowed = int(np.floor(fpr * len(bad) + 1e-9))  # 0.1 × 30 is 3.0000000000000004 or 2.9999999999999996
        if allowed < 1:
            raise ValueError(f"{len(bad)} impostor pairs can't show a false-positive rate of {fpr:g}: 1/{fpr:g} needed")
        if allowed == len(bad):
            threshold = -np.inf
        else:
            # The largest score that must be refused; the threshold is the next number above it.
            refused = np.partition(bad, len(bad) - allowed - 1)[len(bad) - allowed - 1]
            threshold = np.nextafter(refused, np.inf) if refused < np.inf else np.nan  # nothing is >= NaN
        points.append(
            Operating(fpr, float(np.mean(good >= threshold)), float(threshold), int(np.sum(bad >= threshold)))
        )
    return points


def pair_scores(embeddings: ArrayLike, ids: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines of every unordered pair of rows: (genuine, impostor). embeddings (N, D), ids (N,)."""
    x = np.asarray(embeddings, dtype=np.float64)
    who = np.asarray(ids)
    if x.ndim != 2 or who.shape != x.shape[:1]:
        raise ValueError(f"embeddings must be (N, D) and ids (N,), got {x.shape} and {who.shape}")
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        row = int(np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))[0])
        raise ValueError(f"embeddings must be finite and of length > 0; row {row} is not")
    x = x / lengths
    upper = np.triu_indices(len(x), k=1)
    # Products in float64, kept in float32: their order of summation, which differs between BLAS
    # libraries, then can't change the rank of a pair.
    cosines = (x @ x.T)[upper].astype(np.float32)
    same = who[upper[0]] == who[upper[1]]
    return cosines[same], cosines[~same]


def all_pairs(embeddings: ArrayLike, ids: ArrayLike, fprs: Sequence[float]) -> list[Operating]:
    """tpr_at_fpr over every unordered pair of the N rows: N(N−1)/2 scores, all held in memory."""
    return tpr_at_fpr(*pair_scores(embeddings, ids), fprs)
