"""Published models as ours: one module for each, by the `model_type`, or `_class_name`, of its config.json.

A module has `config_from(config.json) -> ModelConfig`, `from_theirs(tensors, config)` and `to_theirs`, its inverse;
perhaps `UNREAD`, parts of the names of tensors that a file may have for no layer.
Nothing in a folder is trusted: no code, no pickle, no file beside it.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer

from ritornello import recipes
from ritornello.config import MAX_SIZE, ModelConfig, pick, require
from ritornello.device import pick_device
from ritornello.engine.generate import Loaded
from ritornello.hub import hrm_text, huginn, llama, ouro, parcae
from ritornello.hub.export import created, free, write_model
from ritornello.hub.gguf import SUFFIX, Gguf
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.native import loaded_of, tokenizer_in, weight_files
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import tensors
from ritornello.train.stored import Stored
from ritornello.train.tokenizer import MAX_BYTES

CONVERTERS: dict[str, ModuleType] = {
    "hrm_text": hrm_text,
    "huginn_raven": huginn,
    "llama": llama,
    "mistral": llama,
    "ouro": ouro,
    "ParcaeConfig": parcae,
}
CLASSES: dict[type[ModelConfig], type[RecurrentDepthTransformer]] = {hrm_text.HrmTextConfig: hrm_text.HrmText}
Change = Callable[[RecurrentDepthTransformer], RecurrentDepthTransformer]
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
UNREAD = (
    huginn.ROPE_TABLE,
    "lm_head.weight",
    "rotary_emb.inv_freq",
)  # ends of names: they follow


class Folder:
    """A model as it was published: config.json, safetensors, a tokenizer's files."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, path / "config.json"
        self.body = recipes.read_object(self.source)
        writing = path / "generation_config.json"
        self.writing = recipes.read_object(writing) if writing.exists() else {}

    @property
    def stored(self) -> Stored:
        return Stored(weight_files(self.path))

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(str(self.path.absolute()))

    def save_tokenizer(self, folder: Path) -> None:
        """As it is."""
        for name in TOKENIZER:
            if (self.path / name).is_file():
                text = recipes.read_text(self.path / name, max_bytes=MAX_BYTES)
                (folder / name).write_text(text, encoding="utf-8")


def read_published(path: str | Path, *, kind: str | None = None) -> RecurrentDepthTransformer:
    """The model of a folder with config.json and safetensors as published, on the CPU, in the weights' own dtypes; or
    of a `.gguf` file, in float32.

    kind: what to read it as; None: the model_type that it names.

    Raises:
        ValueError: another kind of model, or what is damaged, missing or not of this model, named.
    """
    return _read(_opened(path), kind)


def encoded(path: str | Path, text: str) -> list[int]:
    """The ids of a text by a published model's own tokenizer, as transformers reads it.

    Raises:
        ValueError: there is none that it reads.
    """
    published = _opened(path)
    try:
        return published.tokenizer()(text, add_special_tokens=False).input_ids
    except (OSError, KeyError, TypeError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{published.source}: no tokenizer that transformers reads: {said[:300]}") from None


def convert(
    path: str | Path,
    target: str | Path,
    *,
    kind: str | None = None,
    change: Change | None = None,
    max_shard: str = "5GB",
) -> Path:
    """Write a published model as a folder that transformers reads, as `export` does a run, whole or not at all.

    Its tokenizer's files come along as they are.
    kind: as for `read_published`. change: what to make of the model first, `upcycle` for example. max_shard: the
    largest file, "200MB" for example.

    Raises:
        ValueError: what `read_published` or `change` refuses, or something at `target`.
    """
    target, published = free(target), _opened(path)
    found = _read(published, kind)
    found = found if change is None else change(found)
    model = RitornelloForCausalLM.of(found, **_ids(published))
    with created(target) as folder:
        write_model(model, folder, dtype=None, max_shard=max_shard)
        published.save_tokenizer(folder)
    return target


def _opened(path: str | Path) -> Folder | Gguf:
    path = Path(path)
    return Gguf(path) if path.suffix == SUFFIX else Folder(path)


def _read(published: Folder | Gguf, kind: str | None) -> RecurrentDepthTransformer:
    converter, config = _shape(published, kind)
    with torch.device("meta"):
        model = CLASSES.get(type(config), RecurrentDepthTransformer)(config)
    stored, unread = published.stored, getattr(converter, "UNREAD", set())
    expected = converter.to_theirs(model.state_dict(), config)
    idle = {name for name in stored.described if name.endswith(UNREAD) or unread & {*name.split(".")}}
    found = {name: x for name, x in stored.described.items() if name in expected or name not in idle}
    tensors.check(found, tensors.in_types_of(found, expected), stored.source)
    model.load_state_dict(converter.from_theirs(stored.read(), config), assign=True)
    return model.eval()


def load_published(path: str | Path, *, device: str = "auto") -> Loaded:
    """Such a model with its tokenizer, ready to generate; errors as above."""
    path, target = Path(path), pick_device(device)
    model = read_published(path).to(target)
    return loaded_of(model, tokenizer_in(path, model.config.vocab_size), path)


def _ids(published: Folder | Gguf) -> dict[str, Any]:
    """The tokens that begin, end and fill up texts, where theirs names them: first of all for those who write."""
    body = published.body | {name: value for name, value in published.writing.items() if value is not None}
    found = {name: body.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, ids in found.items():
        some = ids if isinstance(ids, list) and name.startswith("eos") else [ids] if ids is not None else []
        whole = all(type(i) is int and 0 <= i < MAX_SIZE for i in some)
        require(whole, f"{published.source}: {name}", ids, "the id of a token")
    return found


def _shape(published: Folder | Gguf, kind: str | None) -> tuple[ModuleType, ModelConfig]:
    try:
        converter = pick(
            CONVERTERS, kind or str(published.body.get("model_type", published.body.get("_class_name"))), "model_type"
        )
        return converter, converter.config_from(published.body)
    except ValueError as error:
        raise ValueError(f"{published.source}: {error}") from None
