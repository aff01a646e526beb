"""Depth-wise batching: every request gets what it would get alone, whatever runs beside it."""

import inspect
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.config import ExitName, ExitRule
from ritornello.engine.engine import Engine
from ritornello.engine.lanes import Lanes
from ritornello.engine.pages import NONE, Pages, Tables, distinct
from ritornello.engine.prefixes import BLOCK, Prefixes
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.engine.tokens import Tokens
from tests.engine.kinds import KINDS, alone, answers, is_empty, made, prompts, ruled
from tests.model.builders import build

RULES: dict[str, tuple[ExitName, ...]] = {
    "gate": ("hazard", "cumulative", "delta", "kl", "entropy"),
    "act": ("cumulative", "hazard"),
    "kl": ("kl", "entropy", "delta"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_each_request_gets_what_it_gets_alone(kind: str, chunk: int) -> None:
    model, rule = made(kind)
    requests = [
        Request(prompt=prompt, max_tokens=6, n_loops=(4, 4, 2, 1)[i % 4], exit=rule, sampling=Sampling(seed=i))
        for i, prompt in enumerate(prompts(model.config, 7))
    ]
    engine = Engine(model, chunk=chunk, tick_tokens=max(16, chunk))
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    for number, request in zip(numbers, requests, strict=True):
        assert found[number] == alone(model, request)
    assert is_empty(engine)
    deep = [found[number][1] for number, request in zip(numbers, requests, strict=True) if request.n_loops == 4]
    assert (len({loops for used in deep for loops in used}) > 1) == (rule is not None), deep
    other = replace(requests[0], sampling=Sampling(seed=99))
    assert alone(model, other) != found[numbers[0]]


@pytest.mark.parametrize("kind", ["gate", "act", "kl"])
def test_each_request_has_a_rule_of_its_own(kind: str) -> None:
    """All rules that a model can have run side by side in every tick, and none at all."""
    settings, _ = KINDS[kind]
    model = build(settings, dtype=torch.float64).eval()
    rules = [None, *(ruled(model, name) for name in RULES[kind])]
    requests = [
        Request(
            prompt=prompt, max_tokens=5, n_loops=(4, 3)[i % 2], exit=rules[i % len(rules)], sampling=Sampling(seed=i)
        )
        for i, prompt in enumerate(prompts(model.config, 4 * len(rules)))
    ]
    engine = Engine(model, chunk=4, tick_tokens=16)
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    for number, request in zip(numbers, requests, strict=True):
        assert found[number] == alone(model, request)
    assert is_empty(engine)
    early = {i % len(rules) for i, number in enumerate(numbers) if min(found[number][1]) < (requests[i].n_loops or 0)}
    assert early == set(range(1, len(rules))), "a rule never fired"


@pytest.mark.parametrize("kind", ["gqa", "mla", "kl"])
def test_requests_that_come_and_go(kind: str) -> None:
    (model, rule), rng = made(kind), random.Random(1)
    requests = [
        Request(prompt=p, max_tokens=rng.randint(1, 9), exit=rule, sampling=Sampling(seed=i))
        for i, p in enumerate(prompts(model.config, 20))
    ]
    engine, found, cancelled, waiting = Engine(model, chunk=4, tick_tokens=12), {}, set(), list(requests)
    while waiting or engine.busy:
        if waiting and rng.random() < 0.4:
            found[engine.submit(waiting.pop(0))] = []
        for event in engine.step():
            found[event.number] += [] if event.token is None else [event.token]
        if rng.random() < 0.05 and found:
            number = rng.choice(list(found))
            if engine.cancel(number):
                cancelled.add(number)
    assert 0 < len(cancelled) < len(requests)
    for number, request in enumerate(requests):
        expected = alone(model, request)[0]
        assert found[number] == (expected if number not in cancelled else expected[: len(found[number])])
    assert is_empty(engine)


@pytest.mark.parametrize(("kind", "share"), [*((kind, 4) for kind in KINDS), ("kl", 2)])
def test_a_full_memory_is_no_failure(kind: str, share: int) -> None:
    """With a part of the rows needed, sequences give theirs up and start over: the same tokens, later."""
    model, rule = made(kind)
    requests = [
        Request(prompt=p, max_tokens=10, exit=rule, sampling=Sampling(seed=i))
        for i, p in enumerate(prompts(model.config, 10))
    ]
    most = sum(len(request.prompt) + request.max_tokens for request in requests)
    engine = Engine(model, chunk=8, tick_tokens=64, n_rows=Engine(model).layout.most_rows(most // share))
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    assert engine.n_preempted > 0
    for number, request in zip(numbers, requests, strict=True):
        assert found[number] == alone(model, request)
    engine.prefixes.clear()
    assert engine.pages.n_used == 0


def test_an_early_exit_holds_few_rows() -> None:
    model, _ = made("kl")
    request = Request(prompt=prompts(model.config, 1, seed=3)[0] * 2, max_tokens=1, n_loops=4)
    peaks = []
    for rule in (None, ExitRule("kl", 1e9)):
        engine = Engine(model)
        engine.submit(replace(request, exit=rule))
        peak = 0
        with torch.inference_mode():
            while engine.waiting or engine.running:
                engine._enter()
                engine._loop()
                peak = max(peak, engine.pages.n_used)
                engine._leave()
        peaks.append(peak)
    c, n = model.config, len(request.prompt)
    assert peaks[0] == n * (c.n_prelude_layers + 4 * c.n_recurrent_layers)
    assert peaks[1] == n * (c.n_prelude_layers + c.n_recurrent_layers)


def test_ticks_mix_loops() -> None:
    """A prompt's chunks follow each other through the loops: as many ticks as chunks and loops, not their product."""
    model, _ = made("gqa")
    engine = Engine(model, chunk=2, tick_tokens=64)
    engine.submit(Request(prompt=[1] * 16, max_tokens=1, n_loops=4))
    list(engine.run())
    assert engine.n_ticks == 16 // 2 + 4 - 1 and engine.n_token_loops == 16 * 4


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [1] * 64}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n_loops": 5}, "n_loops"),
        ({"n_loops": 0}, "n_loops"),
        ({"exit": ExitRule("kl", 0.1)}, "exit"),
        ({"exit": ExitRule("delta", 0.1, min_loops=3), "n_loops": 2}, "min_loops"),
        ({"prompt": [[1, 2], [3]]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"sampling": Sampling(logit_bias=((36, 1.0),))}, "logit_bias"),
        ({"n_logprobs": 21}, "n_logprobs"),
        ({"n_logprobs": True}, "n_logprobs"),
        ({"stop": 3}, "stop"),
        ({"exit": "kl"}, "exit"),
        ({"sampling": {}}, "sampling"),
        ({"draft": 2}, "draft"),
        ({"constraint": "[a-z]"}, "constraint"),
    ],
)
def test_what_cannot_be_done_is_refused(bad: dict[str, Any], said: str) -> None:
    model, _ = made("gqa")
    engine = Engine(model, vocab_size=model.config.vocab_size - 1)
    with pytest.raises(ValueError, match=said):
        engine.submit(Request(**{"prompt": [1], **bad}))
    with pytest.raises(ValueError, match="rows"):
        Engine(model, n_rows=9).submit(Request(prompt=[1] * 9))
    assert not engine.busy


@pytest.mark.parametrize(
    "bad", [{"n_rows": 0}, {"n_loops": 0}, {"chunk": 0}, {"tick_tokens": 3}, {"vocab_size": 99}], ids=str
)
def test_options_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*: must be"):
        Engine(made("gqa")[0], **bad)


def test_a_compiled_model_is_refused() -> None:
    model, _ = made("gqa")
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="model = 'compiled'"):
        Engine(model)


@pytest.mark.parametrize("kind", ["kl", "streams"])
def test_a_place_that_is_taken_again_is_another_token(kind: str) -> None:
    """A short text may take slot and place of the last token that was in the loop, but not its lane."""
    model, rule = made(kind)
    rng, engine = random.Random(1), Engine(model)
    for _ in range(60):
        before, after = rng.choices(range(model.config.vocab_size), k=rng.randint(2, 6)), [rng.randrange(8)]
        told = []
        for each in (engine, Engine(model)):
            if each is engine:
                each.submit(Request(prompt=before, max_tokens=1, exit=rule))
                list(each.run())
            each.submit(Request(prompt=after, max_tokens=1, exit=rule, n_logprobs=3))
            told += list(each.run())
        assert told[0].logprob == pytest.approx(told[1].logprob, abs=1e-12)


def test_what_breaks_in_the_middle_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised, all under way start over: nothing is lost but time."""
    model, rule = made("kl")
    requests = [Request(prompt=p, max_tokens=4, exit=rule) for p in prompts(model.config, 6)]
    places: list[tuple[Any, str]] = [(model, name) for name in ("prelude", "loop_once", "coda", "logits")]
    places += [(Tokens, "where"), (Pages, "drop"), (Pages, "hold"), (Prefixes, "give"), (Prefixes, "keep")]
    places += [(Lanes, "drop"), (Tables, "halt"), (Tables, "open"), (Tokens, "joined"), (Tokens, "made")]
    for where, name in places:
        engine, real = Engine(model, chunk=4, tick_tokens=16), getattr(where, name)
        static = isinstance(inspect.getattr_static(where, name), staticmethod)
        calls = iter(range(10**9))

        def failing(*arguments: Any, real: Any = real, calls: Any = calls) -> Any:
            call = next(calls)
            if call in (1, 20):
                raise MemoryError
            found = real(*arguments)
            if call == 4:  # done, but nobody knows
                raise MemoryError
            return found

        numbers = [engine.submit(request) for request in requests]
        found: dict[int, list[int]] = {number: [] for number in numbers}
        n_failures = 0
        with monkeypatch.context() as patch:
            patch.setattr(where, name, staticmethod(failing) if static else failing)
            while engine.busy:
                try:
                    for event in engine.step():
                        found[event.number] += [] if event.token is None else [event.token]
                except MemoryError:
                    n_failures += 1
        assert n_failures
        for number, request in zip(numbers, requests, strict=True):
            assert found[number] == alone(model, request)[0]
        assert is_empty(engine)


def test_no_token_of_a_step_that_fails_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("gqa")
    engine, real, calls = Engine(model), Engine._push, iter(range(10**6))
    requests = [Request(prompt=[i], max_tokens=4) for i in range(3)]
    found: dict[int, list[int]] = {engine.submit(request): [] for request in requests}

    def failing(*arguments: Any) -> Any:
        if next(calls) in (4, 8):
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(Engine, "_push", failing)
    n_failures = 0
    while engine.busy:
        try:
            for event in engine.step():
                found[event.number] += [] if event.token is None else [event.token]
        except MemoryError:
            n_failures += 1
    assert n_failures == 2 and list(found.values()) == [alone(model, request)[0] for request in requests]


@pytest.mark.parametrize("seed", range(12))
def test_prompts_as_large_as_a_tick_in_a_full_memory(seed: int) -> None:
    rng, (model, _) = random.Random(seed), made("gqa")
    requests = [Request(prompt=[i, 1], max_tokens=rng.randint(20, 40)) for i in range(rng.randint(2, 4))]
    requests += [Request(prompt=rng.choices(range(30), k=rng.randint(25, 40)), max_tokens=3) for _ in range(2)]
    rows = Engine(model).layout.most_rows(63) + rng.randrange(9)
    engine = Engine(model, chunk=8, tick_tokens=8, n_rows=rows)
    numbers = [engine.submit(replace(request, sampling=Sampling(seed=i))) for i, request in enumerate(requests)]
    found = answers(engine, numbers)
    last = numbers[-1]
    assert found[last] == alone(model, replace(requests[last], sampling=Sampling(seed=last))) and is_empty(engine)


def test_nobody_starves() -> None:
    """A long prompt beside short requests that never cease: it gets what they leave of a tick, and memory in turn."""
    model, _ = made("gqa")
    engine = Engine(model, chunk=16, tick_tokens=16)
    engine = Engine(model, chunk=16, tick_tokens=16, n_rows=engine.layout.most_rows(64))
    for i in range(3):
        engine.submit(Request(prompt=[i], max_tokens=8))
    long = engine.submit(Request(prompt=[1] * 60, max_tokens=2))
    for tick in range(400):
        if len(engine.waiting) < 3:
            engine.submit(Request(prompt=[tick % 30, 2], max_tokens=8))
        if any(event.number == long for event in engine.step()):
            break
    assert tick < 300, "never served"


def test_rows_are_held_once() -> None:
    """A place's rows by loop: different ones, then the last one again to the end, or none at all."""
    rng, rows = np.random.default_rng(0), np.full((3, 6, 5), NONE)
    for slot, place in np.ndindex(3, 5):
        if deep := rng.integers(7):
            rows[slot, :, place] = 100 * slot + 10 * place + np.minimum(np.arange(6), deep - 1)
    expected = np.unique(rows[rows != NONE])
    assert len(expected) < (rows != NONE).sum()
    assert np.array_equal(np.sort(distinct(rows)), expected)
    assert np.array_equal(np.sort(distinct(rows[0])), np.unique(rows[0][rows[0] != NONE]))


def test_pages_are_counted() -> None:
    engine = Engine(made("gqa")[0], n_rows=30)
    pages = engine.pages
    first, second = pages.take(10), pages.take(20)
    assert len(np.unique(np.concatenate((first, second)))) == 30 and pages.n_free == 0
    pages.hold(first[:4])
    pages.drop(first)
    assert pages.n_free == 6
    pages.drop(first[:4])
    assert pages.n_free == 10 and pages.n_used == 20


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_changes_no_text(kind: str) -> None:
    model, rule = made(kind)
    start = prompts(model.config, 1)[0] * BLOCK
    requests = [
        Request(prompt=[*start[: 2 * BLOCK], i], max_tokens=3, exit=rule, sampling=Sampling(seed=i)) for i in range(3)
    ]
    engine = Engine(model, chunk=8, tick_tokens=64)
    for request in requests:
        found = answers(engine, [number := engine.submit(request)])
        assert found[number] == alone(model, request)
        assert len(engine.prefixes) == 2
    assert is_empty(engine)


def test_what_prompts_share_is_computed_once() -> None:
    model, _ = made("kl")
    start = [7] * (2 * BLOCK)
    requests = [
        Request(prompt=[*start, i], max_tokens=5, n_loops=n, sampling=Sampling(seed=i))
        for i, n in enumerate((4, 4, 4, 3))
    ]
    engine = Engine(model, chunk=8, tick_tokens=64)
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    apart = Engine(model, chunk=8, tick_tokens=64)
    for number, request in zip(numbers, requests, strict=True):
        assert found[number] == alone(model, request)
        answers(apart, [apart.submit(request)])
        apart.prefixes.clear()
    assert len(engine.prefixes) == 2 * 2, "another depth is another prefix"
    assert apart.n_token_loops - engine.n_token_loops == 2 * len(start) * 4
    assert engine.pages.n_used > 0
    engine.prefixes.clear()
    assert engine.pages.n_used == 0


def test_the_same_prompt_again_runs_its_last_block_only() -> None:
    model, _ = made("gqa")
    engine = Engine(model)
    request = Request(prompt=[3] * (3 * BLOCK), max_tokens=1, n_loops=4)
    engine.submit(request)
    first = list(engine.run())
    before = engine.n_token_loops
    engine.submit(request)
    assert [event.token for event in engine.run()] == [event.token for event in first]
    assert engine.n_token_loops - before == 4 * BLOCK and before == 4 * 3 * BLOCK


def test_what_is_kept_makes_room() -> None:
    """Shared prefixes are the first to go, the oldest before all."""
    model, _ = made("gqa")
    probe = Engine(model)
    engine = Engine(model, n_rows=probe.layout.most_rows(5 * BLOCK))
    for i in range(6):
        request = Request(prompt=[i] * (2 * BLOCK), max_tokens=3, sampling=Sampling(seed=i))
        found = answers(engine, [number := engine.submit(request)])
        assert found[number] == alone(model, request)
    assert engine.n_preempted == 0 and 0 < len(engine.prefixes) <= 4


def test_log_probabilities_are_the_models() -> None:
    model, _ = made("gqa")
    request = Request(prompt=[1, 2, 3], max_tokens=4, n_logprobs=3, sampling=Sampling(temperature=0.5, top_k=5, seed=1))
    engine = Engine(model)
    engine.submit(request)
    tokens = list(request.prompt)
    for event in engine.run():
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert event.token is not None and event.logprob == pytest.approx(float(expected[event.token]), abs=1e-9)
        best = expected.topk(3)
        assert [token for token, _ in event.likeliest] == best.indices.tolist()
        assert [share for _, share in event.likeliest] == pytest.approx(best.values.tolist(), abs=1e-9)
        tokens.append(event.token)
    assert len(tokens) == 7


def test_several_token_tables_give_one_answer() -> None:
    model = build({"halting": "kl", "n_token_tables": 2}, dtype=torch.float64).eval()
    prompt = [(1, 2), (3, 4), (5, 6)]
    engine = Engine(model)
    engine.submit(Request(prompt=prompt, max_tokens=1, sampling=Sampling(temperature=0)))
    (event,) = engine.run()
    with torch.no_grad():
        assert event.token == int(model(torch.tensor([prompt])).logits[0, -1].argmax()) and event.reason == "length"
    for bad in ({"prompt": [1, 2]}, {"max_tokens": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            engine.submit(Request(**{"prompt": prompt, "max_tokens": 1, **bad}))


def test_the_end_of_a_text() -> None:
    model, _ = made("gqa")
    request = Request(prompt=[1, 2, 3], max_tokens=4)
    engine = Engine(model)
    engine.submit(request)
    events = list(engine.run())
    assert [event.reason for event in events] == ["", "", "", "length"]
    third = events[2].token
    assert third is not None and third not in [event.token for event in events[:2]]
    engine.submit(replace(request, stop=frozenset([third])))
    ends = list(engine.run())
    assert [(event.token, event.reason) for event in ends[2:]] == [(None, "stop")]
    limit = model.config.max_seq_len
    engine.submit(Request(prompt=[1] * (limit - 2), max_tokens=9))
    assert [event.reason for event in engine.run()] == ["", "length"]


BIASED = Sampling(logit_bias=((5, -100.0),))  # away from what is broken


def test_logits_that_are_no_numbers_end_one_text() -> None:
    """Those beside it do not notice."""
    model = build({"tie_embeddings": False}, dtype=torch.float64).eval()
    engine = Engine(model)
    engine.pages.entries[engine.pages.take(1)] = torch.nan  # the first row, another's
    with torch.no_grad():
        model.embed_tokens[0].weight[5] = torch.nan
    engine.submit(Request(prompt=[5, 2, 1], max_tokens=3))
    healthy = [Request(prompt=[1, 2, 3] * n, max_tokens=6, sampling=BIASED) for n in (1, 4, 2)]
    numbers = [engine.submit(request) for request in healthy]
    events = list(engine.run())
    assert [(event.token, event.reason) for event in events if event.number == 0] == [(None, "failed")]
    model.embed_tokens[0].weight[5].data.zero_()
    for number, request in zip(numbers, healthy, strict=True):
        tokens = [event.token for event in events if event.number == number]
        assert len(tokens) == 6 and tokens == answers(engine, [again := engine.submit(request)])[again][0]


def test_soak() -> None:
    """200 requests at random times, some cancelled, with a quarter of the memory that all at once would need."""
    (model, rule), rng = made("kl"), random.Random(3)
    starts = [rng.choices(range(model.config.vocab_size), k=BLOCK) for _ in range(4)]
    requests = [
        Request(
            prompt=rng.choice(([], *starts)) + rng.choices(range(model.config.vocab_size), k=rng.randint(1, 8)),
            max_tokens=rng.randint(1, 8),
            n_loops=rng.randint(1, 4),
            exit=rng.choice((rule, None)),
            sampling=Sampling(seed=i, temperature=rng.choice((0.0, 1.0)), repetition_penalty=rng.choice((1.0, 1.3))),
        )
        for i in range(200)
    ]
    engine = Engine(model, chunk=8, tick_tokens=32)
    engine = Engine(model, chunk=8, tick_tokens=32, n_rows=engine.layout.most_rows(40))
    found: dict[int, list[int]] = {}
    waiting, cancelled = list(requests), set()
    while waiting or engine.busy:
        while waiting and rng.random() < 0.7:
            found[engine.submit(waiting.pop(0))] = []
        for event in engine.step():
            found[event.number] += [] if event.token is None else [event.token]
        if rng.random() < 0.02 and engine.cancel(number := rng.choice(list(found))):
            cancelled.add(number)
    assert engine.n_preempted > 0 and cancelled
    plain = [i for i, request in enumerate(requests) if request.sampling.repetition_penalty == 1 and i not in cancelled]
    for number in plain[::10]:
        assert found[number] == alone(model, requests[number])[0]
    single = Engine(model)
    for number in [i for i in range(200) if i not in cancelled]:
        assert answers(single, [again := single.submit(requests[number])])[again][0] == found[number]
    assert is_empty(engine)
