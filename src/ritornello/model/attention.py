"""Two kinds of attention behind one switch. Each turns a token into one cache entry, and queries entries."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.config import ModelConfig
from ritornello.model.cache import KeyValues
from ritornello.model.context import Context, Loop
from ritornello.model.lora import Linear, table_of
from ritornello.model.norm import RMSNorm
from ritornello.ops.attention import attention, enriched, rotate
from ritornello.ops.latent import Widths, absorbed, absorbs, expanded
from ritornello.ops.linear import local, lowered
from ritornello.ops.ragged import Ragged


class Attention(nn.Module, ABC):
    """x (B, T, D) -> (B, T, D). `running` (B, T or 1) bool: tokens that have not halted."""

    o_proj: Linear

    def __init__(self, config: ModelConfig, *, layer: int, looped: bool) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    def forward(
        self, x: Tensor, loop: Loop, table: Loop, context: Context, kv: KeyValues, running: Tensor | None
    ) -> Tensor:
        """`loop` addresses the cache, `table` = min(loop, n_loops - 1) the low-rank deltas."""
        x = lowered(x)
        found = kv.put(self.layer, loop, self.entry(x, table, context), running, context.some)
        queries = self.queries(x, table, context)
        y = found.each(queries, self.attend) if isinstance(found, Ragged) else self.attend(queries, found, context.mask)
        return self.o_proj(y, table)

    @abstractmethod
    def entry(self, x: Tensor, table: Loop, context: Context) -> Tensor:
        """What a token leaves for others to attend to: (B, T, kv_width)."""

    @abstractmethod
    def queries(self, x: Tensor, table: Loop, context: Context) -> tuple[Tensor, ...]:
        """What x (B, T, D) looks for, in parts (B, T, H, width)."""

    @abstractmethod
    def attend(self, queries: tuple[Tensor, ...], entries: Tensor, mask: Tensor | None) -> Tensor:
        """What the queries find in entries (B, S, kv_width): (B, T, H * value width)."""


def lora_options(config: ModelConfig, target: str, *, looped: bool) -> dict[str, Any]:
    """Keyword arguments that give a Linear its low-rank deltas, where the configuration asks for them."""
    chosen = looped and config.lora_rank > 0 and target in config.lora_targets
    return {"n_loops": config.n_loops, "rank": config.lora_rank} if chosen else {}


class GroupedQueryAttention(Attention):
    """GQA (2305.13245) as in Llama. An entry holds G rotated keys, then G values. With value embeddings (Parcae) these
    have a part that the token alone gives, its row of a table, by a gate for each head that reads a few channels."""

    def __init__(self, config: ModelConfig, *, layer: int, looped: bool) -> None:
        super().__init__(config, layer=layer, looped=looped)
        dim, head_dim, bias = config.dim, config.head_dim, config.qk_bias
        q, k, v, o = (lora_options(config, name, looped=looped) for name in "qkvo")
        self.q_proj = Linear(dim, config.n_heads * head_dim, bias=bias, **q)
        self.k_proj = Linear(dim, config.n_kv_heads * head_dim, bias=bias, **k)
        self.v_proj = Linear(dim, config.n_kv_heads * head_dim, **v)
        self.o_proj = Linear(config.n_heads * head_dim, dim, **o)
        enriches = layer in config.value_embeddings
        self.value_table = table_of(config.vocab_size, config.n_kv_heads * head_dim) if enriches else None
        self.value_gate = Linear(config.value_gate_width, config.n_kv_heads) if enriches else None

    def entry(self, x: Tensor, table: Loop, context: Context) -> Tensor:
        keys, values = self._turned(self.k_proj(x, table), context), self.v_proj(x, table)
        if self.value_table is not None and self.value_gate is not None:
            gates = self.value_gate(x[..., : self.config.value_gate_width])
            values = enriched(values, self.value_table(context.tokens), gates)
        return torch.cat((keys.flatten(-2), values), -1)

    def queries(self, x: Tensor, table: Loop, context: Context) -> tuple[Tensor, ...]:
        return (self._turned(self.q_proj(x, table), context),)

    def _turned(self, x: Tensor, context: Context) -> Tensor:
        x = x.unflatten(-1, (-1, self.config.head_dim))
        x = x if context.rope is None else rotate(x, context.rope)
        return F.rms_norm(x, x.shape[-1:]).to(x.dtype) if self.config.qk_norm else x

    def attend(self, queries: tuple[Tensor, ...], entries: Tensor, mask: Tensor | None) -> Tensor:
        head_dim, q = self.config.head_dim, queries[0]
        k, v = entries.unflatten(-1, (-1, head_dim)).to(q.dtype).transpose(1, 2).chunk(2, 1)
        y = attention(q.transpose(1, 2), k, v, mask=mask, scale=head_dim**-0.5)
        return y.transpose(1, 2).flatten(-2)


class LatentAttention(Attention):
    """MLA (DeepSeek-V2 2405.04434, §2.1; names of DeepSeek-V3). An entry: the normalised latent, the rotary key, whose
    channels use Llama's halves layout, DeepSeek's interleaved one permuted."""

    def __init__(self, config: ModelConfig, *, layer: int, looped: bool) -> None:
        super().__init__(config, layer=layer, looped=looped)
        q_width = config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        lora = lora_options(config, "q", looped=looped)
        if config.q_lora_rank:
            self.q_a_proj = Linear(config.dim, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, q_width, **lora)
        else:
            self.q_proj = Linear(config.dim, q_width, **lora)
        self.kv_a_proj_with_mqa = Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, config.n_heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(config.n_heads * config.v_head_dim, config.dim, **lora_options(config, "o", looped=looped))
        self.widths = Widths(config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim)
        self.scale = (self.widths.nope + self.widths.rope) ** -0.5

    def entry(self, x: Tensor, table: Loop, context: Context) -> Tensor:
        latent, rotary = self.kv_a_proj_with_mqa(x).split([self.widths.rank, self.widths.rope], -1)
        if context.rope is not None:
            rotary = rotate(rotary[:, :, None], context.rope)[:, :, 0]
        return torch.cat((self.kv_a_layernorm(latent).to(rotary.dtype), rotary), -1)

    def queries(self, x: Tensor, table: Loop, context: Context) -> tuple[Tensor, ...]:
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)), table) if c.q_lora_rank else self.q_proj(x, table)
        heads = q.unflatten(-1, (-1, c.qk_nope_head_dim + c.qk_rope_head_dim))
        nope, rotary = heads.tensor_split((c.qk_nope_head_dim,), -1)
        return nope, rotary if context.rope is None else rotate(rotary, context.rope)

    def attend(self, queries: tuple[Tensor, ...], entries: Tensor, mask: Tensor | None) -> Tensor:
        nope, rotary = (part.transpose(1, 2) for part in queries)
        entries, plain = entries.to(nope.dtype), type(self.kv_b_proj) is Linear  # absorption reads no adapter around it
        if plain and absorbs(nope.shape[2], entries.shape[1], self.widths):
            weight = local(self.kv_b_proj.weight).to(nope.dtype)
            y = absorbed(nope, rotary, entries, weight, self.widths, mask=mask, scale=self.scale)
        else:
            made = self.kv_b_proj(entries[..., : self.widths.rank])
            y = expanded(nope, rotary, entries, made, self.widths, mask=mask, scale=self.scale)
        return y.transpose(1, 2).flatten(-2)


ATTENTION: dict[str, type[Attention]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
