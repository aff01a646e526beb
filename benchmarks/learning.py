"""How long until a model has learned as much as OpenMythos learns in ten minutes with all its loops: same text, batches
and number of parameters, each side with its own recipe. Seconds are steps times the median step, measured by turns
before and after training, so that what else the machine does in between counts for neither side."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.timing import paired
from ritornello import recipes
from ritornello.accounting import count_parameters
from ritornello.config import Recipe
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import Batch, Batches, Rows, prepare
from ritornello.train.evaluate import evaluating
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step
from ritornello.train.trainer import CACHE

SECONDS, SHARE = 600.0, 1 / 3  # of OpenMythos' training; of it, in which ours should be as far
SEEDS = (0, 1)
PILOT_SECONDS, RATES = 60.0, (3e-4, 1e-3, 3e-3, 1e-2)  # OpenMythos' own learning rate is the first
WARMUP, FLOOR = 0.035, 0.1  # 2,000 of its 57,220 steps; the rate it ends with
EVALUATIONS, WINDOWS = 15, 512
Step = Callable[[int], float]
Score = Callable[[], float]


def recipe(seed: int = 0) -> Recipe:
    """The demo's, its shared expert as wide as OpenMythos has them: as all active ones."""
    found = recipes.from_mapping(recipes.read_toml(recipes.find("demo")))
    model = replace(found.model, n_shared_experts=found.model.n_active_experts)
    return replace(found, model=model, train=replace(found.train, seed=seed))


def ours(recipe: Recipe, batches: Batches, held_out: Sequence[Batch]) -> tuple[Step, Score]:
    model = RecurrentDepthTransformer(recipe.model, seed=recipe.train.seed)
    optimizers = build_optimizers(model, recipe.train)
    step = lambda i: float(train_step(model, optimizers, batches.batch(i), train=recipe.train, step=i)["loss"])  # noqa: E731
    return step, lambda: score(model, lambda tokens: model(tokens).logits, held_out)


def theirs(
    recipe: Recipe, rate: float, n_steps: int, batches: Batches, held_out: Sequence[Batch]
) -> tuple[Step, Score]:
    """Its training script: AdamW, a linear warm-up, half a cosine."""
    torch.manual_seed(recipe.train.seed)
    model: Any = peers.openmythos(recipe.model)
    total = count_parameters(recipe.model)["total"]
    assert abs(sum(p.numel() for p in model.parameters()) / total - 1) < 0.1, "as many parameters on both sides"
    optimizer, loss_of, warmup = peers.adamw(model, lr=rate), peers.logits_loss(model), WARMUP * n_steps

    def step(i: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (i - warmup) / (n_steps - warmup)))
        scale = i / warmup if i < warmup else FLOOR + (1 - FLOOR) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        batch = batches.batch(i)
        return peers.step(model, loss_of, optimizer, *map(torch.from_numpy, (batch.tokens, batch.labels)))

    stop, loops = peers.count_calls(model.recurrent.block)
    with torch.no_grad():
        model(torch.from_numpy(held_out[0].tokens))
    stop()
    assert len(loops) == recipe.model.n_loops, loops
    return step, lambda: score(model, model, held_out)


def score(model: nn.Module, logits_of: Callable[[Tensor], Tensor], held_out: Sequence[Batch]) -> float:
    """The mean cross-entropy in nats of the same windows."""
    with torch.no_grad(), evaluating(model):
        losses = [
            nn.functional.cross_entropy(
                logits_of(torch.from_numpy(b.tokens)).transpose(1, 2), torch.from_numpy(b.labels)
            )
            for b in held_out
        ]
    return float(torch.stack(losses).mean())


def learn(side: tuple[Step, Score], n_steps: int) -> dict[int, float]:
    """The validation loss after so many steps."""
    step, score_now = side
    curve, places = {}, {round(n_steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    for i in range(n_steps):
        step(i)
        if i + 1 in places:
            curve[i + 1] = score_now()
    return curve


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    base = recipe()
    dataset = prepare(base.data, Path.home() / CACHE, offline=True)
    how: Any = {"seq_len": base.data.seq_len, "batch_size": base.train.batch_size, "isolate_documents": False}
    draws = {seed: Batches(dataset.train, seed=seed, **how) for seed in SEEDS}
    text = Rows(dataset.validation, seq_len=base.data.seq_len, isolate_documents=False)
    held_out = list(text.evaluation(base.train.batch_size, WINDOWS // base.train.batch_size))

    timed = iter(range(10_000))
    our_step, their_step = ours(base, draws[0], held_out)[0], theirs(base, RATES[0], 10_000, draws[0], held_out)[0]
    before = paired(lambda: our_step(next(timed)), lambda: their_step(next(timed)), n=4 * n, warmup=2)
    n_ours, n_theirs = int(SHARE * SECONDS / before.ours), int(SECONDS / before.peer)

    last: dict[float, float] = {}
    for rate in RATES:  # by the loss of batches not seen before
        steps = int(PILOT_SECONDS / before.peer)
        step, _ = theirs(base, rate, steps, draws[0], held_out)
        last[rate] = mean([step(i) for i in range(steps)][-steps // 5 :])
    rate = min(last, key=lambda rate: last[rate])
    said = ", ".join(f"{loss:.2f} at {rate:g}" for rate, loss in last.items())

    for seed in SEEDS:
        own = recipe(seed)
        own = replace(own, train=replace(own.train, steps=n_ours))
        peer, side = theirs(own, rate, n_theirs, draws[seed], held_out), ours(own, draws[seed], held_out)
        goal = learn(peer, n_theirs)[n_theirs]
        curve = learn(side, n_ours)
        after = paired(lambda: side[0](n_ours - 1), lambda: peer[0](n_theirs - 1), n=4 * n)  # noqa: B023
        seconds = n_theirs * (before.peer + after.peer) / 2
        reached = next((step for step, loss in curve.items() if loss <= goal), None)
        taken = reached * (before.ours + after.ours) / 2 if reached else None
        ratio = seconds / taken if taken else 0.0
        yield {
            "bench": "learning",
            "shape": "demo",
            "attention": base.model.attention,
            "dtype": "fp32",
            "metric": f"seconds to a validation loss of {goal:.3f} nats, seed {seed}; ours ends at {curve[n_ours]:.3f}",
            "ours": taken,
            "peer": seconds,
            "peer_name": f"{peers.OPENMYTHOS}, learning rate {rate:g} (a minute's training: {said})",
            "ratio": ratio,
            "ceiling": 1 / SHARE,
            "utilisation": ratio * SHARE,
            "n": 1,
        }
