"""A long prompt beside OpenMythos."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.depth import PREFILL, prefill
from benchmarks.shapes import VOCAB, mixture
from benchmarks.timing import memory, paired
from ritornello.accounting import flops_per_token
from ritornello.model.rdt import RecurrentDepthTransformer

N_LOOPS = 8


def rows(attention: str, *, n: int, ceiling: float) -> Iterator[dict[str, Any]]:
    config = replace(mixture("S1", attention=attention, n_loops=N_LOOPS), max_seq_len=PREFILL)
    model = RecurrentDepthTransformer(config).eval()
    peer: Any = peers.openmythos(config).eval()
    tokens = torch.randint(VOCAB, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    stop, loops = peers.count_calls(peer.recurrent.block)
    theirs = torch.inference_mode()(partial(peer, tokens))
    theirs()
    stop()
    assert len(loops) == N_LOOPS, loops
    short = prefill(model, tokens[:, :64], N_LOOPS)
    torch.testing.assert_close(prefill(model, tokens, N_LOOPS)[:, :64], short, rtol=1e-3, atol=1e-4)
    found = paired(lambda: prefill(model, tokens, N_LOOPS), theirs, n=n, warmup=0)
    flops = PREFILL * flops_per_token(config, seq_len=PREFILL, n_loops=N_LOOPS, training=False, convention="full")
    row = {
        "bench": "prefill",
        "shape": "S1",
        "attention": attention,
        "dtype": "fp32",
        "metric": f"seconds, {PREFILL} tokens",
        **asdict(found),
        "peer_name": peers.OPENMYTHOS,
        "ceiling": ceiling,
        "utilisation": flops / found.ours / ceiling,
    }
    yield row
    yield from memory(lambda: prefill(model, tokens, N_LOOPS), theirs, row)
