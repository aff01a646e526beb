"""Weights that two processes draw alike, whatever their libraries: a hash of name and place, as uniform numbers."""

import zlib

import numpy as np
import torch
from torch import Tensor

MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # splitmix64


def uniform(name: str, shape: torch.Size) -> Tensor:
    """In (-1, 1), float64."""
    seed = zlib.crc32(name.encode()) << 32
    x = (np.arange(1, shape.numel() + 1, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in MIX:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2**52 - 1).reshape(tuple(shape))


def drawn(name: str, shape: torch.Size, bias: float) -> Tensor:
    """A tensor of OpenMythos; bias: of its halting head."""
    x = uniform(name, shape)
    if "norm" in name:
        return 1 + x / 2
    if name.endswith("halt.bias"):
        return torch.full_like(x, bias)
    if name.endswith(("log_A", "log_dt")):
        return x
    if name.endswith("router_bias"):
        return x / 10
    return x * (3 / shape[-1]) ** 0.5 if len(shape) == 2 else x
