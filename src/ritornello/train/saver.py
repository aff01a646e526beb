"""Checkpoints written beside the training that goes on: a step waits for a copy of the state, not for the disk."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ritornello.train import checkpoint, sharded, tensors
from ritornello.train.parallel import World


class Saver:
    """Writes the checkpoints of one run, one at a time; the caller holds the run's lock until this is left.

    background: on a thread of its own, from copies, so that training may change everything at once. What kept a
    checkpoint from being written is raised by the next call, at the latest when this is left: earlier ones are intact.
    world: of processes that write together, each what it holds, in a group apart from training's; None: this one
    writes all.
    """

    def __init__(self, run_dir: str | Path, *, keep: int, background: bool = True, world: World | None = None) -> None:
        self.run_dir, self.keep, self.world = Path(run_dir), keep, world
        self.newest: Path | None = None  # complete on the disk
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def save(
        self,
        *,
        step: int,
        model_state: Mapping[str, Tensor],
        optimizer_state: checkpoint.OptimizerState,
        **others: Any,
    ) -> None:
        """`checkpoint.save` or `sharded.save`, once the one before is written. One that is there already stays.

        Raises:
            OSError, ValueError: see there; in the background, of the one before.
        """
        states = {"model_state": model_state, "optimizer_state": optimizer_state}
        if self.wait() == checkpoint.path_of(self.run_dir, step) and self.world is not None:
            return
        how: Any = {**others, "step": step, "keep": self.keep}
        write: Callable[..., Path] = checkpoint.save if self.world is None else sharded.save
        if self.world is None:
            how |= {name: tensors.copied(state) if self._pool else state for name, state in states.items()}
        else:
            how["world"] = self.world
            owns = {name: sharded.own(state, self.world) for name, state in states.items()}
            how |= {name: own.copied() if self._pool else own for name, own in owns.items()}
        if self._pool is not None:
            self._pending = self._pool.submit(write, self.run_dir, **how)
        else:
            self.newest = write(self.run_dir, **how)

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
