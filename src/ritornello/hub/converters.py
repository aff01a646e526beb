"""Published looped models as ours: one module for each, by the `model_type`, or `_class_name`, of its config.json.

A module has `config_from(config.json) -> ModelConfig`, `from_theirs(tensors, config)` and `to_theirs`, its inverse;
perhaps `UNREAD`, parts of the names of tensors that a file may have for no layer.
Nothing in a folder is trusted: no code, no pickle, no file beside it.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ritornello import recipes
from ritornello.config import MAX_SIZE, ModelConfig, pick, require
from ritornello.device import pick_device
from ritornello.engine.generate import Loaded
from ritornello.hub import hrm_text, huginn, ouro, parcae
from ritornello.hub.export import created, free, write_model
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.native import loaded_of, tokenizer_in, weight_files
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import tensors
from ritornello.train.stored import Stored
from ritornello.train.tokenizer import MAX_BYTES

CONVERTERS: dict[str, ModuleType] = {
    "hrm_text": hrm_text,
    "huginn_raven": huginn,
    "ouro": ouro,
    "ParcaeConfig": parcae,
}
CLASSES: dict[type[ModelConfig], type[RecurrentDepthTransformer]] = {hrm_text.HrmTextConfig: hrm_text.HrmText}
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
UNREAD = (huginn.ROPE_TABLE, "lm_head.weight")  # follow from the rest, where a model does not have them itself


def read_published(path: str | Path) -> RecurrentDepthTransformer:
    """The model of a folder with config.json and safetensors as published, on the CPU, in the weights' own dtypes.

    Raises:
        ValueError: another kind of model, or what is damaged, missing or not of this model, named.
    """
    path = Path(path)
    converter, config = _shape(path / "config.json")
    with torch.device("meta"):
        model = CLASSES.get(type(config), RecurrentDepthTransformer)(config)
    stored = Stored(weight_files(path))
    expected = converter.to_theirs(model.state_dict(), config)
    idle = {*UNREAD, *(name for name in stored.described if {*name.split(".")} & getattr(converter, "UNREAD", set()))}
    found = {name: x for name, x in stored.described.items() if name in expected or name not in idle}
    tensors.check(found, tensors.in_types_of(found, expected), stored.source)
    model.load_state_dict(converter.from_theirs(stored.read(), config), assign=True)
    return model.eval()


def load_published(path: str | Path, *, device: str = "auto") -> Loaded:
    """Such a model with its tokenizer, ready to generate; errors as above."""
    path, target = Path(path), pick_device(device)
    model = read_published(path).to(target)
    return loaded_of(model, tokenizer_in(path, model.config.vocab_size), path)


def convert(path: str | Path, target: str | Path, *, max_shard: str = "5GB") -> Path:
    """Write a published model as a folder that transformers reads, as `export` does a run, whole or not at all.

    Its tokenizer's files come along as they are.
    max_shard: the largest file, "200MB" for example.

    Raises:
        ValueError: what `read_published` refuses, or something at `target`.
    """
    path, target = Path(path), free(target)
    model = RitornelloForCausalLM.of(read_published(path), **_ids(path / "config.json"))
    with created(target) as folder:
        write_model(model, folder, dtype=None, max_shard=max_shard)
        for name in TOKENIZER:
            if (path / name).is_file():
                text = recipes.read_text(path / name, max_bytes=MAX_BYTES)
                (folder / name).write_text(text, encoding="utf-8")
    return target


def _ids(source: Path) -> dict[str, Any]:
    """The tokens that begin, end and fill up texts, where theirs names them: first of all for those who write."""
    writing = source.with_name("generation_config.json")
    said = recipes.read_object(writing) if writing.exists() else {}
    body = recipes.read_object(source) | {name: value for name, value in said.items() if value is not None}
    found = {name: body.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, ids in found.items():
        some = ids if isinstance(ids, list) and name.startswith("eos") else [ids] if ids is not None else []
        whole = all(type(i) is int and 0 <= i < MAX_SIZE for i in some)
        require(whole, f"{source}: {name}", ids, "the id of a token")
    return found


def _shape(source: Path) -> tuple[ModuleType, ModelConfig]:
    body = recipes.read_object(source)
    try:
        converter = pick(CONVERTERS, str(body.get("model_type", body.get("_class_name"))), "model_type")
        return converter, converter.config_from(body)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
