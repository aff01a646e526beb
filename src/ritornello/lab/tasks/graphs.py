"""Functional graphs as tokens: N nodes, each with one parent, written as N edges in random order and N questions.

An edge is (node, parent). A question about a node is (N + node, N); its answer is wanted at its own position. Node
names and the order of edges are random, so that nothing but following edges tells one node from another.
"""

from abc import abstractmethod

import numpy as np

from ritornello.lab.tasks.base import Ids, Problems, Task
from ritornello.train.data import NO_LABEL

N_GUESSED = 200  # problems over which guessing is averaged


class GraphTask(Task):
    """A task about one graph per row, the same graph for every order of its edges."""

    n_token_tables = 2

    def __init__(self, n_nodes: int) -> None:
        self.n_nodes = n_nodes
        self.vocab_size = 2 * n_nodes

    @abstractmethod
    def ask(self, parents: Ids, hops: Ids) -> tuple[Ids, Ids]:
        """Answer and difficulty of the question about each node, both (n, N)."""

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        answers, difficulty = self.ask(drawn, hops)
        return Problems(edge_tokens(rng, drawn), at_questions(answers, NO_LABEL), at_questions(difficulty, 0))

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        return read_parents(tokens)


class ForestTask(GraphTask):
    """Every node is asked for the root that its parents lead to; a question's hops are its node's depth.

    Roots are their own parents. They are asked too, at 0 hops.
    """

    def ask(self, parents: Ids, hops: Ids) -> tuple[Ids, Ids]:
        node = nodes_like(parents)
        depth = np.zeros_like(parents)
        for _ in range(int(hops.max())):
            above = np.take_along_axis(parents, node, axis=1)
            depth += above != node
            node = above
        return node, depth

    def guessing(self, hops: int) -> float:
        """Among the roots that some other node points to; the longest path leaves few nodes to the others."""
        deepest = np.full(N_GUESSED, max(hops, self.train_hops))
        found = self.sample(np.random.default_rng(0), deepest, split="test")
        right = [
            1 / len(np.unique(answers[depth > 0])) for answers, depth in zip(found.answers, found.hops, strict=True)
        ]
        return float(np.average(right, weights=(found.hops == hops).sum(axis=1)))

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By pointer doubling."""
        ancestors = read_parents(tokens)
        for _ in range(self.n_nodes.bit_length()):
            ancestors = np.take_along_axis(ancestors, ancestors, axis=1)
        return at_questions(ancestors, NO_LABEL)


def nodes_like(parents: Ids) -> Ids:
    """(n, N): 0 … N−1 in every row."""
    return np.tile(np.arange(parents.shape[1]), (len(parents), 1))


def rename(rng: np.random.Generator, parents: Ids) -> Ids:
    """The same graphs (n, N) under random names."""
    names = rng.permuted(nodes_like(parents), axis=1)
    renamed = np.empty_like(parents)
    np.put_along_axis(renamed, names, np.take_along_axis(names, parents, axis=1), axis=1)
    return renamed


def edge_tokens(rng: np.random.Generator, parents: Ids) -> Ids:
    """(n, 2N, 2): the edges of `parents` (n, N) in random order, then one question for each node."""
    nodes = nodes_like(parents)
    sources = rng.permuted(nodes, axis=1)
    edges = np.stack([sources, np.take_along_axis(parents, sources, axis=1)], axis=2)
    questions = np.stack([nodes + parents.shape[1], np.full_like(nodes, parents.shape[1])], axis=2)
    return np.concatenate([edges, questions], axis=1)


def read_parents(tokens: Ids) -> Ids:
    """(n, N) from tokens (n, 2N, 2)."""
    edges = tokens[:, : tokens.shape[1] // 2]
    parents = np.empty(edges.shape[:2], dtype=np.int64)
    np.put_along_axis(parents, edges[..., 0], edges[..., 1], axis=1)
    return parents


def walk(parents: Ids, k: Ids) -> Ids:
    """(n, N): where k (n,) hops from each node lead."""
    node = nodes_like(parents)
    for hop in range(int(k.max())):
        node = np.where(hop < k[:, None], np.take_along_axis(parents, node, axis=1), node)
    return node


def at_questions(values: Ids, fill: int) -> Ids:
    """(n, 2N): `values` (n, N) where the questions are, `fill` where the edges are."""
    return np.concatenate([np.full_like(values, fill), values], axis=1)
