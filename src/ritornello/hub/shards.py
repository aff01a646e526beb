"""The folder of a published checkpoint, read tensor by tensor: config.json, and safetensors with or without an index.

Nothing in it is trusted: no code, no pickle, no file outside it. A shard is opened when a tensor of it is asked for.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ritornello import recipes
from ritornello.config import require, shown
from ritornello.train import tensors
from ritornello.train.tokenizer import MAX_BYTES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FP8 = "F8_E4M3"
DTYPES = ("F64", "F32", "BF16", "F16", FP8)
SCALES = "_scale_inv"  # what the name of a tensor's block scales adds to its own


def dequantize(
    weight: Tensor, scales: Tensor, *, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers times the scale of their block (DeepSeek-V3 2412.19437, §3.3.2), which the last ones cut short.

    weight: (N, K) float8_e4m3fn. scales: (⌈N / block[0]⌉, ⌈K / block[1]⌉). Multiplied in float32, rounded once, as
    DeepSeek's own code; dtype torch.float64: exact.
    """
    wide, found = torch.promote_types(dtype, torch.float32), torch.empty(weight.shape, dtype=dtype)
    for rows, out, scale in zip(weight.split(block[0]), found.split(block[0]), scales.to(wide), strict=True):
        out.copy_(rows.to(wide) * scale.repeat_interleave(block[1])[: weight.shape[1]])
    return found


class Published:
    """What a folder holds.

    Raises:
        ValueError: what is damaged or missing, with its file; here or when it is asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = recipes.read_object(self.folder / "config.json")
        self._headers: dict[Path, Mapping[str, Any]] = {}
        self._files: dict[Path, Any] = {}
        self._places = self._index() if (self.folder / INDEX).exists() else None
        self._block = self._blocks()

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """One of them, of the shape it must have; FP8 dequantised. dtype None: as stored, FP8 as float32.

        Raises:
            ValueError: not there, of another shape, not of a known type, damaged, or not finite; names tensor and file.
        """
        found, path = self._raw(name, shape)
        if found.dtype == torch.float8_e4m3fn:
            if self._block is None or len(shape) != 2:
                raise ValueError(f"{path}: {shown(name)}: FP8 without a weight_block_size in config.json")
            n_blocks = [-(-n // b) for n, b in zip(shape, self._block, strict=True)]
            scales, _ = self._raw(name + SCALES, n_blocks)
            found = dequantize(found, scales, block=self._block, dtype=dtype or torch.float32)
        found = found if dtype is None else found.to(dtype)
        tensors.require_finite({name: found}, path)
        return found

    def _raw(self, name: str, shape: Any) -> tuple[Tensor, Path]:
        path = self._path(name)
        entry = self._header(path).get(name)
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: no tensor {shown(name)}")
        if entry.get("dtype") not in DTYPES:
            raise ValueError(
                f"{path}: {shown(name)}: dtype = {shown(entry.get('dtype'))}: must be one of {', '.join(DTYPES)}"
            )
        if entry.get("shape") != list(shape):
            raise ValueError(f"{path}: {shown(name)}: shape = {shown(entry.get('shape'))}: must be {list(shape)}")
        return self._file(path).get_tensor(name), path

    def _path(self, name: str) -> Path:
        if self._places is None:
            path = self.folder / WEIGHTS
        else:
            if name not in self._places:
                raise ValueError(f"{self.folder / INDEX}: no tensor {shown(name)}")
            path = self.folder / self._places[name]
        if path.is_symlink() or not path.is_file():
            remedy = "download it into a folder of its own" if path.is_symlink() else "download this shard too"
            raise ValueError(f"{path}: a regular file must hold {shown(name)}; {remedy}")
        return path

    def _header(self, path: Path) -> Mapping[str, Any]:
        if path not in self._headers:
            self._headers[path] = tensors.header(path)
        return self._headers[path]

    def _file(self, path: Path) -> Any:
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: not a valid safetensors file: {error}") from None
        return self._files[path]

    def _index(self) -> dict[str, str]:
        source = self.folder / INDEX
        places: Any = recipes.read_object(source, max_bytes=MAX_BYTES).get("weight_map")
        require(isinstance(places, dict) and bool(places), f"{source} weight_map", places, "names of tensors and files")
        for file in places.values():
            ours = isinstance(file, str) and re.fullmatch(r"[^/\\]+\.safetensors", file) is not None
            require(ours, f"{source} weight_map", file, "the name of a safetensors file in the folder")
        return places

    def _blocks(self) -> tuple[int, int] | None:
        """How many rows and columns share a scale; None: nothing is quantised."""
        said: Any = self.config.get("quantization_config")
        if said is None:
            return None
        place, known = f"{self.folder / 'config.json'} quantization_config", isinstance(said, dict)
        method = said.get("quant_method") if known else said
        require(method == "fp8", f"{place} quant_method", method, "'fp8'", "convert a release in FP8 or bfloat16")
        block = said.get("weight_block_size")
        ok = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        require(ok, f"{place} weight_block_size", block, "two integers > 0")
        return block[0], block[1]
