"""What rounding the weights of the models that come along loses, at each number of loops: errors could grow."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from ritornello.engine.generate import load
from ritornello.engine.quantize import Weights, quantize
from ritornello.lab import cell
from ritornello.lab.measure import Questions, accuracy
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.recipes import find_model
from ritornello.train.data import Rows, prepare
from ritornello.train.evaluate import evaluate, gap
from ritornello.train.trainer import CACHE

LOOPS = (1, 2, 4, 8, 16, 32)
BATCH, N_BATCHES = 32, 24  # windows of text
HOPS, N_QUESTIONS = (1, 2, 4, 8, 16, 20), 512  # a loop for each hop


def rows(weights: Weights) -> Iterator[dict[str, Any]]:
    for found in (text(weights), chains(weights)):
        for shape, attention, metric, ours, exact, n in found:
            yield {
                "bench": "rounding",
                "shape": shape,
                "attention": attention,
                "dtype": weights,
                "metric": metric,
                "ours": ours,
                "peer": exact,
                "peer_name": "float32",
                "ratio": None,
                "ceiling": None,
                "utilisation": None,
                "n": n,
            }


Found = Iterator[tuple[str, str, str, float, float, int]]


def rounded(model: RecurrentDepthTransformer, weights: Weights) -> RecurrentDepthTransformer:
    copy = deepcopy(model)
    quantize(copy, weights)
    return copy


def text(weights: Weights) -> Found:
    """Bits per byte of held-out text, and what was lost with its standard error over windows."""
    loaded = load(find_model(Path("python")), device="cpu")
    data, attention = loaded.recipe.data, loaded.model.config.attention
    dataset = prepare(data, Path.home() / CACHE, offline=True)
    assert dataset.tokenizer.to_json() == loaded.tokenizer.to_json(), "another Python's standard library"
    windows = list(Rows(dataset.validation, seq_len=data.seq_len).evaluation(BATCH, N_BATCHES))
    ours, exact = (evaluate(m, windows, loops=LOOPS) for m in (rounded(loaded.model, weights), loaded.model))
    for n in LOOPS:
        assert (ours.nats[n] != exact.nats[n]).any(), "not rounded at all"
        lost, error = gap(ours.nats[n], exact.nats[n], exact.n_bytes)
        metric = f"bits per byte at {n} loops: {lost:+.5f}, standard error {error:.5f}"
        yield "python", attention, metric, ours.bpb(ours.nats[n]), exact.bpb(exact.nats[n]), BATCH * N_BATCHES


def chains(weights: Weights) -> Found:
    """The share of right answers."""
    found = cell.load(find_model(Path("chains")))
    questions = Questions.of(found.model, found.cell.build_task(), HOPS, N_QUESTIONS)
    ours, exact = (accuracy(m, questions, HOPS) for m in (rounded(found.model, weights), found.model))
    for k in HOPS:
        metric = f"accuracy, {k} hops in {k} loops"
        yield "chains", found.cell.model.attention, metric, ours[k][k], exact[k][k], N_QUESTIONS
