"""The same numbers as code nobody here wrote: transformers' Llama, and its DeepSeek-V3's attention and experts.

Their norms, softmax, rotary angles and router force float32. To compare at 1e-10 their code runs as it is with
`torch.float32` read as float64. Both whole models are also compared in plain float32, where nothing is changed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

from ritornello.config import ModelConfig
from ritornello.model import attention as attentions
from ritornello.model.cache import Cache, Passing
from ritornello.model.layers import Layer, Pass
from ritornello.model.moe import MixtureOfExperts
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.builders import close, differ

B, T, VOCAB, DIM, HEADS, EXPERTS = 2, 11, 23, 24, 4, 12
THETA = 500.0
RANKS = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


class Float64Torch:
    """The torch module in which float32 means float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (llama, deepseek):
        monkeypatch.setattr(module, "torch", Float64Torch())


def ours(**changes: Any) -> RecurrentDepthTransformer:
    """A plain model of one prelude and one coda layer, unless changed. No weight or bias is left at 0 or 1."""
    shape = {"vocab_size": VOCAB, "dim": DIM, "n_heads": HEADS, "n_kv_heads": 2, "head_dim": 6, "rope_theta": THETA}
    experts = {"n_experts": EXPERTS, "n_active_experts": 3, "expert_dim": 16, "router_scale": 2.5, "lora_rank": 0}
    layers = {"n_prelude_layers": 1, "n_recurrent_layers": 0, "n_coda_layers": 1, "ffn_dim": 40}
    config = ModelConfig(**(shape | RANKS | experts | layers | {"tie_embeddings": False} | changes))
    model = RecurrentDepthTransformer(config).double().eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """No weight or bias is left at 0 or 1; what follows from a configuration stays."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "bias" in name:
            tensor.normal_(std=0.1)
        elif "inv_freq" not in name:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}


def llama_config(implementation: str) -> LlamaConfig:
    config = LlamaConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-6,
    )
    config._attn_implementation = implementation
    return config


def deepseek_config(implementation: str = "eager", *, interleaved: bool = False, **changes: Any) -> DeepseekV3Config:
    moe = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 1}
    moe |= {"topk_group": 1, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2}
    config = DeepseekV3Config(
        **SHAPE,
        num_key_value_heads=HEADS,
        num_mtp_layers=0,
        rope_interleave=interleaved,
        **(RANKS | moe | changes),
    )
    config._attn_implementation = implementation
    config._experts_implementation = "eager"
    return config


def give(theirs: nn.Module, weights: dict[str, Tensor], *, interleaved: bool = False) -> nn.Module:
    """`theirs` in evaluation mode with our weights, under our names; every tensor of both must have its partner."""
    weights = {name: interleave(name, w) if interleaved else w for name, w in weights.items()}
    theirs.to(next(iter(weights.values())).dtype).load_state_dict(weights, strict=True)
    return theirs.eval()


def interleave(name: str, weight: Tensor) -> Tensor:
    """Rotary rows in DeepSeek's order: a pair's two halves side by side."""
    rope, nope = RANKS["qk_rope_head_dim"], RANKS["qk_nope_head_dim"]
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        heads = weight.unflatten(0, (HEADS, nope + rope))
        return torch.cat((heads[:, :nope], _pairs(heads[:, nope:], 1)), 1).flatten(0, 1)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat((weight[:-rope], _pairs(weight[-rope:], 0)))
    return weight


def _pairs(rows: Tensor, dim: int) -> Tensor:
    return torch.stack(rows.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def whole_model_names(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """Our parameters under the names of their models."""
    named = {"embed_tokens.0.": "model.embed_tokens.", "prelude_layers.0.": "model.layers.0."}
    named |= {"coda_layers.0.": "model.layers.1.", "norm.": "model.norm.", "head.": "lm_head."}
    renamed = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in named if name.startswith(prefix))
        renamed[named[prefix] + name.removeprefix(prefix)] = tensor
    return renamed


def compare(run: Callable[[], Tensor], theirs: Tensor, module: nn.Module) -> None:
    """`run` gives what theirs did, within 1e-10. Positive control: it does not once any one weight moves by 1e-6."""
    with torch.no_grad():
        close(run(), theirs)
        for name, weight in module.named_parameters():
            before = weight.clone()
            weight.view(-1)[0] += 1e-6
            try:
                differ(run(), theirs, 1e-10)
            except pytest.fail.Exception:
                pytest.fail(f"{name} moved unnoticed")
            weight.copy_(before)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens() -> Tensor:
    """Id 0, whose embedding the positive control moves, is among them."""
    return torch.cat((torch.zeros(B, 1, dtype=torch.int64), torch.randint(VOCAB, (B, T - 1))), 1)


def causal_mask() -> Tensor:
    return torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]


def angles(rotary: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(x, torch.arange(T)[None])


def attend(model: RecurrentDepthTransformer, layer: Layer, x: Tensor) -> Tensor:
    return layer.self_attn(x, 0, 0, model.context(x), Passing(), None)


def through(model: RecurrentDepthTransformer, layer: Layer, x: Tensor) -> Tensor:
    return layer(x, Pass(0, 0, model.context(x), Passing()))[0]


@IMPLEMENTATIONS
@torch.no_grad()
def test_grouped_query_attention(exact: None, implementation: str) -> None:
    model, config, x = ours(), llama_config(implementation), draw(B, T, DIM)
    attention = model.prelude_layers[0].self_attn
    theirs = give(llama.LlamaAttention(config, 0), attention.state_dict())
    expected = theirs(x, angles(llama.LlamaRotaryEmbedding(config), x), causal_mask())[0]
    compare(lambda: attend(model, model.prelude_layers[0], x), expected, attention)


@IMPLEMENTATIONS
@torch.no_grad()
def test_llama_layer(exact: None, implementation: str) -> None:
    model, config, x = ours(), llama_config(implementation), draw(B, T, DIM)
    layer = model.prelude_layers[0]
    theirs = give(llama.LlamaDecoderLayer(config, 0), layer.state_dict())
    rotary = llama.LlamaRotaryEmbedding(config)
    expected = theirs(x, causal_mask(), position_embeddings=angles(rotary, x))
    compare(lambda: through(model, layer, x), expected, layer)


@IMPLEMENTATIONS
@torch.no_grad()
def test_whole_llama(exact: None, implementation: str) -> None:
    model, ids = ours(), tokens()
    theirs = give(LlamaForCausalLM(llama_config(implementation)), whole_model_names(model))
    compare(lambda: model(ids).logits, theirs(ids, use_cache=False).logits, model)


@IMPLEMENTATIONS
@LAYOUTS
@pytest.mark.parametrize("q_rank", [0, 14])
@torch.no_grad()
def test_latent_attention(exact: None, implementation: str, interleaved: bool, q_rank: int) -> None:
    model, x = ours(attention="mla", q_lora_rank=q_rank), draw(B, T, DIM)
    config = deepseek_config(implementation, interleaved=interleaved, q_lora_rank=q_rank or None)
    attention = model.prelude_layers[0].self_attn
    theirs = give(deepseek.DeepseekV3Attention(config, 0), attention.state_dict(), interleaved=interleaved)
    rotary = angles(deepseek.DeepseekV3RotaryEmbedding(config), x)
    expected = theirs(x, rotary, causal_mask())[0]
    compare(lambda: attend(model, model.prelude_layers[0], x), expected, attention)
    if interleaved:
        differ(give(theirs, attention.state_dict())(x, rotary, causal_mask())[0], expected, 1e-2)


@LAYOUTS
@torch.no_grad()
def test_absorbed_decoding(exact: None, monkeypatch: pytest.MonkeyPatch, interleaved: bool) -> None:
    """Token by token from the cache of latents, against their one pass over expanded keys and values."""
    model, ids = ours(attention="mla", q_lora_rank=14), tokens()
    config = deepseek_config(interleaved=interleaved, q_lora_rank=14)
    theirs = give(DeepseekV3ForCausalLM(config), whole_model_names(model), interleaved=interleaved)
    absorbed, calls = attentions.absorbed, []

    def noted(*args: Any, **how: Any) -> Tensor:
        calls.append(args[0].shape)
        return absorbed(*args, **how)

    monkeypatch.setattr(attentions, "absorbed", noted)

    def decode() -> Tensor:
        cache = Cache(model.config, batch_size=B, max_len=T, dtype=torch.float64)
        return torch.cat([model(piece, cache=cache).logits for piece in (ids[:, :4], *ids[:, 4:].split(1, 1))], 1)

    expected = theirs(ids, use_cache=False).logits
    close(decode(), expected)
    assert len(calls) == 2 * (T - 4)
    compare(decode, expected, model)
    compare(lambda: model(ids).logits, expected, model)


def moe_weights(mlp: MixtureOfExperts) -> dict[str, Tensor]:
    return {name.replace("router.", "gate."): w for name, w in mlp.state_dict().items()}


GROUPS = pytest.mark.parametrize(("groups", "active"), [(1, 1), (4, 2), (4, 1), (3, 3)])
NORMALIZED = pytest.mark.parametrize("normalized", [True, False])


def mixture(groups: int, active: int, normalized: bool, **changes: Any) -> tuple[RecurrentDepthTransformer, Any]:
    """A model whose recurrent layer has experts, and the configuration of theirs."""
    limits = {"n_expert_groups": groups, "n_active_groups": active, "normalize_expert_weights": normalized}
    model = ours(n_recurrent_layers=1, loop_embedding=False, **limits, **changes)
    return model, deepseek_config(
        n_group=groups, topk_group=active, norm_topk_prob=normalized, first_k_dense_replace=0, q_lora_rank=None
    )


@GROUPS
@NORMALIZED
@torch.no_grad()
def test_router(exact: None, groups: int, active: int, normalized: bool) -> None:
    """The same experts, in whatever order, with the same weights."""
    model, config = mixture(groups, active, normalized)
    router, x = model.recurrent[0].mlp.router, draw(B, T, DIM)
    theirs = give(deepseek.DeepseekV3TopkRouter(config), router.state_dict())
    _, weights, indices = theirs(x)

    def dense() -> Tensor:
        chosen, w, _ = router(x, 0)
        return torch.zeros(B, T, EXPERTS, dtype=w.dtype).scatter(-1, chosen, w)

    expected = torch.zeros(B * T, EXPERTS, dtype=torch.float64).scatter(-1, indices, weights)
    assert (expected > 0).sum() == B * T * 3
    compare(dense, expected.view(B, T, EXPERTS), router)


@GROUPS
@NORMALIZED
@torch.no_grad()
def test_mixture_of_experts(exact: None, groups: int, active: int, normalized: bool) -> None:
    model, config = mixture(groups, active, normalized)
    mlp, x = model.recurrent[0].mlp, draw(B, 2 * T, DIM)
    theirs = give(deepseek.DeepseekV3MoE(config), moe_weights(mlp))
    compare(lambda: mlp(x, 0, [])[0], theirs(x), mlp)


@torch.no_grad()
def test_control_group_limits_and_bias_matter(exact: None) -> None:
    model, config = mixture(4, 1, True)
    mlp, x = model.recurrent[0].mlp, draw(B, T, DIM)
    free, _ = mixture(1, 1, True)
    free.load_state_dict(model.state_dict())
    theirs = give(deepseek.DeepseekV3MoE(config), moe_weights(mlp))(x)
    differ(free.recurrent[0].mlp(x, 0, [])[0], theirs, 1e-2)
    mlp.router.e_score_correction_bias.zero_()
    differ(mlp(x, 0, [])[0], theirs, 1e-2)


@torch.no_grad()
def test_deepseek_layer(exact: None) -> None:
    """Latent attention and experts together."""
    model, config = mixture(4, 2, True, attention="mla")
    layer, x = model.recurrent[0], draw(B, 2 * T, DIM)[:, :T]
    weights = {name.replace("router.", "gate."): w for name, w in layer.state_dict().items()}
    theirs = give(deepseek.DeepseekV3DecoderLayer(config, 0), weights)
    rotary = deepseek.DeepseekV3RotaryEmbedding(config)
    expected = theirs(x, causal_mask(), position_embeddings=angles(rotary, x))
    compare(lambda: through(model, layer, x), expected, layer)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
@torch.no_grad()
def test_whole_models_as_they_are_in_float32(kind: str) -> None:
    model, ids = ours(attention=kind).float(), tokens()
    if kind == "gqa":
        theirs = LlamaForCausalLM(llama_config("sdpa"))
    else:
        theirs = DeepseekV3ForCausalLM(deepseek_config("sdpa", q_lora_rank=None))
    expected = give(theirs, whole_model_names(model))(ids, use_cache=False).logits
    close(model(ids).logits, expected, 1e-5)
    model.norm.weight[0] += 1e-3
    differ(model(ids).logits, expected, 1e-5)
