"""Tensor parallelism (Megatron-LM 1909.08053, §3): processes that read the same tokens compute a layer together.

Each has some heads of the attention, some columns of a feed-forward network and some of the experts; what they make is
added up. Weights are DTensors, products are of each process' own part. Within such a region a process knows a part of
every gradient: that of the input is added up where it leaves, that of a weight held whole by `partial`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ritornello.config import ModelConfig, require
from ritornello.model.layers import Layer
from ritornello.model.moe import FeedForward, MixtureOfExperts
from ritornello.model.rdt import RecurrentDepthTransformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COLUMNS = {"q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "gate_proj", "up_proj"}
ROWS = {"o_proj", "down_proj"}


def spread(model: RecurrentDepthTransformer, mesh: "DeviceMesh") -> None:
    """Make every process of `mesh` hold its part of each layer, but for routed experts."""
    check(model.config, mesh.size())
    group = mesh.get_group()
    for layer in _layers(model):
        for region in regions(layer):
            for path, parameter in list(region.named_parameters()):
                dim = dimension(path)
                if dim is not None:
                    place(region, path, parameter, mesh, (dim,))
            region.register_forward_pre_hook(lambda _, inputs: (Inward.apply(inputs[0], group), *inputs[1:]))
        layer.self_attn.register_forward_hook(lambda _, inputs, y: Outward.apply(y, group))
        layer.mlp.register_forward_hook(lambda _, inputs, y: _outward(y, group))


def check(c: ModelConfig, n: int) -> None:
    """Whether each of `n` processes can have as much as the others.

    Raises:
        ValueError: the first width that `n` does not divide.
    """
    none = n == 1 or not c.value_embeddings
    require(none, "parallel.tensor", n, "1 with model.value_embeddings, whose tables are not cut")
    widths = {"n_heads": c.n_heads}
    if c.attention == "gqa":
        widths["n_kv_heads"] = c.n_kv_heads
    looped = "n_shared_experts x expert_dim" if c.ffn == "moe" and not c.is_plain else "ffn_dim"
    widths |= {looped: c.n_shared_experts * c.expert_dim} if looped != "ffn_dim" else {}
    if c.n_prelude_layers or c.n_coda_layers or looped == "ffn_dim":
        widths["ffn_dim"] = c.ffn_dim
    for name, width in widths.items():
        require(width % n == 0, "parallel.tensor", n, f"a divisor of model.{name} ({width})")


def regions(layer: Layer) -> Iterator[nn.Module]:
    """The parts of a layer within which processes have parts of what one would."""
    yield layer.self_attn
    if isinstance(layer.mlp, FeedForward):
        yield layer.mlp
    elif layer.mlp.shared_experts is not None:
        yield layer.mlp.shared_experts


def dimension(path: str) -> int | None:
    """Along which a parameter of a region is spread; None: every process has it whole."""
    owner, _, kind = path.rpartition(".")
    if owner in COLUMNS:
        return {"weight": 0, "bias": 0, "loop_B": 1}.get(kind)
    return {"weight": 1, "loop_A": 2}.get(kind) if owner in ROWS else None


def partial(model: RecurrentDepthTransformer) -> Iterator[nn.Parameter]:
    """Those held whole, of whose gradient each process has a part."""
    for layer in _layers(model):
        for region in regions(layer):
            yield from (p for path, p in region.named_parameters() if dimension(path) is None)


def place(module: nn.Module, path: str, x: nn.Parameter, mesh: "DeviceMesh", dims: tuple[int, ...]) -> None:
    """Leave of `module`'s parameter `x` this process' part, `dims` being those that each axis of the mesh cuts."""
    from torch.distributed.tensor import Shard, distribute_tensor

    owner, _, name = path.rpartition(".")
    part = distribute_tensor(x.data, mesh, [Shard(dim) for dim in dims], src_data_rank=None)
    setattr(module.get_submodule(owner), name, nn.Parameter(part, requires_grad=x.requires_grad))


class Inward(torch.autograd.Function):
    """x as it is; its gradient is the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:  # pyrefly: ignore
        return _all_reduced(grads[0], ctx.group), None


class Outward(torch.autograd.Function):
    """The sum of x over the group; its gradient is as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:  # pyrefly: ignore
        return grads[0], None


def _all_reduced(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _outward(y: Any, group: Any) -> Any:
    """Of what a feed-forward network gives, beside which experts come with their routing."""
    return (Outward.apply(y[0], group), y[1]) if isinstance(y, tuple) else Outward.apply(y, group)


def _layers(model: RecurrentDepthTransformer) -> Iterator[Layer]:
    for layer in (*model.prelude_layers, *model.recurrent, *model.coda_layers):
        assert isinstance(layer, Layer) and isinstance(layer.mlp, FeedForward | MixtureOfExperts)
        yield layer
