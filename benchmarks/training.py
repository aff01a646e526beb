"""A whole training step beside OpenMythos: the same shape, loops, tokens and optimizer on both sides."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.shapes import BATCH, VOCAB, mixture, training
from benchmarks.timing import paired
from ritornello.accounting import count_parameters, flops_per_token
from ritornello.config import ModelConfig, TrainConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import Batch
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step

N_LOOPS = 8
N_PARAMETERS_APART = 0.1  # of the peer's: the shapes agree, its adapters and norms are its own


def ours(config: ModelConfig, train: TrainConfig, tokens: np.ndarray) -> Callable[[], float]:
    model = RecurrentDepthTransformer(config)
    optimizers = build_optimizers(model, train)
    n, length = tokens.shape[0], tokens.shape[1] - 1
    batch = Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        documents=np.zeros((n, length), np.int64),
        indices=np.arange(n),
        n_bytes=np.ones(n, np.int64),
    )
    steps = iter(range(train.steps))
    return lambda: float(train_step(model, optimizers, batch, train=train, step=next(steps))["loss"])


def rows(shape: str, attention: str, dtype: str, *, n: int, ceiling: float) -> Iterator[dict[str, Any]]:
    config, train = mixture(shape, attention=attention, n_loops=N_LOOPS), training(N_LOOPS, dtype)
    n_sequences, length = BATCH[shape]
    tokens = np.random.default_rng(0).integers(VOCAB, size=(n_sequences, length + 1))
    peer = peers.openmythos(config)
    theirs, total = sum(p.numel() for p in peer.parameters()), count_parameters(config)["total"]
    assert abs(total / theirs - 1) < N_PARAMETERS_APART, (total, theirs)
    step = peers.training_step(peer, torch.from_numpy(tokens), bf16=dtype == "bf16")
    stop, loops = peers.count_loops(peer)
    first, our_step = step(), ours(config, train, tokens)
    stop()
    assert len(loops) == N_LOOPS, loops
    assert abs(our_step() - first) < 1  # both know nothing yet: about log V
    found = paired(our_step, step, n=n, warmup=0)
    flops = (
        n_sequences
        * length
        * flops_per_token(config, seq_len=length, n_loops=N_LOOPS, training=True, convention="full")
    )
    yield {
        "bench": "training",
        "shape": shape,
        "attention": attention,
        "dtype": dtype,
        "metric": "seconds a step",
        **asdict(found),
        "peer_name": "open-mythos 0.5.0",
        "ceiling": ceiling,
        "utilisation": flops / found.ours / ceiling,
    }
