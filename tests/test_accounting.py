"""Closed formulas against what a built model has, computes and stores."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ritornello.accounting import count_parameters, describe, flops_per_token, kv_bytes_per_token
from ritornello.config import ModelConfig
from ritornello.model import attention, moe
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops import latent
from ritornello.ops.attention import attention_ref
from ritornello.ops.experts import experts_ref
from tests.model.builders import build, every_kind, tiny, tokens_for

B, T, LOOPS = 2, 5, 2
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "dot", "mv", "conv", "attention", "einsum", "matmul", "linear")
PLAIN = {"layers": (2, 0, 1)}
ROWS = [
    {"attention": kind, **row}
    for kind in ("gqa", "mla")
    for row in ({}, {"ffn": "dense"}, PLAIN, {"halting": "gate"}, {"injection": "linear", "carry_streams": 3})
]

DELTAS = (".loop_A", ".loop_B")


class Products(TorchDispatchMode):
    """The names of all operators that multiply matrices, whether a counter knows them or not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in PRODUCTS):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def counted(model: RecurrentDepthTransformer, *, training: bool, **options: Any) -> tuple[float, set[str]]:
    """FLOPs per token by torch's own counter, and the matrix products among the operators that it counted as zero."""
    counter, products = FlopCounterMode(display=False), Products()
    # Its module tracker fails on views made without gradients, as truncated depth makes them; totals need no modules.
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda *error: None)
    tokens = tokens_for(model.config, B, T)
    with counter, products, torch.set_grad_enabled(training):
        out = model.train(training)(tokens, n_loops=LOOPS, **options)
        if training:
            assert out.logits is not None
            (out.logits.sum() + sum(out.aux.values())).backward()
    known = {op.__name__ for op, flops in counter.get_flop_counts()["Global"].items() if flops > 0}
    return counter.get_total_flops() / (B * T), products.seen - known


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths that define the operators, made of products that the counter knows."""
    for module in (attention, latent):
        monkeypatch.setattr(module, "attention", attention_ref)
    monkeypatch.setattr(moe, "experts", lambda *tensors, exact: experts_ref(*tensors))


def same(config: ModelConfig, real: float, **options: Any) -> None:
    options = {"seq_len": T, "n_loops": LOOPS, "training": False, "convention": "full", **options}
    assert flops_per_token(config, **options) == pytest.approx(real, rel=0.01)


@every_kind
def test_parameters(row: dict) -> None:
    model = build(row)
    counts = count_parameters(model.config)
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == sum(counts["shares"].values())
    modules = {"embedding": model.embed_tokens, "prelude": model.prelude_layers, "coda": model.coda_layers}
    for part, module in modules.items():
        assert counts["shares"].get(part, 0) == sum(p.numel() for p in module.parameters())
    tables = ("embed_tokens", "head"), "value_table.weight"
    named = model.named_parameters()
    vocabulary = sum(p.numel() for n, p in named if n.startswith(tables[0]) or n.endswith(tables[1]))
    assert counts["non_embedding"] == counts["total"] - vocabulary


@every_kind
def test_shares_of_the_recurrent_block(row: dict) -> None:
    model = build(row)
    parts = {"recurrent_attention": "self_attn", "routed_experts": ".experts.", "router": "router"}
    parts |= {"shared_experts": "shared_experts", "recurrent_ffn": ".mlp.", "recurrent_norms": "layernorm"}
    parts["value_embeddings"] = ".value_"
    if model.config.ffn == "moe":
        del parts["recurrent_ffn"]
    shares = count_parameters(model.config)["shares"]
    deltas = sum(p.numel() for n, p in model.recurrent.named_parameters() if n.endswith(DELTAS))
    assert shares.get("lora", 0) == deltas
    for part, word in parts.items():
        inside = {n: p for n, p in model.recurrent.named_parameters() if word in n and not n.endswith(DELTAS)}
        if part == "recurrent_norms":
            inside = {n: p for n, p in inside.items() if "self_attn" not in n}
        if part == "recurrent_attention":
            inside = {n: p for n, p in inside.items() if ".value_" not in n}
        assert shares.get(part, 0) == sum(p.numel() for p in inside.values()), part


@pytest.mark.parametrize("tied", [True, False])
def test_active_parameters_are_those_that_one_token_reaches(tied: bool) -> None:
    """Of stacked weights and tables, the slices that get a gradient from one token in loop 0; of the rest, all."""
    targets = ("o", "ffn")  # a token alone gives its query no gradient
    model = build(tiny(tie_embeddings=tied, n_token_tables=2, halting="act", lora_targets=targets))
    model(tokens_for(model.config, 1, 1), n_loops=1).logits.square().sum().backward()
    sliced = (*DELTAS, ".experts.", "embed_tokens", "loop_embedding.")
    active = 0
    for name, p in model.named_parameters():
        in_slices = any(word in name for word in sliced)
        active += int(p.grad.flatten(1).any(1).sum()) * p[0].numel() if in_slices else p.numel()
    assert count_parameters(model.config)["active"] == active < count_parameters(model.config)["total"]


@every_kind
def test_flops(reference: None, row: dict) -> None:
    """Of a forward and a backward pass."""
    model = build(row)
    real, uncounted = counted(model, training=True)
    assert not uncounted
    same(model.config, real, training=True)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_flops_of_inference_and_of_truncated_depth(reference: None, row: dict) -> None:
    model = build(row)
    real, uncounted = counted(model, training=False)
    assert not uncounted
    same(model.config, real)
    real, uncounted = counted(model, training=True, backprop_loops=1)
    assert not uncounted
    same(model.config, real, training=True, backprop_loops=1)
    if not model.config.is_plain:
        with pytest.raises(AssertionError):
            same(model.config, real, training=True)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_flops_of_decoding(reference: None, row: dict) -> None:
    model = build(row)
    cache = Cache(model.config, batch_size=B, max_len=T, dtype=torch.float64)
    tokens = tokens_for(model.config, B, T)
    with torch.no_grad():
        model(tokens[:, :-1], n_loops=LOOPS, cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], n_loops=LOOPS, cache=cache)
    same(model.config, counter.get_total_flops() / B, convention="decode")


def test_control_the_fast_paths_are_not_counted() -> None:
    """Why the tests above need the reference paths, and that they would have noticed an operator that counts zero."""
    real, uncounted = counted(build({}), training=False)
    assert uncounted == {"_scaled_dot_product_flash_attention_for_cpu"}
    with pytest.raises(AssertionError):
        same(tiny(), real)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_causal_is_the_mean_of_what_each_token_sees(kind: str) -> None:
    config = tiny(attention=kind, kv_lora_rank=5)  # a latent so narrow that absorption never costs more
    options = {"n_loops": LOOPS, "training": False}
    by_position = [flops_per_token(config, seq_len=t, convention="decode", **options) for t in range(1, T + 1)]
    assert flops_per_token(config, seq_len=T, convention="causal", **options) == sum(by_position) / T
    assert flops_per_token(config, seq_len=T, convention="full", **options) > sum(by_position) / T


@every_kind
def test_cache_bytes(row: dict) -> None:
    config, policy = build(row).config, row["policy"]
    cache = Cache(config, batch_size=B, max_len=T, n_loops=LOOPS, policy=policy, dtype=torch.bfloat16)
    real = sum(slots.nbytes for slots in cache.slots) / (B * T)
    assert kv_bytes_per_token(config, n_loops=LOOPS, policy=policy) == real
    assert kv_bytes_per_token(config, n_loops=LOOPS, policy=policy, bytes_per_number=4) == 2 * real


def test_a_slot_of_latent_attention_is_its_latent_and_rotary_key() -> None:
    config = tiny(attention="mla")
    assert describe(config)["kv_bytes_per_slot"] == 2 * (config.kv_lora_rank + config.qk_rope_head_dim)


def test_describe() -> None:
    facts = describe(tiny())
    assert sum(facts["share_of_parameters"].values()) == pytest.approx(1)
    for kind in ("training", "inference", "decode"):
        flops = facts[f"{kind}_flops_per_token_by_loops"]
        assert list(flops) == ["1", "2", "4", "8", "16", "32"]
        assert flops["32"] - flops["16"] == 2 * (flops["16"] - flops["8"]) == 16 * (flops["2"] - flops["1"])
    assert facts["assuming"]["seq_len"] == tiny().max_seq_len
    plain = describe(tiny(**PLAIN))
    assert list(plain["inference_flops_per_token_by_loops"]) == ["1"]
    assert len(set(plain["kv_bytes_per_token"].values())) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_len": 0}, "seq_len = 0"),
        ({"n_loops": 0}, "n_loops = 0"),
        ({"n_loops": 1.5}, "n_loops = 1.5"),
        ({"backprop_loops": -1}, "backprop_loops = -1"),
        ({"convention": "casual"}, "did you mean 'causal'"),
        ({"convention": "decode", "training": True}, "'full' or 'causal' in training"),
    ],
)
def test_a_mistake_names_its_field(options: dict, said: str) -> None:
    right = {"seq_len": T, "n_loops": LOOPS, "training": False, "convention": "full"}
    with pytest.raises(ValueError, match=said):
        flops_per_token(tiny(), **(right | options))


def test_an_unknown_cache_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy = 'lats': .*did you mean 'last'"):
        kv_bytes_per_token(tiny(), n_loops=1, policy="lats")


def test_the_formulas_need_no_torch() -> None:
    code = "import sys, ritornello.accounting, ritornello.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
