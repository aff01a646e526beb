"""How many loops each sequence of a training batch runs: a function of (seed, step), whatever the number of processes.

The counts of one step are stratified: every batch holds the distribution's quantiles, not n independent draws, and they
are arranged so that contiguous slices of the batch (ranks, micro-batches) carry nearly equal sums.
"""

import numpy as np
from numpy.typing import NDArray

from ritornello.config import TrainConfig

Counts = NDArray[np.int64]
_QUADRATURE = 64  # nodes over the normal of a log-normal-Poisson


def generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Host random numbers addressed by (seed, step); streams are independent (Philox keeps no other state)."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, stream]))


def sample(train: TrainConfig, *, step: int, n_sequences: int, documents: NDArray[np.integer] | None = None) -> Counts:
    """Loop counts of the whole global batch at `step`, each in [min_loops, max_loops].

    Args:
        documents: (B, T) ids of a packed batch, B = n_sequences, negative = padding.

    Returns:
        (B,) by global sequence; (B, T), constant within each document, once any row holds several. Padding gets
        min_loops then.
    """
    rng = generator(train.seed, step)
    starts = None if documents is None else _starts(documents)
    if documents is None or starts is None:
        return _arrange(_quantiles(train, step=step, n=n_sequences, rng=rng), rng)
    assert documents.shape[0] == n_sequences
    by_document = _arrange(_quantiles(train, step=step, n=int(starts.sum()), rng=rng), rng)
    which = np.maximum(np.cumsum(starts.reshape(-1)).reshape(starts.shape) - 1, 0)
    return np.where(documents < 0, train.min_loops, by_document[which])


def mean_at(train: TrainConfig, *, step: int) -> float:
    """Curriculum: the mean grows linearly from min_loops to mean_loops over depth_ramp_steps."""
    return train.min_loops + (train.mean_loops - train.min_loops) * _ramp(train, step)


def _ramp(train: TrainConfig, step: int) -> float:
    return min(1.0, step / train.depth_ramp_steps) if train.depth_ramp_steps else 1.0


def _starts(documents: NDArray[np.integer]) -> NDArray[np.bool_] | None:
    """(B, T) first positions of documents; None if no row holds more than one."""
    starts = documents >= 0
    starts[:, 1:] &= documents[:, 1:] != documents[:, :-1]
    return starts if (starts.sum(axis=1) > 1).any() else None


def _quantiles(train: TrainConfig, *, step: int, n: int, rng: np.random.Generator) -> Counts:
    """(n,) ascending counts, one from each n-th part of the distribution at `step`."""
    u = (np.arange(n) + rng.random(n)) / n
    counts = train.min_loops + np.searchsorted(_cdf(train, step=step), u, side="right")
    return np.minimum(counts, train.max_loops)


def _cdf(train: TrainConfig, *, step: int) -> NDArray[np.float64]:
    """P(count <= min_loops + k) for k = 0 .. max_loops - min_loops; what lies outside is clipped to the ends.

    fixed: the rounded mean. uniform: [min_loops, max_loops], whose upper end takes the curriculum; mean_loops isn't
    read. poisson: max(1, Poisson(mean)) (Parcae, 2604.12946). lognormal_poisson: 1 + Poisson(exp N(ln m - s²/2, s))
    (Huginn, 2502.05171, §3.3) with m = mean - 1 where Huginn has m = mean, so that mean_loops is the mean.
    """
    low, high, mean = train.min_loops, train.max_loops, mean_at(train, step=step)
    counts = np.arange(low, high + 1)
    match train.depth:
        case "fixed":
            return (counts >= round(mean)).astype(np.float64)
        case "uniform":
            n = 1 + round((high - low) * _ramp(train, step))
            return np.minimum((counts - low + 1) / n, 1.0)
        case "poisson":
            return _poisson_cdf(np.array([mean]), np.array([1.0]), high)[low:]
        case "lognormal_poisson":
            nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
            sigma = train.depth_sigma
            rates = (mean - 1) * np.exp(sigma * nodes - sigma**2 / 2)
            return _poisson_cdf(rates, weights / weights.sum(), high)[low - 1 : -1]


def _poisson_cdf(rates: NDArray[np.float64], weights: NDArray[np.float64], high: int) -> NDArray[np.float64]:
    """P(N <= k) for k = 0 .. high, N a mixture of Poissons."""
    k = np.arange(high + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, high + 1)))])
    rates = np.maximum(rates, np.finfo(np.float64).tiny)[:, None]
    return np.cumsum(weights @ np.exp(k * np.log(rates) - rates - log_factorial))


def _arrange(ascending: Counts, rng: np.random.Generator) -> Counts:
    """A random order in which the contiguous halves carry nearly equal sums, and so do their halves, and so on.

    Neighbours in size are dealt one to each part, the most unequal ones first, the larger to the lighter part.
    A length with an odd factor is split by that factor last.
    """
    n = len(ascending)
    if n <= 1:
        return ascending
    p = next(p for p in range(2, n + 1) if n % p == 0)
    if p == n:
        return rng.permutation(ascending)
    groups = ascending.reshape(-1, p)
    sums = np.zeros(p, dtype=np.int64)
    parts = np.empty_like(groups)
    for i in np.argsort(groups[:, 0] - groups[:, -1], kind="stable"):
        lightest = np.argsort(sums, kind="stable")
        parts[i, lightest] = groups[i, ::-1]
        sums += parts[i]
    return np.concatenate([_arrange(np.sort(parts[:, j]), rng) for j in rng.permutation(p)])
