"""A promise about risk is kept as often as it says, by simulation with risks that are known."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ritornello.engine.risk import n_needed, n_rejected, p_values

LIMIT, N, TRIALS = 0.1, 100, 4000
Sampler = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]


def without_replacement(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """From a text of 130 sequences, a tenth of which are all wrong."""
    return rng.permuted(np.tile(np.arange(130) % 10 == 0, (shape[0], 1)), axis=1)[:, : shape[1]].astype(float)


SAMPLERS: dict[str, Sampler] = {  # of mean LIMIT
    "coins": lambda rng, shape: (rng.random(shape) < LIMIT).astype(float),
    "constant": lambda rng, shape: np.full(shape, LIMIT),
    "rare": lambda rng, shape: (rng.random(shape) < 2 * LIMIT) * 0.5,
    "beta": lambda rng, shape: rng.beta(0.5, 4.5, shape),
    "even": lambda rng, shape: rng.random(shape) * 2 * LIMIT,
    "without replacement": without_replacement,
}


def normal_p_values(risks: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """What is usual, and only right for large samples."""
    error = risks.std(-1, ddof=1) / risks.shape[-1] ** 0.5
    return stats.norm.cdf((risks.mean(-1) - limit) / np.maximum(error, 1e-12))


def excess(p: NDArray[np.float64]) -> float:
    """By how many standard errors a p-value is small too often, at the worst of some levels."""
    levels = np.array([0.005, 0.01, 0.05, 0.1, 0.3])
    share = (p[:, None] <= levels).mean(0)
    return float(((share - levels) / np.sqrt(levels * (1 - levels) / len(p))).max())


@pytest.mark.parametrize("kind", SAMPLERS)
def test_p_values_are_small_no_more_often_than_they_say(kind: str) -> None:
    risks = SAMPLERS[kind](np.random.default_rng(0), (TRIALS, N))
    assert excess(p_values(risks, LIMIT)) < 4
    assert np.isfinite(p_values(risks, LIMIT)).all()


def test_control_usual_p_values_are_small_too_often() -> None:
    risks = SAMPLERS["coins"](np.random.default_rng(0), (TRIALS, 30))
    assert excess(normal_p_values(risks, LIMIT)) > 20
    assert excess(p_values(risks, LIMIT)) < 4


def test_p_values_are_never_below_the_exact_ones_of_coins() -> None:
    loose = 0
    for n in (1, 7, 59, 200):
        for limit in (0.01, 0.05, 0.3, 0.9):
            heads = np.arange(n + 1)
            coins = (np.arange(n) < heads[:, None]).astype(float)
            found, exact = p_values(coins, limit), stats.binom.cdf(heads, n, limit)
            assert (found >= exact * (1 - 1e-9)).all() and (found <= 1).all()
            assert (np.diff(found) >= -1e-12).all(), "more risk, less evidence"
            loose += int((found / np.e < exact).sum())
    assert loose > 100  # control: not by a wide margin, so that without its factor e it would be


def test_a_known_value() -> None:
    """No risk in 59 sequences is the first to show a risk of at most 5% with 95% confidence."""
    assert p_values(np.zeros(59), 0.05) == pytest.approx(0.95**59)
    assert float(p_values(np.zeros(59), 0.05)) <= 0.05 < float(p_values(np.zeros(58), 0.05))


@pytest.mark.parametrize("mean", [0.0, 0.01, 0.03, 0.049])
def test_as_many_as_are_needed_are_enough(mean: float) -> None:
    n = n_needed(mean, 0.05, 0.05)
    assert n is not None and float(p_values(np.full(n, mean), 0.05)) <= 0.05
    assert float(p_values(np.full(n // 2, mean), 0.05)) > 0.05
    assert n_needed(0.05, 0.05, 0.05) is None and n_needed(0.5, 0.05, 0.05) is None


def test_the_first_that_stands_ends_the_sequence() -> None:
    assert n_rejected([0.01, 0.05, 0.06, 0.01], 0.05) == 2
    assert n_rejected([0.06, 0.01], 0.05) == 0 and n_rejected([], 0.05) == 0
    assert n_rejected([0.01, float("nan"), 0.01], 0.05) == 1
    assert n_rejected([0.01, 0.01], 0.05) == 2


N_CALIBRATIONS, LEVEL, N_THRESHOLDS = 300, 0.1, 24
TRUE = np.concatenate([np.linspace(0, 0.06, 8), np.full(N_THRESHOLDS - 8, LIMIT * 1.001)])  # most are just too risky


def by_fixed_sequence(p: NDArray[np.float64], risks: NDArray[np.float64]) -> int:
    return n_rejected(p, LEVEL) - 1


def anywhere(p: NDArray[np.float64], risks: NDArray[np.float64]) -> int:
    return max(np.flatnonzero(p <= LEVEL), default=-1)


def by_the_mean(p: NDArray[np.float64], risks: NDArray[np.float64]) -> int:
    return max(np.flatnonzero(risks.mean(-1) <= LIMIT), default=-1)


def violations(choose: Callable[..., int], *, alike: bool) -> tuple[float, float]:
    """The shares of calibrations whose threshold is too risky, and that found any. alike: a sequence that fails under
    one threshold fails under all riskier ones; else the risks of a sequence have nothing to do with each other."""
    rng, broken, found = np.random.default_rng(1), 0, 0
    for _ in range(N_CALIBRATIONS):
        draws = rng.random((1 if alike else N_THRESHOLDS, 200))
        risks = (draws < TRUE[:, None]).astype(float)
        chosen = choose(p_values(risks, LIMIT), risks)
        found += chosen >= 0
        broken += chosen >= 0 and bool(TRUE[chosen] > LIMIT)
    return broken / N_CALIBRATIONS, found / N_CALIBRATIONS


@pytest.mark.parametrize("alike", [True, False])
def test_a_promise_is_broken_no_more_often_than_it_says(alike: bool) -> None:
    broken, found = violations(by_fixed_sequence, alike=alike)
    assert broken <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / N_CALIBRATIONS) ** 0.5
    assert found > 0.9  # it does not keep it by promising nothing


@pytest.mark.parametrize("choose", [anywhere, by_the_mean])
def test_control_it_is_where_one_picks_the_best(choose: Callable[..., int]) -> None:
    broken, _ = violations(choose, alike=False)
    assert broken > 2 * LEVEL
