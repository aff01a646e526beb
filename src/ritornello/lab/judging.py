"""From seeds to an outcome: the rules that several experiments share. Fewer than MIN_SEEDS decide nothing."""

from collections.abc import Mapping, Sequence

import numpy as np

from ritornello.lab.report import Outcome
from ritornello.lab.statistics import MIN_SEEDS, Summary, difference, greater, summarise

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


def is_better(a: Sequence[float], b: Sequence[float], margin: float = MARGIN) -> tuple[Outcome, str]:
    """Whether the models of `a` are better than those of `b` by `margin`, and the test in words.

    Refuted only where the 95% interval of the difference (Welch) lies below `margin`.
    """
    if min(len(a), len(b)) < MIN_SEEDS:
        return "inconclusive", f"none: {seeds(min(len(a), len(b)))}"
    found, p = difference(a, b), greater(a, b)
    test = f"exact one-sided permutation test, difference {interval(found)}, p = {p:.3g}"
    if found.mean >= margin and p <= ALPHA:
        return "holds", test
    return ("does not hold" if found.high < margin else "inconclusive"), test


def is_better_paired(a: Sequence[float], b: Sequence[float], *, margin: float = MARGIN) -> tuple[Outcome, str]:
    """Whether pairs, one a seed, are better in `a` than in `b` by `margin`: a model used in two ways, or two arms."""
    if len(a) < MIN_SEEDS:
        return "inconclusive", f"none: {seeds(len(a))}"
    found = paired(a, b)
    test = f"95% t interval of the paired difference {interval(found)}"
    if found.mean >= margin and found.low > 0:
        return "holds", test
    return ("does not hold" if found.high < margin else "inconclusive"), test


def costs_at_most(before: Sequence[float], after: Sequence[float], cheap: float) -> tuple[Outcome, str]:
    """Whether pairs, one a seed, lose at most `cheap` from `before` to `after`: one model in two ways, or two arms."""
    if len(before) < MIN_SEEDS:
        return "inconclusive", f"none: {seeds(len(before))}"
    lost = paired(before, after)
    test = f"95% t interval of the paired loss {interval(lost)} against {cheap}"
    if lost.high <= cheap:
        return "holds", test
    return ("does not hold" if lost.low > cheap else "inconclusive"), test


def all_cost_at_most(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], cheap: float) -> tuple[Outcome, str]:
    """`costs_at_most` of each (before, after) by its name; one that fails decides."""
    judged = {name: costs_at_most(before, after, cheap) for name, (before, after) in pairs.items()}
    test = "; ".join(f"{name}: {said}" for name, (_, said) in judged.items())
    return all_of([outcome for outcome, _ in judged.values()]), test


def paired(a: Sequence[float], b: Sequence[float]) -> Summary:
    """Of a - b, pair by pair."""
    return summarise((np.asarray(a) - np.asarray(b)).tolist())


def side(found: Summary, threshold: float) -> Outcome:
    """Whether the whole 95% interval lies above `threshold`; refuted where it lies below."""
    return "holds" if found.low > threshold else "does not hold" if found.high < threshold else "inconclusive"


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """One failure decides; a doubt leaves it open."""
    for outcome in ("does not hold", "not tested at this scale", "inconclusive"):
        if outcome in outcomes:
            return outcome
    return "holds"


def listed(values: Sequence[float], digits: int = 2) -> str:
    """Each seed's"""
    return " ".join(f"{value:.{digits}f}" for value in values)


def shown(values: Sequence[float]) -> str:
    """mean ± sd over seeds"""
    if not values:
        return "–"
    found = summarise(values)
    return f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if found.n > 1 else "")


def interval(found: Summary) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"
