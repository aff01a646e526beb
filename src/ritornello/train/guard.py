"""Which steps are left out: those whose loss or gradient is not finite, and, where asked for, spikes."""

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

LEAST = 1e-3  # of the mean: the smallest standard deviation
WINDOW = 128  # steps that a new one is compared with; half of them must be there (OLMo-core's SkipStepOptimizer)
IN_A_ROW = 3  # steps without a finite result, after which a run ends


class SkippedStepError(ArithmeticError):
    """A step that changed neither parameters nor optimizers."""

    def __init__(self, step: int, sequences: Sequence[int], loss: float, grad_norm: float, reason: str) -> None:
        self.step, self.sequences, self.loss, self.grad_norm, self.reason = step, sequences, loss, grad_norm, reason
        super().__init__(f"step {step}: {reason}; nothing was updated; sequences {_listed(sequences)}")


class NonFiniteError(SkippedStepError):
    """A loss or gradient that is not finite."""


class SpikeError(SkippedStepError):
    """A loss or gradient norm far above those before."""


@dataclass(frozen=True)
class Limits:
    """What a step may reach: above it, it is left out."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def check(
        self, step: int, sequences: Sequence[int], loss: float, grad_norm: float, others: Sequence[float] = ()
    ) -> None:
        """Raises NonFiniteError, for `others` too, or SpikeError."""
        if not all(map(math.isfinite, (loss, grad_norm, *others))):
            raise NonFiniteError(step, sequences, loss, grad_norm, "the loss or a gradient is not finite")
        for name, value, most in ("loss", loss, self.loss), ("gradient norm", grad_norm, self.grad_norm):
            if value > most:
                raise SpikeError(step, sequences, loss, grad_norm, f"{name} {value:.4g} is above {most:.4g}, a spike")


@dataclass(frozen=True)
class Seen:
    """What a guard knows, as a checkpoint keeps it."""

    losses: list[float]
    grad_norms: list[float]
    lost: list[tuple[int, list[int]]]
    n_skipped: int


@dataclass
class Guard:
    """What the steps so far were like. sigmas: standard deviations above the mean that make a spike, 0: nothing does.

    Only finite numbers enter the history, and a spike as the limit that it passed: one of any size leaves the guard
    awake, and a loss that stays where it jumped to is soon no spike.
    """

    sigmas: float
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    lost: list[tuple[int, list[int]]] = field(default_factory=list)  # the last steps, not finite: their sequences
    n_skipped: int = 0

    def limits(self) -> Limits:
        """Of the next step."""
        if not self.sigmas or len(self.losses) < WINDOW // 2:
            return Limits()
        return Limits(*(_limit(seen, self.sigmas) for seen in (self.losses, self.grad_norms)))

    def done(self, loss: float, grad_norm: float) -> None:
        """A step was made."""
        self.lost.clear()
        self._remember(loss, grad_norm)

    def skipped(self, error: SkippedStepError) -> None:
        """A step was left out. The last of IN_A_ROW that were not finite is raised and names all their sequences."""
        self.n_skipped += 1
        if not isinstance(error, NonFiniteError):
            self.lost.clear()
            most = self.limits()
            self._remember(min(error.loss, most.loss), min(error.grad_norm, most.grad_norm))
            return
        self.lost.append((error.step, list(error.sequences)))
        if len(self.lost) >= IN_A_ROW:
            all_of_them = "; ".join(f"step {step}: {_listed(sequences)}" for step, sequences in self.lost)
            raise NonFiniteError(
                error.step,
                error.sequences,
                error.loss,
                error.grad_norm,
                f"{len(self.lost)} steps in a row without a finite loss and gradient (sequences of {all_of_them}); "
                "lower train.lr, or look at these sequences",
            ) from error

    def _remember(self, loss: float, grad_norm: float) -> None:
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def state(self) -> dict[str, Any]:
        """`Seen` as plain JSON."""
        lost = [[step, sequences] for step, sequences in self.lost]
        seen = {"losses": list(self.losses), "grad_norms": list(self.grad_norms)}
        return {**seen, "lost": lost, "n_skipped": self.n_skipped}

    def restore(self, state: Seen) -> None:
        self.losses.extend(state.losses)
        self.grad_norms.extend(state.grad_norms)
        self.lost = list(state.lost)
        self.n_skipped = state.n_skipped


def _limit(seen: Collection[float], sigmas: float) -> float:
    """A history that hardly varies says nothing: what lies within a thousandth of its mean is no deviation."""
    mean = fmean(seen)
    return mean + sigmas * max(pstdev(seen), LEAST * abs(mean))


def _listed(sequences: Sequence[int], most: int = 64) -> str:
    more = f" and {len(sequences) - most} more" if len(sequences) > most else ""
    return ", ".join(map(str, sequences[:most])) + more
