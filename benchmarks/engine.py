"""Requests of mixed lengths and depths, at once and as they come: depth-wise batching beside batches in lockstep; a
text alone with and without a draft; and OpenMythos' own way to write several texts."""

import functools
import inspect
import json.decoder
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.shapes import VOCAB, mixture
from benchmarks.timing import paired
from ritornello.accounting import at_mean_loops, flops_per_token
from ritornello.config import ExitRule
from ritornello.engine.engine import Engine
from ritornello.engine.generate import decode, load
from ritornello.engine.pages import Layout
from ritornello.engine.request import Draft, Request
from ritornello.engine.sampling import Sampling
from ritornello.lab import arms, cell
from ritornello.lab.tasks import TASKS
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.recipes import find_model

BATCHES = 16, 64  # texts in lockstep
N_REQUESTS = 64
RULES = {"chains-wide": ExitRule("delta", 0.5)}  # which costs next to nothing; else the trained gate
GATE = ExitRule("hazard", 0.9)
PROBLEMS = "chains", "chains-moe", "chains-wide"  # the lab's models, and one whose ticks are filled by work
WIDE: dict[str, Any] = {"dim": 512, "head_dim": 128, "ffn_dim": 3072}  # of the smallest looped model
WIDE_TRAINING: dict[str, Any] = {"lr": 5e-4, "steps": 1600}
DRAFTS = Draft(n_loops=1, n_tokens=2), Draft(n_loops=2, n_tokens=3), Draft(n_loops=4, n_tokens=4)
SEED = 0
TICK = 2048  # tokens, as in lockstep of 64
GREEDY = Sampling(temperature=0)
Serve = Callable[[RecurrentDepthTransformer, Sequence[Request], Sequence[float]], "Served"]


@dataclass(frozen=True)
class Load:
    """A trained model and what it is asked; the right answers, where there are any."""

    name: str
    model: RecurrentDepthTransformer
    requests: list[Request]
    answers: Sequence[int] = ()

    @property
    def common(self) -> dict[str, Any]:
        return {"bench": "engine", "shape": self.name, "attention": self.model.config.attention, "dtype": "fp32"}


def texts() -> Load:
    """Prompts of 8 to 128 tokens out of a text, continued by 4 to 48."""
    loaded, rng = load(find_model("python"), device="cpu"), random.Random(SEED)
    text, found = loaded.tokenizer.encode(inspect.getsource(json.decoder)), []
    for _ in range(N_REQUESTS):
        start, length = rng.randrange(len(text) - 128), rng.randint(8, 128)
        found.append(Request(prompt=text[start : start + length], max_tokens=rng.randint(4, 48), sampling=GREEDY))
    return Load("python", loaded.model, found)


def problems(name: str) -> Load:
    """Graphs whose longest chain has 1 to 16 hops, and the question about its start: depth follows difficulty."""
    task, rng = TASKS["chains"], np.random.default_rng(SEED)
    hops = rng.integers(1, 17, 4 * N_REQUESTS)
    drawn = task.sample(rng, hops, split="test")
    n_edges = drawn.tokens.shape[1] // 2
    places = (drawn.hops == hops[:, None]).argmax(1)
    rows = zip(drawn.tokens.tolist(), places.tolist(), strict=True)
    asked = [[*map(tuple, row[:n_edges]), tuple(row[place])] for row, place in rows]
    model = wide() if name == "chains-wide" else cell.load(find_model(name)).model
    requests = [Request(prompt=prompt, max_tokens=1, n_loops=16, sampling=GREEDY) for prompt in asked]
    return Load(name, model, requests, drawn.answers[np.arange(len(places)), places].tolist())


def wide() -> RecurrentDepthTransformer:
    """Trained the first time, in less than an hour on a core."""
    wanted = arms.cell("dense", TASKS["chains"], seed=SEED, masked=True, model=WIDE, **WIDE_TRAINING)
    return cell.trained(wanted, Path("runs/lab/models")).model


@dataclass
class Served:
    """Of each request, seconds after it came: its first token and its last; and the tokens themselves. token_loops:
    how often a token passed the engine's block; n_ticks: in so many ticks."""

    first: list[float]
    last: list[float]
    tokens: list[list[int]]
    token_loops: int = 0
    n_ticks: int = 0

    @staticmethod
    def of(n: int) -> "Served":
        return Served([0.0] * n, [0.0] * n, [[] for _ in range(n)])

    def add(self, i: int, token: int, seconds: float) -> None:
        self.tokens[i].append(token)
        self.first[i] = self.first[i] or seconds
        self.last[i] = seconds


def lockstep(
    model: RecurrentDepthTransformer, asked: Sequence[Request], arrivals: Sequence[float], batch: int = BATCHES[0]
) -> Served:
    """The first of those that wait form a batch, which ends with its longest text."""
    n, begun, done, found = len(asked), time.perf_counter(), 0, Served.of(len(asked))
    while done < n:
        now = time.perf_counter() - begun
        ready = [i for i in range(done, min(n, done + batch)) if arrivals[i] <= now]
        if not ready:
            time.sleep(max(0.0, arrivals[done] - now))
            continue
        how: Any = {name: getattr(asked[ready[0]], name) for name in ("n_loops", "exit", "sampling")}
        longest = max(asked[i].max_tokens for i in ready)
        for tokens, _ in decode(model, [asked[i].prompt for i in ready], n_new=longest, use_cache=longest > 1, **how):
            at = time.perf_counter() - begun
            for i, token in zip(ready, tokens.tolist(), strict=True):
                if len(found.tokens[i]) < asked[i].max_tokens:
                    found.add(i, token, at - arrivals[i])
        done += len(ready)
    return found


@functools.cache
def engine_of(model: RecurrentDepthTransformer, n_loops: int, n_tokens: int) -> Engine:
    """With rows for so many tokens: a server has one and keeps it."""
    n_rows = Layout(model.config, n_loops=n_loops).most_rows(n_tokens)
    return Engine(model, tick_tokens=TICK, chunk=64, n_rows=n_rows, n_loops=n_loops)


def depthwise(model: RecurrentDepthTransformer, asked: Sequence[Request], arrivals: Sequence[float]) -> Served:
    n_tokens = sum(len(request.prompt) + request.max_tokens for request in asked)
    engine = engine_of(model, asked[0].n_loops or model.config.n_loops, n_tokens)
    engine.prefixes.clear()
    ticks, token_loops, numbers = engine.n_ticks, engine.n_token_loops, {}
    n, begun, come, found = len(asked), time.perf_counter(), 0, Served.of(len(asked))
    while come < n or engine.busy:
        while come < n and arrivals[come] <= time.perf_counter() - begun:
            numbers[engine.submit(asked[come])] = come
            come += 1
        if not engine.busy:
            time.sleep(max(0.0, arrivals[come] - (time.perf_counter() - begun)))
        for event in engine.step():
            assert event.token is not None
            i = numbers[event.number]
            found.add(i, event.token, time.perf_counter() - begun - arrivals[i])
    found.token_loops = engine.n_token_loops - token_loops
    found.n_ticks = engine.n_ticks - ticks
    return found


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    for given in (texts(), *map(problems, PROBLEMS)):
        yield from throughput(given, n=n)
    yield from drafts(texts(), n=n)
    yield from beside_openmythos(n=n)


def throughput(given: Load, *, n: int) -> Iterator[dict[str, Any]]:
    model, full = given.model, given.requests
    early = [replace(request, exit=RULES.get(given.name, GATE)) for request in full]
    at_once, n_loops = [0.0] * len(full), full[0].n_loops or model.config.n_loops
    solo, served = (serve(model, early[:32], at_once) for serve in (lockstep, depthwise))
    same = statistics.mean(a == b for a, b in zip(solo.tokens, served.tokens, strict=True))
    assert same > 0.8, f"only {same:.0%} of the texts are the same"
    few, many = (depthwise(model, asked, at_once) for asked in (early, full))
    mean = n_loops * few.token_loops / many.token_loops  # of prompts' tokens too
    tokens = sum(request.max_tokens for request in early)
    metric = f"seconds for {len(full)} texts, {tokens} tokens, {mean:.2f} of {n_loops} loops in the mean"
    depthwise_early = partial(depthwise, model, early, at_once)
    fastest = 0.0
    for batch, (how, asked) in product(BATCHES, ((f"all {n_loops} loops", full), ("leaving early", early))):
        found = paired(depthwise_early, partial(lockstep, model, asked, at_once, batch), n=n)
        name = f"lockstep of {batch}, {how}"
        fastest = found.ours
        yield given.common | _row(metric, asdict(found), name)
    found = paired(depthwise_early, partial(depthwise, model, full, at_once), n=n)
    length = round(statistics.mean(len(request.prompt) for request in full))
    cost = partial(flops_per_token, model.config, seq_len=length, training=False, convention="full")
    limit = cost(n_loops=n_loops) / at_mean_loops(lambda n_loops: cost(n_loops=n_loops), mean)
    shares = {"ceiling": limit, "utilisation": found.ratio / limit}
    yield given.common | _row("seconds, leaving early", asdict(found), "the engine, all loops") | shares
    sizes = {"ours": few.token_loops / few.n_ticks, "peer": many.token_loops / many.n_ticks, "n": 1}
    yield given.common | _row("tokens a tick", sizes, "all loops")
    if given.answers:
        ours, all_loops = (
            statistics.mean(found.tokens[i] == [answer] for i, answer in enumerate(given.answers))
            for found in (few, many)
        )
        assert ours > all_loops - 0.02, f"leaving early answers {ours:.3f}, all loops {all_loops:.3f}"
        yield given.common | _row("questions right", {"ours": ours, "peer": all_loops, "n": 1}, "all loops")
    yield from latencies(given, early, fastest, n=n)


def _row(metric: str, found: dict[str, Any], name: str) -> dict[str, Any]:
    empty = dict.fromkeys(("ratio", "ratio_low", "ratio_high", "ceiling", "utilisation"))
    return {**empty, "metric": metric, **found, "peer_name": name}


def latencies(given: Load, asked: Sequence[Request], seconds: float, *, n: int) -> Iterator[dict[str, Any]]:
    """An open loop: requests come at random, at half the rate that depth-wise batching serves at most."""
    rng = random.Random(SEED)
    at, arrivals = 0.0, []
    for _ in asked:
        arrivals.append(at := at + rng.expovariate(len(asked) / seconds / 2))
    sides = [[serve(given.model, asked, arrivals) for serve in (depthwise, lockstep)] for _ in range(n)]
    kinds = {"first token": lambda s: s.first, "last token": lambda s: s.last}
    for what in kinds if asked[0].max_tokens > 1 else ["last token"]:
        for share in (50, 99):
            quantiles = [
                [statistics.quantiles(kinds[what](s), n=100, method="inclusive")[share - 1] for s in turn]
                for turn in sides
            ]
            yield given.common | _row(
                f"seconds to the {what}, p{share}",
                _medians(quantiles),
                f"lockstep of {BATCHES[0]}, leaving early",
            )


def _medians(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of what both sides had in each turn."""
    ratios = sorted(b / a for a, b in turns)
    ours, peer = (statistics.median(side) for side in zip(*turns, strict=True))
    spread = {"ratio_low": ratios[0], "ratio_high": ratios[-1], "n": len(turns)}
    return {"ours": ours, "peer": peer, "ratio": statistics.median(ratios), **spread}


def drafts(given: Load, *, n: int) -> Iterator[dict[str, Any]]:
    """One text after another: the same tokens, by few loops that guess and full depth that agrees or not."""
    model, plain = given.model, given.requests[:8]

    def alone(asked: Sequence[Request]) -> tuple[list[list[int]], float]:
        engine = Engine(model)
        tokens = []
        for request in asked:
            engine.submit(request)
            tokens.append([event.token for event in engine.run() if event.token is not None])
        return tokens, engine.n_agreed / max(engine.n_drafted, 1)

    expected, _ = alone(plain)
    for draft in DRAFTS:
        drafted = [replace(request, draft=draft) for request in plain]
        tokens, agreed = alone(drafted)
        same = statistics.mean(a == b for a, b in zip(tokens, expected, strict=True))
        assert same > 0.8, f"only {same:.0%} of the texts are the same"
        metric = f"seconds, batch 1, {draft.n_loops} loops guess {draft.n_tokens} tokens, {agreed:.0%} agreed with"
        for name, side in (
            ("the engine", partial(alone, plain)),
            ("generate", partial(lockstep, model, plain, [0.0] * len(plain), 1)),
        ):
            found = paired(partial(alone, drafted), side, n=n)
            yield given.common | _row(metric, asdict(found), f"{name} without a draft")


def beside_openmythos(*, n: int, n_new: int = 64) -> Iterator[dict[str, Any]]:
    """Sixteen texts by its `generate`, as long as it writes if not told otherwise, all loops on both sides."""
    for attention in ("gqa", "mla"):
        config = mixture("S1", attention=attention)
        peer: Any = peers.openmythos(config).eval()
        model = RecurrentDepthTransformer(config).eval()
        prompts = torch.randint(VOCAB, (16, 32), generator=torch.Generator().manual_seed(SEED))
        asked = [Request(prompt=prompt, max_tokens=n_new) for prompt in prompts.tolist()]
        stop, loops = peers.count_calls(peer.recurrent.block)
        theirs = partial(torch.inference_mode()(peer.generate), prompts, max_new_tokens=n_new, n_loops=config.n_loops)
        theirs()
        stop()
        assert len(loops) == config.n_loops * n_new, loops
        compiled = deepcopy(model)
        compiled.compile(unroll=True)
        torch.compiler.reset()
        at_once = [0.0] * len(asked)
        sides = {"by the engine": partial(depthwise, model, asked, at_once)}
        sides["compiled, in lockstep"] = partial(lockstep, compiled, asked, at_once)
        for how, ours in sides.items():
            found = paired(ours, theirs, n=n, warmup=2)
            common = {"bench": "engine", "shape": "S1", "attention": attention, "dtype": "fp32"}
            metric = f"seconds for 16 texts of {n_new} tokens, {how}"
            yield common | _row(metric, asdict(found), f"{peers.OPENMYTHOS} generate")
