"""uvicorn, and how it ends: what is under way is finished first."""

import contextlib
import gc
import logging
import signal
import socket
import time
from asyncio import TimerHandle
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ritornello.serve.app import Service
from ritornello.serve.settings import MAX_HEAD

BACKLOG = 4096  # connections that wait to be taken
GRACE = 1.0  # seconds in which clients are told that nothing more comes


class Server(uvicorn.Server):
    """SIGTERM and Ctrl-C: `/ready` says no, nothing new is let in, what is under way goes on for `drain_seconds` at
    most. The second one ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.signal: int | None = None
        self.again = False  # a second one came
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        seconds = self.service.settings.drain_seconds if self.signal is None else 0
        self.again = self.signal is not None
        self.signal = self.signal or sig
        self.service.draining = True
        self._deadline = time.monotonic() + seconds

    async def on_tick(self, counter: int) -> bool:
        worker, late = self.service.worker, time.monotonic() - self._deadline
        if self.service.draining and late > 0:
            worker.give_up("the server is on its way out")
        if self.service.draining and (not self.service.n_open or late > GRACE):
            return True
        return await super().on_tick(counter)


class Connection(H11Protocol):
    """One whose request has to begin, and its head to be there, in time."""

    header_seconds = 10.0
    _late: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Nobody sends more before the answer is there: uvicorn would keep it, and not see the client leave."""
        super().data_received(data)
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and not self.cycle.more_body and self.conn.trailing_data[0]:
            self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(self.header_seconds, self._close_if_headless)

    def _close_if_headless(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def bind(host: str, port: int, *, write_seconds: float) -> socket.socket:
    """A listening socket. Who leaves unread what was sent for so long is disconnected by the system.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * write_seconds))
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return listening


def raise_file_limit() -> None:
    """As many connections as the system lets this process have."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def config_for(app: Any, service: Service, *, access_log: bool = False) -> uvicorn.Config:
    connection = type("Timed", (Connection,), {"header_seconds": service.settings.header_seconds})
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_graceful_shutdown=2,  # by then all that is under way was waited for
    )


def serve(app: Any, service: Service, listening: socket.socket, *, access_log: bool = False) -> None:
    """Until a signal ends it.

    Raises:
        KeyboardInterrupt: that was Ctrl-C.
        SystemExit: a second signal.
    """
    raise_file_limit()
    gc.collect()
    gc.freeze()  # what is there stays: else a large body has the collector look through all of torch
    level = logging.INFO if access_log else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    server = Server(config_for(app, service, access_log=access_log), service)
    server.run([listening])
    if server.again:
        raise SystemExit(128 + (server.signal or signal.SIGTERM))
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt
