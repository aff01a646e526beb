"""What each of several processes does: all cases of one world size in one launch, for a launch takes seconds.

python -m torch.distributed.run --nproc-per-node N -m tests.distributed.worker RESULTS FOLDER
"""

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ritornello import recipes
from ritornello.config import Gather, ParallelConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import parallel
from ritornello.train.optim import build_optimizers
from ritornello.train.step import Plan, accumulate, train_step
from ritornello.train.trainer import train
from tests.distributed import checkpoints
from tests.train.small import batch, model_config, train_config

HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 4}
PLAIN: dict[str, Any] = {"lora_rank": 0, "loop_embedding": False, "ffn": "dense"}
READING: dict[str, Any] = {"qk_norm": True, "read_matrix": True}
STEPS = 50
KINDS: dict[str, dict[str, Any]] = {
    "experts, tied": {"halting": "none"},
    "gate, untied": {"halting": "gate", "tie_embeddings": False, "qk_bias": True},
    "act": {"halting": "act"},
    "plain": {"halting": "none", "n_prelude_layers": 2, "n_recurrent_layers": 0, "n_coda_layers": 0} | PLAIN,
    "streams, mla": {"halting": "kl", "carry_streams": 2, "attention": "mla"},
    "idle experts": {"halting": "none", "n_experts": 64},
    "dense": {"halting": "none", "ffn": "dense"},
    "values": {"halting": "none", "ffn": "dense", "activation": "relu2", "value_embeddings": (0, 1), **READING},
}
LONG = ("experts, tied", "act")
FEW = ("experts, tied", "streams, mla")  # of those that several ways together try
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # of training, and the kind of model
    "micro-batches, cut off": ("experts, tied", {"microbatch_size": 4, "backprop_loops": 2}),
    "recomputed": ("experts, tied", {"checkpoint_activations": True}),
    "expected": ("gate, untied", {"halting_loss": "expected"}),
}


Trained = tuple[list[dict[str, float]], dict[str, Tensor]]


def both(world: parallel.World, config: ParallelConfig, kind: str, **how: Any) -> tuple[Trained, Trained]:
    """What all processes together make of some steps, and what one makes of them."""
    return trained(world, config, kind, **how), alone(kind, config.pipeline, **how)


@cache
def alone(kind: str, n_stages: int, **how: Any) -> Trained:
    """Once for all processes, which ask for the same in the same order: each in turn trains, and tells the others."""
    whose = alone.cache_info().currsize % dist.get_world_size()
    mine = dist.get_rank() == whose
    found = [trained(parallel.ALONE, ParallelConfig(pipeline=n_stages), kind, **how) if mine else None]
    dist.broadcast_object_list(found, src=whose)
    assert found[0] is not None
    return found[0]


def trained(
    world: parallel.World, config: ParallelConfig, kind: str, *, steps: int, packed: bool, **settings: Any
) -> Trained:
    """Metrics by step, and the whole state after the last."""
    more = {"n_recurrent_layers": config.pipeline} if config.pipeline > 1 else {}
    model = RecurrentDepthTransformer(model_config(**HEADS | KINDS[kind] | more)).double().train()
    config_of_training = train_config(
        steps=STEPS, batch_size=8, balance_weight=1e-2, depth="uniform", min_loops=1, **settings
    )
    world.shard(model, config)
    optimizers = build_optimizers(model, config_of_training)
    seen = []
    for step in range(steps):
        found = train_step(
            model,
            optimizers,
            batch(n=8, length=16, packed=packed, seed=step),
            train=config_of_training,
            step=step,
            world=world,
        )
        seen.append({name: float(value) for name, value in found.items()})
    state = parallel.gathered(model.state_dict())
    return seen, {name: value.clone() for name, value in state.items()}


def difference(ours: dict[str, Tensor], alone: dict[str, Tensor]) -> float:
    """The largest, by parameter relative to its own largest number, or .1; each stage of a pipeline has its own."""
    assert ours.keys() <= alone.keys()
    own = {name: alone[name] for name in ours}
    found = max(float((ours[name] - x).abs().max() / x.abs().max().clamp(min=0.1)) for name, x in own.items())
    largest = torch.tensor([found, *(float(name not in ours) for name in alone)])
    dist.all_reduce(largest[0], dist.ReduceOp.MAX)
    dist.all_reduce(missing := largest[1:].clone(), dist.ReduceOp.MIN)
    assert not missing.any(), "a parameter that nobody has"
    return float(largest[0])


Case = tuple[str, str, int, dict[str, Any]]  # name, kind of model, steps, settings of training


def cases(config: ParallelConfig, size: int) -> list[Case]:
    """What a layout is tried with: all kinds where it is one way of sharing the work, a few where it is several."""
    single, found = size == 2, []
    if single and config.gather == "step" and config.replicate == 1:
        long = LONG if config == ParallelConfig(shard=2) else LONG[:1]
        found += [(f"{kind}, {STEPS}", kind, STEPS, {}) for kind in long]
    left_out = {"plain"} if config.pipeline > 1 else {"plain", "dense"} if config.expert > 1 else set()
    left_out |= {"values"} if max(config.pipeline, config.expert, config.tensor) > 1 else set()
    kinds = [kind for kind in KINDS if kind not in left_out]
    found += [(kind, kind, 1, {}) for kind in (kinds if single else FEW)]
    found += [(name, kind, 1, settings) for name, (kind, settings) in SETTINGS.items() if single]
    if config.pipeline > 1:  # more than are on their way together
        all_at_once = {"microbatch_size": 2, "backprop_loops": 2, "checkpoint_activations": True}
        found.append(("many micro-batches", "experts, tied", 1, all_at_once))
    return found


def equality(world: parallel.World, config: ParallelConfig) -> dict[str, Any]:
    """By kind and number of steps: how far metrics and parameters are from one process' own."""
    found = {}
    for name, kind, steps, settings in cases(config, world.size):
        how: Any = {"steps": steps, "packed": kind != "plain"}  # packed: some rows have fewer tokens than others
        ours, theirs = both(world, config, kind, **how, **settings)
        assert ours[0][0].keys() == theirs[0][0].keys()
        metrics = max(
            abs(a[each] - b[each]) / max(abs(b[each]), 1e-3)
            for a, b in zip(ours[0], theirs[0], strict=True)
            for each in b
        )
        found[name] = metrics, difference(ours[1], theirs[1])
    return found


def muon(world: parallel.World, config: ParallelConfig) -> dict[str, float]:
    """By parameter that Muon moves, how far a step is from one process' own, as a share of its length."""
    how: Any = {"packed": True, "optimizer": "muon", "muon_lr": 0.02}
    kind, before = (
        "experts, tied",
        RecurrentDepthTransformer(model_config(**HEADS | KINDS["experts, tied"])).double().state_dict(),
    )
    (_, ours), (_, alone) = both(world, config, kind, steps=1, **how)
    names = [name for name, x in alone.items() if name.endswith("proj.weight")]
    return {name: float((ours[name] - alone[name]).norm() / (alone[name] - before[name]).norm()) for name in names}


def lowered(world: parallel.World, config: ParallelConfig) -> float:
    """The least cosine of a matrix' gradient in bfloat16 with one process' in float32, some loops having none."""

    def gradients(where: parallel.World, how: ParallelConfig, **settings: Any) -> dict[str, Tensor]:
        kind: Any = HEADS | KINDS["experts, tied"] | {"n_recurrent_layers": config.pipeline}
        model = RecurrentDepthTransformer(model_config(**kind)).train()
        given = train_config(batch_size=8, microbatch_size=4, backprop_loops=2, **settings)
        where.shard(model, how, given.precision)
        accumulate(model, Plan.of(batch(n=8, length=16), given, 0), given, where)
        where.finish_gradients(model)
        return {name: parallel.whole(p.grad).flatten() for name, p in model.named_parameters() if p.ndim > 1}

    alone = gradients(parallel.ALONE, ParallelConfig())
    ours = gradients(world, config, precision="bf16")
    again = gradients(world, config, precision="bf16", checkpoint_activations=True)
    assert all(torch.equal(x, again[name]) for name, x in ours.items())
    found = [torch.cosine_similarity(x, alone[name], 0) for name, x in ours.items() if alone[name].any()]
    assert len(found) > 8
    least = torch.stack(found).min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)


def gathers(world: parallel.World, gather: Gather) -> dict[str, dict[str, int]]:
    """How often a step puts weights together, and adds gradients up, by number of loops."""
    found = {}
    for loops in (4, 8):
        train = train_config(batch_size=8, depth="fixed", mean_loops=loops, max_loops=8)
        model = RecurrentDepthTransformer(model_config(halting="none")).train()
        world.shard(model, ParallelConfig(gather=gather))
        optimizers = build_optimizers(model, train)
        with ExitStack() as stack:
            names = ("all_gather_single", "reduce_scatter_single")
            counted = {
                name: stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name))) for name in names
            }
            train_step(model, optimizers, batch(n=8), train=train, step=0, world=world)
            found[str(loops)] = {name: calls.call_count for name, calls in counted.items()}
    return found


def whole_run(folder: Path) -> None:
    """A run of all processes; one that goes on where one process stopped; half a run for one process to go on with."""
    given = recipes.read_json(folder / "recipe.json")
    short = replace(given, train=replace(given.train, steps=given.train.steps // 2))
    around = replace(given, parallel=ParallelConfig(pipeline=2))
    train(given, out=folder / "together", cache_dir=folder)
    train(around, out=folder / "alone first", cache_dir=folder, resume=True)
    if dist.get_world_size() == 2:
        train(short, out=folder / "together first", cache_dir=folder)
    else:
        train(replace(around, train=short.train), out=folder / "pipeline first", cache_dir=folder)


def _kept(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
    return grads[0], None


def _zeros(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    return x.new_zeros(sum(received), *x.shape[1:])


def _lost(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
    x = ctx.ring.fetch(torch.empty_like(ctx.like, device="cpu"), 1)
    return grads[0], x * 0, None


def _unsummed(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
    return grads[0][:, ctx.pieces.mine], None, None


SABOTAGE: dict[str, tuple[ParallelConfig, str, Any]] = {  # a layout, and what does not happen in it
    "weights held whole": (ParallelConfig(tensor=2), "tensor_parallel.partial", lambda model: ()),
    "gradients of inputs": (ParallelConfig(tensor=2), "tensor_parallel.Inward.backward", staticmethod(_kept)),
    "tokens on their way": (ParallelConfig(expert=2), "expert_parallel._exchanged", _zeros),
    "gradients of states": (ParallelConfig(pipeline=2), "ring._Give.backward", staticmethod(_lost)),
    "gradients of entries": (ParallelConfig(context=2), "context_parallel.Gathered.backward", staticmethod(_unsummed)),
}


def sabotaged(config: ParallelConfig, what: str, instead: Any) -> float:
    """How far parameters are from one process' own."""
    with parallel.world(config, torch.device("cpu")) as world, mock.patch(f"ritornello.train.{what}", instead):
        how: Any = {"steps": 1, "packed": True}
        (_, ours), (_, alone) = both(world, config, "experts, tied", **how)
        return difference(ours, alone)


def layouts(size: int) -> dict[str, ParallelConfig]:
    """What `size` processes try, by name: each way of sharing the work alone with two, some together with four."""
    if size == 2:
        return {
            "shard": ParallelConfig(shard=2),
            "loop": ParallelConfig(shard=2, gather="loop"),
            "replicate": ParallelConfig(replicate=2),
            "tensor": ParallelConfig(tensor=2),
            "expert": ParallelConfig(expert=2),
            "context": ParallelConfig(context=2),
            "pipeline": ParallelConfig(pipeline=2),
        }
    return {
        "expert, tensor": ParallelConfig(expert=2, tensor=2, gather="loop"),
        "expert, context": ParallelConfig(expert=2, context=2),
        "pipeline, expert": ParallelConfig(pipeline=2, expert=2, gather="loop"),
        "pipeline, tensor": ParallelConfig(pipeline=2, tensor=2),
        "pipeline of four": ParallelConfig(pipeline=4),
    }


def main() -> None:
    results: dict[str, Any] = {}
    size, cpu = int(os.environ["WORLD_SIZE"]), torch.device("cpu")
    with parallel.world(ParallelConfig(), cpu) as everyone:
        whole_run(Path(sys.argv[2]))
        results |= {"steps": {}, "muon": {}, "bf16": {}}
        for name, config in layouts(size).items():
            with parallel.world(config, cpu) as world:
                results["steps"][name] = equality(world, config)
                results["bf16"][name] = lowered(world, config)
                if name == "shard":
                    results["muon"][name] = muon(world, config)
        if size == 2:
            results["sabotage"] = {name: sabotaged(*what) for name, what in SABOTAGE.items()}
        results["checkpoints"] = checkpoints.cases(Path(sys.argv[2]) / "checkpoints")
        results["gathers"] = {gather: gathers(everyone, gather) for gather in get_args(Gather)}
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
