"""Expert parallelism (GShard 2006.16668): each process has some of the routed experts, and tokens travel to them.

Of processes that read the same tokens (tensor), each takes from its own those for its experts, and nothing travels. The
processes of an expert group read other tokens: one exchange says how many come for each expert, one brings them, one
takes what became of them back. No token is dropped, and every process takes part, also one that has no tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ritornello.config import require
from ritornello.model.moe import Experts, MixtureOfExperts
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.experts import experts
from ritornello.train.tensor_parallel import Inward, place

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def spread(model: RecurrentDepthTransformer, mesh: "DeviceMesh") -> None:
    """Make every process of `mesh` (expert, tensor) hold an equal part of the routed experts of each layer."""
    c = model.config
    if c.ffn != "moe" or c.is_plain:
        require(mesh.size(0) == 1, "parallel.expert", mesh.size(0), "1 for a model without experts")
        return
    ok = c.n_experts % mesh.size() == 0
    require(ok, "parallel.expert x tensor", mesh.size(), f"a divisor of model.n_experts ({c.n_experts})")
    owners = Owners.of(mesh, c.n_experts)
    for layer in model.recurrent:
        assert isinstance(layer.mlp, MixtureOfExperts)
        module = layer.mlp.experts
        for path, parameter in list(module.named_parameters()):
            place(module, path, parameter, mesh, (0, 0))
        module.forward = partial(dispatched, module, owners)  # pyrefly: ignore


@dataclass(frozen=True)
class Owners:
    """Where experts are: the first n_local with process (0, 0) of the (expert, tensor) mesh, the next with (0, 1)."""

    n_local: int
    n_expert: int
    n_tensor: int
    tensor: int  # this process' index
    first: int  # of this process' experts
    expert_group: Any
    tensor_group: Any

    @classmethod
    def of(cls, mesh: "DeviceMesh", n_experts: int) -> "Owners":
        (n_expert, n_tensor), (row, column) = mesh.shape, mesh.get_coordinate() or (0, 0)
        n_local = n_experts // mesh.size()
        first = (row * n_tensor + column) * n_local
        return cls(n_local, n_expert, n_tensor, column, first, mesh["expert"].get_group(), mesh["tensor"].get_group())


def dispatched(
    module: Experts, owners: Owners, x: Tensor, indices: Tensor, weights: Tensor, exact: bool = False
) -> Tensor:
    """`Experts.forward` by all processes: x (N, D), indices and weights (N, k) -> (N, D), a part of it where others
    read the same tokens."""
    x = x.to(module.down_proj.dtype)
    if owners.n_tensor > 1:
        x, weights = Inward.apply(x, owners.tensor_group), Inward.apply(weights, owners.tensor_group)
    flat = indices.flatten()
    order = flat.argsort(stable=True)  # the pairs by expert, hence by owner
    if owners.n_tensor > 1:
        order = order[flat[order] // owners.n_local % owners.n_tensor == owners.tensor]
    y = _visited(module, owners, x[order // indices.shape[1]], flat[order], exact)
    y = y * weights.flatten()[order, None].to(y.dtype)
    every = y.new_zeros(indices.numel(), x.shape[1]).index_copy(0, order, y)
    return every.view(*indices.shape, x.shape[1]).sum(1)


def _visited(module: Experts, owners: Owners, rows: Tensor, expert: Tensor, exact: bool) -> Tensor:
    """What becomes of rows (M, D) that are sorted by their expert (M,), wherever that is: (M, D)."""
    if owners.n_expert == 1:
        return _computed(module, rows, expert - owners.first, exact)
    ids = torch.arange(owners.n_expert * owners.n_tensor * owners.n_local, device=rows.device)
    ends = torch.searchsorted(expert, ids, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1)).view(owners.n_expert, owners.n_tensor, -1)[:, owners.tensor]
    coming = torch.empty_like(counts, memory_format=torch.contiguous_format)  # (sources, n_local)
    dist.all_to_all_single(coming, counts.contiguous(), group=owners.expert_group)
    sent, received = counts.sum(1).tolist(), coming.sum(1).tolist()
    here = torch.arange(owners.n_local, device=rows.device).repeat(owners.n_expert)
    visitors = Exchange.apply(rows, received, sent, owners.expert_group)
    y = _computed(module, visitors, here.repeat_interleave(coming.flatten()), exact)
    return Exchange.apply(y, sent, received, owners.expert_group)


def _computed(module: Experts, rows: Tensor, expert: Tensor, exact: bool) -> Tensor:
    """Rows (M, D) through this process' own experts (M,)."""
    once = rows.new_ones(len(rows), 1)
    return experts(rows, module.gate_up_proj, module.down_proj, expert[:, None], once, exact=exact)


class Exchange(torch.autograd.Function):
    """Rows (M, D), `sent` of them to each process of the group, for those that it gets, `received` from each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchanged(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore
        return _exchanged(grads[0], ctx.sent, ctx.received, ctx.group), None, None, None


def _exchanged(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
    return found
