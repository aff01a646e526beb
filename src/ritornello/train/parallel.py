"""Processes that train one model together: who they are, what each reads, and what each holds.

Batches are global and a function of (seed, step), so nobody sends data: each process reads its rows and divides by what
the whole batch has. Gradients are then added up, never averaged, and every process ends up with the same step.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ritornello.config import ParallelConfig, Precision, require
from ritornello.model.moe import Router
from ritornello.model.norm import RMSNorm
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.linear import local
from ritornello.train import context_parallel, expert_parallel, pipeline, tensor_parallel

if TYPE_CHECKING:  # a second to import: one process alone does without
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
PATIENCE = timedelta(minutes=30)  # with one that writes a checkpoint; one that died is noticed at once by its socket


@dataclass(frozen=True)
class World:
    """The processes of a run, this one being number `rank` of `size`. One alone is a world in which nothing is sent."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    n_stages: int = 1  # of the pipeline, that read the same tokens
    n_context: int = 1  # processes that share out the tokens of the same rows
    n_tensor: int = 1  # processes, next to each other, that read the same tokens
    meshes: "Meshes | None" = None
    ring: pipeline.Stage | None = None

    @property
    def n_peers(self) -> int:
        """Processes of each stage."""
        return self.size // self.n_stages

    @property
    def n_readers(self) -> int:
        """Among how many processes, or groups of those that read the same rows, these are dealt out."""
        return self.n_peers // (self.n_context * self.n_tensor)

    group: "dist.ProcessGroup | None" = None  # that sends; None: training's own

    def part(self, rows: slice) -> slice:
        """Of rows of the global batch, those that this process reads."""
        return self.parts(rows)[self.rank % self.n_peers // (self.n_context * self.n_tensor)]

    def parts(self, rows: slice) -> list[slice]:
        """Of rows of the global batch, those of each reader."""
        n, left = divmod(rows.stop - rows.start, self.n_readers)
        assert not left, (rows, self.n_readers)
        return [slice(start, start + n) for start in range(rows.start, rows.stop, n)]

    def total(self, x: Tensor, *, stage: bool = False) -> Tensor:
        """The sum over all that read different tokens, in place; stage: of this stage only."""
        if self.meshes is not None:
            group = self.meshes.stages["stage"].get_group() if stage else None
            # those that compute layers together have the same
            dist.all_reduce(x.zero_() if self.rank % self.n_tensor else x, group=group)
        return x

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    @contextmanager
    def tokens_shared(self, model: RecurrentDepthTransformer, length: int) -> Iterator[context_parallel.Pieces]:
        """Rows of `length` tokens are shared out: which of them this process gives the model, within."""
        pieces = context_parallel.Pieces(length, self.n_context, self.rank // self.n_tensor % self.n_context)
        group = None if self.meshes is None else self.meshes.readers["context"].get_group()
        with context_parallel.shared(model, pieces, group):
            yield pieces

    def rows(self, x: Tensor) -> Tensor:
        """(size, *x.shape): the `x` of every process."""
        found = x.new_zeros((self.size, *x.shape))
        found[self.rank] = x
        return self.summed(found)

    def told(self, text: str) -> str:
        """What the first process says."""
        said = torch.tensor(list(text.encode() if self.rank == 0 else b""), dtype=torch.int64, device=self.device)
        heard = said.new_zeros(int(self.summed(torch.tensor(len(said), device=self.device))))
        heard[: len(said)] = said
        return bytes(self.summed(heard).tolist()).decode() if len(heard) else ""

    def any(self, said: bool) -> bool:
        """Whether it is so in any process: what all of them then do."""
        return bool(self.summed(torch.tensor(int(said), device=self.device)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What each process does for itself: all of them fail, once all are done, where one fails.

        Raises:
            ValueError: in those that did not fail, where another one raised what it says itself.
        """
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised again, once the others know
            failed = error
        if self.any(failed is not None) and failed is None:
            raise ValueError("another process failed: its own message says how")
        if failed is not None:
            raise failed

    @contextmanager
    def first(self) -> Iterator[bool]:
        """What the first process does for all, which wait for it: whether this is it. All fail where it fails."""
        with self.together():
            yield self.rank == 0

    @contextmanager
    def apart(self) -> Iterator["World"]:
        """The same processes, in a group of their own on the host: for a thread that runs beside training."""
        if self.size == 1:
            yield replace(self, device=torch.device("cpu"))
            return
        group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield World(self.rank, self.size, group=group)
        finally:
            dist.destroy_process_group(group)

    def same(self, what: str, *numbers: int) -> None:
        """Raises ValueError if these numbers are others in another process."""
        if self.size == 1:
            return
        mine = torch.tensor(numbers, device=self.device)
        least, most = mine.clone(), mine.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        require(torch.equal(least, most), what, list(numbers), "the same in every process", "do all see the same disk?")

    def shard(self, model: RecurrentDepthTransformer, config: ParallelConfig, precision: Precision = "fp32") -> None:
        """Spread layers over processes that read the same, experts over some that don't, and then what each has of
        parameters, gradients and optimizer states over all others (FSDP2), a layer at a time.

        `gather` says how often the looped layers are put together: "step": once, and held until gradients are known;
        "loop": for each loop and again on the way back. bf16: matrices of layers are put together in bfloat16, since
        autocast keeps no copies of views, as FSDP2's whole weights are; norms and routers stay in float32.
        """
        if self.meshes is None:
            return
        from torch.distributed.fsdp import FSDPModule

        layers, experts = self.meshes.layers, self.meshes.experts
        if self.ring is not None:
            pipeline.divide(model, self.ring)
        if self.n_tensor > 1:
            tensor_parallel.spread(model, layers["tensor"])
        if self.n_tensor > 1 or config.expert > 1:
            expert_parallel.spread(model, experts["expert", "tensor"])
        mesh, once = layers["replicate", "shard"], config.gather == "step"
        for layer in (*model.prelude_layers, *model.coda_layers):
            _shard_layer(layer, mesh, precision)
        for layer in model.recurrent:
            if config.expert > 1:
                _shard(layer.mlp.experts, experts["replicate", "shard"], precision, once=once)  # pyrefly: ignore
            _shard_layer(layer, mesh, precision, once=once)
        _shard(model, mesh, ignored_params=set(replicated(model).values()))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        if isinstance(self.ring, pipeline.Conductor):
            self.ring.lead(model)  # last: its hook is then behind FSDP2's own

    def finish_gradients(self, model: RecurrentDepthTransformer) -> None:
        """After the backward pass: what was put together is let go, what is held whole by several is added up."""
        if self.meshes is None:
            return
        for module in model.recurrent.modules():  # first: until then parameters are those that were put together
            if hasattr(module, "reshard"):
                module.reshard()  # pyrefly: ignore
        for parameter in replicated(model).values():
            if parameter.requires_grad and parameter.grad is not None:
                self.total(parameter.grad, stage=True)
        if self.n_tensor > 1:
            group = self.meshes.layers["tensor"].get_group()
            for parameter in tensor_parallel.partial(model):
                if parameter.grad is not None:
                    dist.all_reduce(local(parameter.grad), group=group)
        if self.ring is not None:
            for parameter in pipeline.everywhere(model).values():
                if parameter.requires_grad and parameter.grad is not None:
                    dist.all_reduce(local(parameter.grad), group=self.ring.group)
            self.ring.finish()

    def share(self, module: nn.Module) -> None:
        """What every process of the first stage holds whole of `module` becomes the first one's."""
        if self.meshes is not None:
            group = self.meshes.stages["stage"].get_group()
            for parameter in module.parameters():
                dist.broadcast(parameter.data, 0, group=group)

    def led(self, model: RecurrentDepthTransformer, work: Callable[[], T]) -> T | None:
        """What `work`, which runs the model, gives where the first stage does it; the others serve, and have None."""
        if self.ring is None:
            return work()
        try:
            return self.ring.led(model, work)
        finally:
            self.ring.finish()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """The model's own parameters, vocabulary and head among them, are whole; layers are as they run."""
        if self.meshes is None:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(model, FSDPModule)
        model.unshard()
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


ALONE = World()


@contextmanager
def world(config: ParallelConfig, device: torch.device, store: Any = None) -> Iterator[World]:
    """The processes that torchrun started; without it, this one alone. store: where they meet; None: torchrun's.

    Raises:
        ValueError: another number of processes than the recipe's layout has, or no device for this one.
    """
    started = dist.is_initialized()  # by whoever calls
    size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", 1))
    config = laid_out(config, size)
    if size == 1:
        yield World(device=device)
        return
    device = _own(device)
    if not started:
        where: Any = {"device_id": device} if device.type == "cuda" else {}
        if store is not None:
            store.set_timeout(PATIENCE)
            where |= {"store": store, "rank": int(os.environ["RANK"]), "world_size": size}
        dist.init_process_group(BACKENDS[device.type], timeout=PATIENCE, **where)
    try:
        cut = meshes(config, device)
        how = (config.pipeline, config.context, config.tensor, cut)
        yield World(dist.get_rank(), size, device, *how, None if config.pipeline == 1 else _ring(cut, device))
    finally:
        if not started:
            dist.destroy_process_group()


def _own(device: torch.device) -> torch.device:
    """Of one kind of device, that of this process."""
    require(device.type in BACKENDS, "device", device.type, "cpu or cuda with several processes")
    if device.type == "cpu":
        return device
    require(device.index is None, "device", str(device), "cuda, without an index, with several processes")
    index, n_devices = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    ok = index is not None and index.isdecimal() and int(index) < n_devices
    require(ok, "LOCAL_RANK", index, f"a device's index, 0 to {n_devices - 1}", "torchrun sets it")
    found = torch.device("cuda", int(index or 0))
    torch.cuda.set_device(found)
    return found


def laid_out(config: ParallelConfig, size: int) -> ParallelConfig:
    """The layout of `size` processes, with `shard` put in where it takes all that are left."""
    others = config.pipeline * config.replicate * config.context * config.tensor
    shard = config.shard or max(1, size // others)
    remedy = "torchrun --nproc-per-node N starts N; shard = 0 takes all that are left"
    product = f"{config.pipeline} x {config.replicate} x {shard} x {config.context} x {config.tensor}"
    name, wanted = (
        "parallel.pipeline x replicate x shard x context x tensor",
        f"as many processes as there are ({size})",
    )
    require(shard * others == size, name, product, wanted, remedy)
    ok = shard * config.context % config.expert == 0
    require(ok, "parallel.expert", config.expert, f"a divisor of shard x context ({shard * config.context})")
    return replace(config, shard=shard)


@dataclass(frozen=True)
class Meshes:
    """The same processes cut in several ways: as the layers are spread, (replicate, shard, tensor), where those that
    share out tokens are in one shard group; as routed experts are, (replicate, shard, expert, tensor); and as batches
    are read, (rows, context, tensor). Each within its stage of the pipeline; stages: (pipeline, stage)."""

    layers: "DeviceMesh"
    experts: "DeviceMesh"
    readers: "DeviceMesh"
    stages: "DeviceMesh"


def meshes(config: ParallelConfig, device: torch.device) -> Meshes:
    """Of the group that has been started; `config` as `laid_out` gives it."""
    from torch.distributed.device_mesh import init_device_mesh

    # one mesh cut in two ways: FSDP2 asks that its mesh and that of what was spread before it have one origin
    everyone = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("world",))
    shard = config.shard * config.context
    n = config.pipeline
    layers = (n, config.replicate, shard, config.tensor)
    experts = (n, config.replicate, shard // config.expert, config.expert, config.tensor)
    readers = (n, config.replicate * config.shard, config.context, config.tensor)
    return Meshes(
        everyone._unflatten(0, layers, ("pipeline", "replicate", "shard", "tensor")),
        everyone._unflatten(0, experts, ("pipeline", "replicate", "shard", "expert", "tensor")),
        everyone._unflatten(0, readers, ("pipeline", "rows", "context", "tensor")),
        everyone._unflatten(0, (n, dist.get_world_size() // n), ("pipeline", "stage")),
    )


def _ring(cut: Meshes, device: torch.device) -> pipeline.Stage:
    """The stages that this process hands states to and gets them from.

    Every process asks for every group, in one order: torch counts them to name them, and nccl splits what all have.
    """
    group = cut.stages["pipeline"].get_group()
    stage, n = dist.get_rank(group), dist.get_world_size(group)
    ways = sorted({(i, (i + way) % n) for i in range(n) for way in (1, -1)})
    control, hops = group, {}
    for ranks in cut.stages.mesh.T.tolist():
        own = dist.get_rank() in ranks
        if device.type != "cpu":
            found = dist.new_group(ranks, backend="gloo", timeout=PATIENCE)
            control = found if own else control
        for way in ways:
            found = dist.new_group([ranks[i] for i in way], timeout=PATIENCE)
            hops |= {way: found} if own and stage in way else {}
    return (pipeline.Stage if stage else pipeline.Conductor)(group, control, device, stage, n, hops)


def _shard_layer(layer: nn.Module, mesh: "DeviceMesh", precision: Precision, *, once: bool = False) -> None:
    """In bf16, two groups: that of the matrices, and that of what is float32 always."""
    if precision == "bf16":
        _shard([each for each in layer.modules() if isinstance(each, RMSNorm | Router)], mesh, once=once)
    _shard(layer, mesh, precision, once=once)


def _shard(
    modules: Any,
    mesh: "DeviceMesh",
    precision: Precision = "fp32",
    *,
    once: bool | None = None,
    **how: Any,
) -> None:
    """One FSDP2 group, of a module or a list. once: put together once a step, and held; None: as what is outermost."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low, full = (torch.bfloat16, torch.float32) if precision == "bf16" else (None, None)
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=full, cast_forward_inputs=False)
    fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=None if once is None else not once, **how)
    for module in modules if isinstance(modules, list) else [modules]:
        module.set_reshard_after_backward(not once, recurse=False)


def replicated(model: RecurrentDepthTransformer) -> dict[str, nn.Parameter]:
    """What is too small to spread: scalars, and the halting head, which is fitted apart from all else."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 0 or name.startswith("halting.")
    }


@torch.no_grad()
def clip_gradients(model: RecurrentDepthTransformer, max_norm: float, world: World = ALONE) -> Tensor:
    """Scale all gradients, wherever they lie, to a norm of at most `max_norm`; returns the norm before."""
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    if world.meshes is None:
        return torch.nn.utils.clip_grad_norm_(trained.values(), max_norm)
    gradients: list[Any] = [p.grad for p in trained.values()]
    everywhere = pipeline.everywhere(model)
    holders = [world.size if name in everywhere else world.n_peers for name in trained]
    counted = [n_parts(x) / n for x, n in zip(gradients, holders, strict=True)]  # of each number once
    shares = torch.tensor(counted, device=world.device)
    norms = torch.stack(torch._foreach_norm([local(x) for x in gradients]))
    total = (norms.square() * shares.to(norms.dtype)).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    torch._foreach_mul_([local(x) for x in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def is_spread(x: Any) -> bool:
    """Whether this is a DTensor, of which each process holds a part."""
    return hasattr(x, "full_tensor")


def n_parts(x: Any) -> int:
    """Over how many processes a tensor is spread, those that hold the same part counting as one."""
    if not is_spread(x):
        return 1
    sizes = zip(x.placements, x.device_mesh.shape, strict=True)
    return math.prod(n for placement, n in sizes if not placement.is_replicate())


def whole(x: Any) -> Any:
    """A tensor put together from all processes, which all have to ask; anything else as it is."""
    return x.full_tensor() if is_spread(x) else x


def gathered(state: Mapping[str, Any], *, keep: bool = True) -> dict[str, Any]:
    """Every tensor whole, one after the other, on the host where it was spread. keep: False where this process only
    helps the others."""
    found = {}
    for name in sorted(state):  # a state that was read may have another order in every process
        value = state[name]
        tensor = whole(value).cpu() if is_spread(value) else value
        if keep:
            found[name] = tensor
    return found
