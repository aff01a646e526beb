"""An exported folder back as what the rest of this package works with. Nothing in it is trusted: no code, no pickle, no
file beside it, and no number is read before headers and configuration agree.
"""

from pathlib import Path
from typing import Any

import torch

from ritornello import recipes
from ritornello.config import DataConfig, ModelConfig, Recipe, require
from ritornello.device import pick_device
from ritornello.engine.generate import Loaded
from ritornello.hub.configuration import SHAPE
from ritornello.hub.foreign import read_tokenizer
from ritornello.hub.shards import INDEX, WEIGHTS
from ritornello.hub.tokenizer import is_own, without_specials
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import tensors
from ritornello.train.stored import Stored
from ritornello.train.tokenizer import MAX_BYTES, Tokenizer, from_json

PREFIX = "model.rdt."
SCALAR = "loop_embedding_scale"  # a vector of one number in such a folder


def load_exported(path: str | Path, *, device: str = "auto") -> Loaded:
    """The model of a folder that `export`, `convert` or `save_pretrained` wrote, ready to generate.

    Raises:
        ValueError: what is damaged, missing or not of this model, named.
    """
    path, target = Path(path), pick_device(device)
    shape = _shape(path / "config.json")
    tokenizer = tokenizer_in(path, shape.vocab_size)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(shape)
    stored = Stored(weight_files(path))
    expected = {f"{PREFIX}{name}": x for name, x in model.state_dict().items()}
    found = stored.described
    expected = tensors.in_types_of(found, expected)  # rounded weights are a model's own
    expected = {name: x.view(1) if name.endswith(SCALAR) else x for name, x in expected.items()}
    tensors.check(found, expected, stored.source)
    state = {name.removeprefix(PREFIX): x for name, x in stored.read().items()}
    model.load_state_dict({n: x.view(()) if n.endswith(SCALAR) else x for n, x in state.items()}, assign=True)
    return loaded_of(model.to(target), tokenizer, path)


def loaded_of(model: RecurrentDepthTransformer, tokenizer: Tokenizer, path: Path) -> Loaded:
    """What generates, without a recipe that it was trained by."""
    data = DataConfig(seq_len=min(DataConfig.seq_len, model.config.max_seq_len))
    return Loaded(model.eval(), tokenizer, Recipe(model=model.config, data=data), path)


def tokenizer_in(path: Path, room: int) -> Tokenizer:
    """The tokenizer of a folder: one of ours, or what a published model came with. room: ids that the model has."""
    text = recipes.read_text(path / "tokenizer.json", max_bytes=MAX_BYTES)
    if not is_own(recipes.parse_json(text, path / "tokenizer.json")):
        return read_tokenizer(path, room)
    tokenizer = from_json(without_specials(text))
    n_ids = tokenizer.vocab_size
    require(n_ids <= room, f"{path} tokenizer", f"{n_ids} ids", f"at most the model's {room}")
    return tokenizer


def _shape(source: Path) -> ModelConfig:
    """What the configuration says of the model; the rest of it is transformers' own."""
    body = recipes.read_object(source)
    try:
        return recipes.validated(ModelConfig, {name: body[name] for name in SHAPE if name in body})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def weight_files(path: Path) -> list[Path]:
    """The folder's own weights, whole or in the shards that its index names."""
    names: Any = [WEIGHTS]
    if (path / INDEX).exists():
        index: Any = recipes.parse_json(recipes.read_text(path / INDEX, max_bytes=MAX_BYTES), path / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else None
    ours = isinstance(names, list) and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    require(ours and bool(names), f"{path / INDEX} weight_map", names, "names of safetensors files in the folder")
    found = [path / name for name in names]
    absent = next((file for file in found if file.is_symlink() or not file.is_file()), None)
    require(absent is None, str(path), f"without {absent and absent.name}", "a folder with its weights")
    return found
