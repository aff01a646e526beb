"""llama.cpp's files of one model, its numbers dequantised by transformers, tokenizer and all."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ritornello.config import require
from ritornello.train import tensors

SUFFIX = ".gguf"
SCALED = "rope_freqs.weight"  # of Llama 3.1: transformers leaves it out without a word, and angles would be wrong
DAMAGED = (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, OverflowError)  # as its readers tell


@dataclass(frozen=True)
class Dequantized:
    """Tensors in memory, with what is asked of stored ones."""

    described: dict[str, Tensor]
    source: Path

    def read(self) -> dict[str, Tensor]:
        tensors.require_finite(self.described, self.source)
        return self.described


class Gguf:
    """A file of one model: what its config.json would say, its tensors in float32, its tokenizer.

    Raises:
        ValueError: a package is missing, it is not such a file, or its positions are not plain rope.
    """

    def __init__(self, path: Path) -> None:
        try:
            import accelerate  # noqa: F401 - transformers asks for it here
            from gguf import GGUFReader
        except ImportError as error:
            raise ValueError(f"{path}: needs the package {error.name}; pip install 'ritornello[gguf]'") from error
        require(path.is_file(), "source", str(path), "a file")
        self.source, self._place = path, path.absolute()
        try:
            scaled = any(tensor.name == SCALED for tensor in GGUFReader(path).tensors)
        except DAMAGED as error:
            raise self._unread(error) from None
        require(not scaled, f"{path}: rope", SCALED, "plain, the one that is converted")
        self.body: dict[str, Any] = self._by(AutoConfig).to_dict()
        self.writing: dict[str, Any] = {}

    @cached_property
    def stored(self) -> Dequantized:
        model = self._by(AutoModelForCausalLM, dtype=torch.float32)
        return Dequantized(dict(model.state_dict()), self.source)

    def tokenizer(self) -> Any:
        return self._by(AutoTokenizer)

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)

    def _by(self, auto: Any, **options: Any) -> Any:
        try:
            return auto.from_pretrained(str(self._place.parent), gguf_file=self._place.name, **options)
        except DAMAGED as error:
            raise self._unread(error) from None

    def _unread(self, error: Exception) -> ValueError:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ValueError(f"{self.source}: not read as a GGUF model: {said[:300]}")
