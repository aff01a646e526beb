"""What a linear read-out finds in states: sets of nodes, and how much of a set it can find."""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Marks = NDArray[np.bool_]
RIDGE = 1e-2  # of the mean square of a state's numbers, for each example


def fit(states: Numbers, sets: Marks) -> Numbers:
    """(D + 1, N): ridge regression from states (n, D) to the marks of sets (n, N), with a constant."""
    x = _with_constant(states)
    gram = x.T @ x / len(x)
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram, x.T @ sets / len(x))


def score(probe: Numbers, states: Numbers) -> Numbers:
    """(n, N): higher for nodes that are likelier in the set."""
    return _with_constant(states) @ probe


def found(scores: Numbers, sets: Marks) -> Numbers:
    """(n,): of each set's k nodes, the share among the k highest scores (precision at k). No set may be empty."""
    order = np.argsort(-scores, axis=1, kind="stable")
    first = np.arange(sets.shape[1]) < sets.sum(axis=1, keepdims=True)
    return (np.take_along_axis(sets, order, axis=1) & first).sum(axis=1) / sets.sum(axis=1)


def held_one(sets: Marks) -> Numbers:
    """(n,): what `found` expects where one node of the set is known for certain and of the rest nothing."""
    k, n = sets.sum(axis=1), sets.shape[1]
    return (1 + (k - 1) ** 2 / (n - 1)) / k


def _with_constant(states: Numbers) -> Numbers:
    return np.concatenate([states, np.ones((len(states), 1))], axis=1)
