"""The exact mode: in float32, bit for bit, whatever runs beside a request and however its tokens are cut."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.torture import engine as soak
from ritornello.engine.engine import EXACT, Engine
from ritornello.engine.request import Event, Request
from ritornello.engine.sampling import Sampling
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.engine.kinds import KINDS, is_empty, made, prompts

Answer = list[Event]


def served(model: RecurrentDepthTransformer, requests: list[Request], **options: Any) -> tuple[list[Answer], Engine]:
    """All log-probabilities of each, its number left out."""
    engine = Engine(model, tick_tokens=2 * EXACT, **options)
    found: dict[int, Answer] = {engine.submit(request): [] for request in requests}
    for event in engine.run():
        found[event.number].append(replace(event, number=0))
    return list(found.values()), engine


@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_no_bit(kind: str) -> None:
    model, rule = made(kind, torch.float32)
    requests = [
        Request(
            prompt=prompt,
            max_tokens=12,
            n_loops=(4, 4, 2, 1)[i % 4],
            exit=rule,
            sampling=Sampling(seed=i),
            n_logprobs=20,
        )
        for i, prompt in enumerate(prompts(model.config, 6))
    ]
    rows = Engine(model).layout.most_rows(50)
    together, engine = served(model, requests, exact=True, chunk=32, n_rows=rows)
    assert is_empty(engine) and (engine.n_preempted > 0 or rule is not None)
    for request, answer in zip(requests, together, strict=True):
        assert answer == served(model, [request], exact=True, chunk=3)[0][0]


def test_control_without_it_bits_change() -> None:
    model, _ = made("gqa", torch.float32)
    requests = [Request(prompt=p, max_tokens=5, n_logprobs=20) for p in prompts(model.config, 6)]
    together, _ = served(model, requests, chunk=32)
    assert together != [served(model, [request], chunk=3)[0][0] for request in requests]


def test_a_long_prompt() -> None:
    """Longer than a multiple of the spans that are attended together."""
    model, rng = made("mla", torch.float32)[0], random.Random(0)
    prompt = rng.choices(range(model.config.vocab_size), k=model.config.max_seq_len - 6)
    request = Request(prompt=prompt, max_tokens=4, n_logprobs=20)
    others = [Request(prompt=prompt[:n], max_tokens=4) for n in (3, 20, 40)]
    assert (
        served(model, [*others, request], exact=True, chunk=32)[0][3]
        == served(model, [request], exact=True, chunk=7)[0][0]
    )


def test_a_soak() -> None:
    """Requests of every kind at random moments, some cancelled, memory for a fraction of them; 10,000 in benchmarks."""
    (found,) = soak.rows(scale=0.02)
    assert found["trials"] == 200 and not found["failures"], found["note"]
