"""From seeds to an outcome: the rules that several experiments share. Fewer than MIN_SEEDS decide nothing."""

from collections.abc import Sequence

from ritornello.lab.report import Outcome
from ritornello.lab.statistics import MIN_SEEDS, greater, summarise

ALPHA = 0.05
MARGIN = 0.1  # of accuracy; a smaller difference isn't worth a claim, however certain


def reaches(values: Sequence[float], threshold: float) -> Outcome:
    """Whether the mean reaches `threshold`; refuted only where the whole 95% interval lies below it."""
    found = summarise(values)
    if found.n < MIN_SEEDS:
        return "inconclusive"
    if found.mean >= threshold:
        return "holds"
    return "does not hold" if found.high < threshold else "inconclusive"


def is_better(a: Sequence[float], b: Sequence[float]) -> tuple[Outcome, str]:
    """Whether `a` is better than `b` by MARGIN, and the test in words."""
    if min(len(a), len(b)) < MIN_SEEDS:
        return "inconclusive", f"none: {seeds(min(len(a), len(b)))}"
    difference, p = summarise(a).mean - summarise(b).mean, greater(a, b)
    test = f"exact one-sided permutation test, difference {difference:+.3f}, p = {p:.3g}"
    if difference < MARGIN:
        return "does not hold", test
    return ("holds" if p <= ALPHA else "inconclusive"), test


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """One failure decides; a doubt leaves it open."""
    for outcome in ("does not hold", "not tested at this scale", "inconclusive"):
        if outcome in outcomes:
            return outcome
    return "holds"


def shown(values: Sequence[float]) -> str:
    """mean ± sd over seeds"""
    found = summarise(values)
    return f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if found.n > 1 else "")


def seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"
