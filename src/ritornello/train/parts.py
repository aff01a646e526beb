"""Where in a whole tensor the numbers lie that one process holds, whatever its layout is: boxes, by their corners."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from ritornello.train.parallel import is_spread


@dataclass(frozen=True)
class Part:
    """A box of a tensor: `offset` is its first number's place in the whole one. Neither has an entry for a scalar."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(start + n for start, n in zip(self.offset, self.shape, strict=True))

    def common(self, other: "Part") -> "Part | None":
        """What lies in both, if anything does."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(min(ends) - start for start, *ends in zip(offset, self.end, other.end, strict=True))
        return Part(offset, shape) if all(n > 0 for n in shape) else None

    def within(self, other: "Part") -> tuple[slice, ...]:
        """The slices of `other`'s own numbers that this part of it takes."""
        starts = [own - its for own, its in zip(self.offset, other.offset, strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))


def whole(shape: Sequence[int]) -> Part:
    return Part((0,) * len(shape), tuple(shape))


def held(tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """The parts of `tensor` that this process holds, with a view of each: one, or several of a DTensor whose rows were
    dealt out in turns, or none where there were too few rows. A tensor that is no DTensor is held whole."""
    if not is_spread(tensor):
        yield whole(tensor.shape), tensor.detach()
        return
    local: Tensor = tensor.detach().to_local()  # pyrefly: ignore
    for runs in product(*(_runs(_indices(tensor, dim)) for dim in range(tensor.ndim))):
        part = Part(tuple(start for start, _ in runs), tuple(places.stop - places.start for _, places in runs))
        yield part, local[tuple(places for _, places in runs)]


def _indices(tensor: Any, dim: int) -> Tensor:
    """Of a DTensor's indices along `dim`, those that this process holds, in its order."""
    indices, coordinate = torch.arange(tensor.shape[dim]), tensor.device_mesh.get_coordinate()
    if coordinate is None:  # another part of the mesh holds all of it
        return indices[:0]
    for place, n, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial(), (placement, "has to be added up first")
        if getattr(placement, "dim", None) == dim:  # the offset that PyTorch computes is the first index only
            along = indices.view(*[1] * dim, -1)
            indices = placement._split_tensor(along, n, with_padding=False)[0][place].flatten()
    assert len(indices) == tensor.to_local().shape[dim]
    return indices


def _runs(indices: Tensor) -> list[tuple[int, slice]]:
    """Every run of consecutive indices: its first one, and its places in the list."""
    if not len(indices):
        return []
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(indices)]
    return [(int(indices[start]), slice(start, stop)) for start, stop in pairwise(edges)]


def overlapping(parts: Sequence[Part]) -> tuple[int, int] | None:
    """The places of two parts of a tensor that have a number in common, if there are any."""
    active: list[int] = []
    for i in sorted(range(len(parts)), key=lambda i: parts[i].offset):
        part = parts[i]
        active = [k for k in active if parts[k].end[:1] > part.offset[:1]] if part.shape else active
        for k in active:
            if part.common(parts[k]) is not None:
                return min(i, k), max(i, k)
        active.append(i)
    return None
