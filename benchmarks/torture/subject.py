"""The run that is tortured, and what must be true of it afterwards."""

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ritornello.config import DataConfig, ModelConfig, Recipe, TrainConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, files, runs, tensors
from ritornello.train.trainer import train

STEPS, SAVE_EVERY = 40, 4
MODEL = ModelConfig(
    dim=16,
    n_loops=4,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    n_experts=4,
    n_active_experts=2,
    expert_dim=8,
    lora_rank=2,
)
TRAIN = TrainConfig(
    steps=STEPS,
    batch_size=4,
    warmup_steps=4,
    lr=1e-2,
    schedule="constant",  # this and the next: what a step does must not depend on how many there are
    router_bias_cooldown=0.0,
    max_loops=4,
    mean_loops=2.0,
    log_every=1,
    eval_every=10,
    eval_batches=1,
    eval_loops=(1, 4),
    save_every=SAVE_EVERY,
)
Digest = tuple[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A small run in `folder`, and the weights and optimizer states that it has after 0, 1, ... STEPS steps when left
    alone."""

    folder: Path
    recipe: Recipe
    undisturbed: dict[int, Digest]
    losses: dict[int, tuple[float, float]]  # and the gradients' norm, by step

    def run(self, out: Path, *, background: bool = True, steps: int = STEPS) -> None:
        """Start it, or go on with it."""
        settings = replace(self.recipe.train, save_in_background=background, steps=steps)
        changed = replace(self.recipe, train=settings)
        train(changed, out=out, resume=True, device="cpu", cache_dir=self.folder / "cache", offline=True)

    def problem(self, out: Path, *, least: int = 0) -> str | None:
        """What is wrong with what a run left in `out`: at least step `least`, and every bit as undisturbed."""
        found = self.saved(out)
        if found is None:
            return None if least == 0 else f"no checkpoint, though step {least} was saved"
        step, weights = found
        if step < least:
            return f"step {step}, though step {least} was saved"
        return None if weights == self.undisturbed[step] else f"other weights at step {step}"

    def saved(self, out: Path) -> tuple[int, Digest] | None:
        """The step of the newest checkpoint in `out`, which can be loaded, and what it holds."""
        try:
            newest = checkpoint.latest(out)
        except ValueError:  # none is valid
            newest = None
        if newest is None:
            return None
        assert not newest.name.startswith(files.TEMPORARY), f"{newest.name} was chosen"
        return checkpoint.load(newest).manifest.step, digest(newest)

    def seconds(self, out: Path, *, background: bool = True) -> float:
        """What a run takes that is left alone."""
        begun = time.monotonic()
        assert ended(forked(lambda: self.run(out, background=background))) == 0
        taken = time.monotonic() - begun
        shutil.rmtree(out)
        return taken

    def logged(self, out: Path) -> int:
        """The last step in the metrics."""
        return max((int(line["step"]) for line in runs.lines(out)), default=0)


def written(folder: Path) -> Recipe:
    """The recipe, and its text in `folder`."""
    rng = random.Random(0)
    words = [bytes(rng.choices(range(97, 123), k=rng.randint(2, 6))).decode() for _ in range(30)]
    text = folder / "text.txt"
    text.write_text(" ".join(rng.choices(words, k=6000)))
    return Recipe(name="subject", model=MODEL, data=DataConfig(source=str(text), seq_len=24), train=TRAIN)


def prepared(folder: Path) -> Subject:
    recipe = written(folder)
    every = replace(recipe.train, save_every=1, keep_checkpoints=STEPS)
    out = folder / "undisturbed"
    train(replace(recipe, train=every), out=out, device="cpu", cache_dir=folder / "cache")
    saved = (out / "checkpoints").glob("step_*")
    found = {checkpoint.verify(path).step: digest(path) for path in saved}
    assert sorted(found) == list(range(1, STEPS + 1)) and len(set(found.values())) == STEPS
    losses = measured(out)
    shutil.rmtree(out)
    found[0] = unchanged(recipe)
    return Subject(folder, recipe, found, losses)


def unchanged(recipe: Recipe) -> Digest:
    """What it has before the first step."""
    start = RecurrentDepthTransformer(recipe.model, seed=recipe.train.seed).state_dict()
    return _digest(tensors.pack(start), tensors.pack({}))


def measured(out: Path) -> dict[int, tuple[float, float]]:
    """What each step measured, by the metrics of a run."""
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in runs.lines(out) if "loss" in line}


def digest(directory: Path) -> Digest:
    manifest = checkpoint.verify(directory)
    kinds = ([(directory / name).read_bytes() for name in manifest.of(kind)] for kind in checkpoint.KINDS)
    return _digest(*map(b"".join, kinds))


def _digest(weights: bytes, states: bytes) -> Digest:
    return hashlib.sha256(weights).hexdigest(), hashlib.sha256(states).hexdigest()


def forked(work: Callable[[], object]) -> int:
    """The pid of a child that does the work and exits with 0, with 3 after an exception, with 130 when interrupted."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        work()
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:  # noqa: BLE001 - whatever it was, the parent judges by what is on the disk
        os._exit(3)


def ended(pid: int) -> int:
    """Its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def place(background: bool) -> str:
    return "background" if background else "foreground"


def row(case: str, trials: int, problems: list[str], note: str) -> Row:
    return {"case": case, "trials": trials, "failures": len(problems), "note": "; ".join(problems[:5]) or note}
