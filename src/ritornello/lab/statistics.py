"""What can be said of a few seeds: mean and spread, an interval, an exact comparison of two arms."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_SEEDS = 3  # below, no claim is decided
LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """Of one value per seed: its mean, its standard deviation (n - 1), and a 95% t interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f} (n = {self.n})"


def summarise(values: Sequence[float]) -> Summary:
    """With one value there is no spread: sd and interval are NaN."""
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    assert len(x) > 0
    if len(x) == 1:
        return Summary(float(x[0]), np.nan, np.nan, np.nan, 1)
    mean, sd = float(x.mean()), float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1)) * sd / len(x) ** 0.5
    return Summary(mean, sd, mean - half, mean + half, len(x))


def difference(a: Sequence[float], b: Sequence[float]) -> Summary:
    """Of the means of two samples, a - b, with Welch's 95% t interval; n is the smaller sample's, at least 2."""
    from scipy import stats

    one, other = summarise(a), summarise(b)
    assert min(one.n, other.n) > 1
    part, other_part = one.sd**2 / one.n, other.sd**2 / other.n
    mean, error = one.mean - other.mean, (part + other_part) ** 0.5
    if error == 0:
        return Summary(mean, 0.0, mean, mean, min(one.n, other.n))
    freedom = error**4 / (part**2 / (one.n - 1) + other_part**2 / (other.n - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Summary(mean, error, mean - half, mean + half, min(one.n, other.n))


def paired(gains: ArrayLike, weights: ArrayLike, *, n_draws: int = 10_000) -> Summary:
    """Of Σ gains / Σ weights over items drawn again with replacement: a percentile interval of 95%; sd, their spread.

    gains: after − before for each item; weights: its bytes, or 1. The same items give the same interval.
    """
    one, weight = np.asarray(gains, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    assert one.shape == weight.shape and one.ndim == 1
    draw, n = np.random.default_rng(0), len(one)
    size = max(1, 2**21 // n)
    blocks = (draw.integers(n, size=(min(size, n_draws - i), n)) for i in range(0, n_draws, size))
    means = np.concatenate([one[block].sum(1) / weight[block].sum(1) for block in blocks])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Summary(float(one.sum() / weight.sum()), float(means.std(ddof=1)), float(low), float(high), n)


def spread(by_seed: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The standard deviation (n - 1) over the last axis, one entry a seed; None with one seed."""
    return by_seed.std(-1, ddof=1) if by_seed.shape[-1] > 1 else None


def greater(a: Sequence[float], b: Sequence[float]) -> float:
    """p of the exact one-sided permutation test that the mean of `a` is greater than that of `b`.

    Exact for any distribution, ties included; with 3 seeds each it can't fall below 1/20, with 5 each 1/252.
    """
    from scipy import stats

    def of_means(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis=axis) - y.mean(axis=axis)

    samples = (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    found = stats.permutation_test(samples, of_means, vectorized=True, alternative="greater", n_resamples=np.inf)
    return float(found.pvalue)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's ρ; NaN where either does not vary."""
    from scipy import stats

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)
