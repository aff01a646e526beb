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
