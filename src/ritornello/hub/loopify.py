"""A plain transformer whose layers loop, without training: a window of them runs again, damped (2605.23872).

    h = layers[:first](embed(tokens));  h ← h + s · (layers[first:last](h) − h), n_loops times;  layers[last:], head

No weight changes and none is added: the same tensors under the names of prelude, recurrent block and coda.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ritornello.config import MAX_LOOPS, ModelConfig, require, require_int
from ritornello.engine.generate import load
from ritornello.hub.export import created, free, tokenizer_of, wrapped, write_model
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.published import LOOPED_ALIKE
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.recipes import find_model, is_exported

LOOPED: dict[str, Any] = {  # what makes n_loops = 1 the plain transformer, bit for bit
    "injection": "none",
    "initial_state": "e",
    "normalize_input": False,
    "carry_streams": 1,
    "anchored": False,
    "kv_sharing": "per_loop",
    **LOOPED_ALIKE,
}
COUNTS = ("n_prelude_layers", "n_recurrent_layers", "n_coda_layers")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, order=True)
class Window:
    """Layers `first` … `last` − 1 run `n_loops` times. scale: how much of their change stays, the first time and later
    (`ModelConfig.loop_scale`): (1, 1) repeats them, (1, s) adds damped repeats to the model as it is, (1/n, 1/n) takes
    its one step in n smaller ones."""

    first: int
    last: int
    n_loops: int
    scale: tuple[float, float] = (1.0, 1.0)

    def __str__(self) -> str:
        first, later = (f"{scale:.3g}" for scale in self.scale)
        return f"layers {self.first}-{self.last - 1} x{self.n_loops}, scale {first}, {later}"


def loopify(model: RecurrentDepthTransformer, window: Window) -> RecurrentDepthTransformer:
    """The model with the window's layers looped; it shares all weights with `model`.

    Raises:
        ValueError: a model that loops already, a window that is not within its layers.
    """
    n = model.config.n_layers
    require(model.config.is_plain, "n_recurrent_layers", model.config.n_recurrent_layers, "0: a plain transformer")
    require_int("last", window.last, 1, n)
    require_int("first", window.first, 0, window.last - 1)
    require_int("n_loops", window.n_loops, 1, MAX_LOOPS)
    parts = range(window.first), range(window.first, window.last), range(window.last, n)
    return assembled(model, *parts, n_loops=window.n_loops, loop_scale=window.scale)


def assembled(
    model: RecurrentDepthTransformer, prelude: range, recurrent: range, coda: range, **shape: Any
) -> RecurrentDepthTransformer:
    """A model of some layers of a plain one, by their numbers there; embeddings, last norm and head are its own."""
    sizes = len(prelude), len(recurrent), len(coda)
    counts: dict[str, Any] = dict(zip(COUNTS, sizes, strict=True))
    config = replace(model.config, **LOOPED, **counts, **shape)
    with torch.device("meta"):
        found = RecurrentDepthTransformer(config)
    theirs, ours, state = _stacks(model.config), _stacks(config), model.state_dict()
    names = {theirs[i]: ours[place] for place, i in enumerate((*prelude, *recurrent, *coda))}
    kept = {}
    for name, tensor in state.items():
        stem = ".".join(name.split(".")[:2])
        if stem in names or "layers" not in stem:
            kept[names.get(stem, stem) + name.removeprefix(stem)] = tensor
    found.load_state_dict(kept, assign=True)
    return found.train(model.training)


def _stacks(config: ModelConfig) -> list[str]:
    """By number, what the names of a layer's tensors begin with."""
    sizes = zip(("prelude_layers", "recurrent", "coda_layers"), (getattr(config, name) for name in COUNTS), strict=True)
    return [f"{stack}.{i}" for stack, n in sizes for i in range(n)]


def opened(name_or_path: str | Path) -> tuple[RitornelloForCausalLM, PreTrainedTokenizerBase]:
    """A plain model and its tokenizer, on the CPU: of a run, a checkpoint, or a folder of `export` or `convert`.

    Raises:
        ValueError: nothing valid there, or a model that loops already.
    """
    path = find_model(name_or_path)
    if is_exported(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = RitornelloForCausalLM.from_pretrained(path, local_files_only=True)
    else:
        loaded = load(path, device="cpu")
        tokenizer, model = tokenizer_of(loaded), wrapped(loaded)
    n = model.native.config.n_recurrent_layers
    require(n == 0, f"{path} n_recurrent_layers", n, "0: a plain transformer", "this one loops already")
    return model.eval(), tokenizer


def write(
    model: RitornelloForCausalLM, window: Window, tokenizer: PreTrainedTokenizerBase, target: Path, *, max_shard: str
) -> Path:
    """The looped model as a folder that transformers and all of this package read, whole or not at all.

    Raises:
        ValueError: something at `target`.
    """
    looped = RitornelloForCausalLM.of(
        loopify(model.native, window), **{name: getattr(model.config, name) for name in IDS}
    )
    looped.generation_config = model.generation_config
    with created(free(target)) as folder:
        write_model(looped, folder, dtype=None, max_shard=max_shard)
        tokenizer.save_pretrained(folder)
    return target
