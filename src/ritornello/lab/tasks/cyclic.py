"""One cycle through all nodes; every node is asked for its k-th successor. The number of loops alone tells k."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids, Problems
from ritornello.lab.tasks.graphs import GraphTask, at_questions, nodes_like, read_parents, rename, walk
from ritornello.train.data import NO_LABEL


class Cyclic(GraphTask):
    """All questions of a row have the same k = hops. k stops short of N − 1, the hop backwards.

    All cycles look alike but for their names: no question is easier than another, and no answer likelier.
    """

    name = "cyclic"
    title = "k-th successor on a cycle"
    loops_say_hops = True

    def __init__(self, n_nodes: int = 24) -> None:
        require_int("n_nodes", n_nodes, 8)
        super().__init__(n_nodes)
        self.max_hops = n_nodes - 2
        self.chance = 1 / n_nodes

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        nodes = np.tile(np.arange(self.n_nodes), (len(hops), 1))
        return rename(rng, np.roll(nodes, -1, axis=1))

    def ask(self, parents: Ids, hops: Ids) -> tuple[Ids, Ids]:
        return walk(parents, hops), np.tile(hops[:, None], (1, self.n_nodes))

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By writing the cycle down as a list and counting k places on."""
        parents = read_parents(tokens)
        cycle = np.zeros_like(parents)
        for place in range(1, self.n_nodes):
            cycle[:, place] = np.take_along_axis(parents, cycle[:, place - 1 : place], axis=1)[:, 0]
        places = np.empty_like(cycle)
        np.put_along_axis(places, cycle, nodes_like(cycle), axis=1)
        answers = np.take_along_axis(cycle, (places + hops[:, None]) % self.n_nodes, axis=1)
        return at_questions(answers, NO_LABEL)

    def tell(self, problems: Problems) -> Ids:
        """k as the second id of each question, N + k."""
        tokens = problems.tokens.copy()
        tokens[:, self.n_nodes :, 1] += problems.hops[:, self.n_nodes :]
        return tokens
