"""Statistics of repeated runs: intervals, paired differences, correction for multiplicity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

CONFIDENCE = 0.95  # of every interval, two-sided
POWER, LEVEL = 0.8, 0.05  # of the one-sided tests: the power with which their reach is told, and below which p counts


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided confidence interval and, for differences, the one-sided p of "not above 0"."""

    mean: float
    low: float
    high: float
    n: int
    p: float = float("nan")


def mean_interval(values: ArrayLike) -> Estimate:
    """The mean of n values with Student's 95 % interval (n − 1 degrees of freedom); NaN ends for n < 2."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"values must be finite numbers (n,), one at least, got shape {x.shape}")
    if len(x) < 2:
        return Estimate(float(x.mean()), float("nan"), float("nan"), len(x))
    return _student(float(x.mean()), float(stats.sem(x)), len(x) - 1, len(x))


def _student(mean: float, error: float, freedom: int, n: int) -> Estimate:
    """A mean whose standard error has so many degrees of freedom; of an error of 0, p says where the mean lies."""
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    p = float(stats.t.sf(mean / error, freedom)) if error > 0 else float(mean <= 0)
    return Estimate(mean, mean - half, mean + half, n, p if freedom else float("nan"))


class TwoWay:
    """Runs as treatment + seed + noise, the noise of one spread for all treatments, by least squares.

    y (N,): a score a run; treatment, seed (N,): whose it is. What a seed gives to all treatments (its people, first
    weights, batches) is taken out, and the noise of all is pooled, so that a difference has the degrees of freedom of
    all runs and not those of its own few pairs.
    spread: the standard deviation of the noise;  freedom: its degrees of freedom
    """

    def __init__(self, y: ArrayLike, treatment: ArrayLike, seed: ArrayLike) -> None:
        values = np.asarray(y, dtype=np.float64)
        names, which = np.unique(np.asarray(treatment), return_inverse=True)
        seeds, when = np.unique(np.asarray(seed), return_inverse=True)
        if values.shape != which.shape or values.shape != when.shape or not np.isfinite(values).all():
            raise ValueError(f"a finite score, a treatment and a seed a run are needed, got shape {values.shape}")
        self.place = {str(name): i for i, name in enumerate(names)}
        design = np.hstack([np.eye(len(names))[which], np.eye(len(seeds))[when]])
        self.gram = design.T @ design
        self.inverse = np.linalg.pinv(self.gram)
        self.effects = self.inverse @ design.T @ values
        self.runs = np.bincount(which)
        self.freedom = len(values) - int(np.linalg.matrix_rank(design))
        rest = float(((values - design @ self.effects) ** 2).sum())
        self.spread = round(float(np.sqrt(rest / self.freedom)), 12) if self.freedom else float("nan")

    def difference(self, better: str, worse: str) -> Estimate:
        """better − worse, with the pooled spread; n: the runs of the one that has fewer. NaN ends where no run is left
        to tell the spread from; NaN throughout where no seeds connect the two, directly or through others."""
        a, b = self.place[better], self.place[worse]
        contrast = np.zeros(len(self.effects))
        contrast[a], contrast[b] = 1, -1
        n = int(min(self.runs[a], self.runs[b]))
        if not np.allclose(contrast @ self.inverse @ self.gram, contrast):
            return Estimate(float("nan"), float("nan"), float("nan"), n)
        mean = round(float(contrast @ self.effects), 12) + 0.0
        error = self.spread * float(np.sqrt(contrast @ self.inverse @ contrast))
        return _student(mean, error, self.freedom, n)

    def detectable(self, runs: int) -> float:
        """The true difference that a one-sided test on so many seeds of each treatment sees, with POWER at LEVEL."""
        return _detectable(self.freedom) * self.spread * float(np.sqrt(2 / runs))


def bootstrap_people(differences: ArrayLike, left: ArrayLike, right: ArrayLike, *, draws: int = 2000) -> Estimate:
    """Percentile interval of a mean difference over pairs of images, where people and seeds are drawn anew.

    differences (S, P): for S seeds and P pairs, such as "right with loss A" minus "right with loss B".
    left, right (P,): whose images the pair has, as numbers 0 … The images of a person stand or fall
    together, so people are drawn with replacement and a pair counts as often as its people were drawn: n_i
    times for a pair of one person, n_i n_j times for one of two (the subsets bootstrap of Bolle, Ratha and
    Pankanti, 2004, taken to people). Genuine and impostor pairs keep their halves of the mean. p is the
    share of draws whose difference is not above 0.
    """
    d = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    a, b = np.asarray(left), np.asarray(right)
    if d.shape[1:] != a.shape or a.shape != b.shape or not d.size:
        raise ValueError(f"differences must be (S, P), left and right (P,), got {d.shape}, {a.shape}, {b.shape}")
    sides = [(a == b) == kind for kind in (True, False) if ((a == b) == kind).any()]
    rng, people = np.random.default_rng(0), int(max(a.max(), b.max())) + 1
    found = np.empty(draws)
    for i in range(draws):
        weights = np.zeros(len(a))
        while not all(weights[side].any() for side in sides):  # of few people, a draw may hold no pair
            counts = np.bincount(rng.integers(people, size=people), minlength=people)
            weights = np.where(a == b, counts[a], counts[a] * counts[b])
        drawn = d[rng.integers(len(d), size=len(d))].mean(axis=0)
        found[i] = np.mean([np.average(drawn[side], weights=weights[side]) for side in sides])
    low, high = np.quantile(found, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    mean = float(np.mean([d[:, side].mean() for side in sides]))
    return Estimate(mean, float(low), float(high), people, float(np.mean(found <= 0)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of p-values for their number; order kept."""
    order, adjusted = np.argsort(ps, kind="stable"), np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(np.fmin(1.0, np.arange(len(ps), 0, -1) * np.asarray(ps)[order]))
    return adjusted.tolist()


def written(p: float) -> str:
    """A p of two digits, or of as many as it takes to say on which side of LEVEL it lies."""
    texts = (f"{p:.{digits}g}" for digits in range(2, 18))
    return next(text for text in texts if (float(text) < LEVEL) == (p < LEVEL))


def detectable_difference(differences: ArrayLike) -> float:
    """The true difference that a one-sided paired t-test on as many pairs sees, with POWER at LEVEL, where the
    differences spread as they do here (n >= 2): from the noncentral t distribution."""
    x = np.asarray(differences, dtype=np.float64)
    n = len(x)
    if n < 2:
        raise ValueError("two differences at least are needed to know their spread")
    return _detectable(n - 1) * float(x.std(ddof=1) / np.sqrt(n))


def _detectable(freedom: int) -> float:
    """The true value, in standard errors, that a one-sided t-test sees."""
    critical = stats.t.ppf(1 - LEVEL, freedom)
    return float(optimize.brentq(lambda d: stats.nct.sf(critical, freedom, d) - POWER, 0, 10 * critical + 10))
