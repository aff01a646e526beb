"""What the model says of a prompt's own tokens, against its forward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.engine.engine import EXACT, Engine
from ritornello.engine.request import Draft, Event, Request
from ritornello.engine.sampling import Sampling
from ritornello.engine.text import Text
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.tokenizer import ByteTokenizer
from tests.engine.kinds import KINDS, is_empty, made, prompts
from tests.model.builders import build

Told = tuple[list[int], list[int], list[float], list[list[int]]]


def events(engine: Engine, requests: list[Request]) -> list[list[Event]]:
    found: dict[int, list[Event]] = {engine.submit(request): [] for request in requests}
    for event in engine.run():
        found[event.number].append(event)
    return list(found.values())


def scores(answer: list[Event]) -> list[Event]:
    """Those of the prompt, which come first."""
    n = sum(event.prompt for event in answer)
    assert all(event.prompt and not event.reason for event in answer[:n])
    return answer[:n]


def expected(
    model: RecurrentDepthTransformer, request: Request, vocab_size: int | None = None
) -> tuple[list[int], torch.Tensor]:
    """Loops (n - 1) and log-probabilities (n - 1, V) by one forward pass."""
    with torch.no_grad():
        out = model(torch.tensor([request.prompt]), n_loops=request.n_loops, exit=request.exit)
    return out.loops_used[0, :-1].tolist(), out.logits[0, :-1, :vocab_size].log_softmax(-1)


def equal(model: RecurrentDepthTransformer, request: Request, answer: list[Event]) -> bool:
    told = scores(answer)
    loops, shares = expected(model, request)
    own = shares.gather(-1, torch.tensor(request.prompt[1:], dtype=torch.int64)[:, None])[:, 0]
    assert request.n_logprobs is not None
    best = shares.topk(request.n_logprobs)
    same = torch.allclose(torch.tensor([e.logprob for e in told], dtype=torch.float64), own, rtol=0, atol=1e-9)
    ids, values = ([[pair[i] for pair in e.likeliest] for e in told] for i in (0, 1))
    near = torch.allclose(torch.tensor(values, dtype=torch.float64).flatten(), best.values.flatten(), rtol=0, atol=1e-9)
    tokens = [e.token for e in told] == list(request.prompt[1:]) and [e.loops for e in told] == loops
    return same and near and tokens and ids == best.indices.tolist()


def asked(kind: str, **options: Any) -> tuple[RecurrentDepthTransformer, list[Request]]:
    model, rule = made(kind)
    how: dict[str, Any] = {"max_tokens": 5, "exit": rule, "n_logprobs": 3, "scores_prompt": True, **options}
    return model, [
        Request(prompt=p, n_loops=(4, 2, 3)[i % 3], sampling=Sampling(seed=i), **how)
        for i, p in enumerate(prompts(model.config, 6))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_scores_are_the_models(kind: str) -> None:
    """In company, in chunks, beside a request that does not ask; the text is what it is without."""
    model, requests = asked(kind)
    requests[5] = replace(requests[5], scores_prompt=False)
    engine = Engine(model, chunk=5, tick_tokens=16)
    answers = events(engine, requests)
    assert is_empty(engine)
    silent = events(Engine(model), [replace(request, scores_prompt=False) for request in requests])
    for request, answer, plain in zip(requests[:5], answers, silent, strict=False):
        assert equal(model, request, answer)
        written = answer[len(request.prompt) - 1 :]
        assert [(e.token, e.loops, e.reason) for e in written] == [(e.token, e.loops, e.reason) for e in plain]
    assert not any(event.prompt for event in answers[5])
    if not model.config.is_plain:  # control: another depth says something else
        longest = max(requests[:5], key=lambda request: len(request.prompt))
        other = replace(longest, n_loops=1, exit=None)
        assert not equal(model, other, answers[requests.index(longest)])


@pytest.mark.parametrize("kind", ["gqa", "act exits", "first", "plain"])
def test_a_text_that_starts_over_tells_no_score_twice(kind: str) -> None:
    """Wherever in its prompt it was."""
    model, requests = asked(kind)
    engine = Engine(model, chunk=3, tick_tokens=16)
    found: dict[int, list[Event]] = {engine.submit(request): [] for request in requests}
    partly = 0
    while engine.busy:
        for event in engine.step():
            found[event.number].append(event)
        if engine.n_ticks % 3 == 0 and engine.n_preempted < 6 and engine.running:
            victim = max(engine.running, key=lambda s: 1 < s.n_scored < s.n_prompt)
            partly += 1 < victim.n_scored < victim.n_prompt
            engine._preempt(victim)
    assert engine.n_preempted >= 3 and partly > 0 and is_empty(engine)
    assert all(equal(model, request, answer) for request, answer in zip(requests, found.values(), strict=True))


def test_nor_does_one_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = asked("kl")
    engine = Engine(model, chunk=4, tick_tokens=16)
    found: dict[int, list[Event]] = {engine.submit(request): [] for request in requests}
    coda, calls = model.coda, iter(range(10**6))

    def failing(*args: Any) -> torch.Tensor:
        if next(calls) in (3, 6, 10, 15):
            raise RuntimeError("a coda that fails")
        return coda(*args)

    monkeypatch.setattr(model, "coda", failing)
    n_errors = 0
    while engine.busy and engine.n_ticks < 500:
        try:
            told = engine.step()
        except RuntimeError:
            n_errors += 1
            continue
        for event in told:
            found[event.number].append(event)
    monkeypatch.undo()
    assert n_errors == 4
    assert all(equal(model, request, answer) for request, answer in zip(requests, found.values(), strict=True))


def test_known_prefixes_are_left_for_others_and_not_taken() -> None:
    model, rule = made("kl")
    prompt = [i % 30 for i in range(40)]
    request = Request(prompt=prompt, max_tokens=1, n_loops=4, exit=rule, n_logprobs=2, scores_prompt=True)
    engine = Engine(model, chunk=16)
    plain = replace(request, scores_prompt=False)
    each = []
    for some in (plain, request, request, plain):
        before = engine.n_token_loops
        (answer,) = events(engine, [some])
        each.append(engine.n_token_loops - before)
        assert not some.scores_prompt or equal(model, some, answer)
    assert each[0] == each[1] == each[2] > 3 * each[3]
    engine = Engine(model, chunk=16)
    events(engine, [request])
    before = engine.n_token_loops
    events(engine, [plain])
    assert engine.n_token_loops - before == each[3]


@pytest.mark.parametrize("more", [{"loop_budget": 2.5}, {"draft": Draft(n_loops=1, n_tokens=3)}], ids=str)
def test_with_budgets_and_drafts(more: dict[str, Any]) -> None:
    model, requests = asked("gqa", max_tokens=9)
    requests = [replace(request, n_loops=4, **more) for request in requests]
    answers = events(Engine(model, chunk=5, tick_tokens=16), requests)
    silent = events(Engine(model), [replace(request, scores_prompt=False) for request in requests])
    for request, answer, plain in zip(requests, answers, silent, strict=True):
        assert equal(model, request, answer)
        assert [e.token for e in answer[len(request.prompt) - 1 :]] == [e.token for e in plain]


@pytest.mark.parametrize("kind", ["kl", "bare"])
def test_exact_scores_do_not_depend_on_company(kind: str) -> None:
    model, rule = made(kind, torch.float32)
    requests = [
        Request(prompt=p, max_tokens=3, n_loops=3, exit=rule, n_logprobs=20, scores_prompt=True)
        for p in prompts(model.config, 3)
    ]
    together = events(Engine(model, exact=True, chunk=8, tick_tokens=2 * EXACT), requests)
    for request, answer in zip(requests, together, strict=True):
        (solo,) = events(Engine(model, exact=True, chunk=3, tick_tokens=2 * EXACT), [request])
        assert [replace(e, number=0) for e in answer] == [replace(e, number=0) for e in solo]


def test_ids_that_are_never_chosen_have_no_probability() -> None:
    model, _ = made("gqa")
    engine = Engine(model, vocab_size=20)
    request = Request(prompt=[1, 19, 3], max_tokens=1, n_logprobs=0, scores_prompt=True)
    (answer,) = events(engine, [request])
    _, shares = expected(model, request, 20)
    assert [event.logprob for event in scores(answer)] == pytest.approx([float(shares[0, 19]), float(shares[1, 3])])
    with pytest.raises(ValueError, match=r"prompt = \[1, 20\]: must be integers of shape \(2,\) in \[0, 19\]"):
        engine.submit(replace(request, prompt=[1, 20]))
    engine.submit(replace(request, prompt=[1, 20], scores_prompt=False))


def test_what_cannot_be_scored() -> None:
    for bad in ({"n_logprobs": None, "scores_prompt": True}, {"scores_prompt": 1}):
        with pytest.raises(ValueError, match=r"scores_prompt = .*: must be False, or True with n_logprobs"):
            Request(prompt=[1, 2], **bad)
    engine = Engine(build({"halting": "none", "n_token_tables": 2}).eval())
    with pytest.raises(ValueError, match="scores_prompt = True: must be False with several token tables"):
        engine.submit(Request(prompt=[(1, 2), (3, 4)], max_tokens=1, n_logprobs=0, scores_prompt=True))


def test_a_prompt_is_not_part_of_the_text() -> None:
    text = Text(ByteTokenizer(), ())
    assert text.take(Event(0, 97, 1, logprob=-1.0, prompt=True)) == "" and text.tokens == []
    assert text.take(Event(0, 97, 1)) == "a"


def test_an_exit_that_no_token_waits_for() -> None:
    """Loops are those of the token before, whose logits they are."""
    model, _ = made("kl")
    request = Request(prompt=[1, 2, 3, 4], max_tokens=1, n_loops=4, exit=ExitRule("kl", 1e9), n_logprobs=0)
    (answer,) = events(Engine(model), [replace(request, scores_prompt=True)])
    assert [event.loops for event in answer] == [1, 1, 1, 1]
