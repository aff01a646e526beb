"""Rounded weights: how far from what they were, what stays exact, and that everything runs on them."""

from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ritornello.config import DataConfig, Recipe
from ritornello.engine.generate import generate, load
from ritornello.engine.quantize import Weights, quantize
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint
from ritornello.train.tokenizer import ByteTokenizer
from tests.model.builders import build, differ, tokens_for

KINDS = get_args(Weights)
SIZES = {"bf16": 2, "int8": 1}
TOLERANCE = {"bf16": 2**-8, "int8": 0.5 / 127}  # of a row's largest weight


def rounded(kind: Weights, **changes: Any) -> tuple[RecurrentDepthTransformer, RecurrentDepthTransformer]:
    """A model, and the same with rounded weights."""
    model = build({"ffn": "moe", "halting": "none", "read_out": "last"} | changes).float()
    copy = deepcopy(model)
    quantize(copy, kind)
    return model, copy


def matrices(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """What is rounded: everything with two dimensions or more that is neither a table by loop nor read as it is."""
    exact = ("embed_tokens", "loop_A", "loop_B", "router", "injection", "loop_embedding", "halting", "probe", "carry")
    found = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and not any(x in name for x in exact)}
    return found | {"head.weight": model.head_weight}


def weight(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"attention": "mla", "tie_embeddings": False}, {"ffn": "dense"}])
def test_every_matrix_is_rounded_and_nothing_else(kind: Weights, changes: dict) -> None:
    model, copy = rounded(kind, **changes)
    chosen = matrices(model)
    assert chosen
    for name, before in chosen.items():
        off = (weight(copy, name) - before).abs() / before.abs().amax(-1, keepdim=True)
        assert weight(copy, name).dtype == before.dtype
        assert 0 < float(off.max()) <= 1.0001 * TOLERANCE[kind], name
    for name, before in model.named_parameters():
        if name not in chosen:
            assert torch.equal(weight(copy, name), before), name
    small = [p for p in copy.parameters() if p.element_size() == SIZES[kind]]
    assert sum(p.numel() for p in small) == sum(p.numel() for p in chosen.values())
    assert not any(p.requires_grad for p in copy.parameters())


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_logits_stay_close_in_a_forward_pass_and_from_a_cache(attention: str) -> None:
    for kind, tolerance in (("bf16", 0.02), ("int8", 0.06)):
        model, copy = rounded(kind, attention=attention)
        tokens = tokens_for(model.config, 2, 6)
        with torch.inference_mode():
            exact, full = model(tokens).logits, copy(tokens).logits
            cache = Cache(model.config, batch_size=2, max_len=6)
            parts = [copy(part, cache=cache).logits for part in (tokens[:, :5], tokens[:, 5:])]
        assert 0 < float((full - exact).norm() / exact.norm()) < tolerance
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)
    differ(exact, exact.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_lower_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    """127.5, which bfloat16 makes of the largest quotient, would come out as -128."""
    model = build({"ffn": "dense"}).to(dtype)
    before = deepcopy(model.recurrent[0].mlp.gate_proj.weight.detach())  # pyrefly: ignore
    quantize(model, "int8")
    found: Any = model.recurrent[0].mlp.gate_proj  # pyrefly: ignore
    off = (found.weight - before).float().abs() / before.float().abs().amax(-1, keepdim=True)
    assert found.weight.dtype == dtype and float(off.max()) < 0.01
    assert int(found.parametrizations.weight.original0.min()) >= -127


def test_only_a_model_and_only_once() -> None:
    _, model = rounded("int8", ffn="dense")
    with pytest.raises(ValueError, match="rounded before"):
        quantize(model, "bf16")
    with pytest.raises(ValueError, match="RecurrentDepthTransformer"):
        quantize(nn.Linear(2, 2), "bf16")  # type: ignore[arg-type]


def test_a_row_of_zeros_and_a_row_of_equals() -> None:
    model = build({"ffn": "dense"}).float()
    layer: Any = model.coda_layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight[0] = 0
        layer.self_attn.o_proj.weight[1] = -0.3
    quantize(model, "int8")
    found = layer.self_attn.o_proj.weight
    assert not found[0].any()
    torch.testing.assert_close(found[1], torch.full_like(found[1], -0.3))


@pytest.mark.compile
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gives_the_same(kind: Weights) -> None:
    torch.compiler.reset()
    _, model = rounded(kind)
    compiled = deepcopy(model)
    compiled.compile(unroll=True)
    tokens = tokens_for(model.config, 1, 5)
    found = []
    for m in (model, compiled):
        cache = Cache(m.config, batch_size=1, max_len=6)
        with torch.inference_mode():
            m(tokens[:, :4], cache=cache)
            found.append(m(tokens[:, 4:], cache=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_a_run_is_loaded_rounded(tmp_path: Path) -> None:
    model = build({"vocab_size": 257, "ffn": "moe"}).float()
    recipe = Recipe(model=model.config, data=DataConfig(tokenizer="bytes", seq_len=32))
    checkpoint.save(
        tmp_path,
        step=1,
        model_state=model.state_dict(),
        recipe=recipe,
        tokenizer_json=ByteTokenizer().to_json(),
        optimizer_state={},
        trainer_state={},
        fingerprint="f" * 64,
    )
    loaded = load(tmp_path, weights="int8")
    assert any(p.dtype == torch.int8 for p in loaded.model.parameters())
    assert generate(loaded, "ab", max_tokens=3).loops
    with pytest.raises(ValueError, match="weights"):
        load(tmp_path, weights="int3")  # type: ignore[arg-type]
