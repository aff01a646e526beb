"""How many loops each token runs, and when: decided before the loop starts, from numbers that the host knows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ritornello.config import MAX_LOOPS, require, require_int
from ritornello.model.context import Loop
from ritornello.ops.subset import Subset


@dataclass(frozen=True)
class Depth:
    """A plan of `n_iterations` passes through the block. Rows of the batch run in `order`, the first `sizes[i]` of them
    in iteration i. Token t of a row is at its own loop `i - starts` while 0 <= i - starts < budgets.

    Budgets per token start together and end apart. Budgets per sequence can end together instead (`right_aligned`): a
    sequence of n loops joins at iteration n_iterations - n, so that the last loops of all coincide.
    """

    n_iterations: int
    order: Tensor | None = None  # (B,) the row that runs in each place
    sizes: tuple[int, ...] | None = None  # None: all rows, always
    starts: Tensor | None = None  # (B, 1) or (B, T), in running order; None: 0
    budgets: Tensor | None = None  # (B, 1) or (B, T); None: n_iterations - starts

    @staticmethod
    def uniform(n_loops: int) -> "Depth":
        require_int("n_loops", n_loops, 1, MAX_LOOPS)
        return Depth(n_loops)

    @staticmethod
    def right_aligned(counts: Sequence[int] | np.ndarray, deepest: int = 0) -> "Depth":
        """counts: integers on the host, (B,) by sequence, or (B, T) constant within each document of packed rows.
        deepest: the largest, where other processes have more rows: the first iterations may then run none."""
        loops = np.asarray(counts)
        require(loops.ndim in (1, 2) and loops.size > 0, "n_loops", loops.shape, "of shape (B,) or (B, T)")
        _check_budgets(loops.dtype.kind in "iu", int(loops.min()), int(loops.max()))
        deepest = max(deepest, int(loops.max()))
        if int(loops.min()) == deepest:
            return Depth(deepest)
        by_row = (loops := loops.reshape(len(loops), -1)).max(1)
        order = np.argsort(-by_row, kind="stable")
        sizes = tuple(int((by_row >= deepest - i).sum()) for i in range(deepest))
        return Depth(deepest, torch.from_numpy(order), sizes, torch.from_numpy(deepest - loops[order]))

    @staticmethod
    def of(n_loops: "int | Tensor | Depth", shape: tuple[int, int]) -> "Depth":
        """Whatever the caller gave as n_loops, for tokens of `shape` (B, T)."""
        if isinstance(n_loops, Depth):
            plan = n_loops.budgets if n_loops.starts is None else n_loops.starts
            ok = plan is None or (plan.shape[0] == shape[0] and plan.shape[1] in (1, shape[1]))
            require(ok, "n_loops", None if plan is None else tuple(plan.shape), f"a plan for (B, T) = {shape}")
            return n_loops
        if not isinstance(n_loops, Tensor):
            return Depth.uniform(n_loops)
        fits = n_loops.shape in (shape[:1], shape)
        require(fits, "n_loops", tuple(n_loops.shape), f"of shape (B,) or (B, T) = {shape}")
        whole = not n_loops.is_floating_point() and n_loops.dtype != torch.bool
        low, high = (int(x) for x in n_loops.aminmax())
        _check_budgets(whole, low, high)
        return Depth(high) if low == high else Depth(high, budgets=n_loops.reshape(shape[0], -1))

    def to(self, device: torch.device) -> "Depth":
        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        return Depth(self.n_iterations, move(self.order), self.sizes, move(self.starts), move(self.budgets))

    def restore(self, x: Tensor) -> Tensor:
        """x (B, ...) from running order to the batch's."""
        return x if self.order is None else x[self.order.argsort()]

    def rows(self, iteration: int, batch: int) -> int:
        """How many rows run in this iteration."""
        return batch if self.sizes is None else self.sizes[iteration]

    def turn(self, iteration: int, rows: int, halted: Tensor | None = None) -> "Turn":
        """Who does what in this iteration, given who has `halted` (rows, T) before its budget ended."""
        loop, running, last = iteration, None, iteration == self.n_iterations - 1
        if self.starts is not None:
            loop = (iteration - self.starts[:rows]).clamp(min=0)
            running = None if self.starts.shape[1] == 1 else iteration >= self.starts[:rows]
        if self.budgets is not None:
            running, last = iteration < self.budgets[:rows], iteration == self.budgets[:rows] - 1
        if halted is not None:
            running = ~halted if running is None else running & ~halted
        return Turn(loop, running, last)


@dataclass(frozen=True)
class Turn:
    """One iteration: the loop index of each token; who runs, (rows, 1 or T), None: all; whose last loop it is;
    whether these are only some tokens of the batch."""

    loop: Loop
    running: Tensor | None
    last: Tensor | bool
    partial: bool = False

    def take(self, some: Subset) -> "Turn":
        pick = lambda x: some.take(x) if isinstance(x, Tensor) else x  # noqa: E731
        return Turn(pick(self.loop), some.running, pick(self.last), partial=True)


def _check_budgets(whole: bool, low: int, high: int) -> None:
    require(whole and low >= 1 and high <= MAX_LOOPS, "n_loops", (low, high), f"integers in [1, {MAX_LOOPS}]")
