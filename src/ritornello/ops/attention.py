"""Scaled dot-product attention with grouped key-value heads."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ritornello.config import Yarn

BLOCK = 256  # queries that share a span of keys, where a mask hides some


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """Defines `attention`: explicit scores, explicit softmax. Same shapes."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if mask is None:
        n_past = k.shape[-2] - q.shape[-2]
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(n_past)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ v.repeat_interleave(groups, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, one key-value head for every H / G query heads.

    Args:
        q: (B, H, T, K) queries.
        k: (B, G, S, K) keys, v: (B, G, S, M) values; G divides H.
        mask: bool, broadcastable to (B, H, T, S), True: may look; None: causal with T = S, or T = 1 seeing all.
    Returns:
        (B, H, T, M)
    """
    if not torch.compiler.is_compiling():  # which cannot know how long a cache's view is
        assert mask is not None or q.shape[-2] in (1, k.shape[-2]), "a chunk that follows cached tokens needs its mask"
    if v.shape[-1] < q.shape[-1] and q.shape[-2] > 1 and q.device.type == "cpu":
        # MLA's values are narrower than its keys: the kernel that never holds all scores takes equal widths only
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        return attention(q, k, wide, mask=mask, scale=scale)[..., : v.shape[-1]]
    if mask is not None and q.shape[-2] > BLOCK and q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _by_blocks(q, k, v, mask, scale)
    if q.shape[-2] == 1 and q.shape[1] != k.shape[1] and (mask is None or mask.ndim < 3 or mask.shape[-3] == 1):
        # the heads that share keys as queries of one head: what `enable_gqa` repeats is then read once
        rows = q.unflatten(1, (k.shape[1], -1))[..., 0, :]
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).flatten(1, 2)[..., None, :]
    how: Any = {"scale": scale}
    if q.shape[1] != k.shape[1]:  # a branch: between two compiled models the comparison is symbolic, and no bool
        how["enable_gqa"] = True
    if mask is None and q.shape[-2] > 1:  # for the same reason
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Each block of queries over the span of keys that one of them may see: the kernel computes what a mask hides."""
    parts, mask = [], mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])
    for queries, seen in zip(q.split(BLOCK, -2), mask.split(BLOCK, -2), strict=True):
        some = seen.flatten(0, -2).view(torch.uint8).amax(0)  # as bool, any() takes twenty times as long
        places = some.nonzero().flatten().tolist() or [0]  # a block may see nothing
        span = slice(places[0], places[-1] + 1)
        parts.append(attention(queries, k[..., span, :], v[..., span, :], mask=seen[..., span], scale=scale))
    return torch.cat(parts, -2)


def visible(
    n_new: int, n_past: int, documents: Tensor | None, past: Tensor | None, device: torch.device
) -> Tensor | None:
    """(B or 1, 1, T, S) bool: at which of S = n_past + n_new tokens each of the T = n_new last may look: none after it,
    and of its own document where documents (B, T), past (B, n_past) are in use. None: as `attention` reads it."""
    if documents is None and (n_new == 1 or not n_past):
        return None
    mask = torch.ones(n_new, n_past + n_new, dtype=torch.bool, device=device).tril(n_past)[None, None]
    if documents is None:
        return mask
    every = documents if past is None else torch.cat((past, documents), 1)
    return mask & (documents[:, None, :, None] == every[:, None, None, :])


def rotary_tables(
    positions: Tensor, *, dim: int, theta: float, dtype: torch.dtype, yarn: Yarn | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, dim) of RoFormer (2104.09864), halves layout as in Llama; computed in >= float32."""
    precise = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=precise) / dim
    speeds = theta**-exponents
    speeds = speeds if yarn is None else slowed(speeds, theta, yarn)
    angles = positions[..., None].to(precise) * speeds
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def slowed(speeds: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """speeds (dim / 2,) of rotary channels, for texts longer than those of the training (YaRN 2309.00071, §3.2).

    Channels that turn less than `yarn.slow` times in `yarn.length` positions become `yarn.factor` times as slow, those
    that turn more than `yarn.fast` times stay, with a ramp between. Its temperature of attention is not here: what
    converts a model scales the queries.
    """
    n = len(speeds)
    low, high = (
        n * math.log(yarn.length / (turns * 2 * math.pi)) / math.log(theta) for turns in (yarn.fast, yarn.slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * n - 1)
    places = torch.arange(n, device=speeds.device, dtype=speeds.dtype)
    ramp = ((places - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
    return speeds / yarn.factor * ramp + speeds * (1 - ramp)


def enriched(values: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
    """values (B, T, G · M) + 2 σ(gates) · rows: gates (B, T, G), one for each head; rows (B, T, G · M) of a table of
    tokens (value embeddings, 2410.17897, as modded-nanogpt and Parcae gate them)."""
    added = 2 * gates.sigmoid()[..., None] * rows.unflatten(-1, (gates.shape[-1], -1))
    return values + added.flatten(-2).to(values.dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (B, T, heads, dim) by the positions that made `tables`."""
    cos, sin = (table[:, :, None].to(x.dtype) for table in tables)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
