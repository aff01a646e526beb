"""Where the processes of a run are heard: one of them listens to all, and says which of them ended the run, and how.

Each holds one connection, which the kernel closes when its process ends, however it ends: a death is known at once and
by its number, whatever the backend makes of it. Messages are lines of JSON from processes that know a token.
"""

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

JOIN = 300.0  # seconds in which all must have started
TICK = 0.5  # seconds between two looks at the clock
SETTLE = 0.5  # in which the cause may follow what came of it: a broken connection is noticed by many
ANSWER = 10.0  # for a process to say where it is
MOST = 1 << 16  # bytes of a message
LOCAL = ("localhost", "127.0.0.1", "::1")
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}  # a lost machine
CERTAINTY = ("died", "failed", "broke")  # of causes, the first being one that nothing else explains

Message = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A process of a run."""

    rank: int
    host: str
    pid: int

    def named(self, size: int) -> str:
        return f"process {self.rank} of {size} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Which processes ended a run, and a line that says so."""

    kind: Literal["died", "failed", "stalled", "missing"]
    ranks: list[int]
    text: str


def send(connection: Connection, message: Message) -> None:
    """To a process that may be gone: its connection says so when it is read."""
    try:
        connection.send_bytes(json.dumps(message).encode())
    except OSError:
        return


def receive(connection: Connection) -> Message | None:
    """The next message; None: nobody is there any more."""
    try:
        message = json.loads(connection.recv_bytes(MOST))
    except (OSError, EOFError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def connected(own: socket.socket) -> Connection:
    """A connection that also ends when the other machine is lost, after half a minute."""
    own.settimeout(None)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(ANSWER), 0))  # of a message begun
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # of this system
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(own.detach())


def listening(address: str) -> socket.socket:
    """On this machine alone where that is where all of them are."""
    if address in LOCAL:
        return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


@dataclass
class Hub:
    """Listens to `size` processes until all have left; `serve` on a thread of its own."""

    size: int
    listener: socket.socket
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    _members: dict[Connection, Member] = field(default_factory=dict)  # that are there
    _joined: dict[int, Member] = field(default_factory=dict)  # that ever were
    _causes: list[tuple[str, int, str]] = field(default_factory=list)  # how certain, who, what was said
    _since: float = 0.0  # the first cause
    _asked: float | None = None
    _places: dict[int, Message] = field(default_factory=dict)
    _verdict: Verdict | None = None

    def serve(self) -> None:
        begun = time.monotonic()
        while len(self._joined) < self.size or self._members:
            more = [self.listener] if len(self._joined) < self.size else []
            for ready in wait([*self._members, *more], TICK):
                if isinstance(ready, Connection):
                    self._hear(ready)
                else:
                    self._join()
            if self._verdict is None:
                self._verdict = self._judged(time.monotonic(), begun)
                if self._verdict is not None:
                    self._tell({"end": asdict(self._verdict)})
        self.listener.close()

    def _join(self) -> None:
        connection = connected(self.listener.accept()[0])
        hello = receive(connection) if connection.poll(ANSWER) else None
        if hello is None or not hmac.compare_digest(str(hello.get("token")), self.token):
            connection.close()
            return
        member = Member(int(hello["rank"]), str(hello["host"]), int(hello["pid"]))
        self._members[connection] = self._joined[member.rank] = member

    def _hear(self, connection: Connection) -> None:
        message, member = receive(connection), self._members[connection]
        match message:
            case None:
                if all(rank != member.rank for _, rank, _ in self._causes):
                    self._cause("died", member.rank, "")
                self._leave(connection)
            case {"bye": _}:
                self._leave(connection)
            case {"error": str(text), "kind": str(kind)} if kind in CERTAINTY:
                self._cause(kind, member.rank, text)
            case {"stalled": _}:
                send(connection, {"here": True})
                if self._asked is None:
                    self._asked = time.monotonic()
                    self._tell({"where": True})
            case {"place": _}:
                self._places[member.rank] = message

    def _cause(self, kind: str, rank: int, text: str) -> None:
        self._since = self._since or time.monotonic()
        self._causes.append((kind, rank, text))

    def _leave(self, connection: Connection) -> None:
        del self._members[connection]
        connection.close()

    def _tell(self, message: Message) -> None:
        for connection in sorted(self._members, key=lambda each: -self._members[each].rank):
            send(connection, message)  # the first process last: this thread ends with it

    def _judged(self, now: float, begun: float) -> Verdict | None:
        if self._causes:
            return self._of_causes() if now > self._since + SETTLE else None
        if self._asked is not None and (len(self._places) == self.size or now > self._asked + ANSWER):
            return self._of_places()
        missing = [rank for rank in range(self.size) if rank not in self._joined]
        if missing and now > begun + JOIN:
            return Verdict("missing", missing, f"process {listed(missing)} of {self.size} did not start in {JOIN:g} s")
        return None

    def _of_causes(self) -> Verdict:
        """Who died; else who failed by itself, the lowest number where all did; else whose error came first."""
        dead = sorted(rank for kind, rank, _ in self._causes if kind == "died")
        if dead:
            return Verdict("died", dead, f"{self._named(dead)} died")
        failed = sorted(rank for kind, rank, _ in self._causes if kind == "failed")
        first = failed[0] if failed else self._causes[0][1]
        text = next(text for _, rank, text in self._causes if rank == first)
        return Verdict("failed", [first], f"{self._named([first])} failed: {text}")

    def _of_places(self) -> Verdict | None:
        """Who does not answer; else who does something else than wait for the others; else all of them. Before the
        first step, preparing data may take any time."""
        silent = [rank for rank in self._joined if rank not in self._places]
        if silent:
            return Verdict("stalled", silent, f"{self._named(silent)} does not answer")
        if not all(place["started"] for place in self._places.values()):
            self._asked = None
            self._places.clear()
            return None
        busy = [rank for rank, place in self._places.items() if not place.get("waits")] or list(self._joined)
        places = "; ".join(f"{self._named([rank])} is at {self._places[rank]['place']}" for rank in sorted(busy))
        return Verdict("stalled", sorted(busy), places)

    def _named(self, ranks: Sequence[int]) -> str:
        return " and ".join(self._joined[rank].named(self.size) for rank in ranks)


def listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
