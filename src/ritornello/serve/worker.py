"""The engine in a thread of its own: what is asked comes in between two ticks, what it tells goes to who waits."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar, final

from ritornello.config import require
from ritornello.engine.constraints import Grammars
from ritornello.engine.engine import Engine
from ritornello.engine.generate import Loaded
from ritornello.engine.pages import Layout
from ritornello.engine.request import Event, Request, Stats

log = logging.getLogger(__name__)
Found = TypeVar("Found")
DONE: Any = object()
PATIENCE = 3  # ticks that may fail within RECENT_SECONDS: after each one all texts start over
RECENT_SECONDS = 60
TELL_SECONDS = 0.02  # between two times that the event loop is woken while the engine works
STATS_SECONDS = 0.25  # how old the published ones may be while the engine works


class Texts:
    """What the engine tells of the texts of one request: (place among them, event), read on the event loop."""

    def __init__(self, n: int, cost: int) -> None:
        self.left, self.cost = set(range(n)), cost / n  # places that are not done; tokens × loops of each
        self.numbers: list[int] = []  # the engine's, of each text
        self._told: list[tuple[int, Event]] = []
        self._new = asyncio.Event()
        self._failure: Exception | None = None

    async def read(self) -> list[tuple[int, Event]]:
        """What has come since, at least one; raises what made the engine give them up."""
        await self._new.wait()
        self.check()
        self._new.clear()
        told, self._told = self._told, []
        return told

    def check(self) -> None:
        """Raises what made the engine give them up, if it did."""
        if self._failure is not None:
            raise self._failure

    def tell(self, events: Sequence[tuple[int, Event]]) -> None:
        self._told.extend(events)
        self._new.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._new.set()


class GivenUpError(Exception):
    """Texts that will not be written to their end, with the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class OverloadedError(Exception):
    """More texts than the server takes; in `seconds` there may be room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"as many texts under way and waiting as the server takes; try again in {seconds} s")
        self.seconds = seconds


@final
class Worker:
    """Who owns the engine. All but `call`ed functions runs on the event loop; the engine's thread is the only one that
    touches the engine.

    max_requests: texts under way and waiting; more are refused.
    """

    def __init__(self, engine: Engine, *, max_requests: int) -> None:
        self.engine, self.max_requests = engine, max_requests
        self.n_texts, self.cost = 0, 0.0  # of all that are let in and not done
        self._gone = ""  # why nothing is begun any more
        self._open: set[Texts] = set()  # whose answers are not at their end
        self._stepping = asyncio.Semaphore(1)
        self.stats: Stats = engine.stats()
        self.rate = 0.0  # tokens × loops a second, lately
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._places: dict[int, tuple[Texts, int]] = {}  # by the engine's number; the thread's alone
        self._alive_at = self._asked_at = time.monotonic()
        self._idle, self._closing = True, False
        self._untold: dict[Texts, list[tuple[int, Event]]] = {}  # what was written since; the thread's alone
        self._told_at = 0.0
        self._coming: list[Callable[[], object]] = []  # texts that wait for the others' next token; the thread's alone
        self._waited = 0  # ticks that they did
        self._in_step = False  # the last tick ended a token
        self._failed_at: list[float] = []  # ticks, lately
        self._published, self._measured = 0.0, (time.monotonic(), engine.n_token_loops)
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """After the texts under way are dropped; waits for the tick that runs."""
        self._put(self._close)
        await asyncio.to_thread(self._thread.join, 10)

    def silent_for(self) -> float:
        """Seconds since the engine's thread gave a sign; 0 where it waits for work, infinite where it has ended."""
        if not self._thread.is_alive():
            return math.inf
        if self._idle and self._inbox.empty():
            return 0.0
        return time.monotonic() - (max(self._alive_at, self._asked_at) if self._idle else self._alive_at)

    async def call(self, do: Callable[[], Found], *, with_others: bool = False) -> Found:
        """What `do` returns, run between two ticks; with_others: when texts under way begin a token, see `_enter`."""
        assert self._loop is not None
        loop, future = self._loop, self._loop.create_future()

        def settle(how: str, value: Any) -> None:
            if not future.done():
                getattr(future, how)(value)

        def run() -> None:
            try:
                found = ("set_result", do())
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                found = ("set_exception", error)
            loop.call_soon_threadsafe(settle, *found)

        self._put(partial(self._coming.append, run) if with_others else run)
        return await future

    async def open(self, requests: Sequence[Request], *, cost: int) -> Texts:
        """Let them in; `drop` has to follow, whatever happens.

        Raises:
            OverloadedError, GivenUpError: see `_admit`.
            ValueError: what the engine cannot do.
        """
        texts = self._admit(len(requests), cost)
        try:
            await self.call(partial(self._submit, texts, requests), with_others=True)
        except BaseException:
            self.drop(texts)
            raise
        return texts

    def _admit(self, n: int, cost: int) -> Texts:
        """A place for each of n texts.

        Raises:
            OverloadedError: no room for them now.
            GivenUpError: the server is on its way out.
        """
        if self._gone:
            raise GivenUpError(503, self._gone)
        if self.n_texts + n > self.max_requests:
            raise OverloadedError(self.wait())
        texts = Texts(n, cost)
        self._open.add(texts)
        self.n_texts += n
        self.cost += cost
        return texts

    async def steps(self, work: Iterator[Found], *, cost: int) -> AsyncIterator[Found]:
        """What `work` yields, a step between two ticks; it counts as a text. One such work at a time has its steps.

        Raises:
            OverloadedError, GivenUpError: see `_admit`.
        """
        texts = self._admit(1, cost)
        try:
            async with self._stepping:
                while (found := await self.call(partial(next, work, DONE))) is not DONE:
                    texts.check()
                    yield found
        finally:
            self.drop(texts)

    def drop(self, texts: Texts) -> None:
        """Whatever is left of these texts ends."""
        self._open.discard(texts)
        self._free(texts, [*texts.left])
        self._put(partial(self._cancel, texts.numbers))

    def end(self, texts: Texts, place: int) -> None:
        """One of them is complete before the engine knows."""
        self._free(texts, [place])
        self._put(partial(self._cancel, [texts.numbers[place]]))

    def _free(self, texts: Texts, places: Iterable[int]) -> None:
        """Room for others, whether or not anybody has read what was written."""
        done = texts.left.intersection(places)
        texts.left -= done
        self.n_texts -= len(done)
        self.cost -= len(done) * texts.cost

    def give_up(self, message: str) -> None:
        """On all that are under way or yet to come; their clients are told."""
        self._gone = message
        for texts in self._open:
            texts.fail(GivenUpError(503, message))

    def _put(self, do: Callable[[], object]) -> None:
        if self._inbox.empty():
            self._asked_at = time.monotonic()
        self._inbox.put(do)

    def wait(self) -> int:
        """Seconds until there may be room: what a text under way costs at most, at the rate of late."""
        mean = self.cost / max(self.n_texts, 1)
        return min(max(math.ceil(mean / self.rate), 1), 60) if self.rate else 1

    def _tell(self, told: Mapping[Texts, Sequence[tuple[int, Event]]]) -> None:
        for texts, some in told.items():
            texts.tell(some)
            self._free(texts, [place for place, event in some if event.reason])

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        while not self._closing:
            self._answer()
            self._enter()
            if self.engine.busy and not self._closing:
                self._tick()
            self._publish()

    def _answer(self) -> None:
        """All that was asked; waits where there is nothing else to do."""
        if not self.engine.busy:
            self._hand_over()
            self._publish(now=True)
            self._idle = True
            asked = self._inbox.get()
            self._alive_at, self._idle = time.monotonic(), False
            asked()
            self._measured = time.monotonic(), self.engine.n_token_loops
        for _ in range(self._inbox.qsize()):  # not what comes meanwhile: texts have their turn
            self._inbox.get_nowait()()

    def _enter(self) -> None:
        """Those who come begin when others do, after at most as many ticks as a token has loops: texts in step need one
        coda and one prelude for all, and their loops are one."""
        n_loops = self.engine.model.config.n_loops
        if self._coming and (self._in_step or not self.engine.busy or self._waited >= n_loops):
            coming, self._coming[:], self._waited = [*self._coming], [], 0
            for enter in coming:
                enter()

    def _tick(self) -> None:
        self._alive_at = time.monotonic()
        self._waited += bool(self._coming)
        try:
            events = self.engine.step()
        except BaseException as error:
            recent = [at for at in self._failed_at if self._alive_at - at < RECENT_SECONDS]
            self._failed_at = [*recent, self._alive_at]
            log.error("tick failed (%d of %d)", len(self._failed_at), PATIENCE, exc_info=error)
            if len(self._failed_at) == PATIENCE:
                self._give_up()
            return
        self._in_step = bool(events)
        for event in events:
            if event.number in self._places:
                texts, place = self._places[event.number]
                self._untold.setdefault(texts, []).append((place, event))
                if event.reason:
                    del self._places[event.number]
        if time.monotonic() - self._told_at > TELL_SECONDS:
            self._hand_over()

    def _hand_over(self) -> None:
        """To all at once: each call wakes the event loop, which holds up the engine."""
        if self._untold:
            self._on_loop(partial(self._tell, self._untold))
            self._untold, self._told_at = {}, time.monotonic()

    def _give_up(self) -> None:
        """On all texts there are: what comes next may fare better."""
        everyone = {texts for texts, _ in self._places.values()}
        log.error("%d texts are given up", len(self._places))
        self._cancel([*self._places])
        self._failed_at.clear()
        self._hand_over()
        self._on_loop(
            lambda: [texts.fail(GivenUpError(500, "the engine failed; its log has more")) for texts in everyone]
        )

    def _submit(self, texts: Texts, requests: Sequence[Request]) -> None:
        if not texts.left:  # dropped while they waited: nothing would cancel them any more
            return
        for place, request in enumerate(requests):
            number = self.engine.submit(request)
            texts.numbers.append(number)
            self._places[number] = texts, place

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.engine.cancel(number)
            self._places.pop(number, None)

    def _publish(self, *, now: bool = False) -> None:
        time_now = time.monotonic()
        if now or time_now - self._published > STATS_SECONDS:
            self._published, self.stats = time_now, self.engine.stats()
            before, done = self._measured
            if time_now - before > 1:
                self.rate = (self.engine.n_token_loops - done) / (time_now - before)
                self._measured = time_now, self.engine.n_token_loops

    def _on_loop(self, do: Callable[[], object]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(do)

    def _close(self) -> None:
        self._closing = True


def engine_of(loaded: Loaded, *, n_loops: int, memory_mb: int | None = None, exact: bool = False) -> Engine:
    """The engine that serves this model, n_loops deep at most.

    memory_mb: for keys and values; default: for four texts of max_seq_len at that depth.
    """
    n_rows = None
    if memory_mb is not None:
        config, weight = loaded.model.config, loaded.model.head_weight
        n_rows = memory_mb * 2**20 // (config.kv_width * weight.element_size())
        least = Layout(config, n_loops=n_loops).most_rows(config.max_seq_len)
        need = -(-least * config.kv_width * weight.element_size() // 2**20)
        require(n_rows >= least, "memory_mb", memory_mb, f"at least {need}: one text of max_seq_len at {n_loops} loops")
    try:
        grammars = Grammars(loaded.tokenizer)
    except ValueError:  # llguidance is not there; who asks for a constraint is told
        grammars = None
    vocab_size = loaded.tokenizer.vocab_size
    return Engine(loaded.model, n_rows=n_rows, n_loops=n_loops, vocab_size=vocab_size, grammars=grammars, exact=exact)
