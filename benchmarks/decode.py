"""One token after another, compiled, beside OpenMythos compiled, and beside it as it comes."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.depth import decode
from benchmarks.shapes import VOCAB, mixture
from benchmarks.timing import Work, paired
from ritornello.accounting import flops_per_token, kv_bytes_per_token
from ritornello.config import ModelConfig
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer

N_LOOPS, NEW = 8, 8
BATCHES, PASTS = (1, 16, 64), (32, 1024)
Forward = Callable[..., Any]


def decode_mythos(forward: Forward, tokens: Tensor, past: dict[str, dict[str, Tensor]], start: int) -> None:
    """`decode` with OpenMythos, whose cache is a dictionary."""
    cache = {name: dict(entry) for name, entry in past.items()}
    with torch.inference_mode():
        for i in range(start, tokens.shape[1]):
            forward(tokens[:, i : i + 1], kv_cache=cache, start_pos=i)


def prepare(
    model: RecurrentDepthTransformer, compiled: RecurrentDepthTransformer, peer: Any, batch: int, past: int
) -> tuple[Work, Callable[[Forward], Work]]:
    """Our side, checked, and how to make the peer's."""
    tokens = torch.randint(VOCAB, (batch, past + NEW), generator=torch.Generator().manual_seed(0))
    cache, theirs = Cache(model.config, batch_size=batch, max_len=past + NEW), {}
    with torch.inference_mode():
        model(tokens[:, :past], cache=cache, return_logits=False)
        peer(tokens[:, :past], kv_cache=theirs)
    torch.testing.assert_close(
        *(decode(m, tokens, N_LOOPS, past=cache) for m in (compiled, model)), rtol=1e-3, atol=1e-4
    )
    stop, loops = peers.count_calls(peer.recurrent.block)
    decode_mythos(peer, tokens, theirs, past)
    stop()
    assert len(loops) == N_LOOPS * NEW, loops
    work = partial(decode, compiled, tokens, N_LOOPS, past=cache)
    return work, lambda forward: partial(decode_mythos, forward, tokens, theirs, past)


def rows(attention: str, *, n: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    config = replace(mixture("S1", attention=attention, n_loops=N_LOOPS), max_seq_len=max(PASTS) + NEW)
    peer = peers.openmythos(config).eval()
    torch._dynamo.config.recompile_limit = 64  # its graph breaks many times
    for batch in BATCHES:
        model = RecurrentDepthTransformer(config).eval()
        compiled = deepcopy(model)
        compiled.compile(unroll=True)
        torch.compiler.reset()
        sides = {f"{peers.OPENMYTHOS}, compiled": torch.compile(peer), f"{peers.OPENMYTHOS}, as it comes": peer}
        for past in PASTS:
            ours, theirs = prepare(model, compiled, peer, batch, past)
            for name, forward in sides.items():
                found = paired(ours, theirs(forward), n=n, warmup=2)
                yield {
                    "bench": "decode",
                    "shape": "S1",
                    "attention": attention,
                    "dtype": "fp32",
                    "metric": f"seconds for {NEW} tokens, batch {batch}, after {past}",
                    **asdict(found),
                    "peer_name": name,
                    "ceiling": bandwidth,
                    "utilisation": NEW * bytes_per_step(config, batch, past) / found.ours / bandwidth,
                }


def bytes_per_step(config: ModelConfig, batch: int, past: int) -> float:
    """Read for one token of every sequence: each weight once a loop, of the experts those that `batch` tokens choose at
    random, and the keys and values of all tokens before."""
    c = config
    products = flops_per_token(c, seq_len=1, n_loops=N_LOOPS, training=False, convention="decode") // 2
    expert = 3 * c.dim * c.expert_dim
    distinct = c.n_experts * (1 - (1 - c.n_active_experts / c.n_experts) ** batch)
    weights = products + N_LOOPS * expert * (distinct - c.n_active_experts)
    return 4 * weights + batch * past * kv_bytes_per_token(c, n_loops=N_LOOPS, policy="per_loop", bytes_per_number=4)
