"""Products with a weight matrix, and low-rank deltas, one for each loop index."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16  # rows, up to which weight · xᵀ is the faster order in float32


def local(weight: Any) -> Tensor:
    """A weight, or of one that is spread over processes this one's part."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) · weightᵀ + bias, weight (N, K), bias (N,) -> (..., N).

    On a CPU few rows of float32 are multiplied the other way around, and the result is copied into order: BLAS takes up
    to five times as long for x · weightᵀ. Compiled, one row becomes a sum of products, which the compiler fuses with
    what stands around it and reads the weight once from end to end (experiments/LOG.md, entries 15 and 16).
    """
    if bias is not None:
        return linear(x, weight) + local(bias)
    n_rows, weight = x.shape[:-1].numel(), local(weight)
    if x.device.type != "cpu" or n_rows > FEW:
        return F.linear(x, weight)
    if torch.compiler.is_compiling() and n_rows == 1:
        return (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
    if x.dtype == weight.dtype == torch.float32 and n_rows > 1 and not torch.is_autocast_enabled("cpu"):
        return (weight @ x.reshape(n_rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def lowered(x: Tensor) -> Tensor:
    """float32 as autocast will multiply it, where it is on: converted once for all products that read it."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def low_rank_ref(x: Tensor, down: Tensor, up: Tensor, loop: Tensor | int) -> Tensor:
    """Defines `low_rank`: each token's own two matrices."""
    index = torch.as_tensor(loop, device=x.device).expand(x.shape[:2])
    return (up[index] @ (down[index] @ x[..., None]))[..., 0]


def low_rank(x: Tensor, down: Tensor, up: Tensor, loop: Tensor | int) -> Tensor:
    """up[loop] · down[loop] · x for (B, T, in), with down (L, r, in), up (L, out, r).

    One loop index for all tokens takes one slice, one per sequence a batched product. One per token multiplies by all
    L slices and keeps the token's own: L·r columns are few, and nothing is sorted.
    """
    down, up = local(down), local(up)
    if isinstance(loop, int):
        return linear(linear(x, down[loop]), up[loop])
    if loop.shape[1] == 1:
        index = loop[:, 0]
        return torch.bmm(torch.bmm(x, down[index].transpose(1, 2)), up[index].transpose(1, 2))
    n_loops, rank, _ = down.shape
    own = F.one_hot(loop, n_loops).to(x.dtype)[..., None]
    hidden = F.linear(x, down.flatten(0, 1)).unflatten(-1, (n_loops, rank)) * own
    return F.linear(hidden.flatten(-2), up.transpose(0, 1).flatten(1))
