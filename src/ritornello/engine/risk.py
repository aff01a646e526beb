"""Which thresholds keep a risk, told from a sample: Learn then Test (Angelopoulos et al., 2110.01052). Needs no model.

A risk is a number in [0, 1] for each sequence. The sequence is the unit: the tokens of one text are not independent.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def p_values(risks: ArrayLike, limit: float) -> NDArray[np.float64]:
    """Of the hypothesis that the mean risk of all sequences is > `limit`, in (0, 1), by Hoeffding and Bentkus
    (2101.02703, as used in 2110.01052): with r the mean of n risks,

        min(exp(-n KL(min(r, limit) ‖ limit)), e · P(Binomial(n, limit) <= ⌈n r⌉))

    where KL is of two coins. Valid for any distribution of the risks and any n.

    Args:
        risks: (..., n) in [0, 1], independent; or drawn without replacement, by which no convex function of their sum
            grows in the mean (Hoeffding 1963, theorem 4), and both bounds are of such functions.
    """
    from scipy import stats

    sample = np.asarray(risks, dtype=np.float64)
    n, total = sample.shape[-1], sample.sum(-1)
    hoeffding = np.exp(-n * _divergence(np.minimum(total / n, limit), limit))
    bentkus = np.e * stats.binom.cdf(np.ceil(total), n, limit)
    return np.minimum(hoeffding, np.minimum(bentkus, 1.0))


def n_rejected(ordered: Sequence[float] | NDArray[np.float64], level: float) -> int:
    """Fixed-sequence testing: how many hypotheses fall, one after the other, before the first that stands. That a true
    one is among them has a probability of at most `level`, if neither they nor their order depend on the sample.

    ordered: the p-value of each.
    """
    return next((i for i, p in enumerate(ordered) if not p <= level), len(ordered))


def n_needed(mean: float, limit: float, level: float) -> int | None:
    """So many sequences of this mean risk are enough; None: it is not below `limit`, and no number is."""
    if mean >= limit:
        return None
    return math.ceil(-math.log(level) / float(_divergence(np.asarray(mean), limit)))


def _divergence(a: NDArray[np.float64], b: float) -> NDArray[np.float64]:
    """KL, in nats, of a coin with probability a from one with b."""
    from scipy.special import xlogy

    return xlogy(a, a / b) + xlogy(1 - a, (1 - a) / (1 - b))
