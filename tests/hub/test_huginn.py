"""What is Huginn's alone: its noise, and tokens that stop by themselves."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks import originals
from benchmarks.originals import SETTINGS, fill, ours, tokens
from ritornello.config import ExitRule
from ritornello.engine.engine import Engine
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.model.carry import initial_state
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.hub.at_hand import original

# their look-up of keys knows two layers before the loop and four in it
LAYERS = {"n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2}
DEEP = SETTINGS["huginn"]["tied"] | LAYERS | {"mean_recurrence": 8}
F64 = torch.float64

pytestmark = pytest.mark.filterwarnings("ignore")  # of code that was written for transformers 4


def noise(model: RecurrentDepthTransformer, ids: Tensor) -> Tensor:
    e = model.embed(ids)
    return initial_state("noise", e, model.context(e))


def test_noise_is_of_the_size_of_theirs() -> None:
    """√D times a normal of variance 2 / (5 D), truncated at 3 standard deviations."""
    model = ours("huginn", DEEP | {"block_size": 8192}, torch.float32)
    h = noise(model, tokens(1, 8192))
    limit = 3 * math.sqrt(2 / 5)
    assert abs(h.std() - math.sqrt(2 / 5)) < 0.01 and abs(h.mean()) < 0.01 and h.abs().max() <= limit * (1 + 1e-6)
    theirs = original("huginn", DEEP).model.initialize_state(torch.zeros(1, 8192, 24))
    assert abs(h.std() - theirs.std()) < 0.01 and theirs.abs().max() <= limit * (1 + 1e-6)


@torch.no_grad()
def by_themselves(ids: Tensor, model: RecurrentDepthTransformer, threshold: float) -> tuple[Tensor, list[int]]:
    """Logits (1, T, V) and loops of each token by their code, which takes one token at a time and looks keys up at the
    latest loop that each token has run."""
    code, starts = original("huginn", DEEP), iter(noise(model, ids).split(1, 1))
    code.model.initialize_state = lambda *_, **__: next(starts).clone()
    with originals._precisely(code.code, F64):
        cache = code.code.HuginnDynamicCache(lookup_strategy="latest-m4")
        stops = code.code.LatentDiffExitEvaluator(threshold)
        logits, _, loops = code.model._prefill_with_varied_exit_steps(ids, stops, past_key_values=cache)
    return logits, loops


@torch.no_grad()
def test_tokens_stop_where_theirs_do() -> None:
    """One pass over all tokens, those that have halted frozen, is their walk from token to token."""
    model, ids = ours("huginn", DEEP, F64), tokens(1, 14)
    for threshold, n_different in ((0.0, 1), (0.8, 2), (1.0, 3)):
        logits, loops = by_themselves(ids, model, threshold)
        out = model(ids, exit=ExitRule("delta", threshold))
        assert out.loops_used[0].tolist() == loops and len(set(loops)) == n_different
        assert (out.logits - logits).abs().max() < 1e-12
    assert (model(ids, exit=ExitRule("delta", 0.8)).logits - logits).abs().max() > 0.1


def test_the_engine_writes_what_their_code_would() -> None:
    model, rule = ours("huginn", DEEP, F64), ExitRule("delta", 1.0)
    engine = Engine(model, chunk=4, tick_tokens=16)
    prompts = [tokens(1, n)[0].tolist() for n in (3, 6, 5)]
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, max_tokens=8, exit=rule, sampling=Sampling(temperature=0)))
    written: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for event in engine.run():
        if event.token is not None:
            written[event.number].append((event.token, event.loops))
    for prompt, found in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *(token for token, _ in found)]])
        logits, loops = by_themselves(ids, model, 1.0)
        read = slice(len(prompt) - 1, -1)
        assert logits[0, read].argmax(-1).tolist() == [token for token, _ in found]
        assert loops[read] == [n for _, n in found]
    assert len({n for found in written for _, n in found}) > 1


def test_weights_by_formula_are_all_different() -> None:
    x = fill({"a": torch.empty(40, 24), "b": torch.empty(40, 24)}, F64)
    assert len(x["a"].unique()) > 900 and not torch.equal(x["a"], x["b"]) and torch.linalg.matrix_rank(x["a"]) == 24
