"""What is computed in float32, whatever the rest runs in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own type where that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
