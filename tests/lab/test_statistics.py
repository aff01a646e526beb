import math
from itertools import combinations

import numpy as np
import pytest

from ritornello.lab import judging
from ritornello.lab.statistics import difference, greater, paired, rank_correlation, summarise


def slow_permutation_p(a: list[float], b: list[float]) -> float:
    """The share of all relabellings whose difference of means is at least the one seen."""
    pool, n = a + b, len(a)
    seen = np.mean(a) - np.mean(b)
    differences = []
    for chosen in combinations(range(len(pool)), n):
        x = [pool[i] for i in chosen]
        y = [pool[i] for i in range(len(pool)) if i not in chosen]
        differences.append(np.mean(x) - np.mean(y))
    return float(np.mean([d >= seen - 1e-12 for d in differences]))


def test_summary_of_known_numbers() -> None:
    found = summarise([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    half = 4.302652729749462 / math.sqrt(3)  # t at .975 with 2 degrees of freedom
    assert found.low == pytest.approx(2 - half) and found.high == pytest.approx(2 + half)


def test_one_seed_has_no_spread() -> None:
    found = summarise([0.5])
    assert found.mean == 0.5 and math.isnan(found.sd) and math.isnan(found.low)


@pytest.mark.parametrize(
    ("a", "b"), [([0.9, 0.8, 0.95], [0.1, 0.2, 0.3]), ([0.5, 0.6, 0.5, 0.7], [0.55, 0.5, 0.5]), ([1.0] * 3, [1.0] * 3)]
)
def test_permutation_test_counts_relabellings(a: list[float], b: list[float]) -> None:
    assert greater(a, b) == pytest.approx(slow_permutation_p(a, b))


def test_control_the_slow_test_tells_directions_apart() -> None:
    assert slow_permutation_p([0.9, 0.8, 0.95], [0.1, 0.2, 0.3]) < 0.1 < slow_permutation_p([0.1, 0.2], [0.9, 0.8])


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 31]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 2, 3], [5, 5, 5]))


def test_reaches() -> None:
    assert judging.reaches([0.96, 0.97, 0.98], 0.95) == "holds"
    assert judging.reaches([0.10, 0.11, 0.12], 0.95) == "does not hold"
    assert judging.reaches([0.60, 0.99, 0.99], 0.95) == "inconclusive"
    assert judging.reaches([0.99, 0.99], 0.95) == "inconclusive"


def test_is_better_asks_for_margin_and_certainty() -> None:
    assert judging.is_better([0.9] * 5, [0.1] * 5)[0] == "holds"
    assert judging.is_better([0.9] * 5, [0.85] * 5)[0] == "does not hold"
    noisy = ([0.99, 0.99, 0.6], [0.98, 0.3, 0.97])  # .11 apart, and it could be anything
    assert judging.is_better(*noisy)[0] == "inconclusive"
    assert judging.is_better(noisy[1], noisy[0])[0] == "inconclusive"  # not refuted by a point estimate
    assert judging.is_better([0.9, 0.1, 0.9], [0.8, 0.1, 0.2])[0] == "inconclusive"
    assert judging.is_better([0.9], [0.1])[0] == "inconclusive"


def test_one_failure_decides() -> None:
    assert judging.all_of(["holds", "does not hold", "inconclusive"]) == "does not hold"
    assert judging.all_of(["holds", "inconclusive"]) == "inconclusive"
    assert judging.all_of(["holds", "holds"]) == "holds"


def test_welch_interval_is_scipys() -> None:
    from scipy import stats

    a, b = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.4]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = difference(a, b)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    same = difference([0.9] * 3, [0.5] * 3)
    assert (same.low, same.high) == pytest.approx((0.4, 0.4))


def test_same_models_are_compared_seed_by_seed() -> None:
    apart = [0.3, 0.6, 0.9]  # the seeds differ more than the ways
    assert judging.costs_at_most(apart, [x - 0.01 for x in apart], 0.02)[0] == "holds"
    assert judging.costs_at_most(apart, [x - 0.03 for x in apart], 0.02)[0] == "does not hold"
    assert judging.costs_at_most(apart, [0.1, 0.6, 0.9], 0.02)[0] == "inconclusive"
    assert judging.costs_at_most(apart[:2], apart[:2], 0.02)[0] == "inconclusive"
    assert judging.is_better_paired([x + 0.2 for x in apart], apart)[0] == "holds"
    assert judging.is_better_paired([x + 0.05 for x in apart], apart)[0] == "does not hold"
    assert judging.is_better_paired([0.9, 0.6, 0.9], apart)[0] == "inconclusive"


def test_paired_interval_of_a_mean() -> None:
    """Of means, the percentile interval comes near the t interval, and items pair."""
    draw = np.random.default_rng(1)
    before = draw.normal(size=400)
    after = before + draw.normal(0.1, 0.2, size=400)
    found, usual = paired(after - before, np.ones(400)), summarise(list(after - before))
    assert found.mean == pytest.approx(usual.mean) and found.n == 400
    assert found.low == pytest.approx(usual.low, abs=2e-3) and found.high == pytest.approx(usual.high, abs=2e-3)
    apart = difference(list(after), list(before))
    assert apart.low < 0 < found.low, "control: unpaired, nothing would be seen"


def test_paired_interval_of_a_ratio() -> None:
    found = paired([1.0, 2.0, 3.0], [1.0, 1.0, 2.0])
    assert found.mean == 1.5 and found == paired([1.0, 2.0, 3.0], [1.0, 1.0, 2.0])
    assert 1 <= found.low < found.high <= 2


def test_paired_interval_covers() -> None:
    """95% of them hold the truth, about."""
    draw = np.random.default_rng(2)
    held = [paired(draw.normal(1, 2, size=60), np.ones(60), n_draws=300) for _ in range(300)]
    assert 0.90 < np.mean([x.low < 1 < x.high for x in held]) < 0.98
