"""Attention of tokens that share a row of a batch but not what they see: each group of them has entries of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Attend = Callable[[tuple[Tensor, ...], Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Group:
    """tokens (g, t): places in the row; entries (g, S, W): what each of the g sees; mask (g or 1, 1, t, S) as in
    `ops.attention`. is_row: these are the tokens of the row, each once, in order."""

    tokens: Tensor
    entries: Tensor
    mask: Tensor | None
    is_row: bool = False


@dataclass(frozen=True)
class Ragged:
    """Groups that have every token of a row, some of them twice."""

    groups: Sequence[Group]

    def each(self, queries: tuple[Tensor, ...], attend: Attend) -> Tensor:
        """attend(queries (g, t, H, K), entries, mask) of every group, together again: (1, N, ...)."""
        if self.groups[0].is_row:
            (group,) = self.groups
            y = attend(
                tuple(part.view(*group.tokens.shape, *part.shape[2:]) for part in queries), group.entries, group.mask
            )
            return y.flatten(0, 1)[None]
        found = [
            attend(tuple(part[0, group.tokens] for part in queries), group.entries, group.mask) for group in self.groups
        ]
        places = torch.cat([group.tokens.flatten() for group in self.groups])
        y = torch.cat([part.flatten(0, 1) for part in found])
        return y.new_empty(queries[0].shape[1], *y.shape[1:]).index_copy_(0, places, y)[None]
