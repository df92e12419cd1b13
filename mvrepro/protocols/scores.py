"""What every protocol starts from: rows of length one, and the largest of more scores than memory holds."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]


def unit(
    embeddings: ArrayLike, what: str = "embeddings", numbers: NDArray[np.intp] | None = None
) -> NDArray[np.float64]:
    """Rows (N, D) scaled to length one, in float64. ValueError names the row without a direction, by numbers[row].

    Products in float64, kept in float32, don't depend on their order of summation, which differs
    between BLAS libraries: so it can't change the rank of a pair.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"{what} must be (N, D), got {x.shape}")
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        row = bad[0] if numbers is None else numbers[bad[0]]
        long = " (its length is beyond what float64 holds)" if np.isfinite(x[bad[0]]).all() and lengths[bad[0]] else ""
        raise ValueError(f"{what} must be finite and of length > 0; row {row} is not{long}")
    return np.asarray(x / lengths)


def cosines(
    x: NDArray[np.float64], left: NDArray[np.intp], y: NDArray[np.float64], right: NDArray[np.intp], chunk: int = 4096
) -> NDArray[np.float32]:
    """x[left[i]] · y[right[i]] of rows of length one, (P,); in chunks, so that many pairs need no copy of all rows."""
    scores = np.empty(len(left), np.float32)
    for a in range(0, len(left), chunk):
        b = a + chunk
        scores[a:b] = np.einsum("pd,pd->p", x[left[a:b]], y[right[a:b]])
    return scores


def rows_and_ids(embeddings: ArrayLike, ids: ArrayLike) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """unit(embeddings) and the ids as an array, (N, D) and (N,); ValueError where they don't belong together."""
    shape, who = np.shape(embeddings), np.asarray(ids)
    if len(shape) != 2 or who.shape != shape[:1]:
        raise ValueError(f"embeddings must be (N, D) and ids (N,), got {shape} and {who.shape}")
    if who.dtype.kind == "f" and np.isnan(who).any():
        raise ValueError(f"ids must be known: the one of row {int(np.flatnonzero(np.isnan(who))[0])} is NaN")
    return unit(embeddings), who


def row_numbers(what: str, rows: ArrayLike, total: int) -> NDArray[np.intp]:
    """ValueError for what is no row numbers of so many rows."""
    found = np.asarray(rows)
    if len(found) and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= total):
        raise ValueError(f"{what} must be row numbers, integers from 0 to {total - 1}")
    return found.astype(np.intp)


def positive_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")


class Largest:
    """The `keep` largest of a stream of scores, ties and all, in memory for about three times as many."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.bound = -np.inf  # once `keep` scores are held, all of them are >= bound
        self._parts: list[Floats] = []
        self._held = 0

    def add(self, scores: Floats) -> None:
        """Scores of any shape. One that only equals the bound changes nothing, for `keep` others are no less."""
        part = scores.ravel() if self.bound == -np.inf else scores[scores > self.bound]
        self._parts.append(np.array(part))  # a copy: the caller may write over its block
        self._held += len(part)
        if self._held > 2 * self.keep:
            self._shrink()

    def _shrink(self) -> None:
        scores = np.concatenate(self._parts)
        if len(scores) > self.keep:
            scores = np.partition(scores, len(scores) - self.keep)[len(scores) - self.keep :].copy()
            self.bound = float(scores[0])
        self._parts, self._held = [scores], len(scores)

    def scores(self) -> Floats:
        """The largest, in no particular order: `keep` of them, or all where there were fewer."""
        if not self._parts:
            return np.empty(0, np.float32)
        self._shrink()
        return self._parts[0]
