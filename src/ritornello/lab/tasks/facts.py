"""Facts held in the weights: every node's successor has to be learnt, and is never shown."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids, Problems, Split, Task, draw_split
from ritornello.lab.tasks.graphs import rename, walk

N_QUESTIONS = 32  # in a row


class Facts(Task):
    """The facts are one cycle through all nodes, fixed by `seed`. A row holds independent questions (node, 0), all for
    the k-th successor, k being told by the number of loops alone and short of the hop backwards.

    Train and test differ in questions, not in rows: a pair (node, k) belongs to one of them. At k = 1 the questions are
    the facts themselves, and in both. About an eighth of the nodes are left for the test of each k, so its questions
    repeat a few dozen different ones.
    """

    name = "facts"
    title = "k-th successor from memory"
    loops_say_hops = True
    n_token_tables = 2
    shared_hops = 1

    def __init__(self, n_nodes: int = 256, seed: int = 0) -> None:
        require_int("n_nodes", n_nodes, 32)
        require_int("seed", seed, 0)
        self.n_nodes = self.vocab_size = n_nodes
        self.max_hops = 30
        self.chance = 1 / n_nodes
        nodes = np.arange(n_nodes)[None]
        self.successors = rename(np.random.default_rng(seed), np.roll(nodes, -1, axis=1))[0]  # (N,)

    def sample(self, rng: np.random.Generator, hops: Ids, *, split: Split) -> Problems:
        self.check(hops, split)
        each = np.repeat(hops, N_QUESTIONS)
        return self.present(rng, draw_split(self.draw, rng, each, split, shared_hops=self.shared_hops), hops)

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(m, 2): a question (node, k) for each entry of `hops` (m,)."""
        return np.stack([rng.integers(self.n_nodes, size=len(hops)), hops], axis=1)

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        nodes, k = drawn.reshape(len(hops), N_QUESTIONS, 2).transpose(2, 0, 1)
        table = walk(np.tile(self.successors, (len(hops), 1)), hops)
        return Problems(np.stack([nodes, np.zeros_like(nodes)], axis=2), np.take_along_axis(table, nodes, axis=1), k)

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        """(m, 2): every question (node, k)."""
        nodes = tokens[..., 0]
        pairs = np.stack([nodes, np.broadcast_to(hops[:, None], nodes.shape)], axis=2)
        return pairs[hops > self.shared_hops].reshape(-1, 2)

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By the binary digits of k, squaring the successor map."""
        node, power = tokens[..., 0], self.successors
        for digit in range(int(hops.max()).bit_length()):
            node = np.where(hops[:, None] >> digit & 1, power[node], node)
            power = power[power]
        return node

    def tell(self, problems: Problems) -> Ids:
        """k as the second id of each question."""
        return np.stack([problems.tokens[..., 0], problems.hops], axis=2)
