"""What it costs that two processes train one model, beside the same processes that each train a model of their own on
as many rows: both cores are busy on either side, and what differs is what the processes say to each other.

python -m benchmarks processes, which starts torchrun.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.held import random_batch
from benchmarks.shapes import dense, mixture, training
from benchmarks.timing import paired
from ritornello.config import ModelConfig, ParallelConfig, TrainConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import parallel
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step

SIZE, N_LOOPS, LENGTH = 2, 8, 256
MODELS: dict[str, Callable[[], ModelConfig]] = {
    "S1": lambda: replace(mixture("S1", n_loops=N_LOOPS), ffn_dim=340, halting="none", read_out="last"),
    "S3": lambda: dense(n_loops=N_LOOPS),
}
LAYOUTS = {
    "FSDP2, looped layers put together once a step": ParallelConfig(shard=SIZE),
    "FSDP2, put together at every loop": ParallelConfig(shard=SIZE, gather="loop"),
    "replicated": ParallelConfig(replicate=SIZE),
    "tensor": ParallelConfig(tensor=SIZE),
    "expert": ParallelConfig(expert=SIZE),
    "context": ParallelConfig(context=SIZE),
}


def rows(shape: str, *, n: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(SIZE)]
        command += ["-m", "benchmarks.processes", shape, str(n), str(out)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        yield from json.loads(out.read_text())


def step(world: parallel.World, config: ParallelConfig, c: ModelConfig, how: TrainConfig) -> Callable[[], object]:
    """Train for one step with the others of `world`, or alone on this process' share of the rows."""
    n_rows = how.batch_size if world is not parallel.ALONE else how.batch_size // SIZE
    model = RecurrentDepthTransformer(c).train()
    world.shard(model, config, how.precision)
    optimizers, data = build_optimizers(model, how), random_batch(c, n_rows, LENGTH)

    def work() -> None:
        train_step(model, optimizers, data, train=how, step=1, world=world)
        dist.barrier()

    return work


def main() -> None:
    shape, n, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    found, c = [], MODELS[shape]()
    with parallel.world(ParallelConfig(), torch.device("cpu")) as everyone:
        for precision in ("fp32", "bf16"):
            how = replace(training(N_LOOPS, precision), batch_size=2 * SIZE, microbatch_size=0)
            for name, config in LAYOUTS.items():
                if config.expert > 1 and c.ffn != "moe":
                    continue
                with parallel.world(config, torch.device("cpu")) as world:
                    times = asdict(paired(step(world, config, c, how), step(parallel.ALONE, config, c, how), n=n))
                where = {"bench": "processes", "shape": shape, "attention": c.attention, "dtype": precision}
                found.append({**where, "metric": name, "peer_name": "each alone, half of the rows", **times})
        if everyone.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
