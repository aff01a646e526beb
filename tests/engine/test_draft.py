"""Self-speculation: a draft saves passes and changes nothing."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.engine.engine import EXACT, Engine
from ritornello.engine.generate import generate
from ritornello.engine.request import Draft, Request
from ritornello.engine.sampling import NO_TOKEN, Sampling
from tests.engine.kinds import KINDS, alone, answers, is_empty, made, prompts
from tests.engine.test_generate import small

LOOPING = [kind for kind in KINDS if kind not in ("plain", "act", "act exits")]


@pytest.mark.parametrize("kind", LOOPING)
@pytest.mark.parametrize("draft", [Draft(n_loops=1, n_tokens=1), Draft(n_loops=2, n_tokens=3), Draft(n_loops=3)])
def test_a_draft_changes_no_token(kind: str, draft: Draft) -> None:
    """Greedy and sampled, beside requests without one."""
    model, _ = made(kind)
    requests = [
        Request(
            prompt=prompt,
            max_tokens=9,
            n_loops=4,
            draft=None if i % 4 == 3 else draft,
            sampling=Sampling(seed=i, temperature=float(i % 2), frequency_penalty=0.5 * (i == 2)),
        )
        for i, prompt in enumerate(prompts(model.config, 7))
    ]
    engine = Engine(model, chunk=5, tick_tokens=16)
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    plain = Engine(model)
    numbers_plain = [plain.submit(replace(request, draft=None)) for request in requests]
    assert list(found.values()) == list(answers(plain, numbers_plain).values())
    assert is_empty(engine)
    assert engine.n_drafted > 0 and 0 <= engine.n_agreed <= engine.n_drafted


def test_in_company_and_with_little_memory_bit_for_bit() -> None:
    model, rng = made("gqa", torch.float32)[0], random.Random(0)
    requests = [
        Request(prompt=p, max_tokens=8, n_loops=4, draft=Draft(n_loops=2, n_tokens=3), sampling=Sampling(seed=i))
        for i, p in enumerate(prompts(model.config, 10))
    ]
    how = {"exact": True, "tick_tokens": EXACT}
    engine = Engine(model, chunk=8, n_rows=Engine(model).layout.most_rows(70), **how)
    found: dict[int, list[int]] = {}
    waiting = list(requests)
    while waiting or engine.busy:
        if waiting and rng.random() < 0.5:
            found[engine.submit(waiting.pop(0))] = []
        for event in engine.step():
            found[event.number] += [] if event.token is None else [event.token]
    assert engine.n_preempted > 0 and is_empty(engine)
    for request, tokens in zip(requests, found.values(), strict=True):
        solo = Engine(model, chunk=4, **how)
        number = solo.submit(replace(request, draft=None))
        assert answers(solo, [number])[number][0] == tokens


def test_drafts_that_take_all_room() -> None:
    """Each waits for one more token: they go on with what they have."""
    model, _ = made("gqa")
    draft = Draft(n_loops=2, n_tokens=6)
    requests = [
        Request(prompt=[i % 30], max_tokens=20, n_loops=4, draft=draft, sampling=Sampling(seed=i)) for i in range(40)
    ]
    engine = Engine(model, chunk=8, tick_tokens=8, n_rows=10**4)
    numbers = [engine.submit(request) for request in requests]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    cut = False
    while engine.busy and engine.n_ticks < 20_000:
        for event in engine.step():
            found[event.number] += [] if event.token is None else [event.token]
        cut = cut or any(sequence.cut_short for sequence in engine.running)
    assert cut and not engine.busy and is_empty(engine)
    for request, tokens in zip(requests[::9], list(found.values())[::9], strict=True):
        assert alone(model, replace(request, draft=None))[0] == tokens


def test_a_draft_that_is_right_saves_passes() -> None:
    """Where the state stays as it is after two loops, every guess stands."""
    model, _ = made("gqa")
    with torch.no_grad():  # decay and branches vanish: the state is the input from the first loop on
        model.injection.A_log.fill_(30.0)
        for name, weight in model.recurrent.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    passes = []
    for draft in (None, Draft(n_loops=1, n_tokens=4)):
        engine = Engine(model)
        number = engine.submit(Request(prompt=[1, 2, 3], max_tokens=21, n_loops=4, draft=draft))
        tokens = answers(engine, [number])[number][0]
        passes.append(engine.n_ticks)
    assert tokens == alone(model, Request(prompt=[1, 2, 3], max_tokens=21, n_loops=4))[0]
    assert engine.n_drafted == engine.n_agreed > 10
    assert passes[1] < 0.6 * passes[0]


def test_the_distribution_is_that_of_full_depth() -> None:
    """Over many seeds, shares of the second token against the model's own probabilities; few loops alone differ."""
    model, _ = made("noise")
    n, prompt = 900, [1, 2, 3]
    with torch.no_grad():
        model.injection.A_log.fill_(-1.5)  # the noise that it starts from is forgotten slowly
        model.head_weight.mul_(2)
    engine = Engine(model, vocab_size=4, n_rows=Engine(model).layout.most_rows(400))
    requests = [
        Request(prompt=prompt, max_tokens=3, n_loops=4, draft=Draft(n_loops=1, n_tokens=2), sampling=Sampling(seed=i))
        for i in range(n)
    ]
    found = answers(engine, [engine.submit(request) for request in requests])
    counts: dict[tuple[int, int], int] = {}
    for tokens, _ in found.values():
        counts.update({pair: counts.get(pair, 0) + 1 for pair in [tuple(tokens[:2])]})
    assert 0 < engine.n_agreed < engine.n_drafted

    @torch.no_grad()
    def shares(tokens: list[int], n_loops: int) -> list[float]:
        return model(torch.tensor([tokens]), n_loops=n_loops).logits[0, -1, :4].softmax(-1).tolist()

    def expected(n_loops: int) -> dict[tuple[int, int], float]:
        first = shares(prompt, n_loops)
        return {(a, b): first[a] * p for a in range(4) for b, p in enumerate(shares([*prompt, a], n_loops))}

    def chi_square(shares: dict[tuple[int, int], float]) -> float:
        return sum((counts.get(pair, 0) - n * share) ** 2 / (n * share) for pair, share in shares.items())

    assert chi_square(expected(4)) < 37.7  # the 0.1% quantile of 15 degrees of freedom
    assert chi_square(expected(1)) > 37.7


def test_ends_in_the_middle_of_a_draft() -> None:
    model, _ = made("gqa")
    request = Request(prompt=[1, 2, 3], max_tokens=12, n_loops=4, sampling=Sampling(temperature=0))
    tokens = alone(model, request)[0]
    for end in range(1, 12):
        engine = Engine(model)
        stop = frozenset({tokens[end]})
        how = {"max_tokens": end} if tokens[end] in tokens[:end] else {"stop": stop}
        number = engine.submit(replace(request, draft=Draft(n_loops=2, n_tokens=3), **how))
        assert answers(engine, [number])[number][0] == tokens[:end]
        assert is_empty(engine)


def test_a_stop_string_in_the_middle_of_a_draft() -> None:
    loaded = small(max_seq_len=64)
    draft, ended = Draft(n_loops=2, n_tokens=6), 0
    for seed in range(12):
        how: dict[str, Any] = {"max_tokens": 30, "seed": seed}
        free = generate(loaded, ["a", "bb"], **how)
        stop = free[0].text[4:6]
        plain = generate(loaded, ["a", "bb"], **how, stop=stop)
        assert generate(loaded, ["a", "bb"], **how, stop=stop, draft=draft) == plain
        ended += plain[0].reason == "stop"
    assert ended > 6


def test_a_draft_is_not_overtaken_for_ever() -> None:
    """One that begins with its prompt, beside requests that never cease."""
    model, _ = made("gqa")
    engine = Engine(model, chunk=7, tick_tokens=8)
    late = engine.submit(Request(prompt=[5], max_tokens=8, n_loops=4, draft=Draft(n_loops=1, n_tokens=6)))
    for tick in range(400):
        while len(engine.waiting) + len(engine.running) < 7:
            engine.submit(Request(prompt=[tick % 30], max_tokens=8))
        if any(event.number == late for event in engine.step()):
            break
    assert tick < 300, "never served"


def test_a_guess_that_is_no_number() -> None:
    """Logits that overflow at few loops only are a wrong guess; at full depth the text fails."""
    model, _ = made("gqa")
    request = Request(prompt=[1, 2, 3], max_tokens=6, n_loops=4, draft=Draft(n_loops=1, n_tokens=2))
    expected, real = alone(model, replace(request, draft=None))[0], model.logits
    engine = Engine(model)
    number = engine.submit(request)
    spoilt = lambda: torch.nan if engine._guessing(engine.running[0]) else 1  # noqa: E731
    model.logits = lambda hidden: real(hidden) * spoilt()  # type: ignore
    assert answers(engine, [number])[number][0] == expected and engine.n_drafted
    model.logits = lambda hidden: real(hidden) * torch.nan  # type: ignore
    engine.submit(request)
    assert [(event.token, event.reason) for event in engine.run()] == [(None, "failed")]
    assert NO_TOKEN not in expected and is_empty(engine)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("gqa", {"draft": Draft(n_loops=4)}),
        ("gqa", {"draft": Draft(n_loops=1, n_tokens=99)}),
        ("act", {"draft": Draft(n_loops=1)}),
        ("plain", {"draft": Draft(n_loops=1), "n_loops": 1}),
        ("kl", {"draft": Draft(n_loops=1), "exit": ExitRule("kl", 0.1)}),
        ("kl", {"draft": Draft(n_loops=1), "loop_budget": 2.0}),
        ("kl", {"loop_budget": 0.5}),
        ("kl", {"loop_budget": 5.0}),
        ("plain", {"loop_budget": 1.0, "n_loops": 1}),
    ],
)
def test_what_cannot_be(kind: str, bad: dict) -> None:
    engine = Engine(made(kind)[0])
    with pytest.raises(ValueError, match=r"draft|loop_budget"):
        engine.submit(Request(prompt=[1], **{"n_loops": 4, **bad}))


@pytest.mark.parametrize("bad", [{"n_loops": 0}, {"n_loops": 1, "n_tokens": 0}])
def test_drafts_are_checked(bad: dict) -> None:
    with pytest.raises(ValueError, match="draft"):
        Draft(**bad)


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.75, 4.0])
def test_a_budget_in_loops_per_token(budget: float) -> None:
    """In the mean no more than that, token by token; what an easy token leaves, a later one may take."""
    model, rule = made("kl")
    requests = [
        Request(prompt=p, max_tokens=12, n_loops=4, exit=rule, loop_budget=budget, sampling=Sampling(seed=i))
        for i, p in enumerate(prompts(model.config, 6))
    ]
    full = [replace(request, loop_budget=None) for request in requests]
    rows = Engine(model).layout.most_rows(45)
    engine = Engine(model, chunk=5, tick_tokens=16, n_rows=rows)
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    assert engine.n_preempted > 0 or budget < 4
    for number, request in zip(numbers, requests, strict=True):
        solo = Engine(model, chunk=3)
        assert answers(solo, [solo.submit(request)])[0] == found[number]
        loops = found[number][1]
        assert all(sum(loops[: i + 1]) <= budget * (i + 1) for i in range(len(loops)))
    generous = [alone(model, request) for request in full]
    assert (list(found.values()) == generous) == (budget == 4.0)
    if budget == 2.75:
        assert any(b > 2 for _, loops in found.values() for _, b in pairwise(loops)), "left-overs are used"
