"""What transformers' generate() and its cache cost, beside this package's own step-by-step decoding and its engine, for
the same greedy tokens of the same model."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.shapes import dense, mixture
from benchmarks.timing import paired
from ritornello.config import ModelConfig
from ritornello.engine.engine import Engine
from ritornello.engine.generate import decode
from ritornello.engine.pages import Layout
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.hub import RitornelloForCausalLM
from ritornello.model.rdt import RecurrentDepthTransformer

BATCH, PAST, NEW = 4, 32, 32
GREEDY = Sampling(temperature=0)


def rows(shape: str, *, n: int) -> Iterator[dict[str, Any]]:
    config = mixture(shape) if shape != "S3" else dense()
    model = RecurrentDepthTransformer(replace(config, max_seq_len=PAST + NEW)).eval()
    behind = RitornelloForCausalLM.of(model)
    tokens = torch.randint(1, config.vocab_size, (BATCH, PAST), generator=torch.Generator().manual_seed(0))
    mask, options = torch.ones_like(tokens), {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def ours() -> torch.Tensor:
        return behind.generate(tokens, attention_mask=mask, **options)[:, PAST:]  # pyrefly: ignore

    def own() -> torch.Tensor:
        steps = decode(model, tokens.tolist(), n_new=NEW, sampling=GREEDY)
        return torch.stack([chosen for chosen, _ in steps], 1)

    assert torch.equal(ours(), own())
    for name, peer in (("decode, all in step", own), ("the engine", lambda: served(model, tokens))):
        head = {"bench": "hub", "shape": shape, "attention": config.attention, "dtype": "fp32"}
        metric = f"seconds of generate() for {NEW} tokens, batch {BATCH}, after {PAST}"
        yield head | {"metric": metric, "peer_name": name} | asdict(paired(ours, peer, n=n))


def served(model: RecurrentDepthTransformer, tokens: torch.Tensor) -> list[int]:
    config: ModelConfig = model.config
    n_rows = Layout(config, n_loops=config.n_loops).most_rows(BATCH * (PAST + NEW))
    engine = Engine(model, n_rows=n_rows, n_loops=config.n_loops, vocab_size=config.vocab_size)
    for row in tokens.tolist():
        engine.submit(Request(prompt=row, max_tokens=NEW, sampling=GREEDY))
    found = []
    while engine.busy:
        found += [event.token for event in engine.step()]
    return found
