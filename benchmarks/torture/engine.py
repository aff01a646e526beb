"""Requests that come at random, change their minds and find the memory full: every answer is bit for bit the one that
the request gets alone, and nothing is left behind."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.subject import Row, row
from ritornello.config import ExitRule, ModelConfig
from ritornello.engine.engine import EXACT, Engine
from ritornello.engine.request import Draft, Event, Request
from ritornello.engine.sampling import Sampling
from ritornello.model.rdt import RecurrentDepthTransformer

N_REQUESTS, N_DIFFERENT = 10_000, 500
ROOM = 48  # tokens that memory has room for at all loops: a fraction of what those under way would take
HOW: dict[str, Any] = {"exact": True, "tick_tokens": 2 * EXACT}
Answer = list[tuple[int | None, int, str]]


def model() -> RecurrentDepthTransformer:
    config = ModelConfig(
        vocab_size=64,
        dim=32,
        n_loops=4,
        n_prelude_layers=1,
        n_recurrent_layers=1,
        n_coda_layers=1,
        max_seq_len=64,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        ffn_dim=64,
        n_experts=8,
        n_active_experts=2,
        n_shared_experts=1,
        expert_dim=16,
        lora_rank=2,
        halting="kl",
    )
    made = RecurrentDepthTransformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():  # so that loops differ, and with them who leaves when
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def request(rng: random.Random) -> Request:
    """One of every kind: fixed depth, leaving early, within a budget, with a draft; some begin alike."""
    start = [rng.randrange(3)] * rng.choice((0, 0, 20))
    prompt = start + rng.choices(range(64), k=rng.randint(1, 16))
    kinds: list[dict[str, Any]] = [
        {},
        {"n_loops": 2},
        {"exit": ExitRule("kl", rng.choice((0.01, 0.1)))},
        {"exit": ExitRule("delta", 0.3), "loop_budget": 2.5},
        {"draft": Draft(n_loops=2, n_tokens=3)},
    ]
    sampling = Sampling(seed=rng.randrange(1000), temperature=rng.choice((0.0, 1.0)), repetition_penalty=1.1)
    return Request(prompt=prompt, max_tokens=rng.randint(1, 10), sampling=sampling, **rng.choice(kinds))


def told(event: Event) -> tuple[int | None, int, str]:
    return event.token, event.loops, event.reason


def alone(made: RecurrentDepthTransformer, asked: Request) -> Answer:
    engine = Engine(made, chunk=EXACT, **HOW)
    engine.submit(asked)
    return [told(event) for event in engine.run()]


def resident() -> int:
    """MiB that the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 // 2**20


def rows(*, scale: float) -> Iterator[Row]:
    rng, made, n = random.Random(0), model(), int(N_REQUESTS * scale)
    different = [request(rng) for _ in range(min(N_DIFFERENT, n))]
    expected = [alone(made, asked) for asked in different]
    engine = Engine(made, chunk=8, n_rows=Engine(made).layout.most_rows(ROOM), **HOW)
    which: dict[int, int] = {}
    found: dict[int, Answer] = {}
    cancelled: set[int] = set()
    problems: list[str] = []
    sent, sizes = 0, []
    while sent < n or engine.busy:
        if sent < n and len(found) < 40 and rng.random() < 0.5:
            i = rng.randrange(len(different))
            number = engine.submit(different[i])
            which[number], found[number], sent = i, [], sent + 1
            sizes += [resident()] if sent in (n // 10, n) else []
        for event in engine.step():
            found[event.number].append(told(event))
            if event.reason:
                if found[event.number] != expected[which[event.number]]:
                    problems.append(f"request {which[event.number]}: another answer")
                del found[event.number]
        if found and rng.random() < 0.02:
            number = rng.choice(list(found))
            if not engine.cancel(number) or found[number] != expected[which[number]][: len(found[number])]:
                problems.append(f"request {which[number]}: another answer before it was cancelled")
            cancelled.add(number)
            del found[number]
    engine.prefixes.clear()
    if engine.pages.n_used != 1 or engine.lanes.n_free != engine.lanes.n_lanes - 1 or found:
        problems.append("something is still held")
    if sizes[-1] > sizes[0] + 16:
        problems.append(f"the process grew from {sizes[0]} to {sizes[-1]} MiB")
    note = (
        f"bit for bit what each gets alone; {len(cancelled)} cancelled, {engine.n_preempted} started over for want of"
    )
    yield row(
        "requests to a full engine",
        n,
        problems,
        f"{note} memory, {engine.n_agreed} of {engine.n_drafted} guesses stood",
    )
