"""What the recurrence carries, and what a forward pass returns."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ritornello.model.context import Loop
from ritornello.model.depth import Turn
from ritornello.model.halting import HaltState
from ritornello.model.moe import Routed
from ritornello.ops.routing import Routing
from ritornello.ops.subset import Subset


@dataclass(frozen=True)
class LoopState:
    """The carry after a loop, a value. Of a batch of B rows, the first m in running order are under way.

    h: (m, T, D), or (m, T, n, D) with carry streams. loops_used: (m, T). rows: (m,) their places in the batch.
    loop: the index of the loop just run; running (m, T or 1): who ran it, None: all. routed: by recurrent layer.
    entries: by layer, the keys and values that halted tokens keep. halt: None when nothing can halt.
    """

    h: Tensor
    loops_used: Tensor
    rows: Tensor
    loop: Loop = -1
    running: Tensor | None = None
    routed: tuple[Routed, ...] = ()
    entries: dict[int, Tensor] | None = None
    halt: HaltState | None = None

    def join(self, other: "LoopState") -> "LoopState":
        """Rows that start now, below those under way. They have no entries yet, and overwrite the zeros put here."""
        entries = self.entries
        if entries is not None:
            shape = other.h.shape[:2]
            entries = {layer: torch.cat((x, x.new_zeros(*shape, x.shape[-1]))) for layer, x in entries.items()}
        halt = None if self.halt is None or other.halt is None else self.halt.join(other.halt)
        pairs = (self.h, other.h), (self.loops_used, other.loops_used), (self.rows, other.rows)
        h, used, rows = (torch.cat(pair) for pair in pairs)
        return LoopState(h, used, rows, entries=entries, halt=halt)

    def take(self, some: Subset) -> "LoopState":
        """The state of some tokens; `entries` remain those of all."""
        halt = None if self.halt is None else self.halt.take(some)
        h, used = some.take(self.h), some.take(self.loops_used)
        return LoopState(h, used, self.rows[some.rows], entries=self.entries, halt=halt)

    def put(self, some: Subset, new: "LoopState", turn: Turn) -> "LoopState":
        """This state after `turn`, which some of its tokens have run."""
        share = len(some.rows) / len(self.rows)  # the loss is a mean over sequences
        routed = tuple(Routed(some.spread(r.indices), r.balance * share) for r in new.routed)
        halt = None if self.halt is None or new.halt is None else self.halt.put(some, new.halt)
        h, used = some.put(self.h, new.h), some.put(self.loops_used, new.loops_used)
        return LoopState(h, used, self.rows, turn.loop, turn.running, routed, new.entries, halt)


@dataclass
class Output:
    """logits (B, T, V) or None; hidden (B, T, D) = norm(coda(h)), in which they are linear; loops_used (B, T).

    aux: scalars for a loss: `balance` (mean over loops and layers), `ponder` (loops + remainder, mean over tokens).
    trajectory: the state after each loop, if asked for.
    """

    logits: Tensor | None
    hidden: Tensor
    loops_used: Tensor
    routing: Routing | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)
    trajectory: list[LoopState] | None = None
