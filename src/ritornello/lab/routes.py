"""Which experts a token takes in each loop: how far that changes, what it goes with, and what it is worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.lab.cell import TEST_SEED
from ritornello.lab.measure import STREAM
from ritornello.lab.tasks import Task
from ritornello.lab.tasks.base import Ids
from ritornello.lab.tasks.graphs import read_parents, walk
from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.layers import Layer
from ritornello.model.moe import MixtureOfExperts
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.train import depth
from ritornello.train.data import NO_LABEL
from ritornello.train.evaluate import evaluating

N_AHEAD = 5  # so many hops may a walk be ahead of its loops: prelude and first loop may take one each
N_SHUFFLES = 8  # over which a control by shuffled labels is averaged
Sets = NDArray[np.bool_]
Forced = Literal["held", "swapped"]
FORCED: tuple[Forced, ...] = get_args(Forced)


@dataclass(frozen=True)
class Routes:
    """Of N tokens in L loops among E experts.

    sets (L, N, E): the experts that each token takes in each loop. elsewhere: mean overlap of a token's experts in a
    loop with those that the same state would take if it were told another loop index (of training's). asked (N,):
    whether it is a question; hops (N,): the question's, else 0. nodes (K, questions): where k hops from each lead.
    """

    sets: Sets
    elsewhere: float
    asked: NDArray[np.bool_]
    hops: Ids
    nodes: Ids

    def consecutive(self, chosen: NDArray[np.bool_] | None = None) -> list[float]:
        """Mean overlap of each token's experts in each loop with those of the next; of the `chosen` (N,) tokens."""
        sets = self.sets if chosen is None else self.sets[:, chosen]
        return overlap(sets[:-1], sets[1:]).mean(-1).tolist()

    def from_first(self) -> list[float]:
        """Mean overlap of each token's experts in the first loop with those of each later one."""
        return overlap(self.sets[:1], self.sets[1:]).mean(-1).tolist()

    def of_two_loops(self) -> float:
        """Mean overlap of a token's experts in two different loops, all pairs: of consecutive ones without order."""
        i, j = np.triu_indices(len(self.sets), 1)
        return float(overlap(self.sets[i], self.sets[j]).mean())

    def of_two_tokens(self) -> float:
        """Mean overlap of the experts of two different tokens of the same role in consecutive loops, all pairs: what
        load and role alone would give."""
        found = []
        for role in (self.asked, ~self.asked):
            for now, then in zip(self.sets[:-1, role], self.sets[1:, role], strict=True):
                both = now.astype(np.float32) @ then.T.astype(np.float32)
                all_pairs = both / (now.sum(-1)[:, None] + then.sum(-1) - both)
                found.append((all_pairs.sum() - all_pairs.trace()) / (all_pairs.size - len(both)))
        return float(np.mean(found))

    def on_their_way(self) -> tuple[float, float]:
        """Mean overlap of consecutive loops of questions that had hops left before the first of the two, and of those
        that had none: over the loops, but the first, before which there were both."""
        pairs = []
        for done in range(1, len(self.sets) - 1):
            groups = (self.hops > done, (self.hops > 0) & (self.hops <= done))
            if all(group.any() for group in groups):
                pairs.append([self.consecutive(group)[done] for group in groups])
        moving, arrived = np.mean(pairs, axis=0)
        return float(moving), float(arrived)

    def load(self) -> NDArray[np.float64]:
        """(L, E): tokens that each expert gets in each loop, as a multiple of an equal share."""
        counts = self.sets.sum(1)
        return counts / counts.mean(-1, keepdims=True)

    def entropy(self) -> list[float]:
        """By loop, in bits, of the expert of a random token; log2(E) where all get as much."""
        return [entropy(shares / shares.sum()) for shares in self.load()]

    def about_loops(self) -> float:
        """Bits that an expert tells about the loop index, beyond what it tells when each token's loops are shuffled."""
        n_loops, n_tokens, _ = self.sets.shape
        index = np.broadcast_to(np.arange(n_loops)[:, None], (n_loops, n_tokens))
        return beyond_chance(index, self.sets, lambda rng: rng.permuted(index, axis=0))

    def about_roles(self) -> float:
        """Bits that an expert tells about a token's role, question or edge, given the loop; beyond shuffled roles."""
        return float(np.mean([_about(self.asked, sets) for sets in self.sets]))

    def about_hops_left(self) -> float:
        """Bits that an expert tells about the hops that a question has left, given the loop; beyond shuffled questions.
        Over the loops before which some question has hops left."""
        asked = self.hops > 0
        left = [np.maximum(self.hops[asked] - done, 0) for done in range(min(len(self.sets), self.hops.max()))]
        return float(np.mean([_about(hops, self.sets[done, asked]) for done, hops in enumerate(left)]))

    def about_nodes(self) -> NDArray[np.float64]:
        """(L, K): bits that an expert of each loop tells about the node k hops on from a question's; beyond shuffled
        questions."""
        return np.array([[_about(nodes, sets[self.asked]) for nodes in self.nodes] for sets in self.sets])


def _about(labels: NDArray[Any], sets: Sets) -> float:
    return beyond_chance(labels, sets, lambda rng: rng.permutation(labels))


def overlap(a: Sets, b: Sets) -> NDArray[np.float64]:
    """Jaccard: the share of the experts in either set (..., E) that are in both."""
    return (a & b).sum(-1) / (a | b).sum(-1)


def entropy(shares: NDArray[np.float64]) -> float:
    """In bits."""
    kept = shares[shares > 0]
    return float(-(kept * np.log2(kept)).sum())


def information(labels: NDArray[Any], sets: Sets) -> float:
    """Mutual information in bits of a label (...) and one of the experts that go with it, sets (..., E)."""
    _, index = np.unique(labels.ravel(), return_inverse=True)
    joint = np.zeros((index.max() + 1, sets.shape[-1]))
    np.add.at(joint, index, sets.reshape(-1, sets.shape[-1]))
    joint /= joint.sum()
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel())


def beyond_chance(labels: NDArray[Any], sets: Sets, shuffle: Any) -> float:
    """`information` less what it is on the mean with labels `shuffle(rng)`: with few tokens chance alone tells some."""
    rng = np.random.default_rng(0)
    return information(labels, sets) - float(np.mean([information(shuffle(rng), sets) for _ in range(N_SHUFFLES)]))


@torch.no_grad()
def observe(model: RecurrentDepthTransformer, task: Task, hops: int, *, n_loops: int, n_problems: int) -> Routes:
    """Of `n_problems` test problems of depth `hops`, on graphs. The model has one recurrent layer, of experts."""
    found = task.sample(depth.generator(TEST_SEED, hops, STREAM), np.full(n_problems, hops), split="test")
    run = Run(Depth.uniform(n_loops))
    with evaluating(model):
        tokens = torch.from_numpy(found.tokens)
        x = model.embed(tokens)
        context = model.context(x, tokens=tokens)
        e = model.prelude(x, context, Passing())
        states = [model.start(e, context, torch.arange(len(e)), run), *model.iterate(e, context, run)]
        taken = [_sets(model, state.routed[0].indices) for state in states[1:]]
        elsewhere = []
        n_trained = model.config.n_loops
        for here, (state, sets) in enumerate(zip(states[:n_trained], taken[:n_trained], strict=False)):
            for loop in [loop for loop in range(n_trained) if loop != here]:
                _, routed = model.loop_once(state.h, e, loop, context, Passing())
                elsewhere.append(overlap(sets, _sets(model, routed[0].indices)).mean())
    asked, parents = (found.answers != NO_LABEL).ravel(), read_parents(found.tokens)
    nodes = [walk(parents, np.full(n_problems, k)).ravel() for k in range(n_loops + N_AHEAD)]
    return Routes(np.stack(taken), float(np.mean(elsewhere)), asked, found.hops.ravel(), np.stack(nodes))


def _sets(model: RecurrentDepthTransformer, indices: Tensor) -> Sets:
    """indices (B, T, k) -> (B T, E)"""
    flat = indices.flatten(0, 1)
    return torch.zeros(len(flat), model.config.n_experts, dtype=torch.bool).scatter_(-1, flat, True).numpy()


@contextmanager
def forced(model: RecurrentDepthTransformer, how: Forced) -> Iterator[None]:
    """Meanwhile, tokens take other experts than the router chooses, weighed by its scores of these.

    held: in every loop those of their first. swapped: those that the token before takes in this loop (the first token
    those of the last), which shows what the right experts are worth at all.
    """
    (layer,) = model.recurrent
    assert isinstance(layer, Layer) and isinstance(layer.mlp, MixtureOfExperts)
    first: list[Tensor] = []

    def replace(_: Any, inputs: tuple[Tensor, int], chosen: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        indices, weights, scores = chosen
        if inputs[1] == 0:
            first[:] = [indices]
        indices = first[0] if how == "held" else indices.roll(1, dims=1)
        other = scores.gather(-1, indices)
        return indices, other * (weights.sum(-1, keepdim=True) / other.sum(-1, keepdim=True)), scores

    hook = layer.mlp.router.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
