"""Requests of mixed lengths and depths, at once and as they come: depth-wise batching beside batches in lockstep."""

import inspect
import json.decoder
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

from benchmarks.timing import paired
from ritornello.accounting import at_mean_loops, flops_per_token
from ritornello.config import ExitRule
from ritornello.engine.engine import Engine, Request
from ritornello.engine.generate import decode, load
from ritornello.engine.pages import Layout
from ritornello.engine.sampling import Sampling
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.recipes import find_model

BATCHES = 16, 64  # texts in lockstep
N_REQUESTS = 64
RULE = ExitRule("hazard", 0.9)
SEED = 0


def requests(text: Sequence[int], n: int, exit: ExitRule | None) -> list[Request]:
    """Prompts of 8 to 128 tokens out of a text, continued by 4 to 48."""
    rng = random.Random(SEED)
    found = []
    for _ in range(n):
        start, length = rng.randrange(len(text) - 128), rng.randint(8, 128)
        prompt, new = text[start : start + length], rng.randint(4, 48)
        found.append(Request(prompt=prompt, max_tokens=new, exit=exit, sampling=Sampling(temperature=0)))
    return found


@dataclass
class Served:
    """Of each request, seconds after it came: its first token and its last; and the tokens themselves. token_loops:
    how often a token passed the engine's block."""

    first: list[float]
    last: list[float]
    tokens: list[list[int]]
    token_loops: int = 0

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
        how = asked[ready[0]]
        longest = max(asked[i].max_tokens for i in ready)
        steps = decode(model, [asked[i].prompt for i in ready], n_new=longest, exit=how.exit, sampling=how.sampling)
        for tokens, _ in steps:
            at = time.perf_counter() - begun
            for i, token in zip(ready, tokens.tolist(), strict=True):
                if len(found.tokens[i]) < asked[i].max_tokens:
                    found.add(i, token, at - arrivals[i])
        done += len(ready)
    return found


def depthwise(model: RecurrentDepthTransformer, asked: Sequence[Request], arrivals: Sequence[float]) -> Served:
    rows = Layout(model.config, n_loops=model.config.n_loops).most_rows
    n_rows = sum(rows(len(request.prompt) + request.max_tokens) for request in asked)
    engine = Engine(model, tick_tokens=256, chunk=64, n_rows=n_rows)
    n, begun, come, found = len(asked), time.perf_counter(), 0, Served.of(len(asked))
    while come < n or engine.busy:
        while come < n and arrivals[come] <= time.perf_counter() - begun:
            come += engine.submit(asked[come]) >= 0
        if not engine.busy:
            time.sleep(max(0.0, arrivals[come] - (time.perf_counter() - begun)))
        for event in engine.step():
            assert event.token is not None
            found.add(event.number, event.token, time.perf_counter() - begun - arrivals[event.number])
    found.token_loops = engine.n_token_loops
    return found


Serve = Callable[[RecurrentDepthTransformer, Sequence[Request], Sequence[float]], Served]


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    loaded = load(find_model("python"), device="cpu")
    model, text = loaded.model, loaded.tokenizer.encode(inspect.getsource(json.decoder))
    full, early = (requests(text, N_REQUESTS, rule) for rule in (None, RULE))
    at_once = [0.0] * N_REQUESTS
    common: dict[str, Any] = {"bench": "engine", "shape": "python", "attention": "gqa", "dtype": "fp32"}
    solo, served = (serve(model, early[:16], at_once) for serve in (lockstep, depthwise))
    same = statistics.mean(a == b for a, b in zip(solo.tokens, served.tokens, strict=True))
    assert same > 0.8, f"only {same:.0%} of the texts are the same"
    few, many = (depthwise(model, asked, at_once).token_loops for asked in (early, full))
    mean = model.config.n_loops * few / many  # of prompts' tokens too
    tokens = sum(request.max_tokens for request in early)
    all_loops = f"all {model.config.n_loops} loops"
    for batch, (how, asked) in product(BATCHES, ((all_loops, full), ("leaving early", early))):
        name = f"lockstep of {batch}, {how}"
        theirs = partial(lockstep, model, asked, at_once, batch)
        found = paired(partial(depthwise, model, early, at_once), theirs, n=n)
        metric = f"seconds for {N_REQUESTS} texts, {tokens} tokens, {mean:.2f} loops in the mean"
        yield {**common, "metric": metric, **asdict(found), "peer_name": name, "ceiling": None, "utilisation": None}
    found = paired(partial(depthwise, model, early, at_once), partial(depthwise, model, full, at_once), n=n)
    cost = partial(flops_per_token, model.config, seq_len=128, training=False, convention="full")
    limit = cost(n_loops=model.config.n_loops) / at_mean_loops(lambda n_loops: cost(n_loops=n_loops), mean)
    yield {
        **common,
        "metric": "seconds, leaving early",
        **asdict(found),
        "peer_name": "the engine, all loops",
        "ceiling": limit,
        "utilisation": found.ratio / limit,
    }
    yield from latencies(model, early, found.ours, common, n=n)


def latencies(
    model: RecurrentDepthTransformer, asked: Sequence[Request], seconds: float, common: dict[str, Any], *, n: int
) -> Iterator[dict[str, Any]]:
    """An open loop: requests come at random, at half the rate that depth-wise batching serves at most."""
    rng = random.Random(SEED)
    at, arrivals = 0.0, []
    for _ in asked:
        arrivals.append(at := at + rng.expovariate(N_REQUESTS / seconds / 2))
    sides = [[serve(model, asked, arrivals) for serve in (depthwise, lockstep)] for _ in range(n)]
    for what, pick in (("first token", lambda s: s.first), ("last token", lambda s: s.last)):
        for share in (50, 99):
            quantiles = [
                [statistics.quantiles(pick(s), n=100, method="inclusive")[share - 1] for s in turn] for turn in sides
            ]
            ratios = sorted(b / a for a, b in quantiles)
            yield {
                **common,
                "metric": f"seconds to the {what}, p{share}",
                "ours": statistics.median(a for a, _ in quantiles),
                "peer": statistics.median(b for _, b in quantiles),
                "peer_name": f"lockstep of {BATCHES[0]}, leaving early",
                "ratio": statistics.median(ratios),
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
                "ceiling": None,
                "utilisation": None,
                "n": n,
            }
