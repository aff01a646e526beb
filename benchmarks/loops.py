"""What a loop costs: time in proportion, memory flat beyond the backprop depth, keys and values of MLA to the byte."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import BATCH, VOCAB, mixture
from benchmarks.timing import limited, paired
from ritornello.model.cache import Cache
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer, Run

LOOPS = (1, 2, 4, 8, 16, 32)
BACKPROP = 4
Recurrence = Callable[[int], Tensor]


def recurrence(model: RecurrentDepthTransformer, tokens: Tensor, *, train: bool, backprop_loops: int = 0) -> Recurrence:
    """The loop alone, by its number of loops; train: with its gradients."""
    with torch.no_grad():
        x = model.embed(tokens)
        context = model.context(x)

    def run(n_loops: int) -> Tensor:
        how = Run(Depth.of(n_loops, (x.shape[0], x.shape[1])), backprop_loops=min(backprop_loops, n_loops - 1))
        with torch.set_grad_enabled(train):
            *_, last = model.iterate(x, context, how)
            if train:
                model.zero_grad(set_to_none=True)
                last.h.sum().backward()
        return last.h.detach()

    return run


def held(work: Callable[[], object], model: nn.Module) -> int:
    """The bytes of all tensors that autograd keeps for a backward pass while this runs, beside the model's own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in storages.values())


def rows(shape: str, attention: str, *, n: int) -> Iterator[dict[str, Any]]:
    config = replace(mixture(shape, attention=attention), halting="none", read_out="last")
    model = RecurrentDepthTransformer(config)
    tokens = torch.randint(VOCAB, BATCH[shape], generator=torch.Generator().manual_seed(0))
    common = {"bench": "loops", "shape": shape, "attention": attention, "dtype": "fp32"}
    for train in (False, True):
        run, name = recurrence(model, tokens, train=train), "loop, training" if train else "loop alone"
        assert not torch.equal(run(1), run(2))
        for few, many in pairwise(LOOPS):
            turns = n * LOOPS[-1] // many  # the shorter, the more: each row takes as long
            found = paired(lambda: run(many), lambda: (run(few), run(few)), n=turns)  # noqa: B023
            yield common | {
                "metric": f"{name}, seconds, {many} loops",
                **asdict(found),
                "peer_name": f"twice {few} loops",
                "ceiling": 2 / 2.05,
                "utilisation": found.ratio / (2 / 2.05),
            }
    cut = recurrence(model, tokens, train=True, backprop_loops=BACKPROP)
    kept = [held(partial(cut, n_loops), model) for n_loops in (8, 32)]
    whole = held(partial(recurrence(model, tokens, train=True), 32), model)
    assert whole > 3 * kept[1], "the measure sees loops that keep their activations"
    metric = f"bytes kept for the backward pass, 32 loops, {BACKPROP} with gradients"
    yield common | limited(metric, kept[1], kept[0], name="8 loops")
    if attention == "mla":
        cache = Cache(config, batch_size=2, max_len=64, n_loops=5)
        numbers = sum(slots.numel() for slots in cache.slots)
        places = sum(slots.shape[0] * slots.shape[1] * slots.shape[2] for slots in cache.slots)
        exact = 4 * (config.kv_lora_rank + config.qk_rope_head_dim)
        name = "(kv_lora_rank + qk_rope_head_dim) · 4"
        yield common | limited("bytes a token and slot in the cache", 4 * numbers / places, exact, name=name)
