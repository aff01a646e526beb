"""A whole training step beside that of others: the same shape, loops, tokens and optimizer on both sides."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import peers
from benchmarks.shapes import BATCH, DTYPES, dense, mixture, once, training
from benchmarks.timing import Paired, memory, paired
from ritornello.accounting import count_parameters, flops_per_token
from ritornello.config import ModelConfig, default_exit
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import Batch
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step

N_LOOPS = 8


def draw(config: ModelConfig, shape: str) -> np.ndarray:
    n_sequences, length = BATCH[shape[:2]]
    return np.random.default_rng(0).integers(config.vocab_size, size=(n_sequences, length + 1))


def ours(
    model: RecurrentDepthTransformer, dtype: str, tokens: np.ndarray, optimizers: Sequence[Optimizer] = ()
) -> Callable[[], float]:
    train = training(model.config.n_loops, dtype)
    optimizers = optimizers or build_optimizers(model, train)
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


def timed(config: ModelConfig, found: Paired, *, shape: str, dtype: str, name: str, ceiling: float) -> dict[str, Any]:
    """The row of a whole step."""
    n_sequences, length = BATCH[shape[:2]]
    per_token = flops_per_token(config, seq_len=length, n_loops=config.n_loops, training=True, convention="full")
    return {
        "bench": "training",
        "shape": shape,
        "attention": config.attention,
        "dtype": dtype,
        "metric": "seconds a step",
        **asdict(found),
        "peer_name": name,
        "ceiling": ceiling,
        "utilisation": n_sequences * length * per_token / found.ours / ceiling,
    }


def compare(
    config: ModelConfig,
    peer: nn.Module,
    loss_of: peers.Forward,
    *,
    shape: str,
    dtype: str,
    name: str,
    n: int,
    ceiling: float,
    apart: float = 0.1,
    looped: nn.Module | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a whole step: its time, and the memory that it takes beside what is there before.

    apart: how far the numbers of parameters may differ, as adapters and norms do; looped: a layer of the peer's
    recurrent block."""
    tokens = draw(config, shape)
    theirs, total = sum(p.numel() for p in peer.parameters()), count_parameters(config)["total"]
    assert abs(theirs / total - 1) <= apart, (total, theirs)
    pair, optimizer, model = torch.from_numpy(tokens), peers.adamw(peer), RecurrentDepthTransformer(config)
    step = partial(peers.step, peer, loss_of, optimizer, pair[:, :-1], pair[:, 1:], bf16=dtype == "bf16")
    our_step = ours(model, dtype, tokens)
    stop, calls = peers.count_calls(peer if looped is None else looped)
    assert abs(our_step() - step()) < 1  # both know nothing yet: about log V
    stop()
    assert len(calls) == config.n_loops, calls
    found = paired(our_step, step, n=n, warmup=0)
    exit = default_exit("act") if config.halting == "act" else None
    with torch.no_grad():
        used = model(pair[:, :-1], exit=exit, return_logits=False).loops_used
    assert config.is_plain or bool((used == config.n_loops).all()), "a token of ours stopped early"
    row = timed(config, found, shape=shape, dtype=dtype, name=name, ceiling=ceiling)
    yield row
    yield from memory(partial(and_forget, our_step, model), partial(and_forget, step, peer), row)


def and_forget(step: Callable[[], float], model: nn.Module) -> None:
    """The next step frees the gradients of this one first: they must not rest there."""
    step()
    model.zero_grad()


def beside_float32(shape: str, attention: str, *, n: int, ceiling: float) -> dict[str, Any]:
    """Our bfloat16 beside our float32."""
    config = mixture(shape, attention=attention, n_loops=N_LOOPS)
    sides = {dtype: ours(RecurrentDepthTransformer(config), dtype, draw(config, shape)) for dtype in DTYPES}
    found = paired(sides["bf16"], sides["fp32"], n=n)
    return timed(config, found, shape=shape, dtype="bf16", name="ours in float32", ceiling=ceiling)


def beside_openmythos(shape: str, attention: str, dtype: str, *, n: int, ceiling: float) -> Iterator[dict[str, Any]]:
    config = mixture(shape, attention=attention, n_loops=N_LOOPS)
    peer: Any = peers.openmythos(config)
    how: Any = {"shape": shape, "dtype": dtype, "n": n, "ceiling": ceiling, "looped": peer.recurrent.block}
    return compare(config, peer, peers.logits_loss(peer), name=peers.OPENMYTHOS, **how)


def beside_parcae(dtype: str, *, n: int, ceiling: float) -> Iterator[dict[str, Any]]:
    """Its model computes with as many numbers as ours once its value embeddings are left out."""
    for tables in (False, True):
        config, peer = dense(n_loops=N_LOOPS), peers.parcae(value_embeddings=tables)
        how: Any = {"shape": "S3", "dtype": dtype, "n": n, "ceiling": ceiling, "looped": peer.transformer.core_block[0]}
        name = "parcae-lm 0.1.0" if tables else "parcae-lm 0.1.0, no value embeddings"
        yield from compare(
            config, peer, peers.parcae_loss(peer, N_LOOPS), name=name, apart=1.2 if tables else 0.1, **how
        )


def beside_transformers(dtype: str, *, n: int, ceiling: float) -> Iterator[dict[str, Any]]:
    """Models that do not loop: Llama, and DeepSeek-V3 with one layer of experts."""
    import transformers

    for name, shape, config, make in (
        ("Llama", "S3", dense(plain=True), peers.llama),
        ("DeepSeek-V3", "S2", once("S2"), peers.deepseek),
    ):
        peer = make(config)
        how: Any = {"shape": f"{shape}, no loops", "dtype": dtype, "n": n, "ceiling": ceiling}
        name = f"transformers {transformers.__version__} {name}"
        yield from compare(config, peer, peers.logits_loss(peer), name=name, **how)
