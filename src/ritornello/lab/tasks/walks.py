"""Walks over facts held in the weights: does a model combine facts that it has only met one at a time?"""

from typing import Literal, get_args

import numpy as np

from ritornello.config import require_choice, require_int
from ritornello.lab.tasks.base import Ids, Problems, Split, Task, draw_split
from ritornello.train.data import NO_LABEL

N_ALONE = 2  # questions of one hop before the walk
START = 2 * N_ALONE  # where the walk begins
Kind = Literal["in", "mixed", "out"]


class Walks(Task):
    """Each relation is a permutation of the entities, fixed by `seed`. A row is two facts of the kind that is only met
    alone, (entity, relation) each, then a walk: an entity and `hops` relations. After each relation, which entity?

    A fifth of every entity's facts, the new ones, are in no training walk of two hops or more. `kind` is that of the
    test: walks of known facts only ("in"), of one known, one new fact and then any ("mixed"), of new facts only
    ("out"); training is the same for all. Walks of known facts belong to a split by their first two hops, so that no
    test walk has been seen in training from its second hop on; the others are in the test alone.
    """

    name = "walks"
    title = "walks over learnt facts"
    shared_hops = 1

    def __init__(
        self, n_entities: int = 32, n_relations: int = 10, max_hops: int = 20, seed: int = 0, kind: Kind = "in"
    ) -> None:
        require_int("n_entities", n_entities, 8)
        require_int("n_relations", n_relations, 5)
        require_int("max_hops", max_hops, 5)
        require_int("seed", seed, 0)
        require_choice("kind", kind, get_args(Kind))
        self.n_entities, self.n_relations, self.max_hops, self.kind = n_entities, n_relations, max_hops, kind
        self.vocab_size = n_entities + n_relations + 1  # the last id is padding
        self.chance = 1 / n_entities
        rng, everything = np.random.default_rng(seed), np.ones((n_relations, 1), np.int64) * np.arange(n_entities)
        self.facts = rng.permuted(everything, axis=1).T  # (E, R): the entity that a fact leads to
        rank = rng.permuted(np.tile(np.arange(n_relations), (n_entities, 1)), axis=1)
        self.by_rank = np.argsort(rank, axis=1)  # (E, R): an entity's relations, the new ones first
        self.n_new = n_relations // 5
        self.is_new = rank < self.n_new  # (E, R)

    def sample(self, rng: np.random.Generator, hops: Ids, *, split: Split) -> Problems:
        self.check(hops, split)
        if split == "test" and self.kind != "in":
            return self.present(rng, self._begin(rng, hops, self.kind), hops)
        known = lambda rng, hops: self._begin(rng, hops, "in")  # noqa: E731
        return self.present(rng, draw_split(known, rng, hops, split, shared_hops=self.shared_hops), hops)

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(n, 3): an entity and two relations, which a walk of one hop leaves unused."""
        return self._begin(rng, hops, self.kind)

    def _begin(self, rng: np.random.Generator, hops: Ids, kind: Kind) -> Ids:
        head = rng.integers(self.n_entities, size=len(hops))
        new = np.full(len(hops), kind == "out") if kind != "mixed" else rng.random(len(hops)) < 0.5
        first = self._relation(rng, head, new)
        second = self._relation(rng, self.facts[head, first], new ^ (kind == "mixed"))
        return np.stack([head, self.n_entities + first, self.n_entities + second], axis=1)

    def _relation(self, rng: np.random.Generator, entity: Ids, new: np.ndarray) -> Ids:
        low, high = np.where(new, 0, self.n_new), np.where(new, self.n_new, self.n_relations)
        return self.by_rank[entity, rng.integers(low, high)]

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        alone = rng.integers(self.n_entities, size=(len(hops), N_ALONE))
        taken = self._relation(rng, alone, np.ones_like(alone, dtype=bool))
        asked = np.stack([alone, self.n_entities + taken], axis=2).reshape(-1, START)
        found = np.stack([np.full_like(alone, NO_LABEL), self.facts[alone, taken]], axis=2).reshape(-1, START)
        entity, begun = drawn[:, 0], drawn[:, 1:].T - self.n_entities
        kinds = np.stack([self.is_new[entity, begun[0]], self.is_new[self.facts[entity, begun[0]], begun[1]]])
        tokens, answers = [entity], [np.full_like(entity, NO_LABEL)]
        for hop in range(int(hops.max())):
            new = kinds[rng.integers(2, size=len(hops)), np.arange(len(hops))]
            relation = begun[hop] if hop < 2 else self._relation(rng, entity, new)
            entity = self.facts[entity, relation]
            tokens.append(np.where(hop < hops, self.n_entities + relation, self.vocab_size - 1))
            answers.append(np.where(hop < hops, entity, NO_LABEL))
        answered = np.concatenate([found, np.stack(answers, axis=1)], axis=1)
        places = np.concatenate([np.arange(START) % 2, np.arange(len(tokens))])
        all_tokens = np.concatenate([asked, np.stack(tokens, axis=1)], axis=1)
        return Problems(all_tokens, answered, np.where(answered != NO_LABEL, places, 0))

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        return tokens[hops > self.shared_hops, START : START + 3]

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By where the relations since the last entity, as one permutation, take it."""
        everything = np.arange(self.n_entities)
        moves = np.concatenate([self.facts.T, everything[None]])  # (R + 1, E); padding moves nothing
        answers, product, head = np.full_like(tokens, NO_LABEL), everything + 0 * tokens[:, :1], tokens[:, 0]
        for pos, token in enumerate(tokens.T):
            starts, asks = token < self.n_entities, (token >= self.n_entities) & (token < self.vocab_size - 1)
            head = np.where(starts, token, head)
            moved = np.take_along_axis(moves[(token - self.n_entities).clip(0)], product, axis=1)
            product = np.where(starts[:, None], everything, moved)
            answers[asks, pos] = product[asks, head[asks]]
        return answers
