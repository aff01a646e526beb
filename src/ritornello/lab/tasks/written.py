"""Disjoint chains followed in writing: every node asks for the next one, so that what is written is asked next."""

import numpy as np

from ritornello.lab.tasks.base import Ids, Problems
from ritornello.lab.tasks.chains import Chains
from ritornello.lab.tasks.graphs import GraphTask, at_questions, edge_tokens, nodes_like, read_parents
from ritornello.train.data import NO_LABEL


class WrittenChains(GraphTask):
    """The graphs of Chains, in the same split. After the edges a row follows chains from their nodes to their ends, one
    after the other, as far as there is room: N tokens, each written as a question is, (N + node, N). At each the next
    node is asked for; an end answers itself, which ends its chain.

    A question's hops are those to the end of its chain, all but the first of which are asked by the tokens after it.
    The first chain of a row starts from a node as deep as the row's hops, the others from random nodes.
    """

    name = "written-chains"
    title = "end of a chain, written hop by hop"

    def __init__(self, n_nodes: int = 32, n_chains: int = 8) -> None:
        self.chains = Chains(n_nodes, n_chains)
        super().__init__(n_nodes)
        self.max_hops = self.chains.max_hops
        self.chance = 1 / n_nodes

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        return self.chains.draw(rng, hops)

    def ask(self, parents: Ids, hops: Ids) -> tuple[Ids, Ids]:
        return parents, self.chains.ask(parents, hops)[1]

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        answers, depth = self.ask(drawn, hops)
        tokens = edge_tokens(rng, drawn)
        nodes = self._follow(rng, drawn, depth)
        tokens[:, self.n_nodes :, 0] = self.n_nodes + nodes
        written = (np.take_along_axis(values, nodes, axis=1) for values in (answers, depth))
        return Problems(tokens, *(at_questions(x, fill) for x, fill in zip(written, (NO_LABEL, 0), strict=True)))

    def _follow(self, rng: np.random.Generator, parents: Ids, depth: Ids) -> Ids:
        """(n, N): the node at each place after the edges."""
        starts = rng.permuted(nodes_like(parents), axis=1)
        starts[:, 0] = (depth + rng.random(depth.shape)).argmax(axis=1)
        rows, chain = np.arange(len(parents)), np.zeros(len(parents), np.int64)
        nodes = np.empty_like(parents)
        nodes[:, 0] = starts[:, 0]
        for place in range(1, self.n_nodes):
            before = nodes[:, place - 1]
            above = parents[rows, before]
            chain += above == before
            nodes[:, place] = np.where(above == before, starts[rows, chain], above)
        return nodes

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        return read_parents(tokens)

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By looking for the edge that each node is the source of."""
        edges, asked = tokens[:, : self.n_nodes], tokens[:, self.n_nodes :, 0] - self.n_nodes
        place = (edges[:, None, :, 0] == asked[:, :, None]).argmax(axis=2)
        return at_questions(np.take_along_axis(edges[..., 1], place, axis=1), NO_LABEL)
