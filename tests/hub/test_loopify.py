"""Layers of a plain transformer looped: once through it is the same model, and more often what the equation says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ritornello.engine.engine import Engine
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.hub.export import created
from ritornello.hub.loopify import Window, assembled, loopify, opened, write
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.native import load_exported
from ritornello.hub.tokenizer import to_transformers
from ritornello.model.cache import Cache, Passing
from ritornello.model.layers import Pass
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.tokenizer import ByteTokenizer
from tests.model.builders import build, close, differ, tokens_for

LAYERS = {"one stack": (5, 0, 0), "two stacks": (2, 0, 3)}


def plain(layers: str = "one stack", dtype: torch.dtype = torch.float64) -> RecurrentDepthTransformer:
    return build({"halting": "none", "layers": LAYERS[layers], "tie_embeddings": False}, dtype=dtype)


def run(model: RecurrentDepthTransformer, numbers: range, x: Tensor) -> Tensor:
    """Layers by number, one after the other."""
    now = Pass(0, 0, model.context(x), Passing())
    for i in numbers:
        x, _ = [*model.prelude_layers, *model.coda_layers][i](x, now)
    return x


def slowly(model: RecurrentDepthTransformer, window: Window, tokens: Tensor) -> Tensor:
    """The equation written out."""
    h = run(model, range(window.first), model.embed(tokens))
    for loop in range(window.n_loops):
        scale = window.scale[0] if loop == 0 else window.scale[1]
        h = h + scale * (run(model, range(window.first, window.last), h) - h)
    h = run(model, range(window.last, 5), h)
    return model.logits(model.norm(h))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_once_through_it_is_the_same_model(layers: str, dtype: torch.dtype) -> None:
    model = plain(layers, dtype)
    tokens = tokens_for(model.config, 2, 7)
    for first, last in ((0, 5), (0, 1), (1, 4), (4, 5)):
        looped = loopify(model, Window(first, last, 2, (1.0, 0.5)))
        if dtype != torch.bfloat16:  # the state between loops is float32, what is plain stays bfloat16
            assert torch.equal(looped(tokens, n_loops=1).logits, model(tokens).logits)
        assert not torch.equal(looped(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 0.3), (0.5, 0.5), (0.7, 0.2)])
@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_what_the_equation_says(layers: str, scale: tuple[float, float]) -> None:
    model, window = plain(layers), Window(1, 3, 3, scale)
    tokens, looped = tokens_for(model.config, 2, 7), loopify(model, window)
    close(looped(tokens).logits, slowly(model, window, tokens))
    for other in (Window(1, 3, 2, scale), Window(1, 4, 3, scale), Window(1, 3, 3, (scale[0], 0.25))):
        differ(looped(tokens).logits, slowly(model, other, tokens))


@torch.no_grad()
def test_token_by_token_and_in_the_engine() -> None:
    looped = loopify(plain(), Window(1, 3, 3, (1.0, 0.3)))
    tokens = tokens_for(looped.config, 2, 8)
    whole = looped(tokens).logits
    cache = Cache(looped.config, batch_size=2, max_len=8, dtype=torch.float64)
    close(torch.cat([looped(part, cache=cache).logits for part in tokens.split(1, 1)], 1), whole)
    engine = Engine(looped)
    number = engine.submit(Request(prompt=tokens[0].tolist(), max_tokens=1, sampling=Sampling(temperature=0)))
    assert [event.token for event in engine.run() if event.number == number] == [int(whole[0, -1].argmax())]


def test_no_weight_is_copied() -> None:
    model = plain()
    looped = loopify(model, Window(1, 3, 2))
    places = {x.data_ptr() for x in model.state_dict().values()}
    assert {x.data_ptr() for x in looped.state_dict().values()} == places
    part = assembled(model, range(0), range(1, 3), range(3, 5), n_loops=2)
    assert part.config.n_layers == 4 and {x.data_ptr() for x in part.state_dict().values()} < places


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(0, 6, 2), "last = 6: must be an integer in [1, 5]"),
        (Window(3, 3, 2), "first = 3: must be an integer in [0, 2]"),
        (Window(0, 1, 0), "n_loops = 0"),
        (Window(0, 1, 2, (1.0, 0.0)), "loop_scale = 0.0: must be a finite number in (0, 1]"),
        (Window(0, 1, 2, (1.5, 1.0)), "loop_scale = 1.5"),
    ],
    ids=str,
)
def test_what_is_refused(window: Window, message: str) -> None:
    with pytest.raises(ValueError) as error:
        loopify(plain(), window)
    assert message in str(error.value)


def test_what_loops_already_is_refused() -> None:
    with pytest.raises(ValueError, match="n_recurrent_layers = 2: must be 0: a plain transformer"):
        loopify(loopify(plain(), Window(1, 3, 2)), Window(0, 1, 2))


def folder_of(model: RecurrentDepthTransformer, folder: Path) -> Path:
    """As `export` writes one."""
    tokenizer = ByteTokenizer()
    from ritornello.hub.export import write_model

    with created(folder) as target:
        write_model(RitornelloForCausalLM.of(model, eos_token_id=256), target, dtype=None, max_shard="5GB")
        to_transformers(tokenizer, max_length=64).save_pretrained(target)
    return folder


@torch.no_grad()
def test_a_folder_that_everything_reads(tmp_path: Path) -> None:
    row = {"halting": "none", "layers": (4, 0, 0), "vocab_size": 264}
    model, window = build(row, dtype=torch.float32), Window(1, 3, 2, (1.0, 0.3))
    wrapped, tokenizer = opened(folder_of(model, tmp_path / "plain"))
    target = write(wrapped, window, tokenizer, tmp_path / "looped", max_shard="5GB")
    tokens = tokens_for(model.config, 2, 7)
    wanted = loopify(model, window)(tokens).logits
    loaded = load_exported(target, device="cpu")
    assert loaded.model.config.loop_scale == (1.0, 0.3) and torch.equal(loaded.model(tokens).logits, wanted)
    found = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(found(tokens).logits, wanted) and found.config.eos_token_id == 256
    with pytest.raises(ValueError, match="a folder that does not exist yet"):
        write(wrapped, window, tokenizer, target, max_shard="5GB")
    with pytest.raises(ValueError, match="n_recurrent_layers = 2: must be 0"):
        opened(target)
