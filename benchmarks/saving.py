"""What a checkpoint costs the training that goes on: how long a step waits for it, and what it takes altogether."""

import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.shapes import dense, training
from benchmarks.timing import seconds
from benchmarks.training import draw, ours
from ritornello.config import Recipe
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, files
from ritornello.train.optim import build_optimizers
from ritornello.train.saver import Saver

N_STEPS = 2  # that a checkpoint is written beside: S3 steps take seconds, a checkpoint less than two of them


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    config = dense()
    model = RecurrentDepthTransformer(config)
    settings = training(config.n_loops, "fp32")
    optimizers = build_optimizers(model, settings)
    step = ours(model, "fp32", draw(config, "S3"), optimizers)
    step()
    state: dict[str, Any] = {
        "model_state": model.state_dict(),
        "optimizer_state": checkpoint.flatten_optimizers(optimizers, model),
        "recipe": Recipe(model=config, train=settings),
        "tokenizer_json": "{}",
        "trainer_state": {},
        "fingerprint": "",
    }

    def trained() -> None:
        for _ in range(N_STEPS):
            step()

    pauses: dict[bool, list[float]] = {True: [], False: []}  # by background
    costs: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder, files.lock(folder):
        savers = {background: Saver(folder, keep=2, background=background) for background in (True, False)}
        for turn in range(n + 1):  # the first is not counted
            for background in (True, False) if turn % 2 else (False, True):
                saver, undisturbed = savers[background], seconds(trained)
                pause = seconds(lambda: saver.save(step=2 * turn + background + 1, **state))  # noqa: B023
                rest = seconds(trained) + seconds(saver.wait)
                if turn:
                    pauses[background].append(pause)
                    costs[background].append(pause + rest - undisturbed)
        n_bytes = sum(path.stat().st_size for path in checkpoint.load(folder).directory.iterdir())
        for saver in savers.values():
            saver.close()
    for metric, found in (("a step's pause", pauses), ("training lost", costs)):
        fast, slow = (statistics.median(found[background]) for background in (True, False))
        yield {
            "bench": "saving",
            "shape": "S3",
            "attention": config.attention,
            "dtype": "fp32",
            "metric": f"{metric}, seconds, checkpoint of {n_bytes / 1e6:.0f} MB",
            "ours": fast,
            "peer": slow,
            "peer_name": "in the foreground",
            "ratio": slow / fast if fast > 0 else None,  # of the medians: costs are differences, and may be none
            "ratio_low": None,
            "ratio_high": None,
            "ceiling": None,
            "utilisation": None,
            "n": n,
        }
