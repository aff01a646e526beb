"""How much matrices can stretch a vector."""

import torch
from torch import Tensor


def spectral_norm(w: Tensor) -> Tensor:
    """Largest singular value of (..., m, n)."""
    return torch.linalg.matrix_norm(w.to(torch.promote_types(w.dtype, torch.float32)), 2)


def swiglu_norm(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """c with ‖down(silu(gate x) · up x)‖ ≤ c ‖x‖²: |silu(a)| ≤ |a|, so the product is at most
    min(‖gate‖ · largest row of up, largest row of gate · ‖up‖) ‖x‖²."""
    rows = lambda w: w.float().norm(dim=-1).amax(-1)  # noqa: E731
    product = torch.minimum(spectral_norm(gate) * rows(up), rows(gate) * spectral_norm(up))
    return product * spectral_norm(down)


def relu2_norm(up: Tensor, down: Tensor) -> Tensor:
    """c with ‖down(relu(up x)² / 2)‖ ≤ c ‖x‖²: the largest element of up x, times ‖up x‖."""
    return up.float().norm(dim=-1).amax(-1) * spectral_norm(up) * spectral_norm(down) / 2
