"""Memory of one process in a training step, by part, at the moment when it needs most.

Weights are float32 masters, their gradients float32 once a backward pass is through. Autograd adds up the gradients of
a weight that every loop uses before it hands them on, so those of all looped layers wait whole, in each process, until
the first loop has been passed. Under autocast one process alone keeps a weight's bfloat16 copy for the whole step;
experts are copied anew by each loop, and each copy is kept for its loop's backward pass, unless activations are
computed again. Several processes put the layers' matrices together in bfloat16, and copy none.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property

from ritornello.accounting import CACHED_NUMBERS, CHUNK_NUMBERS, PROBE_STRIDE, count_parameters
from ritornello.config import ModelConfig, Recipe, TrainConfig
from ritornello.planning.activations import Keeps, Kept, check, kept
from ritornello.planning.layout import Layout

FLOAT, AHEAD = 4, 2  # bytes; layers that are whole at once where each is put together for itself


@dataclass(frozen=True)
class Memory:
    """Bytes. gathered: weights put together from other processes; copies: what autocast made of weights; loss: logits
    of a chunk, gradients of the head and the last state; working: gradients under way."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    gathered: float = 0
    copies: float = 0
    activations: float = 0
    loss: float = 0
    working: float = 0

    @property
    def total(self) -> float:
        held = self.weights + self.gradients + self.optimizer + self.gathered
        return held + self.copies + self.activations + self.loss + self.working


@dataclass(frozen=True)
class Sizes:
    """Numbers (not bytes) of parameters. experts: routed ones; block: the rest of the looped layers; once: prelude and
    coda; root: the model's own, vocabulary first."""

    experts: float
    block: float
    once: float
    root: float

    @cached_property
    def total(self) -> float:
        return self.experts + self.block + self.once + self.root

    @staticmethod
    @cache
    def of(config: ModelConfig) -> "Sizes":
        shares = count_parameters(config)["shares"]
        take = lambda *names: sum(shares.get(name, 0) for name in names)  # noqa: E731
        experts, once = take("routed_experts"), take("prelude", "coda")
        block = take("recurrent_attention", "recurrent_norms", "recurrent_ffn", "shared_experts", "router", "lora")
        return Sizes(experts, block, once, sum(shares.values()) - experts - once - block)

    def held(self, layout: Layout) -> "Sizes":
        """What one process keeps. Norms and MLA's latents, a few percent of a layer, count as divided by `tensor`."""
        n, t = layout.n_shards, layout.tensor
        return Sizes(self.experts / n / t, self.block / n / t, self.once / n / t, self.root / n)

    def whole(self, layout: Layout) -> "Sizes":
        """What one process computes with, once it is put together."""
        t = layout.tensor
        return Sizes(self.experts / layout.expert / t, self.block / t, self.once / t, self.root)


@dataclass(frozen=True)
class Load:
    """What one process has at once: `rows` sequences of `tokens` tokens each (its part where a sequence is shared);
    `loops` that have a gradient, over its rows in the mean; `deepest` of them; `idle` loops without one, likewise."""

    rows: int
    tokens: int
    loops: float
    deepest: int
    idle: float
    accumulates: bool

    @staticmethod
    def of(recipe: Recipe, layout: Layout) -> "Load":
        """Rows of drawn depth: as deep as the deepest may be where one is alone, as the mean where several are."""
        train = recipe.train
        batch = train.microbatch_size or train.batch_size
        rows = max(1, batch // layout.n_readers)
        most = float(train.max_loops if train.depth != "fixed" else round(train.mean_loops))
        mean = (train.min_loops + most) / 2 if train.depth == "uniform" else min(train.mean_loops, most)
        n_loops = max(most / rows, mean)
        cut = train.backprop_loops or most
        deepest, loops = min(cut, most), min(cut, n_loops)
        if recipe.model.is_plain:
            deepest = loops = n_loops = 0
        several = train.accumulation > 1
        return Load(rows, recipe.data.seq_len // layout.context, loops, round(deepest), n_loops - loops, several)

    @property
    def n_tokens(self) -> int:
        return self.rows * self.tokens


def training(recipe: Recipe, layout: Layout | None = None, *, fused: bool = True) -> tuple[str, Memory]:
    """The moment of a step when one process needs most, and what it then holds. layout: None for one process alone.

    fused: as on a GPU; False: as on a CPU (see `activations`).

    Raises:
        ValueError: a model whose activations have no formula.
    """
    check(recipe)
    moments = Moments.of(recipe, layout or Layout(), fused=fused).all()
    return max(moments.items(), key=lambda item: item[1].total)


@dataclass(frozen=True)
class Moments:
    """The moments of one step that may need most."""

    config: ModelConfig
    train: TrainConfig
    layout: Layout
    keeps: Keeps
    load: Load
    kept: Kept
    held: Sizes
    whole: Sizes

    @staticmethod
    def of(recipe: Recipe, layout: Layout, *, fused: bool) -> "Moments":
        keeps = Keeps(low(recipe.train), fused, layout.tensor, layout.context)
        sizes, load = Sizes.of(recipe.model), Load.of(recipe, layout)
        per_token = kept(recipe.model, keeps)
        held, whole = sizes.held(layout), sizes.whole(layout)
        return Moments(recipe.model, recipe.train, layout, keeps, load, per_token, held, whole)

    def all(self) -> dict[str, Memory]:
        found = {"the loss": self.at_loss(), "the last layers' gradients": self.at_coda()}
        if self.config.needs_probe:
            found["the probe's loss"] = self.at_probe()
        if not self.config.is_plain:
            found["the last loop's gradients"] = self.at_loop(first=True)
            if self.load.deepest > 1:
                found["an earlier loop's gradients"] = self.at_loop(first=False)
        return found | {
            "the first layers' gradients": self.at_prelude(),
            "the embedding's gradients": self.at_embedding(),
            "the optimizer": self.at_optimizer(),
        }

    @property
    def alone(self) -> bool:
        """Nothing is put together from others."""
        return self.layout.n_processes == 1

    @property
    def n_recurrent(self) -> int:
        return max(1, self.config.n_recurrent_layers)

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size * self.config.dim

    def resting(self, **more: float) -> Memory:
        """With what is held all the time."""
        return Memory(weights=FLOAT * self.held.total, optimizer=self.states, **more)

    @cached_property
    def states(self) -> float:
        """Of the optimizer, spread as parameters are."""
        kind = self.train.optimizer
        return optimizer_bytes(self.config, kind) * self.held.total / Sizes.of(self.config).total

    def earlier(self) -> float:
        """Gradients of micro-batches before this one."""
        return FLOAT * self.held.total if self.load.accumulates else 0

    @cached_property
    def gathered(self) -> float:
        if self.alone:
            return 0
        looped, n = self.whole.experts + self.whole.block, self.n_recurrent
        if self.layout.gather == "loop":
            looped *= min(AHEAD, n) / n
        n_once = max(1, self.n_once)
        return self.keeps.low * (looped + self.whole.once / n_once * AHEAD) + FLOAT * self.whole.root

    def copies(self, *, left: float, again: float = 0) -> float:
        """Of weights; of experts, one for each of the loops `left`, or where these are computed again, `again`."""
        n = again if self.train.checkpoint_activations else left
        return self.copied * (self.whole.block + self.whole.once + n * self.whole.experts)

    @property
    def copied(self) -> int:
        """Bytes of a number's copy."""
        return self.keeps.low * self.keeps.lowered * self.alone

    def activations(self, *, coda: bool = True, loops: float | None = None) -> float:
        """loops: with a gradient that are left, None: all. One is whole where they are computed again."""
        kept, load = self.kept, self.load
        loops = load.loops if loops is None else loops
        each = kept.entering if self.train.checkpoint_activations else kept.loop
        per_token = kept.prelude + loops * each + (load.loops + load.idle) * kept.seen + coda * kept.coda
        return load.n_tokens * per_token

    def at_loss(self) -> Memory:
        low, d, v, n = self.keeps.low, self.config.dim, self.config.vocab_size, self.load.n_tokens
        size = min(n, max(1, CHUNK_NUMBERS // v))
        part = size if self.keeps.fused else min(size, max(1, CACHED_NUMBERS // v))
        n_chunks = -(-n // size)
        logits, work = low * size * v, part * v * (8 if self.keeps.lowered else FLOAT)
        made = {1: 0, 2: low}.get(n_chunks, FLOAT)  # bytes a number of the head's gradient while logits are made
        adding = low if n_chunks == 1 else low + FLOAT
        read = (n * d + self.vocabulary) * low * self.keeps.lowered  # the last state and the head, lowered
        loss = logits + max(work + made * self.vocabulary, adding * self.vocabulary) + n * d * low + read
        more = {"activations": self.activations(), "copies": self.copies(left=self.load.deepest), "loss": loss}
        return self.resting(gradients=self.earlier(), gathered=self.gathered, **more)

    def after_loss(self) -> float:
        """The gradients that the loss has made: of the head, and of the last state; what the probe's loss keeps."""
        made = FLOAT * (self.vocabulary + self.load.n_tokens * self.config.dim)
        return made + 2 * FLOAT * self.probed() * (self.probed() <= CHUNK_NUMBERS)

    def probed(self) -> float:
        """Logits of the exit probe: more than a chunk of them are computed again."""
        return self.config.needs_probe * self.load.n_tokens / PROBE_STRIDE * self.config.vocab_size

    def at_probe(self) -> Memory:
        """Two predictions in low and in single precision, and what compares them."""
        before = self.at_coda()
        numbers = min(self.probed(), CHUNK_NUMBERS)
        return replace(before, loss=before.loss + numbers * 2 * (self.keeps.low + FLOAT), working=0)

    def at_coda(self) -> Memory:
        return self.resting(
            gradients=self.earlier(),
            gathered=self.gathered,
            copies=self.copies(left=self.load.deepest),
            activations=self.activations(),
            loss=self.after_loss(),
            working=self.load.n_tokens * self.kept.working,
        )

    def at_loop(self, *, first: bool) -> Memory:
        """In the last loop, whose gradients come first, or in the one before it, where they are added up."""
        kept, load, n = self.kept, self.load, self.n_recurrent
        done, passed = 0 if first else 1, 1 / n  # loops; the share of this one's copies that is let go
        activations = self.activations(coda=False, loops=load.loops * (1 - done / max(1, load.deepest)))
        if self.train.checkpoint_activations:
            activations += load.n_tokens * (kept.loop - kept.entering)
        waiting = (FLOAT if self.alone else self.keeps.low) * self.whole.experts + self.keeps.low * self.whole.block
        coda = FLOAT * self.held.once * self.config.n_coda_layers / max(1, self.n_once)
        layer, largest = (self.whole.experts + self.whole.block) / n, 2 / 3 * self.whole.experts / n
        adding = 2 * FLOAT * largest * (not first) if self.alone else FLOAT * layer
        return self.resting(
            gradients=self.earlier() + waiting + coda,
            gathered=self.gathered,
            copies=self.copies(left=load.deepest - done - passed, again=1 - passed),
            activations=activations,
            loss=FLOAT * self.vocabulary,
            working=load.n_tokens * kept.working + adding,
        )

    @property
    def n_once(self) -> int:
        return self.config.n_prelude_layers + self.config.n_coda_layers

    def at_prelude(self) -> Memory:
        """All later layers have their gradients."""
        prelude = self.held.once * self.config.n_prelude_layers / max(1, self.n_once)
        vocabulary = FLOAT * self.vocabulary * (1 - 1 / self.layout.n_shards)
        return self.resting(
            gradients=FLOAT * (self.held.total - prelude) + vocabulary + self.earlier(),
            gathered=self.rooted,
            copies=self.copied * prelude,
            activations=self.load.n_tokens * self.kept.prelude,
            working=self.load.n_tokens * self.kept.working,
        )

    def at_embedding(self) -> Memory:
        """All layers have; of a tied vocabulary there are the head's gradient, the embedding's and their sum."""
        whole = 3 if self.config.tie_embeddings else 1
        return self.resting(
            gradients=FLOAT * (self.held.total + self.vocabulary * (whole - 1 / self.layout.n_shards)) + self.earlier(),
            gathered=self.rooted,
            activations=self.load.n_tokens * self.kept.prelude / max(1, self.config.n_prelude_layers),
        )

    @cached_property
    def rooted(self) -> float:
        """What is put together while the first layers have their turn."""
        return 0 if self.alone else FLOAT * self.whole.root + self.keeps.low * self.whole.once / max(1, self.n_once)

    def at_optimizer(self) -> Memory:
        return self.resting(gradients=FLOAT * self.held.total)


def low(train: TrainConfig) -> int:
    """Bytes of a number that products read."""
    return 2 if train.precision == "bf16" else FLOAT


@cache
def optimizer_bytes(config: ModelConfig, kind: str) -> float:
    """AdamW keeps two numbers for each of a parameter, Muon one for each of its matrices'."""
    return 2 * FLOAT * Sizes.of(config).total - (FLOAT * matrices(config) if kind == "muon" else 0)


def matrices(config: ModelConfig) -> int:
    """Numbers in what Muon moves: the matrices of layers, but for router, low-rank deltas and stacked experts."""
    c, shares = config, count_parameters(config)["shares"]
    latent = (c.q_lora_rank + c.kv_lora_rank) if c.attention == "mla" else 0
    norms = c.n_layers * latent
    norms += (c.n_prelude_layers + c.n_coda_layers) * c.dim * (2 if c.norm == "pre" else 4)
    biases = c.n_layers * (c.n_heads + c.n_kv_heads) * c.head_dim if c.qk_bias else 0
    names = ("recurrent_attention", "recurrent_ffn", "shared_experts", "prelude", "coda")
    return sum(shares.get(name, 0) for name in names) - norms - biases
