"""Readings of every loop, against forward passes in which the token's own budget ends there."""

from typing import Any

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.engine.generate import decode
from ritornello.engine.sampling import Sampling
from ritornello.engine.trace import LoopReading, TokenTrace, trace
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.engine.kinds import KINDS, made
from tests.model.builders import build

PROMPT, COMPLETION = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]


def whole(model: RecurrentDepthTransformer, **options: Any) -> list[TokenTrace]:
    return [each for part in trace(model, PROMPT, COMPLETION, n_loops=4, **options) for each in part]


def expected(
    model: RecurrentDepthTransformer, n_written: int, rule: ExitRule | None = None
) -> tuple[list[int], torch.Tensor]:
    """After all before this token of the completion: loops taken (4,) and log-probabilities (4, V) where the last state
    has 1, 2, 3, 4 loops at most, and those before 4."""
    text = torch.tensor([PROMPT + COMPLETION[:n_written]] * 4)
    budgets = torch.full_like(text, 4)
    budgets[:, -1] = torch.arange(1, 5)
    with torch.no_grad():
        out = model(text, n_loops=None if model.config.is_plain else budgets, exit=rule)
    return out.loops_used[:, -1].tolist(), out.logits[:, -1].log_softmax(-1)


def equal(reading: LoopReading, shares: torch.Tensor) -> bool:
    best, entropy = shares.topk(3), float(-(shares.exp() * shares).sum())
    ids, values = zip(*reading.likeliest, strict=True)
    near = pytest.approx([entropy, *best.values.tolist()], rel=0, abs=1e-9)
    return [reading.entropy, *values] == near and list(ids) == best.indices.tolist()


@pytest.mark.parametrize(
    ("kind", "n_coda"), [*((kind, None) for kind in KINDS), ("delta, mla", 2), ("streams", 2), ("act exits", 0)]
)
def test_each_loop_reads_what_a_budget_of_so_many_gives(kind: str, n_coda: int | None) -> None:
    """The text before is as deep as it went. Chunks change nothing; the control reads one loop off."""
    model, rule = made(kind)
    if n_coda is not None:
        layers = (model.config.n_prelude_layers, model.config.n_recurrent_layers, n_coda)
        model = build({**KINDS[kind][0], "layers": layers}, dtype=torch.float64).eval()
    found = whole(model, exit=rule, n_top=3, chunk=3)
    assert [each.token for each in found] == COMPLETION
    differs = False
    for i, each in enumerate(found):
        loops, shares = expected(model, i, rule)
        assert each.loops == loops[-1] and len(each.by_loop) == max(1, loops[-1])
        assert all(map(equal, each.by_loop, shares))
        differs = differs or any(not equal(a, b) for a, b in zip(each.by_loop[1:], shares, strict=False))
    assert differs or model.config.is_plain


@pytest.mark.parametrize("kind", ["gqa", "act exits", "delta, mla", "streams", "plain"])
def test_the_last_reading_is_what_decoding_saw(kind: str) -> None:
    model, rule = made(kind)
    how: Any = {"n_loops": 4, "exit": rule}
    steps = list(decode(model, [PROMPT], n_new=9, sampling=Sampling(temperature=0), **how))
    written = [int(token) for token, _ in steps]
    found = [each for part in trace(model, PROMPT, written, **how) for each in part]
    assert [each.by_loop[-1].likeliest[0][0] for each in found] == written
    assert [each.loops for each in found] == [int(loops) for _, loops in steps]


def test_it_comes_in_parts_that_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("kl")
    rows: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(hidden.numel() // 16), logits(hidden))[1])
    parts = list(trace(model, [1] * 10, [2] * 20, n_loops=4, chunk=4, n_top=0))
    assert [len(part) for part in parts] == [0, 0, 0, *[4] * 5]
    assert max(rows) == 4 and parts[3][0].by_loop[0].likeliest == ()
    monkeypatch.setattr("ritornello.engine.trace.MOST_STATES", 8)
    fewer = list(trace(model, [1] * 10, [2] * 20, n_loops=4, chunk=4, n_top=0))
    assert [len(part) for part in fewer[:5]] == [0, 0, 0, 2, 2]
    one, other = ([r.entropy for part in some for t in part for r in t.by_loop] for some in (parts, fewer))
    assert one == pytest.approx(other, abs=1e-9) and len(one) == 80


def test_ids_that_are_never_chosen_are_left_out() -> None:
    model, _ = made("gqa")
    (found, *_) = whole(model, vocab_size=12, n_top=12)
    _, shares = expected(model, 0)
    kept = shares[0, :12].log_softmax(-1)
    assert dict(found.by_loop[0].likeliest) == pytest.approx(dict(enumerate(kept.tolist())))


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [37]}),
    ("prompt", {"prompt": [1.5]}),
    ("completion", {"completion": []}),
    ("completion", {"completion": [-1]}),
    ("completion", {"completion": [30], "vocab_size": 30}),
    ("tokens", {"completion": [1] * 64}),
    ("n_loops", {"n_loops": 0}),
    ("n_loops", {"n_loops": 5000}),
    ("exit", {"exit": ExitRule("kl", 0.1)}),
    ("exit", {"exit": "delta"}),
    ("min_loops", {"exit": ExitRule("delta", 0.1, min_loops=5)}),
    ("n_top", {"n_top": 38}),
    ("n_top", {"n_top": -1}),
    ("vocab_size", {"vocab_size": 38}),
    ("chunk", {"chunk": 0}),
]


@pytest.mark.parametrize(("field", "bad"), BAD, ids=str)
def test_bad_arguments_are_refused_first(field: str, bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("gqa")
    monkeypatch.setattr(model, "embed", None)
    given: dict[str, Any] = {"prompt": PROMPT, "completion": COMPLETION, "n_loops": 4, **bad}
    with pytest.raises(ValueError, match=f"^{field} = .*: must be"):
        trace(model, given.pop("prompt"), given.pop("completion"), **given)


def test_models_that_cannot_be_traced() -> None:
    model, _ = made("gqa")
    vars(model)["_step"] = model._step  # as `compile` leaves it
    with pytest.raises(ValueError, match="model = 'compiled'"):
        trace(model, [1], [2])
    with pytest.raises(ValueError, match="model = '2 token tables'"):
        trace(build({"halting": "none", "n_token_tables": 2}), [1], [2])
