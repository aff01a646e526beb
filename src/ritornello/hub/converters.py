"""Published looped models as ours: one module for each, by the `model_type` that its config.json names.

A module has `config_from(config.json) -> ModelConfig`, `from_theirs(tensors, config)` and `to_theirs`, its inverse.
Nothing in a folder is trusted: no code, no pickle, no file beside it.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ritornello import recipes
from ritornello.config import ModelConfig, pick, require
from ritornello.hub import huginn, ouro
from ritornello.hub.native import weight_files
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import tensors
from ritornello.train.stored import Stored

CONVERTERS: dict[str, ModuleType] = {"huginn_raven": huginn, "ouro": ouro}
UNREAD = (huginn.ROPE_TABLE, "lm_head.weight")  # follow from the rest, where a model does not have them itself


def read_published(path: str | Path) -> RecurrentDepthTransformer:
    """The model of a folder with config.json and safetensors as published, on the CPU, in the weights' own dtypes.

    Raises:
        ValueError: another kind of model, or what is damaged, missing or not of this model, named.
    """
    path = Path(path)
    converter, config = _shape(path / "config.json")
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    stored = Stored(weight_files(path))
    expected = converter.to_theirs(model.state_dict(), config)
    found = {name: x for name, x in stored.described.items() if name in expected or name not in UNREAD}
    expected = {name: x.to(found[name].dtype) if name in found else x for name, x in expected.items()}
    tensors.check(found, expected, stored.source)
    model.load_state_dict(converter.from_theirs(stored.read(), config), assign=True)
    return model.eval()


def _shape(source: Path) -> tuple[ModuleType, ModelConfig]:
    body: Any = recipes.parse_json(recipes.read_text(source), source)
    require(isinstance(body, dict), str(source), body, "an object")
    try:
        converter = pick(CONVERTERS, str(body.get("model_type")), "model_type")
        return converter, converter.config_from(body)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
