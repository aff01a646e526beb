"""How long a step takes at best: products or memory, whichever is slower, then what is sent. Nothing overlaps here, so
what does overlap makes a step shorter; the shares in `hardware` say how far below its peaks a device is expected."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from ritornello.accounting import flops_per_token
from ritornello.config import Recipe
from ritornello.planning.hardware import ATTAINABLE, LINK_SHARE, MEMORY_SHARE, Gpu
from ritornello.planning.layout import Layout
from ritornello.planning.memory import FLOAT, Load, Moments, Sizes, low

UPDATE = 7 * FLOAT  # bytes a parameter: weight and two moments read and written, gradient read


@dataclass(frozen=True)
class Sent:
    """Bytes that one process sends in a step, and among how many neighbours, itself included."""

    n_bytes: float
    span: int


@dataclass(frozen=True)
class Time:
    """Seconds of one step. sent: by what travels."""

    products: float
    memory: float
    sent: dict[str, float]

    @property
    def step(self) -> float:
        return max(self.products, self.memory) + sum(self.sent.values())


def depth(recipe: Recipe) -> tuple[float, float]:
    """Mean loops of a sequence, and of them those that have a gradient."""
    if recipe.model.is_plain:
        return 0, 0
    train = recipe.train
    mean = (train.min_loops + train.max_loops) / 2 if train.depth == "uniform" else train.mean_loops
    return mean, min(train.backprop_loops or mean, mean)


@cache
def flops(recipe: Recipe) -> tuple[float, float]:
    """Of one token in training, and of what is computed again where activations are not kept."""
    mean, with_gradient = depth(recipe)
    how = {"seq_len": recipe.data.seq_len, "convention": "causal"}

    def trained(n: int) -> float:
        b = recipe.train.backprop_loops
        return flops_per_token(recipe.model, n_loops=n, training=True, backprop_loops=b, **how)  # pyrefly: ignore

    one, two = (flops_per_token(recipe.model, n_loops=n, training=False, **how) for n in (1, 2))  # pyrefly: ignore
    again = (two - one) * with_gradient if recipe.train.checkpoint_activations else 0
    return between(trained, max(1, mean)), again


def between(cost: Callable[[int], float], n: float) -> float:
    """A cost that is linear between whole numbers."""
    low = math.floor(n)
    return cost(low) if n == low else cost(low) + (n - low) * (cost(low + 1) - cost(low))


def time(recipe: Recipe, layout: Layout, gpu: Gpu) -> Time:
    trained, again = flops(recipe)
    n_tokens = recipe.train.batch_size * recipe.data.seq_len
    rate = (gpu.bf16 if recipe.train.precision == "bf16" else gpu.fp32) * ATTAINABLE
    rates = {True: gpu.link * LINK_SHARE, False: gpu.network * LINK_SHARE}
    seconds = {name: x.n_bytes / rates[x.span <= gpu.per_node] for name, x in sent(recipe, layout).items()}
    products = (trained + again) * n_tokens / layout.n_processes / rate
    return Time(products, moved(recipe, layout) / (gpu.bandwidth * MEMORY_SHARE), seconds)


def moved(recipe: Recipe, layout: Layout) -> float:
    """Bytes from and to one device's memory: weights as often as they are read, what is kept written and read and as
    much for its gradients, experts that one process alone converts by each loop, the optimizer's update."""
    step = Moments.of(recipe, layout, fused=True)
    mean, trained = depth(recipe)
    passes = mean + trained * (2 + recipe.train.checkpoint_activations)
    each, whole = step.keeps.low, step.whole
    converted = (FLOAT + each) * (step.copied > 0) * whole.experts * (mean + trained)
    weights = each * (passes * (whole.experts + whole.block) + 3 * (whole.once + whole.root)) + converted
    return recipe.train.accumulation * (weights + 4 * step.activations()) + UPDATE * step.held.total


def sent(recipe: Recipe, layout: Layout) -> dict[str, Sent]:
    """By what travels; rings for sums, so that each of n processes sends 2 (n - 1) / n of them."""
    axes = {"weights": weights_sent, "gradients": gradients_sent, "sums over replicas": replicas_sent}
    axes |= {"tensor": tensor_sent, "experts": experts_sent, "context": context_sent}
    found = {name: axis(recipe, layout) for name, axis in axes.items()}
    return {name: x for name, x in found.items() if x.n_bytes}


def _others(n: int) -> float:
    return (n - 1) / n


def _spread(layout: Layout, sizes: Sizes) -> Sizes:
    """Of what a process computes with, the part that comes from others."""
    n, among = _others(layout.n_shards), _others(layout.n_shards // layout.expert)
    return Sizes(sizes.experts * among, sizes.block * n, sizes.once * n, sizes.root * n)


def weights_sent(recipe: Recipe, layout: Layout) -> Sent:
    """Put together once for each micro-batch, or for each loop and again on the way back; other layers twice."""
    whole = _spread(layout, Sizes.of(recipe.model).whole(layout))
    load = Load.of(recipe, layout)
    most = 0 if recipe.model.is_plain else _deepest(recipe)
    times = 1 if layout.gather == "step" else most + load.deepest
    n_bytes = low(recipe.train) * ((whole.experts + whole.block) * times + 2 * whole.once) + FLOAT * whole.root
    return Sent(n_bytes * recipe.train.accumulation, layout.tensor * layout.n_shards)


def _deepest(recipe: Recipe) -> int:
    return recipe.train.max_loops if recipe.train.depth != "fixed" else round(recipe.train.mean_loops)


def gradients_sent(recipe: Recipe, layout: Layout) -> Sent:
    """Summed over those that spread them, each getting its part."""
    numbers = _spread(layout, Sizes.of(recipe.model).whole(layout)).total
    return Sent(FLOAT * numbers * recipe.train.accumulation, layout.tensor * layout.n_shards)


def replicas_sent(recipe: Recipe, layout: Layout) -> Sent:
    """Gradients summed over those that hold the same part."""
    held = Sizes.of(recipe.model).held(layout).total
    return Sent(2 * _others(layout.replicate) * FLOAT * held * recipe.train.accumulation, layout.n_processes)


def _passes(recipe: Recipe) -> tuple[float, float]:
    """How often a token passes a layer: prelude and coda, forward and back, or again; the looped ones likewise."""
    mean, trained = depth(recipe)
    c = recipe.model
    again = trained * recipe.train.checkpoint_activations
    return 2 * (c.n_prelude_layers + c.n_coda_layers), c.n_recurrent_layers * (mean + trained + again)


def _step_bytes(recipe: Recipe, layout: Layout, width: float) -> float:
    """Of a step's tokens in one process, at `width` numbers a token as products read them."""
    n_tokens = recipe.train.batch_size * recipe.data.seq_len / layout.n_readers / layout.context
    return n_tokens * width * low(recipe.train)


def tensor_sent(recipe: Recipe, layout: Layout) -> Sent:
    """Two sums of (tokens, dim) for each layer and direction."""
    n = 2 * sum(_passes(recipe)) * 2 * _others(layout.tensor)
    return Sent(n * _step_bytes(recipe, layout, recipe.model.dim), layout.tensor)


def experts_sent(recipe: Recipe, layout: Layout) -> Sent:
    """Each token to its experts and back, in each direction; of those that read the same, each sends for its own."""
    c = recipe.model
    n = 2 * _passes(recipe)[1] * _others(layout.expert) if c.ffn == "moe" else 0
    width = c.n_active_experts * c.dim / layout.tensor
    return Sent(n * _step_bytes(recipe, layout, width), layout.tensor * layout.expert)


def context_sent(recipe: Recipe, layout: Layout) -> Sent:
    """Keys and values of all other parts of the sequence, and their gradients back."""
    c, others = recipe.model, layout.context - 1
    width = c.kv_width / (layout.tensor if c.attention == "gqa" else 1)
    n_bytes = others * sum(_passes(recipe)) * _step_bytes(recipe, layout, width)
    return Sent(n_bytes, layout.tensor * layout.context)


def achieved(recipe: Recipe, layout: Layout, gpu: Gpu) -> float:
    """The share of the peak rate that the step reaches, recomputation not counted."""
    n_tokens = recipe.train.batch_size * recipe.data.seq_len
    peak = gpu.bf16 if recipe.train.precision == "bf16" else gpu.fp32
    return flops(recipe)[0] * n_tokens / layout.n_processes / time(recipe, layout, gpu).step / peak
