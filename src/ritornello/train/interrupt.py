"""Ctrl-C and SIGTERM ask a run to stop after its step; a second signal doesn't wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(KeyboardInterrupt):
    """The run was asked to stop, saved everything, and can be resumed."""


class StopRequest:
    """`signum` is the signal that arrived, None before."""

    signum: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Signals are noted while the block runs, then mean what they did before. Only the main thread can do this."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, request.handle) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
