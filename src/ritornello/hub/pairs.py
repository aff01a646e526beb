"""Rotary rows of published projections: pairs side by side (RoFormer, DeepSeek), or all firsts and then all seconds."""

import torch
from torch import Tensor


def halves(rows: Tensor, n: int) -> Tensor:
    """Of (..., rows, K) the last n rows, which turn: from pairs to halves, Llama's layout and ours."""
    still, turning = rows.tensor_split((rows.shape[-2] - n,), -2)
    return torch.cat((still, turning[..., 0::2, :], turning[..., 1::2, :]), -2)


def pairs(rows: Tensor, n: int) -> Tensor:
    """The way back."""
    still, turning = rows.tensor_split((rows.shape[-2] - n,), -2)
    return torch.cat((still, torch.stack(turning.chunk(2, -2), -2).flatten(-3, -2)), -2)


def to_halves(x: Tensor, head_dim: int) -> Tensor:
    """`halves` of whole heads: x (heads · head_dim, ...), a matrix or a bias."""
    return halves(_by_head(x, head_dim), head_dim).reshape(x.shape)


def to_pairs(x: Tensor, head_dim: int) -> Tensor:
    """The way back."""
    return pairs(_by_head(x, head_dim), head_dim).reshape(x.shape)


def _by_head(x: Tensor, head_dim: int) -> Tensor:
    return x.reshape(x.shape[0] // head_dim, head_dim, -1)
