"""Work done in a process of its own for each piece, several at once."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

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
    context = get_context("spawn")
    left, under_way = list(pieces), {}
    try:
        while left or under_way:
            while left and len(under_way) < at_once:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_answer, args=(send, work, left.pop(0)), daemon=True)
                process.start()
                send.close()  # here, so that the end of the process ends the pipe
                under_way[receive] = process
            for ended in wait(list(under_way)):
                assert isinstance(ended, Connection)
                answer = _received(ended)
                process = under_way.pop(ended)
                process.join()
                if answer is None:
                    raise RuntimeError(f"a process ended without an answer, exit code {process.exitcode}")
                if isinstance(answer[0], Exception):
                    raise answer[0]
                yield answer[0]
    finally:
        for receive, process in under_way.items():
            receive.close()
            process.terminate()
        for process in under_way.values():
            process.join(PATIENCE)
            process.kill()  # nothing where it has ended
            process.join()


def _received(connection: Connection) -> Any:
    with connection:
        try:
            return connection.recv()
        except EOFError:
            return None


def _answer(send: Connection, work: Callable[..., object], piece: tuple[Any, ...]) -> None:
    try:
        answer = work(*piece)
    except Exception as error:  # noqa: BLE001  (raised again where the answer is read)
        answer = _portable(error)
        answer.add_note(f"in a process of its own:\n{traceback.format_exc()}")
    send.send((answer,))


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way, or one that tells what it said."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # noqa: BLE001  (whatever its class does)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
