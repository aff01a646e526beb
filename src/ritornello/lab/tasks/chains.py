"""Disjoint chains; every node is asked for the terminal of its own."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids
from ritornello.lab.tasks.graphs import ForestTask, rename


class Chains(ForestTask):
    """One chain of a row has hops + 1 nodes and none has more; the others grow by random nodes.

    There are `n_chains` of them, or as many as it takes to hold all nodes where `hops` is small. Chance is guessing a
    terminal. Deep rows can be guessed better: the longest chain leaves few nodes to the others, and a terminal that no
    other node points to answers its own question only. By default, guessing among the rest gets 0.13 at 5 hops, 0.17
    at 16, 0.24 at 20 and everything at 24, where the other chains have one node each.
    """

    name = "chains"
    title = "end of a chain"

    def __init__(self, n_nodes: int = 32, n_chains: int = 8) -> None:
        require_int("n_nodes", n_nodes, 8)
        require_int("n_chains", n_chains, 2, n_nodes // 2)
        super().__init__(n_nodes)
        self.n_chains = n_chains
        self.max_hops = n_nodes - n_chains
        self.chance = 1 / n_chains

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        lengths = self._lengths(rng, hops)
        starts = lengths.cumsum(axis=1) - lengths
        places = np.arange(self.n_nodes)
        first = (places[:, None] == starts[:, None]).any(axis=2)
        return rename(rng, places - ~first)

    def _lengths(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(n, C): nodes of each chain, the longest first; 0 for chains that a row does without."""
        full = (hops + 1)[:, None]
        n_chains = np.maximum(self.n_chains, -(-self.n_nodes // full))
        lengths = (np.arange(n_chains.max()) < n_chains).astype(np.int64)
        lengths[:, :1] = full
        left = self.n_nodes - lengths.sum(axis=1)
        for placed in range(int(left.max())):
            growing = (lengths > 0) & (lengths < full)
            chosen = np.where(growing, rng.random(lengths.shape), -1).argmax(axis=1)
            lengths[np.arange(len(hops)), chosen] += placed < left
        return lengths
