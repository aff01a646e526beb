"""Two kinds of attention behind one switch. Each turns a token into one cache entry, and queries entries."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ritornello.config import ModelConfig
from ritornello.model.cache import KeyValues
from ritornello.model.context import Context, Loop
from ritornello.model.lora import Linear
from ritornello.model.norm import RMSNorm
from ritornello.ops.attention import attention, rotate
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
    """GQA (2305.13245) as in Llama. An entry holds G rotated keys, then G values."""

    def __init__(self, config: ModelConfig, *, layer: int, looped: bool) -> None:
        super().__init__(config, layer=layer, looped=looped)
        dim, head_dim, bias = config.dim, config.head_dim, config.qk_bias
        q, k, v, o = (lora_options(config, name, looped=looped) for name in "qkvo")
        self.q_proj = Linear(dim, config.n_heads * head_dim, bias=bias, **q)
        self.k_proj = Linear(dim, config.n_kv_heads * head_dim, bias=bias, **k)
        self.v_proj = Linear(dim, config.n_kv_heads * head_dim, **v)
        self.o_proj = Linear(config.n_heads * head_dim, dim, **o)

    def entry(self, x: Tensor, table: Loop, context: Context) -> Tensor:
        keys = self.k_proj(x, table)
        if context.rope is not None:
            keys = rotate(keys.unflatten(-1, (-1, self.config.head_dim)), context.rope).flatten(-2)
        return torch.cat((keys, self.v_proj(x, table)), -1)

    def queries(self, x: Tensor, table: Loop, context: Context) -> tuple[Tensor, ...]:
        q = self.q_proj(x, table).unflatten(-1, (-1, self.config.head_dim))
        return (q if context.rope is None else rotate(q, context.rope),)

    def attend(self, queries: tuple[Tensor, ...], entries: Tensor, mask: Tensor | None) -> Tensor:
        head_dim, q = self.config.head_dim, queries[0]
        k, v = entries.unflatten(-1, (-1, head_dim)).to(q.dtype).transpose(1, 2).chunk(2, 1)
        y = attention(q.transpose(1, 2), k, v, mask=mask, scale=head_dim**-0.5)
        return y.transpose(1, 2).flatten(-2)


class LatentAttention(Attention):
    """MLA (DeepSeek-V2 2405.04434, §2.1; names of DeepSeek-V3). An entry: the normalised latent, the rotary key.

    Absorption (eq. 10-11 there): kv_b_proj moves from the keys and values of S tokens to the queries and outputs of T.
    Rotary channels use Llama's halves layout, DeepSeek's interleaved one permuted.
    """

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
        self.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5

    def entry(self, x: Tensor, table: Loop, context: Context) -> Tensor:
        projected = self.kv_a_proj_with_mqa(x)
        latent, rotary = projected.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
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
        path = self.absorbed if self.absorbs(nope.shape[2], entries.shape[1]) else self.expanded
        return path(nope, rotary, entries.to(nope.dtype), mask).transpose(1, 2).flatten(-2)

    def absorbs(self, n_queries: int, n_entries: int) -> bool:
        """Whether absorption, which reads kv_b_proj's weight and no adapter around it, multiplies less, per head."""
        c = self.config
        projection = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        scores = n_queries * n_entries * (2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim)
        return type(self.kv_b_proj) is Linear and n_queries * projection + scores < n_entries * projection

    def expanded(self, nope: Tensor, rotary: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of every entry, made by kv_b_proj."""
        c = self.config
        latent, shared_key = entries.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        widths = [c.qk_nope_head_dim, c.v_head_dim]
        keys, values = self.kv_b_proj(latent).unflatten(-1, (-1, sum(widths))).transpose(1, 2).split(widths, -1)
        shared_key = shared_key[:, None].expand(-1, keys.shape[1], -1, -1)
        q, k = torch.cat((nope, rotary), -1), torch.cat((keys, shared_key), -1)
        return attention(q, k, values, mask=mask, scale=self.scale)

    def absorbed(self, nope: Tensor, rotary: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """One key-value head for all queries: the latent itself."""
        c = self.config
        weight = local(self.kv_b_proj.weight).to(nope.dtype).unflatten(0, (nope.shape[1], -1))
        w_key, w_value = weight.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q = torch.cat((torch.einsum("bhtn,hnr->bhtr", nope, w_key), rotary), -1)
        y = attention(q, entries[:, None], entries[:, None, :, : c.kv_lora_rank], mask=mask, scale=self.scale)
        return torch.einsum("bhtr,hvr->bhtv", y, w_value)


ATTENTION: dict[str, type[Attention]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
