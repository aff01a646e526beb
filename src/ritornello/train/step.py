"""One optimizer step. The host waits for the device once, to learn that all is finite before anything changes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ritornello.config import TrainConfig, default_exit
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.noise import Key
from ritornello.train import depth, losses
from ritornello.train.context_parallel import Pieces
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.guard import Limits
from ritornello.train.optim import set_learning_rate
from ritornello.train.parallel import ALONE, World, clip_gradients
from ritornello.train.pipeline import Conductor, Visitor, serve
from ritornello.train.router import update_router_bias
from ritornello.train.schedule import learning_rate_scale, router_bias_rate

PROBE_STREAM = 1  # of the host's random numbers; 0 draws the depths


@dataclass(frozen=True)
class Plan:
    """A global batch with the depth of each sequence, and what its micro-batches are measured against."""

    batch: Batch
    counts: depth.Counts  # (B,), or (B, T) by token
    documents: NDArray[np.int64] | None  # None: every row is one document without padding
    key: tuple[int, int]  # seed, step
    probe: int  # the state that the exit probe is fitted on, counted from the last
    loops: NDArray[np.int64]  # (B,) loops with a gradient

    @staticmethod
    def of(batch: Batch, train: TrainConfig, step: int) -> "Plan":
        documents = batch.documents if (batch.documents != batch.documents[:, :1]).any() else None
        counts = depth.sample(train, step=step, n_sequences=len(batch.tokens), documents=documents)
        probe = int(depth.generator(train.seed, step, PROBE_STREAM).integers(counts.max()))
        loops = counts if counts.ndim == 1 else counts.max(axis=1)
        loops = np.minimum(loops, train.backprop_loops or loops)
        return Plan(batch, counts, documents, (train.seed, step), probe, loops)

    def shares(self, rows: slice, pieces: Pieces, n_stages: int) -> losses.Shares:
        """Of some rows, this process' tokens, and of their loops one stage's."""
        real, targets = self.batch.documents >= 0, self.batch.labels != NO_LABEL
        n_targets = max(1, int(targets.sum()))
        by_token = self.counts if self.counts.ndim == 2 else self.counts[:, None]
        n_states = max(1, int((by_token * targets).sum()))
        return losses.Shares(
            n_targets=n_targets,
            tokens=float(pieces.take(real[rows]).sum() / real.sum()),
            loops=float(self.loops[rows].sum() / self.loops.sum()) / (pieces.n * n_stages),
            probe=self.probe,
            probe_scale=float(self.counts.max()) * n_targets / n_states,
        )


def train_step(
    model: RecurrentDepthTransformer,
    optimizers: Sequence[Optimizer],
    batch: Batch,
    *,
    train: TrainConfig,
    step: int,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    world: World = ALONE,
) -> dict[str, Tensor | float]:
    """Update `model` in place from one global batch, of which each process reads a part; `step` counts from 0.

    Returns metrics, some still on the device: `loss` in nats per token, every auxiliary loss by name, `grad_norm`
    before clipping, `lr`, `mean_loops`, and of the router `router_violation`, `router_entropy`.

    Raises:
        NonFiniteError, SpikeError: before any parameter, buffer or optimizer state changed.
    """
    scale = learning_rate_scale(train, step)
    set_learning_rate(optimizers, scale)
    for parameter in model.parameters():
        parameter.grad = None
    plan = Plan.of(batch, train, step)
    terms, load = accumulate(model, plan, train, world)
    world.finish_gradients(model)
    norm = clip_gradients(model, train.clip_norm, world)
    grad_norm, *values = torch.stack([norm.float(), *world.total(torch.stack([*terms.values()]))]).tolist()
    measured = dict(zip(terms, values, strict=True))
    loss = measured.pop("next_token")
    limits.check(step, batch.indices.tolist(), loss, grad_norm, list(measured.values()))
    for optimizer in optimizers:
        optimizer.step()
    rate = router_bias_rate(train, step)
    if load is not None and rate:
        update_router_bias(model, load, rate=rate, min_tokens=train.router_bias_min_tokens)
    metrics: dict[str, Tensor | float] = {"loss": loss, "lr": train.lr * scale, "grad_norm": grad_norm}
    if not model.config.is_plain:
        metrics["mean_loops"] = float(plan.counts.mean())
    return metrics | measured | (router_metrics(load) if load is not None else {})


@dataclass(frozen=True)
class Micro:
    """What this process does of one micro-batch: `rows` of the batch, of which it has the tokens in `pieces`.

    deepest: the loops of the whole micro-batch, which every process runs, with no row where it has none. together: with
    other micro-batches.
    """

    plan: Plan
    train: TrainConfig
    table: dict[str, float]
    rows: slice
    pieces: Pieces
    deepest: int
    shares: losses.Shares
    together: bool

    @staticmethod
    def of(
        plan: Plan, train: TrainConfig, table: dict[str, float], everyones: slice, pieces: Pieces, world: World
    ) -> "Micro":
        part, deepest = world.part(everyones), int(plan.counts[everyones].max())
        shares = plan.shares(part, pieces, world.n_stages)
        return Micro(plan, train, table, part, pieces, deepest, shares, world.ring is not None)


def accumulate(
    model: RecurrentDepthTransformer, plan: Plan, train: TrainConfig, world: World = ALONE
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Add up the gradients of all micro-batches; returns this process' share of the loss terms, and the experts' load
    (n_loops, R, E) of all."""
    table = losses.weights(model.config, train)
    terms: dict[str, Tensor] = {}
    load, ring = None, world.ring
    with world.tokens_shared(model, plan.batch.tokens.shape[1]) as pieces:
        slices = _slices(len(plan.batch.tokens), train.microbatch_size)
        while some := list(islice(slices, world.n_stages)):
            micros = [Micro.of(plan, train, table, rows, pieces, world) for rows in some]
            if ring is None:
                found = [_forward(model, micros[0])]
            elif isinstance(ring, Conductor):
                found = ring.together([partial(_forward, model, micro) for micro in micros])
            else:
                visitors = serve(model, ring)
                if len(visitors) < len(micros):
                    raise RuntimeError("the first stage gave up")
                found = [_visited(model, *each, world.device) for each in zip(visitors, micros, strict=True)]
            total = sum((each[0] for each in found[1:]), found[0][0])
            (total if ring is None else ring.closed(total)).backward()
            for _, micro_terms, micro_load in found:
                terms = {name: terms[name] + value if terms else value for name, value in micro_terms.items()}
                load = micro_load if load is None or micro_load is None else load + micro_load
    return terms, None if load is None else world.total(load)


Found = tuple[Tensor, dict[str, Tensor], Tensor | None]  # what to differentiate, the terms, the experts' load


def _forward(model: RecurrentDepthTransformer, micro: Micro) -> Found:
    plan, train, rows, pieces = micro.plan, micro.train, micro.rows, micro.pieces
    device = model.norm.weight.device
    tokens, labels = (to_device(pieces.take(x[rows]), device) for x in (plan.batch.tokens, plan.batch.labels))
    documents = None if plan.documents is None else to_device(pieces.take(plan.documents[rows]), device)
    key = Key(*plan.key, to_device(plan.batch.indices[rows], device))
    with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
        out = (model.forward if micro.together else model)(
            tokens,
            n_loops=pieces.depth(Depth.right_aligned(plan.counts[rows], micro.deepest)),
            documents=documents,
            backprop_loops=train.backprop_loops,
            checkpoint=train.checkpoint_activations,
            key=key,
            trajectory=losses.needs_trajectory(micro.table),
            weigh=losses.needs_weights(micro.table),
            compact=None if pieces.n == 1 else False,
            exit=default_exit("act") if model.config.halting == "act" else None,  # its halted tokens stay frozen
            return_logits=False,
        )
        given = {"labels": labels, "documents": documents, "tokens": tokens}
        x = losses.Inputs(model=model, train=train, key=key, out=out, shares=micro.shares, **given)
        total, terms = losses.total_loss(x, micro.table)
    return total, terms, None if out.routing is None else out.routing.load


def _visited(model: RecurrentDepthTransformer, visitor: Visitor, micro: Micro, device: torch.device) -> Found:
    """The same of a stage that has some layers only: how evenly they used their experts."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    terms = {name: torch.zeros((), device=device, dtype=dtype) for name in micro.table}
    total = terms["next_token"]
    if "balance" in terms:
        balance = torch.stack(visitor.balances).sum() / visitor.n_rows * micro.shares.loops
        terms["balance"], total = balance.detach(), micro.table["balance"] * balance
    return total, terms, visitor.load(model, device)


def router_metrics(load: Tensor) -> dict[str, Tensor | float]:
    """How evenly experts are used over all loops: by layer the largest load ÷ the mean − 1, and entropy ÷ ln E."""
    share = load.sum(0).float()
    share = share / share.sum(-1, keepdim=True)
    n_experts = load.shape[-1]
    entropy = torch.special.entr(share).sum(-1) / max(np.log(n_experts), 1e-9)
    return {"router_violation": share.amax(-1).max() * n_experts - 1, "router_entropy": entropy.min()}


def to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copied without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _slices(n: int, size: int) -> Iterator[slice]:
    size = size or n
    return (slice(start, start + size) for start in range(0, n, size))
