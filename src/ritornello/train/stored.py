"""Tensors in safetensors files, whole or in parts: a process reads what it holds, and nothing else.

In a file of parts, "<name>@<offset>" is a part of the tensor <name> that begins there, and the metadata's `shapes` say
how large the whole ones are. So each file says itself what it is: no index can be lost, or disagree.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ritornello import recipes
from ritornello.config import shown
from ritornello.train import parts, tensors
from ritornello.train.parallel import is_spread
from ritornello.train.parts import Part

SHAPES = "shapes"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, as `key` in a file."""

    part: Part
    path: Path
    key: str


@dataclass(frozen=True)
class Entry:
    """A tensor with all its pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)


class Stored:
    """The tensors of some files, which together hold each of them once.

    Raises:
        ValueError: not safetensors, parts that overlap, leave numbers out or reach outside of their tensor, or do not
            agree what it is; the file is named.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        several = f"{paths[0].stem.partition('-')[0]}-*{paths[0].suffix}"
        self.source = paths[0] if len(paths) == 1 else paths[0].with_name(several)  # for messages
        self._files: dict[Path, Any] = {}
        self._entries: dict[str, Entry] = {}
        self._owners: dict[str, str] = {}  # of names for another one's tensor
        for path in paths:
            self._open(path)
        for name, entry in self._entries.items():
            self._check(name, entry)

    @property
    def described(self) -> dict[str, Tensor]:
        """Shape and dtype of each tensor: on the meta device."""
        found = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in self._entries.items()}
        return found | {name: found[owner] for name, owner in self._owners.items()}

    def read(self, layout: Callable[[str], Tensor | None] = lambda _: None, *, rest: bool = True) -> dict[str, Tensor]:
        """Every tensor, on the CPU and whole; or, where `layout` has a DTensor of its shape, spread and placed alike.
        rest: also those that `layout` knows nothing of.

        Raises:
            ValueError: a NaN or an infinity, or a damaged file, which is named.
        """
        wanted = [name for name in self._entries if rest or layout(name) is not None]
        found = {name: self.tensor(name, layout(name)) for name in wanted}
        return found | {name: found[owner] for name, owner in self._owners.items() if owner in found}

    def tensor(self, name: str, like: Tensor | None = None) -> Tensor:
        """One of them; see `read`."""
        entry = self._entries[self._owners.get(name, name)]
        if like is None or not is_spread(like) or like.shape != entry.shape:
            found = torch.empty(entry.shape, dtype=entry.dtype)
        else:
            found = torch.empty_like(like.detach(), dtype=entry.dtype)
        for part, view in parts.held(found):
            for piece in entry.pieces:
                common = part.common(piece.part)
                if common is not None:
                    view[common.within(part)] = self._numbers(name, piece, common)
        return found

    def _numbers(self, name: str, piece: Piece, part: Part) -> Tensor:
        """Those of `part`, which lies in the piece."""
        file = self._files[piece.path]
        if part == piece.part:
            found = file.get_tensor(piece.key)
        else:
            found = file.get_slice(piece.key)[part.within(piece.part)]
        tensors.require_finite({name: found}, piece.path)
        return found

    def _open(self, path: Path) -> None:
        about = tensors.header(path)
        try:
            self._files[path] = safe_open(path, framework="pt")
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: not a valid safetensors file: {error}") from None
        metadata = about.pop("__metadata__", {})
        shapes = recipes.parse_json(metadata[SHAPES], path) if SHAPES in metadata else None
        for key, entry in about.items():
            name, part = (key, parts.whole(entry["shape"])) if shapes is None else _part(key, entry["shape"], path)
            shape = part.shape if shapes is None else _shape(shapes, name, path)
            self._add(tensors.renamed(name), Piece(part, path, key), entry["dtype"], shape)
        self._owners |= tensors.ties({"__metadata__": metadata}, about, path)

    def _add(self, name: str, piece: Piece, dtype: str, shape: tuple[int, ...]) -> None:
        place = f"{piece.path}: {shown(piece.key)}"
        if dtype not in tensors.DTYPES:
            raise ValueError(f"{place}: dtype = {shown(dtype)}: must be one of {', '.join(tensors.DTYPES)}")
        given = Entry(tensors.DTYPES[dtype], shape)
        entry = self._entries.setdefault(name, given)
        if (entry.dtype, entry.shape) != (given.dtype, given.shape):
            before = f"{entry.dtype} {entry.shape} in {entry.pieces[0].path.name}"
            raise ValueError(f"{place}: of a tensor of {given.dtype} {shape}, but {before}")
        if len(piece.part.shape) != len(shape) or any(map(int.__gt__, piece.part.end, shape)):
            raise ValueError(f"{place}: {piece.part.shape} reaches outside of its tensor of {shape}")
        entry.pieces.append(piece)

    def _check(self, name: str, entry: Entry) -> None:
        both = parts.overlapping([piece.part for piece in entry.pieces])
        if both is not None:
            one, other = (entry.pieces[i] for i in both)
            raise ValueError(f"{other.path}: {shown(other.key)} overlaps {shown(one.key)} of {one.path.name}")
        n, whole = sum(piece.part.size for piece in entry.pieces), prod(entry.shape)
        if n != whole:
            raise ValueError(f"{self.source}: {shown(name)}: {whole - n} of {whole} numbers are in no file")


def keyed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parts of `tensor` that this process holds, by the keys that they have in a file of parts."""
    for part, view in parts.held(tensor):
        yield f"{name}@{','.join(map(str, part.offset))}", view


def _part(key: str, shape: Sequence[int], path: Path) -> tuple[str, Part]:
    found = re.fullmatch(r"(.+)@((?:\d{1,18}(?:,\d{1,18})*)?)", key, re.ASCII)
    offset = tuple(map(int, found[2].split(","))) if found and found[2] else ()
    if found is None or len(offset) != len(shape):
        raise ValueError(f"{path}: {shown(key)}: must be a name, @, and {len(shape)} offsets")
    return found[1], Part(offset, tuple(shape))


def _shape(shapes: object, name: str, path: Path) -> tuple[int, ...]:
    found = shapes.get(name) if isinstance(shapes, dict) else None
    if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"{path}: {SHAPES}: {shown(name)} = {shown(found)}: must be a list of integers >= 0")
    return tuple(found)
