"""Checkpoints written beside the training that goes on: a step waits for a copy of the state, not for the disk."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ritornello.train import checkpoint, tensors


class Saver:
    """Writes the checkpoints of one run, one at a time; the caller holds the run's lock until this is left.

    background: on a thread of its own, from copies, so that training may change everything at once. What kept a
    checkpoint from being written is raised by the next call, at the latest when this is left: earlier ones are intact.
    """

    def __init__(self, run_dir: str | Path, *, keep: int, background: bool = True) -> None:
        self.run_dir, self.keep = Path(run_dir), keep
        self.newest: Path | None = None  # complete on the disk
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def save(
        self, *, model_state: Mapping[str, Tensor], optimizer_state: checkpoint.OptimizerState, **others: Any
    ) -> None:
        """`checkpoint.save`, once the one before is written.

        Raises:
            OSError, ValueError: see `checkpoint.save`; in the background, of the one before.
        """
        self.wait()
        states = {"model_state": model_state, "optimizer_state": optimizer_state}
        if self._pool is not None:
            states = {name: tensors.copied(state) for name, state in states.items()}
        how: Any = {**states, **others, "keep": self.keep}
        if self._pool is not None:
            self._pending = self._pool.submit(checkpoint.save, self.run_dir, **how)
        else:
            self.newest = checkpoint.save(self.run_dir, **how)

    def wait(self) -> Path | None:
        """The newest checkpoint, when all are written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.newest = pending.result()
        return self.newest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"the last checkpoint was not written: {failed}")
        finally:
            self.close()

    def close(self) -> None:
        """Wait for what is under way, without asking how it went."""
        if self._pool is not None:
            self._pool.shutdown()
