"""Whether depth that is not used is paid for: tokens that stop at different loops, mixed in one batch."""

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import VOCAB, mixture
from benchmarks.timing import paired
from ritornello.accounting import flops_per_token
from ritornello.config import ModelConfig
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer

N_LOOPS = 16
MEANS = (4, 8)
PREFILL, PAST, NEW = 4096, 32, 64  # tokens


def budgets(mean: int, n: int) -> Tensor:
    """(1, n) loops from 1 to N_LOOPS: the first of n exits with a constant chance at every loop, drawn again beyond the
    last; then one token more or less deep at a time until the mean is as wanted."""
    generator = torch.Generator().manual_seed(mean)
    drawn = torch.empty(50 * n).geometric_(1 / mean, generator=generator).long()
    chosen = drawn[drawn <= N_LOOPS][:n]
    while (left := mean * n - int(chosen.sum())) != 0:
        step = 1 if left > 0 else -1
        place = int(torch.randint(n, (1,), generator=generator))
        chosen[place] = (chosen[place] + step).clamp(1, N_LOOPS)
    return chosen[None]


def prefill(model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int | Tensor, **options: Any) -> Tensor:
    with torch.inference_mode():
        return model(tokens, n_loops=n_loops, **options).logits


def decode(
    model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int | Tensor, *, past: Cache, **options: Any
) -> Tensor:
    """The tokens that follow those of `past`, one by one; n_loops: of each, or (1, those that follow)."""
    cache, logits = (
        copy(past),
        [],
    )  # shares its tensors: what is written lies beyond `past`
    with torch.inference_mode():
        for i in range(past.length, tokens.shape[1]):
            own = n_loops if isinstance(n_loops, int) else n_loops[:, i - past.length, None]
            logits.append(model(tokens[:, i : i + 1], n_loops=own, cache=cache, **options).logits)
    return torch.cat(logits, 1)


def after(model: RecurrentDepthTransformer, tokens: Tensor) -> Cache:
    cache = Cache(model.config, batch_size=1, max_len=PAST + NEW, n_loops=N_LOOPS)
    with torch.inference_mode():
        model(tokens[:, :PAST], n_loops=N_LOOPS, cache=cache, return_logits=False)
    return cache


def rows(shape: str, attention: str, *, n: int) -> Iterator[dict[str, Any]]:
    config = replace(
        mixture(shape, attention=attention, n_loops=N_LOOPS), halting="none", read_out="last", max_seq_len=PREFILL
    )
    model = RecurrentDepthTransformer(config).eval()
    tokens = torch.randint(VOCAB, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    prompt, few = after(model, tokens), tokens[:, : PAST + NEW]
    for name, work, read, new in (
        ("prefill", prefill, tokens, PREFILL),
        ("decode", partial(decode, past=prompt), few, NEW),
    ):
        for mean in MEANS:
            own = budgets(mean, new)
            torch.testing.assert_close(work(model, read, own), work(model, read, own, compact=False))
            found = paired(lambda: work(model, read, own), lambda: work(model, read, N_LOOPS), n=n)  # noqa: B023
            limit = ideal(config, read.shape[1], mean)
            yield {
                "bench": "depth",
                "shape": shape,
                "attention": attention,
                "dtype": "fp32",
                "metric": f"{name}, seconds, {mean} loops a token of {N_LOOPS}",
                **asdict(found),
                "peer_name": f"the same, {N_LOOPS} loops each",
                "ceiling": limit,
                "utilisation": found.ratio / limit,
            }


def ideal(config: ModelConfig, length: int, mean: int) -> float:
    """(P + 16R + C + head) / (P + mR + C + head) in FLOPs."""
    cost = lambda loops: flops_per_token(config, seq_len=length, n_loops=loops, training=False, convention="full")  # noqa: E731
    loop = cost(2) - cost(1)
    return cost(N_LOOPS) / (cost(N_LOOPS) - (N_LOOPS - mean) * loop)
