"""Work done in a process of its own for each piece, several at once."""

import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

T = TypeVar("T")
PATIENCE = 10.0  # seconds that a process has to end by itself


def each_alone(work: Callable[..., T], pieces: Sequence[tuple[Any, ...]], *, at_once: int) -> Iterator[T]:
    """Yield work(*piece) as they finish. The first that fails ends the others, and so does leaving the iterator.

    No pool: its processes are reused, so that the peak memory of one is that of the largest piece it ever had, and one
    that replaces them (`max_tasks_per_child`) can wait for ever when it is stopped.

    Raises:
        RuntimeError: a process ended without an answer, its exit code is named; or what `work` raised cannot travel.
            Else what `work` raised.
    """
    left, under_way = list(pieces), dict[Connection, Beside[T]]()
    try:
        while left or under_way:
            while left and len(under_way) < at_once:
                started = Beside(work, *left.pop(0))
                under_way[started.connection] = started
            for ended in wait(list(under_way)):
                assert isinstance(ended, Connection)
                yield under_way.pop(ended).result()
    finally:
        for started in under_way.values():
            started.stop()
        for started in under_way.values():
            started.end()


class Beside(Generic[T]):
    """work(*piece) in a process that starts now and ends with this one."""

    def __init__(self, work: Callable[..., T], *piece: Any) -> None:
        context = get_context("spawn")
        self.connection, send = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(send, work, piece), daemon=True)
        self._process.start()
        send.close()  # here, so that the end of the process ends the pipe

    def ends_within(self, seconds: float) -> bool:
        """Wait so long at most; whether it has an answer, or none to come."""
        return bool(wait([self.connection], seconds))

    def result(self) -> T:
        """Wait for the end; what `work` returned, or raised. See `each_alone`."""
        with self.connection:
            try:
                (answer,) = self.connection.recv()
            except (EOFError, OSError):
                self._process.join()
                raise RuntimeError(f"a process ended without an answer, exit code {self._process.exitcode}") from None
        self._process.join()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()

    def end(self) -> None:
        """Now, after `stop`."""
        self._process.join(PATIENCE)
        self._process.kill()  # nothing where it has ended
        self._process.join()


def _answer(send: Connection, work: Callable[..., object], piece: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; what then happens is the parent's say
    try:
        answer = work(*piece)
    except KeyboardInterrupt as interrupt:  # a run that was asked to stop, and has saved
        answer = RuntimeError(str(interrupt) or "interrupted")
    except Exception as error:  # noqa: BLE001  (raised again where the answer is read)
        answer = _portable(error)
        answer.add_note(f"in a process of its own:\n{traceback.format_exc()}")
    with suppress(BrokenPipeError):  # nobody waits for it any more
        send.send((answer,))


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way, or one that tells what it said."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # noqa: BLE001  (whatever its class does)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
