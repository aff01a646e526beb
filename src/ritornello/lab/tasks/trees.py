"""Random recursive forests; every node is asked for the root of its tree."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids
from ritornello.lab.tasks.graphs import ForestTask, rename


class Trees(ForestTask):
    """A row begins as a path of `hops` edges and `n_roots` roots, the path's among them. One by one, the other nodes
    attach to a random earlier node of depth < hops.

    Chance is guessing a root. Deep rows can be guessed better: the path leaves few nodes to the other trees, and a root
    that no other node points to answers its own question only. By default, guessing among the rest gets 0.31 at 5 hops,
    0.44 at 12, 0.65 at 20 and 0.83 at 24.
    """

    name = "trees"
    title = "root of a tree"

    def __init__(self, n_nodes: int = 32, n_roots: int = 4) -> None:
        require_int("n_nodes", n_nodes, 8)
        require_int("n_roots", n_roots, 2, n_nodes // 4)
        super().__init__(n_nodes)
        self.n_roots = n_roots
        self.max_hops = n_nodes - 2 * n_roots  # leaves a node for each root
        self.chance = 1 / n_roots

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        places, deepest = np.arange(self.n_nodes), hops[:, None]
        parents = np.where(places <= deepest, np.maximum(places - 1, 0), places)
        depth = np.where(places <= deepest, places, 0)
        for place in range(int(hops.min()) + self.n_roots, self.n_nodes):
            rows = np.flatnonzero(hops + self.n_roots <= place)
            shallow = depth[rows, :place] < deepest[rows]
            chosen = np.where(shallow, rng.random(shallow.shape), -1).argmax(axis=1)
            parents[rows, place] = chosen
            depth[rows, place] = depth[rows, chosen] + 1
        return rename(rng, parents)
