"""One token of one sequence from a dense looped model, which reads its weights once a loop: how close to the memory's
rate that comes."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from benchmarks.decode import NEW
from benchmarks.depth import decode
from benchmarks.shapes import dense
from benchmarks.timing import alone, limited
from ritornello.accounting import flops_per_token, kv_bytes_per_token
from ritornello.engine.quantize import quantize
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer

N_LOOPS, PAST = 8, 32
WEIGHTS = ("fp32", "bf16", "int8")  # products and cache are in float32
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def rows(weights: str, *, n: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    config = replace(dense(n_loops=N_LOOPS), max_seq_len=PAST + NEW)
    model = RecurrentDepthTransformer(config).eval()
    if weights != "fp32":
        quantize(model, weights)  # pyrefly: ignore
    compiled = deepcopy(model)
    compiled.compile(unroll=True)
    tokens = torch.randint(config.vocab_size, (1, PAST + NEW), generator=torch.Generator().manual_seed(0))
    cache = Cache(config, batch_size=1, max_len=PAST + NEW)
    with torch.inference_mode():
        model(tokens[:, :PAST], cache=cache, return_logits=False)
    found, defined = (decode(m, tokens, N_LOOPS, past=cache) for m in (compiled, model))
    assert (found - defined).norm() < 1e-3 * defined.norm()
    products = flops_per_token(config, seq_len=1, n_loops=N_LOOPS, training=False, convention="decode") // 2
    kept = kv_bytes_per_token(config, n_loops=N_LOOPS, policy="per_loop", bytes_per_number=4)
    read = NEW * (BYTES[weights] * products + (PAST + NEW / 2) * kept)
    ours = alone(lambda: decode(compiled, tokens, N_LOOPS, past=cache), n=n, warmup=2)
    metric = f"seconds for {NEW} tokens, batch 1, after {PAST}"
    row = limited(metric, ours, read / bandwidth, name="the same bytes at the memory's rate", n=n)
    yield {"bench": "stream", "shape": "S3", "attention": "gqa", "dtype": weights} | row | {"ceiling": bandwidth}
