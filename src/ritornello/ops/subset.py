"""Some tokens of a batch as a smaller batch, so that those which have halted cost nothing."""

from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

WORTH = 0.9  # of the batch, at most: above it, gathering costs what it saves


@dataclass(frozen=True)
class Subset:
    """Of a batch (B, T), tokens (m, t) of the rows (m,), in order of position; a row with fewer than t that run is
    filled up with some that do not. running (m, t) tells which; None: all."""

    rows: Tensor
    tokens: Tensor
    running: Tensor | None
    shape: tuple[int, int]  # (B, T)

    @staticmethod
    def of(running: Tensor, n_tokens: int) -> "Subset | None":
        """The tokens where `running` (B, T or 1); None where leaving out the others is not worth it. Waits for the
        device. Never empty: where nobody runs it holds one token that does not."""
        shape = (running.shape[0], n_tokens)
        running = running.expand(shape)
        counts = running.sum(1).tolist()
        most = max([1, *counts])
        rows = [row for row, count in enumerate(counts) if count] or [0]
        if len(rows) * most > WORTH * running.numel():
            return None
        chosen = torch.tensor(rows, device=running.device)
        tokens = running[chosen].to(torch.uint8).argsort(stable=True, descending=True)[:, :most].sort().values
        whole = all(counts[row] == most for row in rows)
        return Subset(chosen, tokens, None if whole else running[chosen[:, None], tokens], shape)

    @cached_property
    def _places(self) -> Tensor:
        """(m · t,) in the flattened batch."""
        return (self.rows[:, None] * self.shape[1] + self.tokens).flatten()

    @overload
    def take(self, x: Tensor) -> Tensor: ...
    @overload
    def take(self, x: None) -> None: ...
    def take(self, x: Tensor | None) -> Tensor | None:
        """(B, T, ...) -> (m, t, ...), or (B, 1, ...) -> (m, 1, ...)."""
        if x is None or x.shape[1] == 1:
            return None if x is None else x[self.rows]
        return x.flatten(0, 1).index_select(0, self._places).unflatten(0, self.tokens.shape)

    @overload
    def put(self, old: Tensor, new: Tensor) -> Tensor: ...
    @overload
    def put(self, old: None, new: Tensor | None) -> None: ...
    def put(self, old: Tensor | None, new: Tensor | None) -> Tensor | None:
        """old (B, T, ...) with new (m, t, ...) in their places; a new tensor."""
        if old is None or new is None:
            return None
        return old.flatten(0, 1).index_copy(0, self._places, new.flatten(0, 1)).view(old.shape)

    def seen(self, mask: Tensor | None) -> Tensor:
        """(m, 1, t, S) bool: what these tokens see, among all that mask (B or 1, 1, T, S) lets see; None: causal."""
        if mask is not None:
            return mask.expand(self.shape[0], -1, -1, -1)[self.rows[:, None], 0, self.tokens][:, None]
        return self.tokens[:, None, :, None] >= torch.arange(self.shape[1], device=self.tokens.device)

    def spread(self, x: Tensor) -> Tensor:
        """(m, t, ...) -> (B, T, ...), zero elsewhere."""
        return self.put(x.new_zeros(*self.shape, *x.shape[2:]), x)
