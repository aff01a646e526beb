"""Random directed graphs given by their edges: from which of two sources can this node be reached?"""

import numpy as np
from numpy.typing import NDArray

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids, Problems, Task
from ritornello.train.data import NO_LABEL

Marks = NDArray[np.bool_]


class Reachability(Task):
    """Two sides of `n_side` nodes, each a source with nodes 1 to `hops` edges from it, and two sinks. A node below a
    source has two parents: one a level above it, one there or on its own level (itself, if there is no other). A sink
    has a parent on each side, so that there is a way between any two nodes for those who ignore direction.

    A row is all edges (parent, child) in random order, then each node but the sinks as a target, (N, target). The
    answer is the source that reaches it. The other one does not: a question is one yes and one no, so that guessing
    gets 1/2. Hops are the length of the shortest way. Sources, which two edges tie to themselves, are asked too, at 0
    hops. Every way up leads to the source: a search in breadth takes as many hops, one in depth may take more.
    """

    name = "reachability"
    title = "reachability in a graph"
    n_token_tables = 2
    chance = 1 / 2

    def __init__(self, n_side: int = 8) -> None:
        require_int("n_side", n_side, 6)
        self.n_side, self.n_nodes, self.max_hops = n_side, 2 * n_side + 2, n_side - 1
        self.n_edges, self.vocab_size = 2 * self.n_nodes, self.n_nodes + 1

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(n, 2N): the parents of each node, two and two."""
        n, m, places, sides = len(hops), self.n_side, np.arange(self.n_side), np.array([0, self.n_side])
        deepest = hops[:, None, None]
        level = np.where(places <= deepest, places, rng.integers(1, deepest + 1, size=(n, 2, m)))
        up = level[..., None] - level[..., None, :]  # (n, 2, m, m): from child to parent
        first = _any(rng, up == 1)
        second = _any(rng, (up >= 0) & (up <= 1) & (places != first[..., None]), last=places == places[:, None])
        below = np.stack([first, second], axis=3) + sides[:, None, None]
        sinks = rng.integers(m, size=(n, 2, 2)) + sides
        parents = np.concatenate([below.reshape(n, -1), sinks.reshape(n, -1)], axis=1)
        names = rng.permuted(np.tile(np.arange(self.n_nodes), (n, 1)), axis=1)
        return self._parents(np.stack([np.take_along_axis(names, parents, axis=1), names.repeat(2, axis=1)], axis=2))

    def _parents(self, edges: Ids) -> Ids:
        """(n, 2N): those in edges (n, 2N, 2), by child and then by name."""
        return np.sort(edges[..., 1] * self.n_nodes + edges[..., 0], axis=1) % self.n_nodes

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        children = np.tile(np.arange(self.n_nodes).repeat(2), (len(drawn), 1))
        order = rng.permuted(np.tile(np.arange(self.n_edges), (len(drawn), 1)), axis=1)
        edges = np.take_along_axis(np.stack([drawn, children], axis=2), order[..., None], axis=1)
        joined = self._joined(edges)
        sources = _sources(joined)
        found = _frontiers(joined, sources, self.n_side)
        reached, steps = found.any(axis=2), found.argmax(axis=2)  # (n, 2, N): from either source
        targets = np.nonzero(reached.sum(axis=1) == 1)[1].reshape(len(drawn), -1)
        answers = np.take_along_axis((reached * sources[..., None]).sum(axis=1), targets, axis=1)
        questions = np.stack([np.full_like(targets, self.n_nodes), targets], axis=2)
        needed = np.take_along_axis(steps.sum(axis=1), targets, axis=1)
        tokens = np.concatenate([edges, questions], axis=1)
        return Problems(tokens, self._asked(answers, NO_LABEL), self._asked(needed, 0))

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        return self._parents(tokens[:, : self.n_edges])

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By squaring the matrix of edges."""
        reach = self._joined(tokens[:, : self.n_edges]) | np.eye(self.n_nodes, dtype=bool)
        for _ in range(self.n_nodes.bit_length()):
            reach = reach.astype(np.float32) @ reach > 0
        source = reach & (reach.sum(axis=1) == 1)[..., None]  # nothing but itself reaches it
        answers = np.take_along_axis(source.argmax(axis=1), tokens[:, self.n_edges :, 1], axis=1)
        return self._asked(answers, NO_LABEL)

    def frontiers(self, tokens: Ids, n_hops: int, *, forwards: bool = False) -> Marks:
        """(n, Q, n_hops + 1, N): for each of the Q questions, with which rows end, the nodes whose distance to its
        target is 0, 1, … `n_hops`. `forwards`: (n, 2, n_hops + 1, N), those at these distances from each source."""
        joined = self._joined(tokens[:, : self.n_edges])
        if forwards:
            return _frontiers(joined, _sources(joined), n_hops)
        return _frontiers(joined.swapaxes(1, 2), tokens[:, self.n_edges :, 1], n_hops)

    def _joined(self, edges: Ids) -> Marks:
        """(n, N, N): from which node there is an edge to which."""
        joined = np.zeros((len(edges), self.n_nodes, self.n_nodes), dtype=bool)
        joined[np.arange(len(edges))[:, None], edges[..., 0], edges[..., 1]] = True
        return joined

    def _asked(self, values: Ids, fill: int) -> Ids:
        """(n, T): `values` (n, Q) where the questions are, `fill` where the edges are."""
        return np.pad(values, ((0, 0), (self.n_edges, 0)), constant_values=fill)


def _any(rng: np.random.Generator, allowed: Marks, last: Marks | bool = False) -> Ids:
    """A random place among those allowed on the last axis, one in `last` if there is no other; 0 if none is allowed."""
    return np.where(allowed, rng.random(allowed.shape) - last, -2).argmax(axis=-1)


def _sources(joined: Marks) -> Ids:
    """(n, 2): the nodes with no other parent than themselves."""
    return np.nonzero(joined.sum(axis=1) == 1)[1].reshape(-1, 2)


def _frontiers(joined: Marks, start: Ids, n_hops: int) -> Marks:
    """(n, Q, n_hops + 1, N): the nodes at each distance from `start` (n, Q)."""
    found = [start[..., None] == np.arange(joined.shape[1])]
    seen = found[0]
    for _ in range(n_hops):
        found.append((found[-1].astype(np.float32) @ joined > 0) & ~seen)
        seen = seen | found[-1]
    return np.stack(found, axis=2)
