"""The fastest layout that fits, what the others would cost, and what is missing where none does."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

from ritornello.config import Recipe, TrainConfig, require_int
from ritornello.planning.activations import check
from ritornello.planning.hardware import Gpu
from ritornello.planning.layout import Layout, layouts
from ritornello.planning.memory import Memory, training
from ritornello.planning.roofline import Time, time

COUNTS = sorted(
    {a << i for a in (1, 3) for i in range(14)}
)  # numbers of devices to try: 1, 2, 3, 4, 6, 8, 12, ... 8192
ALIKE = 1.02
AXES = {
    "tensor": "heads and widths of a layer are shared within a node",
    "expert": "each process holds a part of the experts, to which tokens travel",
    "shard": "weights, gradients and optimizer states are spread",
    "replicate": "groups with a whole model each send nothing but sums of gradients",
    "context": "a sequence is shared",
}
NO_PIPELINE = "no pipeline is planned: it would divide gathered weights, for the activations of as many micro-batches"


@dataclass(frozen=True)
class Asked:
    """What is planned. `recipe`: the batch in sequences, the precision and so on. free: names of [train] settings that
    the search may choose, of `checkpoint_activations` and `microbatch_size`. rounds: the batch may be rounded up so
    that every process gets as much."""

    recipe: Recipe
    gpu: Gpu
    n_gpus: int
    free: frozenset[str] = frozenset({"checkpoint_activations", "microbatch_size"})
    rounds: bool = True

    def __post_init__(self) -> None:
        require_int("--gpus", self.n_gpus, 1, 2**17)
        check(self.recipe)

    @property
    def batched(self) -> Recipe:
        """The recipe with a batch that can be shared out."""
        if not self.rounds:
            return self.recipe
        train = self.recipe.train
        n = -(-train.batch_size // self.n_gpus) * self.n_gpus
        micro = train.microbatch_size if n % (train.microbatch_size or 1) == 0 else 0
        return replace(self.recipe, train=replace(train, batch_size=n, microbatch_size=micro))


@dataclass(frozen=True)
class Candidate:
    """One way to do it. moment: of a step, when `memory` is needed."""

    recipe: Recipe
    layout: Layout
    gpu: Gpu
    memory: Memory
    moment: str

    @cached_property
    def time(self) -> Time:
        return time(self.recipe, self.layout, self.gpu)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.usable


@dataclass(frozen=True)
class Plan:
    """best: what is proposed; reasons: of each axis why; next_best: other layouts that fit, the fastest first."""

    asked: Asked
    best: Candidate
    reasons: dict[str, str]
    next_best: tuple[Candidate, ...]


def plan(asked: Asked) -> Plan:
    """Of all layouts that fit into the devices' memory the one with the shortest step; of those that take up to ALIKE
    times as long the simplest: with the fewest axes, without recomputation, the fewest micro-batches, the least memory.

    Raises:
        ValueError: none fits; it says how much memory the most frugal one needs, and how many devices would do.
    """
    found = list(candidates(asked))
    fit = sorted((x for x in found if x.fits), key=lambda x: x.time.step)
    if not fit:
        raise ValueError(missing(asked, found))
    best = min((x for x in fit if x.time.step <= ALIKE * fit[0].time.step), key=simplest_first)
    others = {replace(x.layout, gather="step"): x for x in reversed(fit)}
    del others[replace(best.layout, gather="step")]
    next_best = sorted(others.values(), key=lambda x: x.time.step)[:3]
    return Plan(asked, best, reasons(found, fit, best), tuple(next_best))


def simplest_first(x: Candidate) -> tuple[float, ...]:
    checkpoint, gather = x.recipe.train.checkpoint_activations, x.layout.gather == "loop"
    return x.layout.n_axes, checkpoint, gather, x.recipe.train.accumulation, x.memory.total


def candidates(asked: Asked) -> Iterator[Candidate]:
    """Every layout, with and without what may be chosen, and every size of micro-batch up to the first too large."""
    recipe, gpu = asked.batched, asked.gpu
    for layout in layouts(recipe.model, asked.n_gpus, seq_len=recipe.data.seq_len, per_node=gpu.per_node):
        for variants in _variants(asked, recipe, layout.n_readers):
            for each in _gathers(recipe, layout):
                for variant in variants:
                    moment, memory = training(variant, each)
                    yield Candidate(variant, each, gpu, memory, moment)
                    if memory.total > gpu.usable:
                        break


def _gathers(recipe: Recipe, layout: Layout) -> Iterator[Layout]:
    yield layout
    if layout.n_shards > 1 and not recipe.model.is_plain:
        yield replace(layout, gather="loop")


@cache
def _variants(asked: Asked, recipe: Recipe, n_readers: int) -> tuple[tuple[Recipe, ...], ...]:
    """With and without recomputation, by micro-batch in ascending order."""
    chosen = "checkpoint_activations" in asked.free and not recipe.model.is_plain
    train, again = recipe.train, (False, True) if chosen else (recipe.train.checkpoint_activations,)
    sizes = _microbatches(asked, recipe.train, n_readers)
    settings = [[{"microbatch_size": n, "checkpoint_activations": a} for n in sizes] for a in again]
    return tuple(tuple(replace(recipe, train=replace(train, **s)) for s in some) for some in settings)


def _microbatches(asked: Asked, train: TrainConfig, n_readers: int) -> Sequence[int]:
    """Sizes to try, in sequences of all processes."""
    if "microbatch_size" not in asked.free:
        micro = train.microbatch_size or train.batch_size
        return [micro] if micro % n_readers == 0 else []
    rows, left = divmod(train.batch_size, n_readers)
    return [] if left else [n * n_readers for n in (1, 2, 4, 8, 16, 32, 64) if rows % n == 0]


def reasons(found: Sequence[Candidate], fit: Sequence[Candidate], best: Candidate) -> dict[str, str]:
    """For each axis in use, what would happen without it. fit: the fastest first."""
    said = {}
    for axis, what in AXES.items():
        if getattr(best.layout, axis) > 1:
            without = [x for x in found if getattr(x.layout, axis) == 1]
            faster = [x for x in fit if getattr(x.layout, axis) == 1]
            said[axis] = f"{what}; without it {_without(without, faster, best)}"
    return said


def _without(found: Sequence[Candidate], fit: Sequence[Candidate], best: Candidate) -> str:
    if not found:
        return "there is no layout for so many processes"
    if not fit:
        return f"{_gb(min(x.memory.total for x in found))} GB are needed at least, of {_gb(best.gpu.usable)}"
    slower = fit[0].time.step / best.time.step
    if slower > ALIKE:
        return f"a step takes {slower:.2f} times as long"
    alike = min(x.memory.total for x in fit if x.time.step <= ALIKE * best.time.step)
    return f"a step takes as long, with {_gb(alike)} GB instead of {_gb(best.memory.total)}"


def missing(asked: Asked, found: Sequence[Candidate]) -> str:
    """One line: what is needed, what there is, the nearest remedy."""
    said = f"--gpus = {asked.n_gpus}: must be enough for "
    if not found:
        said += f"a layout of {asked.recipe.train.batch_size} sequences a batch"
    else:
        least = min(found, key=lambda x: x.memory.total)
        parts = asdict(least.memory)
        most = max(parts, key=parts.__getitem__)
        said += f"{_gb(least.memory.total)} GB a GPU ({least.layout}; most of it {most}, {_gb(parts[most])} GB), "
        said += f"which has {_gb(asked.gpu.usable)} to use of {_gb(asked.gpu.memory)}"
    return f"{said}; {remedy(asked)}"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.0f}" if n_bytes >= 1e12 else f"{n_bytes / 1e9:.4g}"


def remedy(asked: Asked) -> str:
    """The least number of devices among COUNTS that will do."""
    for n in COUNTS:
        if n > asked.n_gpus and any(x.fits for x in candidates(replace(asked, n_gpus=n))):
            return f"at least {n} GPUs"
    return f"no number of such GPUs up to {COUNTS[-1]:,} will do: lower --context, --loops or --backprop-loops"
