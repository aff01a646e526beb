"""Checkpoints that several processes write and others read: what worker.py does with each number of processes."""

import errno
import itertools
import logging
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ritornello.config import ParallelConfig, Recipe
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, files, parallel, parts, stored
from ritornello.train.optim import build_optimizers
from ritornello.train.saver import Saver
from ritornello.train.step import train_step
from tests.train.small import batch, model_config, train_config

LAYOUTS = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]  # (replicate, shard)
OTHERS: Any = {"recipe": Recipe(), "tokenizer_json": "{}", "trainer_state": {}, "fingerprint": "f"}
AGREED = 30.0  # seconds in which all know that one failed


def cases(folder: Path) -> dict[str, Any]:
    """What the tests in test_dist.py look at; nothing but True and figures."""
    with parallel.world(ParallelConfig(), torch.device("cpu")) as everyone, everyone.apart() as apart:
        found: dict[str, Any] = {
            "any layout": any_layout(folder / "layouts", apart),
            "background": in_background(folder / "background", everyone, apart),
            "failures": failures(folder / "failures", everyone, apart),
            "kept": kept(folder / "kept", everyone, apart),
        }
    if everyone.size == 4:
        found["topologies"] = topologies(folder / "topologies")
    return found


class Run:
    """A model with its optimizers, as a layout has them. Weights and states are functions of their names and `seed`.

    Its looped layer only: those before and after have the same kinds of weights, and whole runs have them.
    """

    def __init__(self, world: parallel.World, config: ParallelConfig, *, seed: int = 0, **model: Any) -> None:
        self.world = world
        self.model = RecurrentDepthTransformer(model_config(n_prelude_layers=0, n_coda_layers=0, **model)).train()
        world.shard(self.model, config)
        self.train = train_config(batch_size=8, optimizer="muon")
        self.optimizers = build_optimizers(self.model, self.train)
        for _, _, parameter in checkpoint._owners(self.optimizers, self.model).values():
            muon = self.optimizers[1].state if parameter in self._moved_by_muon else None
            states = {"momentum_buffer"} if muon is not None else {"exp_avg", "exp_avg_sq"}
            owner = self.optimizers[muon is not None].state[parameter]
            owner |= {name: torch.zeros_like(parameter) for name in states}
            owner |= {"step": torch.zeros(())} if muon is None else {}
        for name, x in self.state().items():
            local(x).copy_(local(like(filled(name, x, seed), x)))

    @property
    def _moved_by_muon(self) -> set[Tensor]:
        return {p for group in self.optimizers[1].param_groups for p in group["params"]}

    def states(self) -> dict[str, dict[str, Any]]:
        optimizer_state = checkpoint.flatten_optimizers(self.optimizers, self.model)
        return {"model_state": self.model.state_dict(), "optimizer_state": optimizer_state}

    def state(self) -> dict[str, Tensor]:
        """Every tensor, by one name."""
        return {f"{kind}/{name}": x.detach() for kind, table in self.states().items() for name, x in table.items()}

    def mine(self) -> dict[str, Tensor]:
        """A copy of what this process holds."""
        return {name: local(x).clone() for name, x in self.state().items()}

    def is_filled(self, seed: int) -> bool:
        """Whether all of it, in all processes, is what `seed` makes: bit for bit."""
        state = self.state()
        expected = {name: local(like(filled(name, x, seed), x)) for name, x in state.items()}
        return not self.world.any(not same(self.mine(), expected))

    def step(self, step: int = 0) -> None:
        train_step(self.model, self.optimizers, batch(n=8, seed=step), train=self.train, step=step, world=self.world)

    def restore(self, run_dir: Path) -> None:
        """As a trainer does."""
        found = checkpoint.newest(run_dir, self.world)
        assert found is not None
        read, _ = checkpoint.training_state(found, checkpoint.optimizer_layout(self.optimizers, self.model))
        self.model.load_state_dict(found.model.read(self.model.state_dict().get))
        checkpoint.restore_optimizers(self.optimizers, self.model, read)


def filled(name: str, x: Tensor, seed: int) -> Tensor:
    """All of the tensor `name` of a run."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.randn(x.shape, generator=random).abs().to(x.dtype)


def like(whole: Tensor, x: Tensor) -> Tensor:
    """The part of a tensor that every process has which belongs beside `x`."""
    if not isinstance(x, DTensor):
        return whole
    return distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    assert a.keys() == b.keys()
    pairs = [(x.contiguous().view(-1), b[name].contiguous().view(-1)) for name, x in a.items()]
    return all(x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def save(run_dir: Path, run: Run, apart: parallel.World, *, step: int = 1, keep: int = 2) -> None:
    with Saver(run_dir, keep=keep, background=False, world=apart) as saver:
        saver.save(step=step, **run.states(), **OTHERS)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of all that is read meanwhile."""
    n_bytes: list[int] = []
    numbers = stored.Stored._numbers

    def counting(*arguments: Any) -> Tensor:
        found = numbers(*arguments)
        n_bytes.append(found.nbytes)
        return found

    with mock.patch.object(stored.Stored, "_numbers", counting):
        yield n_bytes


def part_of(size: int, layout: tuple[int, int]) -> parallel.World | None:
    """The first processes of all, as a world of `size`; None in the others. All have to ask."""
    group = dist.new_group(list(range(size)), backend="gloo")
    mesh = DeviceMesh("cpu", torch.arange(size).view(layout), mesh_dim_names=("replicate", "shard"))
    rank = dist.get_rank()
    meshes = parallel.Meshes(mesh, mesh, mesh, mesh) if size > 1 else None
    return parallel.World(rank, size, meshes=meshes, group=group) if rank < size else None  # type: ignore[arg-type]


def topologies(folder: Path) -> dict[str, Any]:
    """Saved in each layout and read in each: whether that is bit-equal, whether it would be to another, and what each
    process read and holds, in bytes."""
    found: dict[str, Any] = {}
    worlds = {layout: part_of(layout[0] * layout[1], layout) for layout in LAYOUTS}
    runs = {
        layout: Run(world, ParallelConfig(replicate=layout[0], shard=layout[1]), seed=seed, halting="gate")
        for seed, (layout, world) in enumerate(worlds.items())
        if world is not None
    }
    for layout, run in runs.items():
        save(folder / f"{layout}", run, run.world)
    dist.barrier()
    for layout, run in runs.items():
        for seed, other in enumerate(LAYOUTS):
            with counted() as n_bytes:
                run.restore(folder / f"{other}")
            held = sum(x.nbytes for x in run.mine().values())
            read = run.world.rows(torch.tensor([sum(n_bytes), held])).tolist()
            found["{}x{} by {}x{}".format(*other, *layout)] = run.is_filled(seed), run.is_filled(seed + 1), read
    dist.barrier()
    return found


def placements(mesh: DeviceMesh) -> Iterator[list[Placement]]:
    """Of a tensor of two dims: every way that a mesh of two dims has, dealt out in turns too."""
    kinds = [Replicate(), Shard(0), Shard(1), *(_StridedShard(dim, split_factor=n) for dim in (0, 1) for n in (2, 3))]
    yield from map(list, itertools.product(kinds, repeat=mesh.ndim))


def any_layout(folder: Path, apart: parallel.World) -> dict[str, Any]:
    """A tensor in every layout on a mesh of two dims, uneven, as some of a state's; read back in another one. And what
    tensor parallelism and FSDP2 make of a layer together; and a tensor on a part of the mesh only."""
    size = apart.size
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("a", "b"))
    hows = list(placements(mesh))
    full = {f"{i}": torch.randn(7, 5).bfloat16() if i % 2 else torch.randn(7, 5) for i in range(len(hows))}
    layer = nn.Linear(6, 10, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh["b"], [Shard(0)]))
    fully_shard(layer, mesh=mesh["a"])
    weight = layer.weight
    assert isinstance(weight, DTensor) and isinstance(weight.placements[0], _StridedShard)
    full["tensor parallel, sharded"] = weight.full_tensor().detach()
    full["of one dim"], full["scalar"], full["whole"] = torch.randn(9), torch.randn(()), torch.randn(3, 2)
    for x in full.values():
        dist.broadcast(x, 0)
    spread: Any = partial(distribute_tensor, src_data_rank=None)  # from left to right; every process has the whole
    given: dict[str, Any] = {f"{i}": spread(full[f"{i}"], mesh, how) for i, how in enumerate(hows)}
    given["tensor parallel, sharded"] = weight
    given["of one dim"] = spread(full["of one dim"], mesh["b"], [Shard(0)])  # held in other rows of the mesh too
    given["scalar"], given["whole"] = spread(full["scalar"], mesh, [Replicate(), Replicate()]), full["whole"]
    with Saver(folder, keep=2, background=False, world=apart) as saver:
        saver.save(step=1, model_state=given, optimizer_state={"n": 3}, **OTHERS)
    found = checkpoint.newest(folder, apart)
    assert found is not None
    layouts = given | {f"{i}": spread(torch.zeros(7, 5), mesh, how) for i, how in enumerate([*hows[1:], hows[0]])}
    read = found.model.read(layouts.get)
    expected = {name: local(like(full[name], layouts[name])) for name in read}
    names = found.manifest.of("model")
    heads = [8 + int.from_bytes((found.directory / name).read_bytes()[:8], "little") for name in names]
    sizes = [found.manifest.files[name].size - head for name, head in zip(names, heads, strict=True)]
    return {
        "whole": same(found.model_state, full),
        "control": same(found.model_state, full | {"whole": full["whole"] + 1}),
        "in other layouts": not apart.any(not same({name: local(x) for name, x in read.items()}, expected)),
        "parts of one tensor": max(len(list(parts.held(x))) for x in given.values()),
        "bytes": [sum(x.nbytes for x in full.values()), *sizes],
    }


def in_background(folder: Path, world: parallel.World, apart: parallel.World) -> dict[str, Any]:
    """Training goes on, and changes every weight, before a byte is written."""
    run, gate, write = Run(world, ParallelConfig()), Event(), checkpoint.written

    def waiting(*arguments: Any) -> Any:
        assert gate.wait(60)
        return write(*arguments)

    with mock.patch.object(checkpoint, "written", waiting), Saver(folder, keep=2, world=apart) as saver:
        saver.save(step=1, **run.states(), **OTHERS)
        run.step(1)
        early = saver.newest is None and not list(folder.rglob("manifest.json"))
        gate.set()
        run.step(2)
        saver.wait()
    control = run.is_filled(0)
    run.restore(folder)
    return {"early": early, "equal": run.is_filled(0), "control": control}


def failures(folder: Path, world: parallel.World, apart: parallel.World) -> dict[str, Any]:
    """One process fails, the last or the first, at each stage, at once or on a thread: what each of them raised after
    how many seconds, and whether what was there is all that is there."""
    run, spare, found = Run(world, ParallelConfig(), seed=1), Run(world, ParallelConfig(), seed=2), {}
    save(folder, run, apart)
    stages = {"space": (files, "require_space"), "write": (checkpoint, "written"), "publish": (files, "publish")}
    for (stage, (module, name)), background in itertools.product(stages.items(), (False, True)):
        rank = 0 if stage == "publish" else apart.size - 1
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "where")
        side: Any = {"side_effect": full} if apart.rank == rank else {"wraps": getattr(module, name)}
        raised: Exception | None = None
        start = time.monotonic()
        with mock.patch.object(module, name, **side):
            try:
                with Saver(folder, keep=2, background=background, world=apart) as saver:
                    saver.save(step=2, **spare.states(), **OTHERS)
            except (OSError, ValueError) as error:
                raised = error
        seconds = time.monotonic() - start
        told = isinstance(raised, OSError) if apart.rank == rank else "another process failed" in str(raised)
        dist.barrier()  # the first one removes what is temporary
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        ok = told and seconds < AGREED and left == ["step_000001"]
        found[f"{stage}, {'in the background' if background else 'at once'}"] = not apart.any(not ok)
    spare.restore(folder)
    found["intact"] = spare.is_filled(1)
    save(folder, run, apart, step=2)
    found["afterwards"] = not apart.any(not (folder / "checkpoints" / "step_000002" / "manifest.json").exists())
    return found


def kept(folder: Path, world: parallel.World, apart: parallel.World) -> dict[str, Any]:
    """Four steps are saved and two kept; of the newest, one process' file is damaged, then one is missing."""
    run, found = Run(world, ParallelConfig()), {}
    for step in (2, 3, 4):
        save(folder, run, apart, step=step)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    found["names"] = names == ["step_000003", "step_000004"]
    path = folder / "checkpoints" / "step_000004" / checkpoint.shard("model", apart.size - 1)
    logger = logging.getLogger("ritornello")
    for damage in ("changed", "missing"):
        dist.barrier()
        if apart.rank == 0:
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])) if damage == "changed" else path.unlink()
        dist.barrier()
        with mock.patch.object(logger, "warning") as warned:
            newest = checkpoint.newest(folder, world)
        named = any(str(path) in str(call) for call in warned.call_args_list)
        step = newest.manifest.step if newest else None
        found[damage] = not apart.any(step != 3) and apart.any(named)
    dist.barrier()
    for step in (5, 6):
        save(folder, run, apart, step=step)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    found["the damaged one"] = names == ["step_000005", "step_000006"]
    return found
