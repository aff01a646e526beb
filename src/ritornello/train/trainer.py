"""A whole run: data, model, steps, evaluations, metrics and checkpoints, from a recipe to a directory."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ritornello import recipes
from ritornello.config import DataConfig, ModelConfig, Recipe, TrainConfig, default_exit, require, require_int, shown
from ritornello.device import peak_memory, pick_device, reset_peak_memory
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, files, parallel, tensors
from ritornello.train.data import NO_LABEL, Batch, Batches, Rows
from ritornello.train.evaluate import Evaluation, evaluate
from ritornello.train.guard import Guard, Seen, SkippedStepError
from ritornello.train.halting import fit_gate
from ritornello.train.interrupt import InterruptedRunError, stop_request
from ritornello.train.metrics import Observer, observers, require_packages, to_host
from ritornello.train.optim import build_optimizers
from ritornello.train.profiling import profiling
from ritornello.train.saver import Saver
from ritornello.train.shards import Dataset, Progress
from ritornello.train.step import train_step
from ritornello.train.streamed import Streamed, StreamedBatches, batches, open_data
from ritornello.train.warm_start import warm_start
from ritornello.train.watch import watching

GATE_BATCHES = 8  # that a frozen gate is fitted on, the ones after the last step's
CACHE = Path(".cache", "ritornello")  # in the home directory: tokenised data
logger = logging.getLogger("ritornello")


def train(
    recipe: Recipe,
    *,
    out: str | Path,
    resume: bool = False,
    device: str = "auto",
    observer: Observer | None = None,
    data_progress: Progress | None = None,
    offline: bool = False,
    other_data: bool = False,
    cache_dir: str | Path | None = None,
    profile: int = 0,
) -> Path:
    """Train as `recipe` says into the directory `out`; returns the last checkpoint.

    Args:
        resume: continue from the newest valid checkpoint in `out`, as if the run had never stopped; from the start if
            there is none.
        other_data: resume although the data or the tokenizer changed.
        cache_dir: where tokenised data is kept; default ~/.cache/ritornello.
        profile: so many steps are traced into `out`/profile, see `profiling`.

    Raises:
        ValueError: a recipe that doesn't fit its data; a run in `out` already, or another model's or data's.
        NonFiniteError: no finite loss and gradient in three steps in a row; the last checkpoint is intact.
        InterruptedRunError: Ctrl-C or SIGTERM came; the step was finished and saved.
        StoppedError: of several processes, another one died, failed or hangs.
    """
    out, config = Path(out), recipe.train
    require_packages(config)
    with (
        watching(recipe.parallel, out) as watch,
        parallel.world(recipe.parallel, pick_device(device), watch.store) as world,
    ):
        target = world.device
        _check_parts(config, world)
        cache = Path.home() / CACHE if cache_dir is None else Path(cache_dir)
        dataset = open_data(recipe.data, cache, offline=offline, progress=data_progress)
        _check_vocabulary(recipe, dataset)
        model = RecurrentDepthTransformer(recipe.model, seed=config.seed)
        with _claimed(out, world), stop_request() as request, _saver(out, config, world) as saver:
            found = checkpoint.newest(out, world)
            ok = resume or found is None
            require(ok, "out", str(out), "a directory without a run", "resume it, or choose another")
            if found is None and config.warm_start:
                warm_start(model, config.warm_start, tokenizer_json=dataset.tokenizer.to_json())
            # layer by layer: the whole may fit nowhere
            world.shard(model.train(), recipe.parallel, config.precision)
            model.to(target)
            reset_peak_memory(target)
            trainer = Trainer(recipe, dataset, model, build_optimizers(model, config), saver, world)
            if found is not None:
                with world.together():
                    trainer.restore(found, other_data=other_data)
                ok = trainer.step <= config.steps
                require(ok, "train.steps", config.steps, f">= {trainer.step}, the steps already done")
            world.same("the step to go on from, and the data", trainer.step, int(dataset.fingerprint[:12], 16))
            with ExitStack() as stack, profiling(out, 0 if world.rank else profile) as step_done:
                if isinstance(dataset, Streamed):
                    stack.callback(dataset.blocks.close)
                with world.first() as first:
                    if first:
                        reporting = observers(recipe, out, step=trainer.step, offline=offline, stack=stack)
                        trainer.observers = [*reporting, *filter(None, [observer])]
                        files.write_atomic(out / checkpoint.CONFIG, recipes.to_json(recipe).encode())
                watch.reached(trainer.step)
                while trainer.step < config.steps:
                    trainer.advance()
                    watch.reached(trainer.step)
                    step_done()
                    if world.any(request.signum is not None) and trainer.step < config.steps:
                        trainer.save()
                        raise InterruptedRunError(f"interrupted after step {trainer.step}; saved in {trainer.saved()}")
            return trainer.saved()


@contextmanager
def _claimed(out: Path, world: parallel.World) -> Iterator[None]:
    """The run's directory, held by the first process for all of them."""
    with ExitStack() as stack:
        with world.first() as first:
            if first:
                files.make_directory(out)
                stack.enter_context(files.lock(out))
        yield


@contextmanager
def _saver(out: Path, config: TrainConfig, world: parallel.World) -> Iterator[Saver]:
    """Of the form of checkpoints that the run writes."""
    form = config.checkpoint_form
    ok, remedy = form != "plain" or world.ring is None, "`ritornello runs consolidate` makes it plain"
    require(
        ok, "train.checkpoint_form", form, "'auto' or 'sharded' with a pipeline, no process of which has all", remedy
    )
    with ExitStack() as stack:
        sharded = form == "sharded" or (form == "auto" and world.size > 1)
        writers = stack.enter_context(world.apart()) if sharded else None
        how: Any = {"keep": config.keep_checkpoints, "background": config.save_in_background, "world": writers}
        yield stack.enter_context(Saver(out, **how))


@dataclass(frozen=True)
class State:
    """What is saved besides weights and optimizers: data, depth and noise are functions of (seed, step)."""

    step: int
    guard: Seen

    def __post_init__(self) -> None:
        require_int("step", self.step, 1)


@dataclass
class Trainer:
    """A run in progress; `step` steps are done or left out. All that changes is the model, the optimizers, this count
    and what the guard has seen."""

    recipe: Recipe
    dataset: Dataset
    model: RecurrentDepthTransformer
    optimizers: Sequence[Optimizer]
    saver: Saver
    world: parallel.World = parallel.ALONE
    observers: Sequence[Observer] = ()
    step: int = 0
    _tokens: int = 0  # and seconds, since the last log line
    _seconds: float = 0.0

    def advance(self) -> None:
        """One step, and what is due after it."""
        config, start = self.recipe.train, time.perf_counter()
        batch = self._batches.batch(self.step)
        measured = self._try(batch)
        self.step += 1
        self._tokens += batch.tokens.size
        last = self.step == config.steps
        if measured is None:
            self._report({"skipped_steps": self.guard.n_skipped})
        log = to_host(measured) if measured and (last or self.step % config.log_every == 0) else None
        self._seconds += time.perf_counter() - start
        if log is not None:
            self._log(log, batch)
        if last and self._fits_gate:
            self._fit_gate()
        if last or self.step % config.eval_every == 0:
            found = self.evaluate()
            self._report({**(found.metrics() if found else {}), **self._peak})
        if last or self.step % config.save_every == 0:
            self.save()

    def _try(self, batch: Batch) -> dict[str, Tensor | float] | None:
        """The step's metrics; None where it was left out."""
        try:
            how: Any = {
                "train": self.recipe.train,
                "step": self.step,
                "limits": self.guard.limits(),
                "world": self.world,
            }
            measured = train_step(self.model, self.optimizers, batch, **how)
        except SkippedStepError as error:
            self.guard.skipped(error)
            logger.warning("%s", error)
            return None
        self.guard.done(float(measured["loss"]), float(measured["grad_norm"]))
        return measured

    def evaluate(self) -> Evaluation | None:
        """Bits per byte on `eval_batches` batches of validation text, at `eval_loops`; None: another stage finds it."""
        config = self.recipe.train
        exit = default_exit(self.recipe.model.halting)
        if self._fits_gate and self.step < config.steps:
            exit = None  # its gate knows nothing yet
        rows = Rows(self.dataset.validation, **self._row_settings)
        n_batches = config.accumulation * self.world.n_readers  # no more rows at once than in training
        batches = rows.evaluation(config.batch_size // n_batches, config.eval_batches * n_batches)
        how: Any = {"loops": config.eval_loops, "exit": exit, "bf16": config.precision == "bf16"}
        with self.world.gathered(self.model):  # every process reads the same, so that all stop after the same loop
            return self.world.led(self.model, lambda: evaluate(self.model, batches, **how))

    def save(self) -> None:
        """A checkpoint of this moment."""
        optimizer_state = checkpoint.flatten_optimizers(self.optimizers, self.model)
        states = {"model_state": self.model.state_dict(), "optimizer_state": optimizer_state}
        others: Any = {
            "recipe": self.recipe,
            "tokenizer_json": self.dataset.tokenizer.to_json(),
            "trainer_state": {"step": self.step, "guard": self.guard.state()},
            "fingerprint": self.dataset.fingerprint,
        }
        if self.saver.world is not None:
            self.saver.save(step=self.step, **states, **others)
            return
        states = {name: parallel.gathered(state, keep=self.world.rank == 0) for name, state in states.items()}
        with self.world.first() as first:
            if first:
                self.saver.save(step=self.step, **states, **others)

    def saved(self) -> Path:
        """The last checkpoint, once it is on the disk."""
        with self.world.together():
            self.saver.wait()
        return checkpoint.path_of(self.saver.run_dir, self.step)

    def restore(self, found: checkpoint.Checkpoint, *, other_data: bool) -> None:
        """Continue from `found`. The [train] settings may differ: they then hold from here on."""
        _require_same("model", found.recipe.model, self.recipe.model, "a run keeps its model")
        if not other_data:
            remedy = "--other-data (other_data=True) continues on other data"
            saved, given = (replace(data, field=data.row_field) for data in (found.recipe.data, self.recipe.data))
            _require_same("data", saved, given, remedy)
            ok = found.manifest.fingerprint == self.dataset.fingerprint
            require(ok, "data fingerprint", self.dataset.fingerprint, f"{found.manifest.fingerprint}", remedy)
        own, whole = self.model.state_dict(), self.world.ring is None  # or what one stage has
        described = {name: x for name, x in found.model.described.items() if whole or name in own}
        tensors.check(described, own, found.model.source)
        layout = checkpoint.optimizer_layout(self.optimizers, self.model)
        optimizer_state, saved = checkpoint.training_state(found, layout, rest=whole)
        try:
            state = recipes.validated(State, saved)
        except ValueError as error:
            raise ValueError(f"{found.directory / checkpoint.STATE}: trainer: {error}") from None
        self.model.load_state_dict(found.model.read(own.get, rest=whole))
        checkpoint.restore_optimizers(self.optimizers, self.model, optimizer_state)
        self.guard.restore(state.guard)
        self.step, self.saver.newest = state.step, found.directory

    @cached_property
    def guard(self) -> Guard:
        return Guard(self.recipe.train.skip_spikes)

    @property
    def _row_settings(self) -> dict[str, Any]:
        data = self.recipe.data
        return {"seq_len": data.seq_len, "packing": data.packing, "isolate_documents": data.isolate_documents}

    @cached_property
    def _batches(self) -> Batches | StreamedBatches:
        config = self.recipe.train
        return batches(self.dataset, batch_size=config.batch_size, seed=config.seed, **self._row_settings)

    @property
    def _fits_gate(self) -> bool:
        return self.recipe.model.halting == "gate" and self.recipe.train.halting_loss == "frozen"

    @property
    def _peak(self) -> dict[str, float]:
        """Memory at its largest so far, where that is known."""
        n_bytes = peak_memory(self.world.device)
        return {"peak_mb": round(n_bytes / 1e6, 1)} if n_bytes else {}

    def _fit_gate(self) -> None:
        config, batches = self.recipe.train, self._batches
        rows = slice(0, config.microbatch_size or config.batch_size)
        parts = self.world.parts(rows)  # no more at once than in training
        after = (batches.batch(self.step + i, part) for i in range(GATE_BATCHES) for part in parts)
        with self.world.gathered(self.model):
            how: Any = {"n_loops": config.max_loops, "seed": config.seed}
            found = self.world.led(self.model, lambda: fit_gate(self.model, after, **how))
        if found is not None:
            self.world.share(self.model.halting)
            self._report(found)

    def _log(self, metrics: dict[str, float], batch: Batch) -> None:
        bits = metrics["loss"] / math.log(2) * int((batch.labels != NO_LABEL).sum())
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        used = {"tok_per_s": round(speed, 1), **self._peak}
        self._report({**metrics, "bpb": bits / max(1, int(batch.n_bytes.sum())), **used})

    def _report(self, metrics: dict[str, float]) -> None:
        for observer in self.observers:
            observer.update(self.step, metrics)


def _check_parts(config: TrainConfig, world: parallel.World) -> None:
    size = config.microbatch_size or config.batch_size
    ok = size % world.n_readers == 0
    require(
        ok,
        "train.microbatch_size" if config.microbatch_size else "train.batch_size",
        size,
        f"a multiple of the {world.n_readers} that it is shared out to",
    )


def _check_vocabulary(recipe: Recipe, dataset: Dataset) -> None:
    size, model = dataset.tokenizer.vocab_size, recipe.model
    require(model.vocab_size >= size, "model.vocab_size", model.vocab_size, f">= {size}, the tokenizer's")
    require(model.n_token_tables == 1, "model.n_token_tables", model.n_token_tables, "1 for text")


def _require_same(table: str, saved: ModelConfig | DataConfig, given: ModelConfig | DataConfig, remedy: str) -> None:
    """Name the first setting in which a resumed run's recipe differs."""
    before, now = asdict(saved), asdict(given)
    for name in before:
        ok = before[name] == now[name]
        require(ok, f"{table}.{name}", now[name], f"{shown(before[name])}, as in the run to resume", remedy)
