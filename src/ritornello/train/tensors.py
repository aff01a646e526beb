"""Named tensors as the bytes of a safetensors file, and back without trusting a byte of it."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ritornello import recipes
from ritornello.config import shown

MAX_HEADER = 100_000_000  # bytes, the format's own limit
DTYPES = {  # by the format's names, in the format's order
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
RENAMED = {".lora_A": ".loop_A", ".lora_B": ".loop_B"}  # parts of names, as they were before version 0.2


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file. Names of one and the same tensor (tied weights) are stored once and tied again by `read`."""
    owners: dict[object, str] = {}
    storages: set[int] = set()
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(_view(name, tensor), name)
        if owner != name:
            tied[name] = owner
            continue
        unique[name] = tensor.detach().cpu().contiguous()
        storage = unique[name].untyped_storage().data_ptr()
        if tensor.numel() and storage in storages:  # another view of it: the format wants memory of its own
            unique[name] = unique[name].clone()
        storages.add(storage)
    return safetensors.torch.save(unique, metadata={"tied": json.dumps(tied)})


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors in the host's memory that nothing else writes to, tied ones still tied; other values as they are."""
    owners: dict[object, Tensor] = {}
    copies = dict(state)
    for name, value in state.items():
        if isinstance(value, Tensor):
            view = _view(name, value)
            if view not in owners:
                owners[view] = value.detach().to("cpu", copy=True)
            copies[name] = owners[view]
    return copies


def _view(name: str, tensor: Tensor) -> object:
    """What names of one and the same tensor have in common."""
    same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return same if tensor.numel() else name


def write(
    out: Callable[[memoryview], object],
    described: Mapping[str, Tensor],
    tensor: Callable[[str], Tensor],
    **metadata: object,
) -> None:
    """A safetensors file of which one tensor at a time is in memory.

    Args:
        out: takes the next bytes.
        described: shape and dtype of each tensor by name (meta tensors will do).
        tensor: the one of a name; each is asked for once.
        metadata: plain JSON.
    """
    assert sys.byteorder == "little", "the format's"
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    names = sorted(
        described, key=lambda name: (list(kinds).index(described[name].dtype), name)
    )  # aligned in this order
    header: dict[str, object] = {"__metadata__": {name: json.dumps(value) for name, value in metadata.items()}}
    place = 0
    for name in names:
        x = described[name]
        span = [place, place := place + x.numel() * x.dtype.itemsize]
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape), "data_offsets": span}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out(memoryview(len(text).to_bytes(8, "little") + text))
    for name in filter(lambda name: described[name].numel(), names):
        out(tensor(name).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself, by tensor; what it says is checked by who opens it with the library.

    Raises:
        ValueError: not such a file (a renamed pickle, say), or a duplicate key; names `path`.
    """
    with path.open("rb") as source:
        begin, n_bytes = source.read(9), path.stat().st_size
        end = 8 + int.from_bytes(begin[:8], "little")
        if len(begin) < 9 or end > min(n_bytes, MAX_HEADER) or begin[8:] != b"{":
            raise ValueError(
                f"{path}: not a safetensors file; pickles are never loaded: convert it where it is trusted"
            )
        text = begin[8:] + source.read(end - 9)
    try:
        return recipes.parse_json(text.decode(), path)  # the library lets duplicate keys pass
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: not such a file (a renamed pickle, say), a duplicate key, offsets that do not fit; names `path`.
    """
    about = header(path)
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None
    tensors |= {name: tensors[owner] for name, owner in ties(about, tensors, path).items()}
    return {renamed(name): tensor for name, tensor in tensors.items()}


def renamed(name: str) -> str:
    """What a tensor is called now: its name in a file may be of an earlier version."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def require_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise `ValueError` naming the floating-point tensors that hold a NaN or an infinity."""
    wide = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dtype.itemsize > 1}
    bad = [name for name, tensor in wide.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{source}: {listed('NaN or infinite values in', bad)}")


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: object) -> None:
    """Raise `ValueError` unless `state` has the names, shapes and dtypes of `expected` (meta tensors will do)."""
    problems = [
        listed("missing", [name for name in expected if name not in state]),
        listed("not in this model", [name for name in state if name not in expected]),
    ]
    for what in ("shape", "dtype"):
        pairs = [
            (name, getattr(state[name], what), getattr(expected[name], what)) for name in expected if name in state
        ]
        wrong = [f"{name} {_plain(found)} instead of {_plain(want)}" for name, found, want in pairs if found != want]
        problems.append(listed(f"wrong {what}", wrong))
    if any(problems):
        raise ValueError(f"{source}: " + "; ".join(filter(None, problems)))


def in_types_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`expected`, its floating-point tensors in the types of those that were found, for `check` to compare the rest."""

    def alike(x: Tensor, like: Tensor | None) -> Tensor:
        both = like is not None and like.is_floating_point() and x.is_floating_point()
        return x.to(like.dtype) if like is not None and both else x

    return {name: alike(x, found.get(name)) for name, x in expected.items()}


def listed(problem: str, names: list[str]) -> str:
    """`problem` and the first ten names; empty without names."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{problem} {', '.join(map(shown, names[:10]))}{more}" if names else ""


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


def ties(header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """The names that are not in the file but mean one of its tensors."""
    owners = recipes.parse_json(header.get("__metadata__", {}).get("tied", "{}"), path)
    if not isinstance(owners, dict):
        raise ValueError(f"{path}: tied = {shown(owners)}: must be an object of names")
    for name, owner in owners.items():
        if name in tensors or not isinstance(owner, str) or owner not in tensors:
            raise ValueError(f"{path}: {shown(name)} is tied to {shown(owner)}, which is not in the file")
    return owners
