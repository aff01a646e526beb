"""MLA's two orders of multiplication (DeepSeek-V2 2405.04434, §2.1; absorption: eq. 10-11), over entries (B, S, rank +
rope), the normalised latent and the rotary key of each token; queries (B, H, T, nope) and (B, H, T, rope)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ritornello.ops.attention import attention


class Widths(NamedTuple):
    """Of a latent; of a head's key that does not turn, of its value, and of the key that all heads share."""

    rank: int
    nope: int
    value: int
    rope: int


def absorbs(n_queries: int, n_entries: int, w: Widths) -> bool:
    """Whether absorption multiplies less, per head."""
    projection = w.rank * (w.nope + w.value)
    scores = n_queries * n_entries * (2 * w.rank - w.nope - w.value)
    return n_queries * projection + scores < n_entries * projection


def expanded(
    nope: Tensor, rotary: Tensor, entries: Tensor, made: Tensor, w: Widths, *, mask: Tensor | None, scale: float
) -> Tensor:
    """Keys and values `made` (B, S, H · (nope + value)) of every latent: (B, H, T, value)."""
    keys, values = made.unflatten(-1, (-1, w.nope + w.value)).transpose(1, 2).split([w.nope, w.value], -1)
    shared_key = entries[:, None, :, w.rank :].expand(-1, keys.shape[1], -1, -1)
    q, k = torch.cat((nope, rotary), -1), torch.cat((keys, shared_key), -1)
    return attention(q, k, values, mask=mask, scale=scale)


def absorbed(
    nope: Tensor, rotary: Tensor, entries: Tensor, weight: Tensor, w: Widths, *, mask: Tensor | None, scale: float
) -> Tensor:
    """One key-value head for all queries, the latent itself: `weight` (H · (nope + value), rank), which makes keys and
    values of it, moves from those of S tokens to the queries and outputs of T."""
    w_key, w_value = weight.unflatten(0, (nope.shape[1], -1)).split([w.nope, w.value], 1)
    q = torch.cat((torch.einsum("bhtn,hnr->bhtr", nope, w_key), rotary), -1)
    y = attention(q, entries[:, None], entries[:, None, :, : w.rank], mask=mask, scale=scale)
    return torch.einsum("bhtr,hvr->bhtv", y, w_value)
