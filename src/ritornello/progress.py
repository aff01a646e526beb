"""How far a run is, on standard error: a live bar on a terminal, a line now and then elsewhere, nothing when quiet."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING, Self, final

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn


def process_rank() -> int:
    """Which of the processes that torchrun started this is; the first one speaks for all."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def shown_metric(value: float) -> str:
    """Four significant digits; whole numbers in full."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def shown_speed(tokens_per_second: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if tokens_per_second >= limit:
            return f"{tokens_per_second / limit:.1f}{unit} tok/s"
    return f"{tokens_per_second:.0f} tok/s"


@final
class Progress:
    """An observer of a run of `total_steps`, to be used as a context manager.

    `update` takes any metrics: those with a `loss` (nats per token) move the bar or its plain line, with `tok_per_s`
    where given; others, such as an evaluation's, are results and get a line of their own. Plain lines come at most
    once in `every` seconds by `clock`, and at the last step. ETA is from the steps seen, so it holds for a resumed run.
    """

    def __init__(
        self, total_steps: int, *, quiet: bool = False, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._quiet, self._every, self._clock = total_steps, quiet, every, clock
        self._bar = _bar(total_steps) if not quiet and sys.stderr and sys.stderr.isatty() else None
        self._first: tuple[int, float] | None = None
        self._last = -inf

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that `step` steps are done."""
        if self._first is None:
            self._first, self._last = (step, self._clock()), -inf  # the first step is news
        if "loss" not in metrics:
            self.note(f"step {step}: " + ", ".join(f"{name} {shown_metric(value)}" for name, value in metrics.items()))
            return
        loss = f"loss {metrics['loss']:.4f}"
        speed = shown_speed(metrics["tok_per_s"]) if "tok_per_s" in metrics else ""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description="", completed=step, loss=loss, speed=speed)
        elif self._due() or step >= self._total:
            self.note("  ".join(filter(None, (f"step {step}/{self._total}", loss, speed, self._eta(step)))))

    def stage(self, name: str, done: int, total: int) -> None:
        """Report what comes before the first step, such as tokenising: `done` bytes of `total`."""
        text = f"{name} {done / max(1, total):.0%}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=text)
        elif self._due():
            self.note(text)

    def count(self, done: int, total: int) -> None:
        """Report that `done` of `total` things are done, where there are no metrics of them."""
        self._total = total
        if self._first is None:
            self._first = (done, self._clock())
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif self._due() or done >= total:
            self.note("  ".join(filter(None, (f"{done}/{total}", self._eta(done)))))

    def note(self, text: str) -> None:
        """A line of text, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet and sys.stderr:
            try:
                print(text, file=sys.stderr, flush=True)  # noqa: T201 - the progress of a command is part of its output
            except OSError:  # nobody reads it any more; a run doesn't end for that
                self._quiet = True

    def _due(self) -> bool:
        """Whether the last plain line is long enough ago; if so, the next one counts from now."""
        due = self._clock() - self._last >= self._every
        if due:
            self._last = self._clock()
        return due

    def _eta(self, step: int) -> str:
        assert self._first is not None
        first_step, start = self._first
        if step <= first_step:
            return ""
        return f"ETA {timedelta(seconds=round((self._clock() - start) / (step - first_step) * (self._total - step)))}"


def _bar(total_steps: int) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4, expand=True)
    bar.add_task("", total=total_steps, loss="", speed="")
    return bar
