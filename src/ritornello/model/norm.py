"""Root-mean-square normalisation (1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.ops.precision import at_least_float32


class RMSNorm(nn.Module):
    """x / RMS(x) · weight over the last dimension, in float32 or better whatever x is; returned in that precision."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
