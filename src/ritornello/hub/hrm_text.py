"""HRM-Text (Sapient's HRM-Text-1B; HRM is 2506.21734) as transformers' `HrmTextForCausalLM` runs it.

Two stacks of layers, L and H, take turns at two states of a token. One loop here is one of its high cycles:

    n_low_cycles times   z_L <- norm(L(z_L + z_H))
                         z_H <- norm(H(z_H + z_L))

z_H starts as the embedding, z_L as a vector that all tokens share; logits and exit rules read z_H. Each run of a stack
has keys and values of its own, so a loop has those of (n_low_cycles + 1) · n layers. Norms have no weights, and what a
head of attention finds is multiplied by a sigmoid gate that reads what its query reads. Both states, of the weights'
dtype there, are float32 here.
"""

import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ritornello.config import ModelConfig, require, require_int
from ritornello.hub.published import LOOPED_ALIKE, count, expect, given, rope_theta
from ritornello.model.attention import GroupedQueryAttention
from ritornello.model.cache import KeyValues
from ritornello.model.context import Context, Loop
from ritornello.model.layers import Layer, Pass
from ritornello.model.lora import Linear
from ritornello.model.moe import Routed
from ritornello.model.norm import RMSNorm
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import Output
from ritornello.ops.ragged import Ragged
from ritornello.ops.subset import Subset

STACKS = {"recurrent.0": "model.L_module.layers", "recurrent.1": "model.H_module.layers"}
PARTS = {  # theirs, as it is stored, and what lies in it side by side
    "attn.gqkv_proj": [f"self_attn.{name}_proj" for name in ("gate", "q", "k", "v")],
    "attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}


@dataclass(frozen=True, kw_only=True)
class HrmTextConfig(ModelConfig):
    """`n_recurrent_layers` are those that a loop runs: the low stack's once for each low cycle, and the high stack's.
    n_loops: high cycles."""

    n_low_cycles: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("n_low_cycles", self.n_low_cycles, 1)
        n, runs = self.n_recurrent_layers, self.n_low_cycles + 1
        require(n > 0 and n % runs == 0, "n_recurrent_layers", n, f"a multiple of n_low_cycles + 1 = {runs}")

    @property
    def n_stack_layers(self) -> int:
        """Layers of either stack."""
        return self.n_recurrent_layers // (self.n_low_cycles + 1)


def config_from(theirs: Mapping[str, Any]) -> HrmTextConfig:
    """The shape that their configuration describes.

    Raises:
        ValueError: something is missing, or of a kind that no published checkpoint has.
    """
    dim, n_heads = count(theirs, "hidden_size"), count(theirs, "num_attention_heads")
    expect(theirs, hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0)
    expect(theirs, num_key_value_heads=n_heads)
    n_low_cycles = count({"L_cycles": 3, **theirs}, "L_cycles")
    scale = given(theirs, "embedding_scale", default=None)
    if scale is None:
        std = given(theirs, "initializer_range", default=0.02)
        require(isinstance(std, float) and std > 0, "config.json initializer_range", std, "a number > 0")
        scale = 1 / std
    return HrmTextConfig(
        vocab_size=given(theirs, "vocab_size"),
        dim=dim,
        n_prelude_layers=0,
        # where the first is missing, the second has not been multiplied by the cycles yet
        n_recurrent_layers=count(theirs, "num_layers_per_stack", "num_hidden_layers") * (n_low_cycles + 1),
        n_low_cycles=n_low_cycles,
        n_coda_layers=0,
        n_loops=given(theirs, "H_cycles", default=2),
        max_seq_len=given(theirs, "max_position_embeddings", default=2048),
        tie_embeddings=given(theirs, "tie_word_embeddings", default=False),
        embedding_scale=scale,
        rope_theta=rope_theta(theirs, default=10_000.0),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=given(theirs, "head_dim", default=128),
        ffn_dim=given(theirs, "intermediate_size"),
        norm="pre",
        norm_eps=given(theirs, "rms_norm_eps", default=1e-6),
        normalize_input=False,
        state_norm="loop",
        injection="none",
        initial_state="e",
        carry_streams=2,
        **LOOPED_ALIKE,
    )


class GatedAttention(GroupedQueryAttention):
    """What a query finds, times σ(gate x): a gate for each number, which goes beside the query."""

    def __init__(self, config: ModelConfig, *, layer: int, looped: bool) -> None:
        super().__init__(config, layer=layer, looped=looped)
        self.gate_proj = Linear(config.dim, config.n_heads * config.head_dim)

    def queries(self, x: Tensor, table: Loop, context: Context) -> tuple[Tensor, ...]:
        gate = self.gate_proj(x).unflatten(-1, (-1, self.config.head_dim))
        return *super().queries(x, table, context), gate

    def attend(self, queries: tuple[Tensor, ...], entries: Tensor, mask: Tensor | None) -> Tensor:
        *query, gate = queries
        return super().attend(tuple(query), entries, mask) * gate.flatten(-2).sigmoid()


class Unweighted(RMSNorm):
    """x / RMS(x): the weight is 1, no parameter, and in no state_dict, so it is there at once and not loaded."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        device = "cpu" if self.weight.is_meta else self.weight.device
        del self.weight
        self.register_buffer("weight", torch.ones(dim, device=device), persistent=False)


class TwoStates(nn.Module):
    """The state is (B, T, 2, D), z_H and z_L; z_H is what is read of it."""

    start: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("start", torch.empty(dim))

    def reset(self, generator: torch.Generator) -> None:
        self.start.zero_()

    def expand(self, h: Tensor) -> Tensor:
        return torch.stack((h, self.start.to(h.dtype).expand_as(h)), -2)

    def mean(self, h: Tensor) -> Tensor:
        return h[..., 0, :]


class Later(KeyValues):
    """Those of layers so many places further on: a stack's, when it runs again."""

    def __init__(self, kv: KeyValues, by: int) -> None:
        self.kv, self.by = kv, by

    def put(
        self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None
    ) -> Tensor | Ragged:
        return self.kv.put(layer + self.by, loop, entry, running, some)


class HrmText(RecurrentDepthTransformer):
    """A model of theirs."""

    config: HrmTextConfig  # pyrefly: ignore
    carry: TwoStates  # pyrefly: ignore

    def __init__(self, config: HrmTextConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        n, unrolled = config.n_stack_layers, self.recurrent
        self.carry = TwoStates(config.dim)
        self.norm = Unweighted(config.dim, config.norm_eps)
        self.recurrent = nn.ModuleList((unrolled[:n], unrolled[-n:]))  # numbered as where they run first
        for layer in (*unrolled[:n], *unrolled[-n:]):
            assert isinstance(layer, Layer)
            layer.self_attn = GatedAttention(config, layer=layer.layer, looped=True)
            layer.input_layernorm = layer.post_attention_layernorm = self.norm
        if not self.head_weight.is_meta:
            self.init_weights(seed)

    def forward(  # pyrefly: ignore
        self, tokens: Tensor | None = None, *, token_type_ids: Tensor | None = None, **options: Any
    ) -> Output:
        """As everywhere else. token_type_ids (B, T): those with a 1 see each other, both ways: their prefix, which the
        first pass into a cache has whole."""
        if token_type_ids is None:
            return super().forward(tokens, **options)
        inner = copy(self)
        inner.context = partial(self.context, prefix=token_type_ids == 1)  # pyrefly: ignore
        return RecurrentDepthTransformer.forward(inner, tokens, **options)

    def context(self, x: Tensor, *, prefix: Tensor | None = None, **options: Any) -> Context:
        """See build_context. prefix (B, T) bool: tokens that see each other, where documents let them."""
        cache, length = options.get("cache"), x.shape[1]
        if prefix is None:
            return super().context(x, **options)
        require(prefix.shape == x.shape[:2], "token_type_ids", tuple(prefix.shape), f"(B, T) = {tuple(x.shape[:2])}")
        require(cache is None or cache.length == 0, "token_type_ids", "beside cached tokens", "of the first pass")
        found = super().context(x, **options)
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        seen = (seen if found.mask is None else found.mask) | prefix[:, None, :, None] & prefix[:, None, None, :]
        if found.documents is not None:
            seen = seen & (found.documents[:, None, :, None] == found.documents[:, None, None, :])
        return replace(found, mask=seen)

    def loop_once(
        self, h: Tensor, e: Tensor, loop: Loop, context: Context, kv: KeyValues, running: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        low, high = self.recurrent
        z_h, z_l = h.unbind(-2)
        for cycle in range(self.config.n_low_cycles):
            again = Later(kv, cycle * self.config.n_stack_layers)
            z_l = self._stack(low, z_l + z_h, Pass(loop, 0, context, again, running))
        z_h = self._stack(high, z_h + z_l, Pass(loop, 0, context, kv, running))
        return torch.stack((z_h, z_l), -2), ()

    def _stack(self, layers: nn.Module, x: Tensor, now: Pass) -> Tensor:
        for layer in layers.children():
            x, _ = layer(x, now)
        return self.norm(x)

    def state_bound(self, n_loops: int) -> float:
        """Of each state, after any loop: the norm's that ends it."""
        return math.sqrt(self.config.dim)


def from_theirs(state: Mapping[str, Tensor], config: HrmTextConfig) -> dict[str, Tensor]:
    """Our tensors by name, of theirs as `save_pretrained` stores them."""
    found = {ours: state[theirs] for ours, theirs in _whole(config).items()}
    for ours, theirs, parts in _layers(config):
        pieces = state[theirs].chunk(len(parts))
        found |= {f"{ours}.{part}.weight": x.clone() for part, x in zip(parts, pieces, strict=True)}
    return found


def to_theirs(state: Mapping[str, Tensor], config: HrmTextConfig) -> dict[str, Tensor]:
    """Their tensors by name, of ours: the inverse of `from_theirs`."""
    found = {theirs: state[ours] for ours, theirs in _whole(config).items()}
    for ours, theirs, parts in _layers(config):
        found[theirs] = torch.cat([state[f"{ours}.{part}.weight"] for part in parts])
    return found


def _whole(c: HrmTextConfig) -> dict[str, str]:
    """Ours to theirs, outside of layers."""
    names = {"embed_tokens.0.weight": "model.embed_tokens.weight", "carry.start": "model.z_L_init"}
    return names if c.tie_embeddings else names | {"head.weight": "lm_head.weight"}


def _layers(c: HrmTextConfig) -> Iterator[tuple[str, str, list[str]]]:
    """Our layer, and a matrix of theirs with its parts."""
    for ours, theirs in STACKS.items():
        for i in range(c.n_stack_layers):
            for whole, parts in PARTS.items():
                yield f"{ours}.{i}", f"{theirs}.{i}.{whole}.weight", parts
