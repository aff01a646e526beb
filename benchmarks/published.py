"""Converted Huginn and Ouro shapes in the engine, beside their own code, which writes the same tokens."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.originals import SETTINGS, Settings, missing, theirs
from benchmarks.timing import alone, paired
from benchmarks.writers import WRITERS, converted, padded
from ritornello.accounting import at_mean_loops, flops_per_token
from ritornello.config import ExitRule
from ritornello.engine.engine import Engine
from ritornello.engine.pages import Layout
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.model.rdt import RecurrentDepthTransformer

BATCHES, PAST, NEW = (1, 16), 64, 64
LENGTHS = range(32, 128, 6)  # of 16 prompts of different lengths
MOST = 3  # turns, each of many seconds, after one that compares the tokens
TICK = 2048  # tokens, so that 16 prompts enter together as theirs do
GREEDY = Sampling(temperature=0)
SHAPES: dict[str, Settings] = {
    "huginn": SETTINGS["huginn"]["tied"]
    | {"n_embd": 288, "n_heads": 3, "intermediate_size": 976, "vocab_size": 16384, "block_size": 256}
    | {"n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2, "mean_recurrence": 16},
    "ouro": SETTINGS["ouro"]["head of its own"]
    | {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 1056}
    | {"vocab_size": 16384, "num_hidden_layers": 8, "max_position_embeddings": 256},
}
EXITS = {"huginn": ExitRule("delta", 0.9), "ouro": ExitRule("cumulative", 0.8)}  # half of the loops in the mean
CACHES: dict[str, dict[str, Any]] = {
    "huginn": {"dynamic cache": {}, "static cache": {"cache": "static"}},
    "ouro": {"its own cache": {}},
}
LEAVING: dict[str, dict[str, Any]] = {"huginn": {"cache_lookup_strategy": "latest-m4"}, "ouro": {}}  # as ours
Written = tuple[list[list[int]], float]  # tokens by text, loops of each in the mean


@dataclass(frozen=True)
class Sides:
    """One model, in our engine and in its own code."""

    name: str
    n_loops: int
    engine: Engine
    theirs: Any

    @property
    def model(self) -> RecurrentDepthTransformer:
        return self.engine.model

    def ours(self, prompts: Sequence[Sequence[int]], exit: ExitRule | None = None) -> Written:
        self.engine.prefixes.clear()
        how: Any = {"max_tokens": NEW, "n_loops": self.n_loops, "exit": exit, "sampling": GREEDY}
        numbers = {self.engine.submit(Request(prompt=row, **how)): i for i, row in enumerate(prompts)}
        tokens: list[list[int]] = [[] for _ in prompts]
        loops = 0
        for event in self.engine.run():
            assert event.token is not None
            tokens[numbers[event.number]].append(event.token)
            loops += event.loops
        return tokens, loops / (NEW * len(prompts))

    def their(self, prompts: Sequence[Sequence[int]], **how: Any) -> Written:
        ids, mask = padded(prompts)
        if not mask.all():
            how["mask"] = mask
        tokens, loops = self.theirs.write(ids, NEW, self.n_loops, **how)
        return tokens.tolist(), loops


def sides(name: str) -> Sides:
    settings = SHAPES[name]
    weights = theirs(name, settings, torch.float32)  # by formula: they make tokens differ in depth, and mean nothing
    model = converted(name, settings, weights)
    n_rows = Layout(model.config, n_loops=model.config.n_loops).most_rows(BATCHES[-1] * (max(LENGTHS) + NEW))
    return Sides(
        name,
        model.config.n_loops,
        Engine(model, n_rows=n_rows, tick_tokens=TICK),
        WRITERS[name](settings, weights, model),
    )


def prompts(name: str, lengths: Sequence[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(SHAPES[name]["vocab_size"], (n,), generator=draw).tolist() for n in lengths]


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    """Of the models whose code is at hand."""
    n = min(n, MOST)
    for name in SHAPES:
        if not missing(name):
            found = sides(name)
            for batch in BATCHES:
                yield from beside(found, prompts(name, [PAST] * batch), n=n)
            if name == "ouro":  # Huginn's code has no mask for padding
                yield from full_depth(found, prompts(name, LENGTHS), n=n)


def beside(both: Sides, asked: Sequence[Sequence[int]], *, n: int) -> Iterator[dict[str, Any]]:
    yield from full_depth(both, asked, n=n)
    yield from leaving(both, asked, n=n)


def full_depth(both: Sides, asked: Sequence[Sequence[int]], *, n: int) -> Iterator[dict[str, Any]]:
    """Beside the fastest of its caches."""
    ours = partial(both.ours, asked)
    peers = {how: partial(both.their, asked, **options) for how, options in CACHES[both.name].items()}
    how = min(peers, key=lambda how: alone(peers[how], n=1, warmup=0)) if len(peers) > 1 else next(iter(peers))
    same = agreed(ours()[0], peers[how]()[0])
    assert same > 0.9, f"only {same:.0%} of the tokens are the same"
    metric = f"seconds for {said(asked)}, all {both.n_loops} loops, {same:.1%} of tokens the same"
    yield row(both, metric, f"its generate, {how}") | asdict(paired(ours, peers[how], n=n, warmup=0))


def leaving(both: Sides, asked: Sequence[Sequence[int]], *, n: int) -> Iterator[dict[str, Any]]:
    """By the change of the state (Huginn) or the gate (Ouro), at the same threshold on both sides."""
    rule = EXITS[both.name]
    early, full = partial(both.ours, asked, rule), partial(both.ours, asked)
    their = partial(both.their, asked, exit=rule.threshold, **LEAVING[both.name])
    (tokens, loops), (others, their_loops) = early(), their()
    metric = f"seconds for {said(asked)}, {loops:.2f} of {both.n_loops} loops in the mean, leaving by {rule.rule}"
    yield row(both, metric, f"its generate, {their_loops:.2f} loops") | asdict(paired(early, their, n=n, warmup=0))
    yield row(both, "tokens the same, leaving early", "") | {"ours": agreed(tokens, others), "n": 1}
    found, how = (
        paired(early, full, n=n, warmup=0),
        {"seq_len": PAST + NEW // 2, "training": False, "convention": "full"},
    )
    cost: Any = partial(flops_per_token, both.model.config, **how)
    limit = cost(n_loops=both.n_loops) / at_mean_loops(lambda n_loops: cost(n_loops=n_loops), loops)
    shares = {"ceiling": limit, "utilisation": found.ratio / limit}
    yield row(both, metric, f"the engine, all {both.n_loops} loops") | asdict(found) | shares


def said(asked: Sequence[Sequence[int]]) -> str:
    lengths = {len(prompt) for prompt in asked}
    past = f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else f"{max(lengths)}"
    return f"{len(asked)} text{'s' * (len(asked) > 1)} of {past} + {NEW} tokens"


def agreed(ours: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are the same."""
    pairs = (pair for both in zip(ours, others, strict=True) for pair in zip(*both, strict=True))
    return statistics.mean(a == b for a, b in pairs)


def row(both: Sides, metric: str, peer: str) -> dict[str, Any]:
    empty = dict.fromkeys(("peer", "ratio", "ratio_low", "ratio_high", "ceiling", "utilisation"))
    head = {"bench": "published", "shape": both.name, "attention": "gqa", "dtype": "fp32"}
    return head | empty | {"metric": metric, "peer_name": peer}
