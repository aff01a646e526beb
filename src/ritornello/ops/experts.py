"""The feed-forward network of routed experts: every token through its own k of E SwiGLU networks.

Shapes, everywhere: x (N, D) tokens; gate_up (E, 2F, D) and down (E, D, F) weights; indices (N, k) and weights (N, k)
the experts of each token. Returns (N, D). No token is dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 12  # experts for each pair of token and choice, above which most idle
GROUPED: dict[str, tuple[torch.dtype, ...]] = {  # what F.grouped_mm is used for, by device
    "cuda": (torch.bfloat16, torch.float16),
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
}


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

    def __init__(self, indices: Tensor) -> None:
        flat = indices.flatten()
        self.order = flat.argsort(stable=True)
        self.expert = flat[self.order]
        self.token = self.order // indices.shape[1]

    def ends(self, n_experts: int) -> Tensor:
        """(E,) int32: where the pairs of each expert end."""
        experts = torch.arange(n_experts, device=self.expert.device)
        return torch.searchsorted(self.expert, experts, right=True, out_int32=True)  # bincount would wait for a GPU

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum over each token's choices: a gather, so that the order of the sum never varies."""
        n, k = weights.shape
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(n * k, device=y.device)
        return torch.bmm(weights.to(y.dtype)[:, None], y[inverse].view(n, k, -1)).squeeze(1)


def experts_grouped(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One grouped matmul over the sorted tokens: no host synchronisation, no padding."""
    pairs = _Sorted(indices)
    ends = pairs.ends(gate_up.shape[0])
    hidden = swiglu(F.grouped_mm(x[pairs.token], gate_up.transpose(1, 2), offs=ends))
    return pairs.combine(F.grouped_mm(hidden, down.transpose(1, 2), offs=ends), weights)


def experts_gathered(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Each (token, choice) pair with a copy of its expert's weights: reads no other expert, and waits for nothing."""
    chosen = indices.flatten()
    rows = x.repeat_interleave(indices.shape[1], 0)[:, None]
    hidden = swiglu(torch.bmm(rows, gate_up[chosen].transpose(1, 2)))
    y = torch.bmm(hidden, down[chosen].transpose(1, 2)).view(*indices.shape, -1)
    return torch.bmm(weights.to(y.dtype)[:, None], y).squeeze(1)


def experts_listed(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Two matmuls for each expert that has tokens, its weights where they lie. The host has to know how many it has."""
    pairs = _Sorted(indices)
    chosen, counts = torch.stack(torch.unique_consecutive(pairs.expert, return_counts=True)).tolist()
    # `unbind` where gradients flow: autograd then stacks the experts' gradients once
    every = list(zip(gate_up.unbind(), down.unbind(), strict=True)) if torch.is_grad_enabled() else None
    parts = []
    for expert, rows in zip(chosen, x[pairs.token].split(counts), strict=True):
        w_in, w_out = every[expert] if every is not None else (gate_up[expert], down[expert])
        parts.append(F.linear(swiglu(F.linear(rows, w_in)), w_out))
    return pairs.combine(torch.cat(parts), weights)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The right path, by a measured rule (experiments/LOG.md, entry 11).

    Many pairs: grouped. So few, without gradients, that most experts idle: a GPU gathers, a CPU reads weights in place.
    Listed where the grouped kernels do not reach: see GROUPED, and widths that are no multiple of 8.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    suits = x.dtype in GROUPED.get(x.device.type, ()) and x.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    few = indices.numel() * FEW <= gate_up.shape[0] and not torch.is_grad_enabled()
    if few and x.device.type == "cuda":
        return experts_gathered(x, gate_up, down, indices, weights)
    path = experts_grouped if suits and not few else experts_listed
    return path(x, gate_up, down, indices, weights)
