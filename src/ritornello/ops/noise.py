"""Counter-based random numbers: each one a function of its address, whatever batch, rank or chunk asks for it.

A key is an int64 tensor; `fold` mixes another counter into it. The mixer is SplitMix64 (Steele et al. 2014), whose
arithmetic modulo 2**64 is exactly that of int64 with wrap-around, on every device.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ritornello.config import require_int

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def fold(key: Tensor, counter: Tensor | int) -> Tensor:
    """A new key from `key` and `counter` (broadcast)."""
    if isinstance(counter, int):  # wrapped to int64 here: a tensor would be copied to the device and waited for
        z = (key ^ ((counter * _MIX1 + 2**63) % 2**64 - 2**63)) + _GOLDEN
    else:
        z = (key ^ (counter * _MIX1)) + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def uniform(key: Tensor) -> Tensor:
    """float32 in (0, 1), one for each key: 23 bits, shifted by half a step so that neither end occurs, even rounded."""
    return (_shift(key, 41).to(torch.float32) + 0.5) * 2**-23


def normal(key: Tensor) -> Tensor:
    """Standard normal float32, one for each key, by inversion."""
    return math.sqrt(2) * torch.erfinv(2 * uniform(key) - 1)


@dataclass(frozen=True)
class Key:
    """The address of a forward pass's randomness: the same for a sequence in any batch, on any rank.

    `sequences` (B,) int64 are global sequence ids; None: all sequences draw the same noise, as at inference.
    """

    seed: int = 0
    step: int = 0
    sequences: Tensor | None = None

    def __post_init__(self) -> None:
        require_int("key.seed", self.seed, 0, 2**63 - 1)
        require_int("key.step", self.step, 0, 2**63 - 1)

    def fold(self, positions: Tensor, *counters: Tensor | int) -> Tensor:
        """An int64 key (B, T) for each position, distinct for distinct `counters`."""
        key = fold(fold(torch.full_like(positions[:1, :1], self.seed), self.step), positions)
        if self.sequences is not None:
            key = fold(key, self.sequences.to(positions.device)[:, None])
        for counter in counters:
            key = fold(key, counter)
        return key

    def select(self, rows: Tensor | slice) -> "Key":
        return self if self.sequences is None else replace(self, sequences=self.sequences[rows])


def dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """Dropout of x (..., D). Its mask depends on keys (...), the addresses of the tokens, alone, so that recomputation
    repeats it."""
    kept = uniform(fold(keys[..., None], torch.arange(x.shape[-1], device=x.device))) >= p
    return x * kept / (1 - p)
