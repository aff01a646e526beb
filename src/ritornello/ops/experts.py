"""The feed-forward network of routed experts: every token through its own k of E SwiGLU networks.

Shapes, everywhere: x (N, D) tokens; gate_up (E, 2F, D) and down (E, D, F) weights; indices (N, k) and weights (N, k)
the experts of each token. Returns (N, D). No token is dropped.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ritornello.ops.linear import local

COPIED = 2_000_000  # bytes of weights, up to which a CPU copies those of each pair rather than count slots
FEW = 12  # experts for each pair of token and choice, above which a GPU copies the weights of each pair
SHARED = 2  # pairs for each expert, up to which a compiled path reads weights for every pair
PADDED = 0.75, 48.0  # pairs for each expert, between which a padded batched product beats a product for each expert
HEADROOM = 1.25  # what a batched product has room for, over the mean
ALIKE = 32  # slots, in whose multiples an expert's bfloat16 rows are multiplied: each number of rows has a kernel made
LONE = 8  # experts, up to which they are never worth a batched product
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
        return torch.bmm(weights.to(y.dtype)[:, None], y[inverse].view(n, k, y.shape[1])).squeeze(1)


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
    y = torch.bmm(hidden, down[chosen].transpose(1, 2)).view(*indices.shape, x.shape[1])
    return torch.bmm(weights.to(y.dtype)[:, None], y).squeeze(1)


def experts_fused(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Like `experts_gathered`, as sums of products: a compiler then copies nothing, and reads each weight once."""
    hidden = swiglu((gate_up[indices] * x[:, None, None]).sum(-1)) * weights.to(x.dtype)[..., None]
    return (down[indices] * hidden[..., None, :]).sum(-1).sum(1)


class _Slots:
    """A slot for each (token, choice) pair, so that experts can be multiplied in batches: of every expert as many slots
    as most need, then of those with more pairs, and so on; the rest expert by expert. A slot that stays unused reads
    the first token, and gets the weight 0. The order of the pairs of an expert is that of the tokens.

    token, pair (S,): whose each slot is, pair = n·k where unused. slot (n, k): where each pair is. batches: experts,
    first slot, slots of each. singles: expert, first slot, end.
    """

    def __init__(self, indices: Tensor, n_experts: int, alike: int = 1) -> None:
        """alike: more slots of a single come in multiples of this."""
        n, k = indices.shape
        pairs = _Sorted(indices.cpu())
        order, expert, counts = pairs.order, pairs.expert, pairs.expert.bincount(minlength=n_experts)
        rank = torch.arange(n * k) - (counts.cumsum(0) - counts)[expert]
        place, first = torch.empty_like(order), torch.empty_like(counts)
        self.n_experts, self.batches, self.singles = n_experts, [], []
        active, taken, end = torch.arange(n_experts), 0, 0
        while room := batch_room(int(counts[active].sum()) - taken * len(active), len(active)):
            first[active] = end + room * torch.arange(len(active))
            place = torch.where(rank >= taken, first[expert] + rank - taken, place)
            self.batches.append((active.to(indices.device), end, room))
            end, taken = end + room * len(active), taken + room
            active = (counts > taken).nonzero()[:, 0]
        left = (counts - taken).tolist()
        for i, count in enumerate(left):
            if count > 0:
                first[i] = end
                size = alike * math.ceil(count / alike) if count > alike else count
                self.singles.append((i, end, end := end + size))
        place = torch.where(rank >= taken, first[expert] + rank - taken, place)
        self.idle = [] if self.batches else [i for i, count in enumerate(left) if not count]
        pair, slot = torch.full((end,), n * k), torch.empty_like(order)
        pair[place], slot[order] = order, place
        self.pair, self.slot = pair.to(indices.device), slot.view(n, k).to(indices.device)
        self.token = self.pair % (n * k) // k

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (S, K) · the weight (E, K, M) of each slot's expert -> (S, M)."""
        out = x.new_empty(x.shape[0], weight.shape[2])
        for experts, start, room in self.batches:
            some = weight if len(experts) == self.n_experts else weight[experts]
            rows = slice(start, start + len(experts) * room)
            torch.bmm(x[rows].unflatten(0, (-1, room)), some, out=out[rows].unflatten(0, (-1, room)))
        for expert, start, end in self.singles:
            torch.mm(x[start:end], weight[expert], out=out[start:end])
        return out

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """xᵀ · y over the slots of each expert: (S, K), (S, M) -> (E, K, M)."""
        out = x.new_empty(self.n_experts, x.shape[1], y.shape[1])
        for i, (experts, start, room) in enumerate(self.batches):
            left, right = (t[start : start + len(experts) * room].unflatten(0, (-1, room)) for t in (x, y))
            if i == 0:  # every expert is in the first
                torch.bmm(left.transpose(1, 2), right, out=out)
            else:
                out.index_add_(0, experts, torch.bmm(left.transpose(1, 2), right))
        for expert, start, end in self.singles:
            out[expert].addmm_(x[start:end].t(), y[start:end], beta=1 if self.batches else 0)
        out[self.idle] = 0
        return out

    def spread(self, x: Tensor) -> Tensor:
        """Tokens (n, D) -> slots (S, D)."""
        return x.index_select(0, self.token)

    def collect(self, y: Tensor) -> Tensor:
        """Slots (S, D) -> tokens (n, D): the sum over each token's choices, always in their order."""
        return F.embedding_bag(self.slot, y, mode="sum")

    def weights(self, weights: Tensor) -> Tensor:
        """(n, k) -> (S,)"""
        return torch.cat((weights.flatten(), weights.new_zeros(1))).index_select(0, self.pair)


# Autograd's own gradients of these would add into zeros row by row, and make a weight's gradient for each expert.


class _Move(torch.autograd.Function):
    """A sum of rows, by the function `there`, whose gradient is moved by the function `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore
        return ctx.back(grads[0]), None, None


class _Linear(torch.autograd.Function):
    """x (S, K) · transposed weight (E, M, K) of each slot's expert -> (S, M)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, slots: _Slots) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.slots = slots
        return slots.product(x, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:  # pyrefly: ignore
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        for_x = ctx.slots.product(grad, weight) if ctx.needs_input_grad[0] else None
        return for_x, ctx.slots.outer(grad, x) if ctx.needs_input_grad[1] else None, None


def batch_room(n_pairs: int, n_experts: int) -> int:
    """How many slots each of the experts gets in one batched product; 0: a product for each is faster."""
    mean, (least, most) = n_pairs / max(n_experts, 1), PADDED
    return 4 * math.ceil(HEADROOM * mean / 4) if n_experts > LONE and least <= mean <= most else 0


def experts_slotted(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Batched products over slots, weights where they lie. The host has to know how many pairs each expert has, and
    waits for the device."""
    slots = _Slots(indices, gate_up.shape[0], ALIKE if x.dtype.itemsize < 4 else 1)
    hidden = swiglu(_Linear.apply(_Move.apply(x, slots.spread, slots.collect), gate_up, slots))
    hidden = hidden * slots.weights(weights).to(x.dtype)[:, None]
    return _Move.apply(_Linear.apply(hidden, down, slots), slots.collect, slots.spread)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, exact: bool = False
) -> Tensor:
    """The right path, by a measured rule (experiments/LOG.md, entries 11, 15, 16 and 19).

    exact: gathered, so that no sum of one token depends on what others chose. A CPU: slots, or gathered where that
    copies little and no gradient flows. A GPU: gathered where most experts idle and no gradient flows, else grouped;
    slots where the grouped kernels do not reach (see GROUPED, and widths that are no multiple of 8). Compiled, where
    the host cannot know how many pairs an expert has: grouped; fused up to SHARED pairs an expert, or where the grouped
    kernels do not reach.
    """
    gate_up, down = local(gate_up), local(down)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    suits = x.dtype in GROUPED.get(x.device.type, ()) and x.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    n_pairs, n_experts, forward_only = indices.numel(), gate_up.shape[0], not torch.is_grad_enabled()
    path = experts_slotted
    if exact:
        path = experts_gathered
    elif torch.compiler.is_compiling():
        fused = not suits or (forward_only and n_pairs <= SHARED * n_experts)
        path = experts_fused if fused else experts_grouped
    elif not n_pairs:  # a process whose sequences have not begun; grouped kernels refuse it
        path = experts_slotted
    elif x.device.type == "cpu":
        copied = n_pairs * (gate_up[0].nbytes + down[0].nbytes)
        if forward_only and copied <= COPIED and x.dtype.itemsize >= 4:
            path = experts_gathered
    elif x.device.type == "cuda":
        if forward_only and n_pairs * FEW <= n_experts:
            path = experts_gathered
        elif suits:
            path = experts_grouped
    return path(x, gate_up, down, indices, weights)
