"""How well a language model reads held-out text, by the number of loops that it gets."""

from collections.abc import Sequence

import numpy as np

from ritornello.lab.cell import Trained
from ritornello.lab.measure import Costs, Row, row, values
from ritornello.lab.tasks.text import Text
from ritornello.train import ngram
from ritornello.train.data import NO_LABEL
from ritornello.train.evaluate import Evaluation, evaluate, gap

N_WINDOWS = 512  # the same ones for every arm and seed


def reading_rows(experiment: str, found: Trained, *, loops: Sequence[int], n: int = N_WINDOWS) -> list[Row]:
    """`bpb`, bits per byte, with its standard error over `n` windows, and `nats` per token. A plain model has loops 0.

    data: fingerprint of text and tokenizer.
    """
    task = found.cell.build_material()
    assert isinstance(task, Text)
    costs, windows = Costs(found, task), task.windows(n)
    n_tokens = sum(int((window.labels != NO_LABEL).sum()) for window in windows)
    read = evaluate(found.model, windows, loops=(1,) if costs.plain else loops)
    rows = []
    for at, nats in read.nats.items():
        at = 0 if costs.plain else at
        where = {"loops": at, "data": task.dataset.fingerprint, "error": standard_error(read, nats), **costs.at(at)}
        for metric, value in (("bpb", read.bpb(nats)), ("nats", float(nats.sum()) / n_tokens)):
            rows.append(row(experiment, found, metric=metric, value=value, n=len(nats), **where))
    return rows


def standard_error(read: Evaluation, nats: np.ndarray) -> float:
    """Of bits per byte, over windows."""
    return gap(nats, np.zeros_like(nats), read.n_bytes)[1]


def trigram_row(experiment: str, found: Trained, *, n: int = N_WINDOWS) -> Row:
    """`trigram`: bits per byte that a byte trigram model of all the training text takes for the same windows."""
    task = found.cell.build_material()
    assert isinstance(task, Text)
    windows = task.windows(n)
    n_bytes = sum(int(window.n_bytes.sum()) for window in windows)
    bits = float(ngram.window_bits(task.dataset, windows).sum())
    return row(experiment, found, metric="trigram", value=bits / n_bytes, n=n, loops=0)


def beats_trigrams(rows: Sequence[Row], read: Sequence[float]) -> bool:
    """Whether a model of so many bits per byte, by seed, is known to read better than trigrams, on the mean."""
    trigram = values(rows, metric="trigram")
    return bool(trigram and read) and float(np.mean(read)) < trigram[0]
