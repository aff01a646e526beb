"""The feed-forward network of routed experts: every token through its own k of E SwiGLU networks.

Shapes, everywhere: x (N, D) tokens; gate_up (E, 2F, D) and down (E, D, F) weights; indices (N, k) and weights (N, k)
the experts of each token. Returns (N, D). No token is dropped.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 12  # experts for each pair of token and choice, above which most idle
SHARED = 2  # pairs for each expert, up to which a compiled path reads weights for every pair
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


@torch.library.custom_op("ritornello::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, K) · weight[g] (K, M) -> (N, M), group g the rows before ends[g]. An operator of its own, because under
    torch.compile F.grouped_mm refuses float32."""
    return F.grouped_mm(x, weight, offs=ends)


@torch.library.custom_op("ritornello::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """xᵀ · y over the rows of each group: (N, K), (N, M) -> (G, K, M)."""
    return F.grouped_mm(x.t(), y, offs=ends)


grouped_mm.register_fake(lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[2]))
grouped_outer.register_fake(lambda x, y, ends: x.new_empty(ends.shape[0], x.shape[1], y.shape[1]))


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    for_x = grouped_mm(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    # (M, K) transposed: weights come so, and their gradient then lies as they do
    return for_x, grouped_outer(grad, x, ends).transpose(1, 2) if ctx.needs_input_grad[1] else None, None


grouped_mm.register_autograd(
    _grouped_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


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
    hidden = swiglu(grouped_mm(x[pairs.token], gate_up.transpose(1, 2), ends))
    return pairs.combine(grouped_mm(hidden, down.transpose(1, 2), ends), weights)


def experts_gathered(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Each (token, choice) pair with a copy of its expert's weights: reads no other expert, and waits for nothing."""
    chosen = indices.flatten()
    rows = x.repeat_interleave(indices.shape[1], 0)[:, None]
    hidden = swiglu(torch.bmm(rows, gate_up[chosen].transpose(1, 2)))
    y = torch.bmm(hidden, down[chosen].transpose(1, 2)).view(*indices.shape, -1)
    return torch.bmm(weights.to(y.dtype)[:, None], y).squeeze(1)


def experts_fused(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Like `experts_gathered`, as sums of products: a compiler then copies nothing, and reads each weight once."""
    hidden = swiglu((gate_up[indices] * x[:, None, None]).sum(-1)) * weights.to(x.dtype)[..., None]
    return (down[indices] * hidden[..., None, :]).sum(-1).sum(1)


def experts_listed(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Two matmuls for each expert that has tokens, its weights where they lie. The host has to know how many it has,
    and waits for the device once."""
    pairs = _Sorted(indices)
    ends = pairs.ends(gate_up.shape[0]).tolist()
    counts = {expert: end - start for expert, (start, end) in enumerate(pairwise([0, *ends])) if end > start}
    # `unbind` where gradients flow: autograd then stacks the experts' gradients once
    every = list(zip(gate_up.unbind(), down.unbind(), strict=True)) if torch.is_grad_enabled() else None
    parts = []
    for expert, rows in zip(counts, x[pairs.token].split(list(counts.values())), strict=True):
        w_in, w_out = every[expert] if every is not None else (gate_up[expert], down[expert])
        parts.append(F.linear(swiglu(F.linear(rows, w_in)), w_out))
    return pairs.combine(torch.cat(parts), weights)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The right path, by a measured rule (experiments/LOG.md, entries 11 and 15).

    Many pairs: grouped. So few, without gradients, that most experts idle: a GPU gathers, a CPU reads weights in place;
    compiled, fused up to SHARED pairs an expert. Where the grouped kernels do not reach (see GROUPED, and widths that
    are no multiple of 8) listed, or compiled, where the host cannot know how many experts have tokens, fused.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    suits = x.dtype in GROUPED.get(x.device.type, ()) and x.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    n_pairs, n_experts, forward_only = indices.numel(), gate_up.shape[0], not torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        fused = not suits or (forward_only and n_pairs <= SHARED * n_experts)
        return (experts_fused if fused else experts_grouped)(x, gate_up, down, indices, weights)
    few = n_pairs * FEW <= n_experts and forward_only
    if few and x.device.type == "cuda":
        return experts_gathered(x, gate_up, down, indices, weights)
    path = experts_grouped if suits and not few else experts_listed
    return path(x, gate_up, down, indices, weights)
