"""A run of several processes ends when one of them dies, fails or hangs: all others say which, and leave."""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from ritornello.config import ParallelConfig
from ritornello.train import files, runs
from ritornello.train.hub import (
    ANSWER,
    JOIN,
    SETTLE,
    TICK,
    Hub,
    Member,
    Message,
    Verdict,
    connected,
    listening,
    receive,
    send,
)

KEY = "ritornello/watch"  # in the store that the processes meet at: where the first one listens
GRACE = 20.0  # seconds for a process to leave by itself: torchrun ends it after 30
STALLED = 3  # the exit code of a process that stops for another one's sake
STACK = 2  # standard error, where the stacks of a run that hangs are written to
logger = logging.getLogger("ritornello")


class Helper(threading.Thread):
    """A thread that the training thread waits for."""


class StoppedError(RuntimeError):
    """Another process of the run died, failed or hangs; the message, which the log has too, names it."""

    exit_code = STALLED


@dataclass
class Watch:
    """What one process knows of the others. Alone, or in a group that the caller has started, it knows nothing."""

    own: Member
    size: int
    out: Path
    stall_s: int
    first: Member | None = None
    verdict: Verdict | None = None
    step: int = 0
    started: bool = False
    store: Any = None  # of this start only: torchrun's own outlives its restarts, with the addresses of who is gone
    _store: Any = None  # which ends with the first process' last use of it
    _connection: Connection | None = None
    _since: float = field(default_factory=time.monotonic)  # the last step's end, or the start
    _known: threading.Event = field(default_factory=threading.Event)
    _left: threading.Event = field(default_factory=threading.Event)

    def reached(self, step: int) -> None:
        """So many steps are done, with all that was due after the last."""
        self.step, self.started, self._since = step, True, time.monotonic()

    def reason(self, error: BaseException) -> BaseException:
        """What to raise for `error`: itself where this process is the one that ended the run; it bears `said` then,
        whether another process says the same."""
        if self._connection is None:
            return error
        text = " ".join((str(error) or type(error).__name__).split())[:300]
        if not self._known.is_set():
            kind = "broke" if isinstance(error, RuntimeError) else "failed"
            send(self._connection, {"error": text, "kind": kind})
        self._known.wait(2 * (SETTLE + TICK) + ANSWER)
        verdict = self.verdict
        ours = verdict is None or self.own.rank in verdict.ranks
        if ours or (verdict is not None and verdict.text.endswith(f"failed: {text}")):
            error.__dict__["said"] = not ours
            return error
        stopped = StoppedError(self._said())
        for note in getattr(error, "__notes__", ()):
            stopped.add_note(note)
        stopped.__dict__["said"] = self.verdict is not None and self.verdict.kind != "failed"
        return stopped

    def leave(self) -> None:
        """Nobody need miss this process."""
        self._left.set()
        if self._connection is not None:
            send(self._connection, {"bye": True})

    def listen(self) -> None:
        """What the daemon thread does: hears of the others, and ends this process where it does not leave itself."""
        assert self._connection is not None
        asked: float | None = None  # the first process, which then answers
        while self.verdict is None:
            message = self._connection.poll(TICK) and receive(self._connection)
            if self._left.is_set():
                return
            if message is not False:
                self._heard(message)
            now = time.monotonic()
            if not self.stall_s or now < self._since + self.stall_s:
                asked = None
            elif asked is None:
                asked = now
                send(self._connection, {"stalled": True})
            elif now > asked + ANSWER:
                self._end(Verdict("stalled", [0], f"{self._named_first()} does not answer"))
        self._depart(self.verdict)

    def _heard(self, message: Message | None) -> None:
        match message:
            case None:
                self._end(Verdict("died", [0], f"{self._named_first()} died"))
            case {"end": dict(found)}:
                self._end(Verdict(**found))
            case {"where": _} if self._connection is not None:
                place, waits = _place(threading.main_thread().ident)
                send(self._connection, {"place": place, "waits": waits, "started": self.started})
            case {"here": _}:  # and judges; until then there is nothing to ask
                self._since = time.monotonic() - self.stall_s + 3 * ANSWER

    def _end(self, verdict: Verdict) -> None:
        if verdict.kind == "stalled":
            faulthandler.dump_traceback(STACK, all_threads=True)
        self.verdict = verdict
        if verdict.kind != "failed":  # of those that failed alike, only one says it
            self._say()
        self._known.set()

    def _depart(self, verdict: Verdict) -> None:
        """Without waiting for ever for a backend that does not notice; a checkpoint that is being written may end."""
        patient = time.monotonic() + (0.0 if verdict.kind == "stalled" else GRACE)
        last = patient + self.stall_s
        while time.monotonic() < patient or (verdict.kind != "stalled" and self._writes() and time.monotonic() < last):
            if self._left.wait(TICK):
                return
        if verdict.kind == "failed":
            self._say()
        os._exit(STALLED)

    def _say(self) -> None:
        """At once: a backend, or torchrun, may end this process before it says anything itself."""
        logger.error("error: %s", self._said())

    def _writes(self) -> bool:
        """Whether this process is writing a checkpoint."""
        return any(Path(self.out, runs.CHECKPOINTS).glob(f"{files.TEMPORARY}{os.getpid()}-*"))

    def _named_first(self) -> str:
        assert self.first is not None
        return self.first.named(self.size)

    def _said(self) -> str:
        """In full by the first process that is left; others need only say why they stop."""
        assert self.verdict is not None
        left = [rank for rank in range(self.size) if rank not in self.verdict.ranks]
        if self.verdict.kind == "failed" or (left and self.own.rank != left[0]):
            return f"stopped: {self.verdict.text}"
        stalled = f"no step ended for {self.stall_s} s: " if self.verdict.kind == "stalled" else ""
        newest = runs.newest(self.out)
        saved = "nothing is saved" if newest is None else f"nothing after checkpoint {newest.name} is saved"
        saved += ", another one being written" if self._writes() else ""
        where = f"after step {self.step}" if self.started else "before the first step"
        return f"{stalled}{self.verdict.text}, {where}: {saved}; start again with --resume"


@contextmanager
def watching(config: ParallelConfig, out: Path) -> Iterator[Watch]:
    """The watch over the processes that torchrun, or whoever sets RANK and WORLD_SIZE, started for a run in `out`.

    Raises:
        StoppedError: in place of this process' own error, where another process died, failed first, or hangs.
    """
    import torch.distributed as dist

    size = int(os.environ.get("WORLD_SIZE", 1))
    own = Member(int(os.environ.get("RANK", 0)), socket.gethostname(), os.getpid())
    watch = Watch(own, size, out, config.stall_s)
    if size == 1 or dist.is_initialized():
        yield watch
        return
    hub = _join(watch)
    try:
        yield watch
    except BaseException as error:
        reason = watch.reason(error)
        watch.leave()
        if reason is error:
            raise
        raise reason from error
    watch.leave()
    if hub is not None:
        hub.join(ANSWER)  # the others are about to leave too


def _join(watch: Watch) -> threading.Thread | None:
    """Meet the others; returns the first process' thread that listens to all."""
    import torch.distributed as dist

    address, hub = os.environ.get("MASTER_ADDR", ""), None
    where = f"{address}:{os.environ.get('MASTER_PORT')}"
    late = threading.Timer(JOIN + GRACE, _give_up, [where])  # torch waits for ever for one that listens and is silent
    late.daemon = True
    late.start()
    try:
        watch._store, *_ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN))))
        if watch.own.rank == 0:
            hub = _listen(watch, address)
        connection, place = _found(watch._store, address)
    except RuntimeError as error:  # of torch.distributed
        said = " ".join(str(error).split())[:200]
        raise StoppedError(f"not all of the {watch.size} processes met at {where} in {JOIN:g} s: {said}") from error
    finally:
        late.cancel()
    watch.first, watch._connection = Member(**place["first"]), connection
    watch.store = dist.PrefixStore(place["token"], watch._store)
    send(connection, {"token": place["token"], **asdict(watch.own)})
    _started(watch.listen)
    return hub


def _listen(watch: Watch, address: str) -> threading.Thread:
    hub = Hub(watch.size, listening(address))
    place = {"port": hub.listener.getsockname()[1], "token": hub.token, "first": asdict(watch.own)}
    thread = _started(hub.serve)
    watch._store.set(KEY, json.dumps(place))
    return thread


def _found(store: Any, address: str) -> tuple[Connection, dict[str, Any]]:
    """The first process, where it listens now: a store that outlives a run still knows where it did then."""
    while True:  # a timer ends this
        place = json.loads(store.get(KEY))
        try:
            return connected(socket.create_connection((address, place["port"]), timeout=ANSWER)), place
        except OSError:
            time.sleep(TICK)


def _give_up(where: str) -> None:
    logger.error("process 0 does not answer at %s", where)
    os._exit(STALLED)


def _started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="watch", daemon=True)
    thread.start()
    return thread


def _place(thread: int | None) -> tuple[str, bool]:
    """Where a thread, or one that it waits for, is, by its innermost line of this package; whether it waits for other
    processes there."""
    frames = sys._current_frames()
    helpers = [each.ident for each in threading.enumerate() if isinstance(each, Helper)]
    places = [_of(frames.get(each or 0)) for each in (*helpers, thread)]
    return next((place for place in places if place[1]), places[-1])


def _of(frame: FrameType | None) -> tuple[str, bool]:
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "nowhere", False
    names = [str(each.f_globals.get("__name__")) for each in frames]
    ours = next((each for each, name in zip(frames, names, strict=True) if name.startswith("ritornello")), frames[0])
    code = ours.f_code
    return f"{Path(code.co_filename).name}:{ours.f_lineno} in {code.co_name}", any(
        name.startswith("torch.distributed") for name in names
    )
