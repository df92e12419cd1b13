"""Statistics of repeated runs: intervals, paired differences, correction for multiplicity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided confidence interval and, for differences, the one-sided p of "not above 0"."""

    mean: float
    low: float
    high: float
    n: int
    p: float = float("nan")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of n values with Student's t interval (n − 1 degrees of freedom); NaN ends for n < 2."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"values must be finite numbers (n,), one at least, got shape {x.shape}")
    if len(x) < 2:
        return Estimate(float(x.mean()), float("nan"), float("nan"), len(x))
    error = float(stats.sem(x))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1)) * error
    mean = float(x.mean())
    p = float(mean <= 0)  # where all values are equal
    if error > 0:
        p = float(stats.t.sf(mean / error, len(x) - 1))
    return Estimate(mean, mean - half, mean + half, len(x), p)


def paired_difference(better: ArrayLike, worse: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of better − worse over pairs (the same seed: the same people, weights and batches), with its
    interval and the one-sided p of the paired t-test against "not above 0"."""
    a, b = np.asarray(better, dtype=np.float64), np.asarray(worse, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs must match one to one, got {a.shape} and {b.shape}")
    return mean_interval(a - b, confidence)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of p-values for their number; order kept."""
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return [float(p) for p in adjusted]


def detectable_difference(differences: ArrayLike, power: float = 0.8, level: float = 0.05) -> float:
    """The true difference that a one-sided paired t-test on as many pairs sees with this power, where the
    differences spread as they do here (n >= 2): from the noncentral t distribution."""
    x = np.asarray(differences, dtype=np.float64)
    n = len(x)
    if n < 2:
        raise ValueError("two differences at least are needed to know their spread")
    critical = stats.t.ppf(1 - level, n - 1)
    shift = optimize.brentq(lambda d: stats.nct.sf(critical, n - 1, d) - power, 0, 10 * critical + 10)
    return float(shift * x.std(ddof=1) / np.sqrt(n))
