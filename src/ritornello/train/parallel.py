"""Processes that train one model together: who they are, what each reads, and what each holds.

Batches are global and a function of (seed, step), so nobody sends data: each process reads its rows and divides by what
the whole batch has. Gradients are then added up, never averaged, and every process ends up with the same step.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ritornello.config import ParallelConfig, require
from ritornello.model.rdt import RecurrentDepthTransformer

if TYPE_CHECKING:  # a second to import: one process alone does without
    from torch.distributed.device_mesh import DeviceMesh

REPLICATE, SHARD = "replicate", "shard"
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
PATIENCE = timedelta(minutes=30)  # with one that writes a checkpoint; one that died is noticed at once by its socket


@dataclass(frozen=True)
class World:
    """The processes of a run, this one being number `rank` of `size`. One alone is a world in which nothing is sent."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    mesh: "DeviceMesh | None" = None  # (replicate, shard)
    group: "dist.ProcessGroup | None" = None  # that sends; None: training's own

    def part(self, rows: slice) -> slice:
        """Of rows of the global batch, those that this process reads."""
        return self.parts(rows)[self.rank]

    def parts(self, rows: slice) -> list[slice]:
        """Of rows of the global batch, those of each process."""
        n, left = divmod(rows.stop - rows.start, self.size)
        assert not left, (rows, self.size)
        return [slice(start, start + n) for start in range(rows.start, rows.stop, n)]

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def rows(self, x: Tensor) -> Tensor:
        """(size, *x.shape): the `x` of every process."""
        found = x.new_zeros((self.size, *x.shape))
        found[self.rank] = x
        return self.total(found)

    def told(self, text: str) -> str:
        """What the first process says."""
        said = torch.tensor(list(text.encode() if self.rank == 0 else b""), dtype=torch.int64, device=self.device)
        heard = said.new_zeros(int(self.total(torch.tensor(len(said), device=self.device))))
        heard[: len(said)] = said
        return bytes(self.total(heard).tolist()).decode() if len(heard) else ""

    def any(self, said: bool) -> bool:
        """Whether it is so in any process: what all of them then do."""
        return said if self.size == 1 else bool(self.total(torch.tensor(int(said), device=self.device)))

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
            yield replace(self, device=torch.device("cpu"), mesh=None, group=group)
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

    def shard(self, model: RecurrentDepthTransformer, config: ParallelConfig) -> None:
        """Spread parameters, gradients and optimizer states over the processes of a group (FSDP2), a layer at a time.

        `gather` says how often the looped layers are put together: "step": once, and held until gradients are known;
        "loop": for each loop and again on the way back.
        """
        if self.mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        once = config.gather == "step"
        for layers in (model.prelude_layers, model.coda_layers):
            for layer in layers:
                fully_shard(layer, mesh=self.mesh)
        for layer in model.recurrent:
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=not once)
            layer.set_reshard_after_backward(not once)  # pyrefly: ignore
        fully_shard(model, mesh=self.mesh, ignored_params=set(replicated(model).values()))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def finish_gradients(self, model: RecurrentDepthTransformer) -> None:
        """After the backward pass: what every process holds whole is added up, what was put together is let go."""
        if self.mesh is None:
            return
        for parameter in replicated(model).values():
            if parameter.requires_grad and parameter.grad is not None:
                self.total(parameter.grad)
        for module in model.recurrent:
            module.reshard()  # pyrefly: ignore

    def share(self, module: nn.Module) -> None:
        """What every process holds whole of `module` becomes the first one's."""
        for parameter in module.parameters() if self.size > 1 else ():
            dist.broadcast(parameter.data, 0)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """The model's own parameters, vocabulary and head among them, are whole; layers are as they run."""
        if self.mesh is None:
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
def world(config: ParallelConfig, device: torch.device) -> Iterator[World]:
    """The processes that torchrun started; without it, this one alone.

    Raises:
        ValueError: another number of processes than the recipe's layout has, or no device for this one.
    """
    started = dist.is_initialized()  # by whoever calls
    size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", 1))
    shard = config.shard or max(1, size // config.replicate)
    remedy = "torchrun --nproc-per-node N starts N; shard = 0 takes all that are left"
    ok = config.replicate * shard == size
    require(ok, "parallel", f"{config.replicate} x {shard}", f"as many processes as there are ({size})", remedy)
    if size == 1:
        yield World(device=device)
        return
    device = _own(device)
    if not started:
        where: Any = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(BACKENDS[device.type], timeout=PATIENCE, **where)
    try:
        yield laid_out(config.replicate, shard, device)
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


def laid_out(replicate: int, shard: int, device: torch.device) -> World:
    """The processes of the group that has been started, as `replicate` groups of `shard`."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=(REPLICATE, SHARD))
    return World(dist.get_rank(), dist.get_world_size(), device, mesh)


def replicated(model: RecurrentDepthTransformer) -> dict[str, nn.Parameter]:
    """What is too small to spread: scalars, and the halting head, which is fitted apart from all else."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 0 or name.startswith("halting.")
    }


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, wherever they lie, to a norm of at most `max_norm`; returns the norm before."""
    trained = [p for p in parameters if p.grad is not None]
    parts = [[p for p in trained if is_spread(p) == spread] for spread in (True, False)]
    if not parts[0]:
        return torch.nn.utils.clip_grad_norm_(trained, max_norm)
    parts = [part for part in parts if part]
    gradients = ([p.grad for p in part if p.grad is not None] for part in parts)
    norm = torch.linalg.vector_norm(torch.stack([whole(torch.nn.utils.get_total_norm(some)) for some in gradients]))
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


def is_spread(x: Any) -> bool:
    """Whether this is a DTensor, of which each process holds a part."""
    return hasattr(x, "full_tensor")


def whole(x: Any) -> Any:
    """A tensor put together from all processes, which all have to ask; anything else as it is."""
    return x.full_tensor() if is_spread(x) else x


def gathered(state: Mapping[str, Any], *, keep: bool = True) -> dict[str, Any]:
    """Every tensor whole, one after the other, on the host where it was spread. keep: False where this process only
    helps the others."""
    found = {}
    for name, value in state.items():
        tensor = whole(value).cpu() if is_spread(value) else value
        if keep:
            found[name] = tensor
    return found
