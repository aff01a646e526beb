"""The feed-forward network of routed experts: every token through its own k of E SwiGLU networks.

Shapes, everywhere: x (N, D) tokens; gate_up (E, 2F, D) and down (E, D, F) weights; indices (N, k) and weights (N, k)
the experts of each token. Returns (N, D). No token is dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of a concatenated (..., 2F) projection (2002.05202)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def experts_ref(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Defines the mixture: for each expert, the tokens that chose it."""
    out = torch.zeros_like(x)
    for expert, (w_in, w_out) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, choice = torch.where(indices == expert)
        y = F.linear(swiglu(F.linear(x[token], w_in)), w_out)
        out = out.index_add(0, token, (y * weights[token, choice, None]).to(out.dtype))
    return out


class _Sorted:
    """The (token, choice) pairs in order of their expert, and the way back."""

    def __init__(self, indices: Tensor, n_experts: int) -> None:
        flat = indices.flatten()
        self.order = flat.argsort(stable=True)
        self.expert = flat[self.order]
        self.token = self.order // indices.shape[1]
        experts = torch.arange(n_experts, device=flat.device)
        self.ends = torch.searchsorted(self.expert, experts, right=True)  # bincount would wait for a GPU
        self.counts = self.ends.diff(prepend=self.ends.new_zeros(1))

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum over each token's choices: a gather, so that the order of the sum never varies."""
        n, k = weights.shape
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(n * k, device=y.device)
        return torch.bmm(weights.to(y.dtype)[:, None], y[inverse].view(n, k, -1)).squeeze(1)


def experts_grouped(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One grouped matmul over the sorted tokens: no host synchronisation, no padding. No float64 kernel exists."""
    pairs = _Sorted(indices, gate_up.shape[0])
    ends = pairs.ends.to(torch.int32)
    hidden = swiglu(F.grouped_mm(x[pairs.token], gate_up.transpose(1, 2), offs=ends))
    return pairs.combine(F.grouped_mm(hidden, down.transpose(1, 2), offs=ends), weights)


def experts_padded(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Two batched matmuls over every expert's tokens, padded to the fullest expert's: the fastest on a CPU when the
    load is even. An uneven load would pad far more than it computes, so there each expert gets a matmul of its own.
    """
    pairs = _Sorted(indices, gate_up.shape[0])
    capacity = int(pairs.counts.max())
    n_pairs = indices.numel()
    if gate_up.shape[0] * capacity > 4 * n_pairs:
        return pairs.combine(_per_expert(x[pairs.token], gate_up, down, pairs.counts.tolist()), weights)
    slot = torch.arange(n_pairs, device=x.device) - (pairs.ends - pairs.counts)[pairs.expert]
    address = pairs.expert * capacity + slot
    buffer = x.new_zeros(gate_up.shape[0] * capacity, x.shape[1]).index_copy(0, address, x[pairs.token])
    buffer = buffer.view(gate_up.shape[0], capacity, -1)
    hidden = swiglu(torch.bmm(buffer, gate_up.transpose(1, 2)))
    y = torch.bmm(hidden, down.transpose(1, 2))
    return pairs.combine(y.flatten(0, 1)[address], weights)


def _per_expert(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Only experts with tokens; `unbind` so that autograd stacks the experts' gradients once."""
    parts = zip(rows.split(counts), gate_up.unbind(), down.unbind(), strict=True)
    return torch.cat([F.linear(swiglu(F.linear(part, w_in)), w_out) for part, w_in, w_out in parts if len(part)])


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The right path: grouped matmul in half precision on CUDA where the sizes suit it, padded batches elsewhere."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    suits = x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    path = experts_grouped if x.device.type == "cuda" and suits else experts_padded
    return path(x, gate_up, down, indices, weights)
