"""What is Ouro's alone: the gate that reads the state, and tokens that stop by it."""

import pytest
import torch
from torch import Tensor

from benchmarks.originals import SETTINGS, ours, tokens
from ritornello.config import ExitRule, default_exit
from ritornello.engine.engine import Engine
from ritornello.engine.generate import decode
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from tests.hub.at_hand import original

SHAPE = SETTINGS["ouro"]["tied, fewer keys"]
F64 = torch.float64

pytestmark = pytest.mark.filterwarnings("ignore")  # of code that was written for transformers 4


@torch.no_grad()
def test_weights_of_the_loops_are_theirs() -> None:
    """Read through their expected logits, the sum over loops of p_t times what loop t says."""
    model, code, ids = ours("ouro", SHAPE, F64), original("ouro", SHAPE), tokens()
    code.model.early_exit_threshold = None
    expected = code.logits(ids, 5, exit_at_step=None, use_weighted_exit=True)
    states = model(ids, n_loops=5, trajectory=True, weigh=True).trajectory
    weights = torch.stack([state.halt.weight for state in states])
    assert torch.allclose(weights.sum(0), torch.ones(2, 9, dtype=F64)) and weights.std(-1).min() > 1e-3
    found = sum(w[..., None] * model.logits(state.h) for w, state in zip(weights, states, strict=True))
    assert (found - expected).abs().max() < 1e-12
    even = sum(model.logits(state.h) for state in states) / 5
    assert (even - expected).abs().max() > 0.1


@torch.no_grad()
def exits(ids: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """How far logits are from theirs (B, T), what loops ours used, and how far they are at full depth."""
    model, code = ours("ouro", SHAPE, F64), original("ouro", SHAPE)
    expected = code.logits(ids, 6, exit_at_step=None, exit_threshold=threshold)
    out, full = model(ids, n_loops=6, exit=ExitRule("cumulative", threshold)), model(ids, n_loops=6).logits
    return (out.logits - expected).abs().amax(-1), out.loops_used, (full - expected).abs().amax(-1)


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_token_stops_where_theirs_is_read(threshold: float) -> None:
    apart, loops, full = exits(torch.arange(23)[:, None], threshold)
    assert len(loops.unique()) >= 3 and apart.max() < 1e-12 < 0.1 < full[loops < 6].min()


def test_later_tokens_read_one_that_has_halted_as_it_was() -> None:
    """There its deeper keys and values are computed all the same: the one deviation."""
    apart, loops, _ = exits(tokens(4, 9), 0.6)
    for row, used in zip(apart, loops.tolist(), strict=True):
        first = next((i for i in range(8) if max(used[i + 1 :]) > used[i]), 8)  # read beyond its last loop
        assert row[: first + 1].max() < 1e-12
    assert apart.max() > 1e-3


def test_the_engine_writes_what_one_pass_would() -> None:
    model = ours("ouro", SHAPE, F64)
    rule = ExitRule("cumulative", 0.6)
    assert default_exit(model.config.halting) == ExitRule("cumulative", 0.99)
    engine, prompts = Engine(model, chunk=4, tick_tokens=16), [tokens(1, n)[0].tolist() for n in (3, 7, 5)]
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, max_tokens=8, exit=rule, sampling=Sampling(temperature=0)))
    written: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for event in engine.run():
        if event.token is not None:
            written[event.number].append((event.token, event.loops))
    for prompt, found in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *(token for token, _ in found)]])
        with torch.no_grad():
            out = model(ids, exit=rule)
        read = slice(len(prompt) - 1, -1)
        assert [*zip(out.logits[0, read].argmax(-1).tolist(), out.loops_used[0, read].tolist(), strict=True)] == found
        alone = decode(model, [prompt], n_new=8, exit=rule, sampling=Sampling(temperature=0))
        assert [(int(token), int(n)) for token, n in alone] == found
    assert len({n for found in written for _, n in found}) > 1
