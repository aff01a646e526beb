"""A bound on the state that holds for any number of loops and any tokens.

Branches read RMS-normalised inputs, so ‖delta(u)‖ ≤ M for every u, and with ‖inject(h, e)‖ ≤ ρ‖h‖ + g‖e‖

    ‖h_t‖ ≤ ρᵗ ‖h_0‖ + (1 − ρᵗ) (g ‖e‖ + M) / (1 − ρ).

M is summed over layers, and the largest over experts and loop indices, low-rank deltas included; dropout must be off.
For ρ ≥ 1 the bound grows with t: `lti` alone has one for every depth.
It bounds the state; it promises neither convergence nor good gradients.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ritornello.config import require, require_int
from ritornello.model.attention import Attention, GroupedQueryAttention, LatentAttention
from ritornello.model.carry import HyperConnections
from ritornello.model.layers import Layer
from ritornello.model.lora import Linear
from ritornello.model.moe import FeedForward, MixtureOfExperts
from ritornello.model.norm import RMSNorm
from ritornello.ops.norms import relu2_norm, spectral_norm, swiglu_norm

if TYPE_CHECKING:
    from ritornello.model.rdt import RecurrentDepthTransformer


@torch.no_grad()
def state_bound(model: "RecurrentDepthTransformer", n_loops: int) -> float:
    """The largest ‖h‖ over tokens, after any of `n_loops` loops; of each stream with carry streams."""
    require(not model.config.is_plain, "n_recurrent_layers", 0, "> 0 for a bound on the state")
    require_int("n_loops", n_loops, 1)
    e = _input_bound(model) if model.input_norm is None else norm_bound(model.input_norm)
    noise = math.sqrt(model.config.dim) * 3 * model.config.noise_std
    start = {"zeros": 0.0, "e": e, "noise": noise}[model.config.initial_state]
    last = model.norm if model.config.state_norm == "loop" else model.anchor_norm
    if last is not None:
        return max(start, norm_bound(last))
    layers = [layer for layer in model.recurrent if isinstance(layer, Layer)]
    rho, inflow = model.injection.rho(), model.injection.gain() * e
    write = float(model.carry.write_weight.abs().max()) if isinstance(model.carry, HyperConnections) else 1.0
    if model.config.norm == "sandwich":
        change, scales = norm_bound(layers[-1].mlp_out_layernorm), model.config.loop_scale
        stretch = 1 - min(scales)  # the block's change is its normalised output less what it read
        if isinstance(model.carry, HyperConnections):
            mixing, moved = model.carry.mixing.softmax(-1), model.carry.write_weight[:, None] * model.carry.read_weight
            stretch = max(float((mixing - s * moved).abs().sum(1).max()) for s in scales)
        rho, inflow = rho * stretch, inflow * stretch
    else:
        change = sum(layer_bound(layer, _shift(model)) for layer in layers)
    if rho > 1 and n_loops * math.log(rho) > 700:
        return math.inf  # beyond what a float holds
    steps = n_loops if rho == 1 else (1 - rho**n_loops) / (1 - rho)
    return max(start, rho**n_loops * start + steps * (inflow + write * change))


def _input_bound(model: "RecurrentDepthTransformer") -> float:
    """The largest e that comes from tokens, where no norm makes it."""
    layers = [layer for layer in model.prelude_layers if isinstance(layer, Layer)]
    if layers and model.config.norm == "sandwich":
        return norm_bound(layers[-1].mlp_out_layernorm)
    size = sum(float(table.weight.norm(dim=1).max()) for table in model.embed_tokens)  # pyrefly: ignore
    return model.config.embedding_scale * size + sum(layer_bound(layer, 0.0) for layer in layers)


def norm_bound(norm: RMSNorm | None) -> float:
    """‖norm(x)‖ ≤ √D · max|γ|."""
    assert norm is not None
    return math.sqrt(norm.weight.shape[0]) * float(norm.weight.abs().max())


def _shift(model: "RecurrentDepthTransformer") -> float:
    """The largest loop embedding that a branch's input is shifted by."""
    shifts = model._shift(torch.arange(model.config.n_loops))
    return 0.0 if shifts is None else float(shifts.norm(dim=1).max())


def layer_bound(layer: Layer, shift: float) -> float:
    """M of one layer with a `pre` or `pre_post` norm, whose branches' inputs are shifted by at most `shift`."""
    if layer.norm_kind == "pre_post":
        return norm_bound(layer.attn_out_layernorm) + norm_bound(layer.mlp_out_layernorm)
    attention = attention_bound(layer.self_attn, norm_bound(layer.input_layernorm) + shift)
    x = norm_bound(layer.post_attention_layernorm) + shift
    mlp = feed_forward_bound(layer.mlp, x) if isinstance(layer.mlp, FeedForward) else mixture_bound(layer.mlp, x)
    return attention + mlp


def attention_bound(attention: Attention, x: float) -> float:
    """Each head returns a convex combination of values, ‖v‖ ≤ ‖W_v‖‖x‖; heads stack, then o_proj."""
    c = attention.config
    if isinstance(attention, GroupedQueryAttention):
        values = spectral_norm(_merged(attention.v_proj).unflatten(1, (c.n_kv_heads, -1))).amax(0) * x
        if attention.value_table is not None:  # a gate is at most 2
            rows = attention.value_table.weight.float().unflatten(1, (c.n_kv_heads, -1))
            values = values + 2 * rows.norm(dim=-1).amax(0)
        per_head = values.repeat_interleave(c.n_heads // c.n_kv_heads)
    else:
        assert isinstance(attention, LatentAttention)
        values = attention.kv_b_proj.weight.unflatten(0, (c.n_heads, -1))[:, c.qk_nope_head_dim :]
        per_head = spectral_norm(values) * norm_bound(attention.kv_a_layernorm)
    return float(per_head.norm()) * float(spectral_norm(_merged(attention.o_proj)).max())


def feed_forward_bound(mlp: FeedForward, x: float) -> float:
    up, down = _merged(mlp.up_proj), _merged(mlp.down_proj)
    found = relu2_norm(up, down) if mlp.gate_proj is None else swiglu_norm(_merged(mlp.gate_proj), up, down)
    return float(found.max()) * x**2


def mixture_bound(mlp: MixtureOfExperts, x: float) -> float:
    """Weights sum to router_scale when normalised; otherwise each is at most that."""
    c = mlp.config
    gate, up = mlp.experts.gate_up_proj.chunk(2, 1)
    total = c.router_scale * (1 if c.normalize_expert_weights else c.n_active_experts)
    routed = total * float(swiglu_norm(gate, up, mlp.experts.down_proj).max()) * x**2
    return routed + (feed_forward_bound(mlp.shared_experts, x) if mlp.shared_experts is not None else 0.0)


def _merged(linear: Linear) -> Tensor:
    """(L, out, in): the matrix of each loop; L = 1 without low-rank deltas."""
    if linear.loop_A is None or linear.loop_B is None:
        return linear.weight[None]
    return linear.weight.float() + linear.loop_B.float() @ linear.loop_A.float()
