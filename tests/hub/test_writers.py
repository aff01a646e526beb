"""The published models' own `generate` writes what ours writes: the sides that `benchmarks/published.py` times."""

import pytest
import torch
from torch import Tensor

from benchmarks.originals import SETTINGS, missing, theirs
from benchmarks.writers import WRITERS, converted, padded
from ritornello.engine.engine import Engine
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling

KINDS = {"huginn": "tied", "ouro": "head of its own"}

pytestmark = pytest.mark.filterwarnings("ignore")  # of code that was written for transformers 4


def by_the_engine(model: object, prompts: list[list[int]], n_loops: int) -> list[list[int]]:
    engine, found = Engine(model), [[] for _ in prompts]  # type: ignore
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, max_tokens=6, n_loops=n_loops, sampling=Sampling(temperature=0)))
    for event in engine.run():
        found[event.number].append(event.token)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_both_write_the_same(name: str) -> None:
    if why := missing(name):
        pytest.skip(why)
    settings = SETTINGS[name][KINDS[name]]
    weights: dict[str, Tensor] = theirs(name, settings, torch.float32)
    model = converted(name, settings, weights)
    writer = WRITERS[name](settings, weights, model)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]] if name == "huginn" else [[3, 1, 4, 1, 5], [9, 2]]
    ids, mask = padded(prompts)
    ways: list[dict] = [{}, {"cache": "static"}] if name == "huginn" else [{"mask": mask}]
    for way in ways:
        tokens, loops = writer.write(ids, 6, 3, **way)
        assert tokens.tolist() == by_the_engine(model, prompts, 3) and loops == 3
    assert tokens.tolist() != by_the_engine(model, prompts, 1)
    tokens, loops = writer.write(ids, 6, 3, exit=1e9 if name == "huginn" else 0.0, **ways[0])
    assert tokens.tolist() == by_the_engine(model, prompts, 1) and loops == (1 if name == "huginn" else 3)
