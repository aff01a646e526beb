"""A stream in blocks, each tokenised when it is first needed: what a step reads is a function of (stream, seed, step).

```
<cache>/<key>/blocks/000012.json    where block 12 ends in the stream and how many rows it has: kept, so that the next
                                    block can be made, and this one again
<cache>/<key>/blocks/000012/        its shards: kept of the first block, whose validation text is the run's, and while
                                    it is one of the last or a process reads it
```
"""

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from ritornello.config import DataConfig, require
from ritornello.recipes import read_text
from ritornello.train import files
from ritornello.train.corpus import Corpus, Document
from ritornello.train.data import Rows, alone, learn_tokenizer
from ritornello.train.shards import SPLITS, Dataset, Progress, build, open_shards
from ritornello.train.stream import Position, Reader, Stream
from ritornello.train.tokenizer import MAX_BYTES, Tokenizer
from ritornello.train.watch import Helper

PATIENCE = 10.0  # seconds that the end of a run waits for a block that nobody needs any more


class AbandonedError(Exception):
    """The run ended before the block was complete."""


@dataclass(frozen=True)
class Entry:
    """What is kept of a block for ever."""

    first_row: int  # of all blocks' rows
    n_rows: int
    fingerprint: str  # of its shards
    after: Position  # in the stream

    @property
    def end_row(self) -> int:
        return self.first_row + self.n_rows


@dataclass(frozen=True, eq=False)
class Block:
    """An open one, which stays on the disk until `held` is closed."""

    dataset: Dataset
    rows: Rows
    held: ExitStack


class Blocks:
    """The blocks of a stream, in one process. While one is read, a thread makes the next.

    A block is whole documents, the fewest with `data.stream_bytes` of training text; it may go on over the end of the
    source. Of processes that share the cache, one makes a block and the others wait.
    """

    def __init__(self, stream: Stream, data: DataConfig, home: Path, progress: Progress | None = None) -> None:
        self._stream, self._data, self._home, self._progress = stream, data, home, progress
        self._folder = home / "blocks"
        files.make_directory(self._folder)
        self._reader, self._ended = Reader(stream), threading.Event()
        self._entries: list[Entry] = []
        self._next: tuple[int, Future[Block], threading.Thread] | None = None
        self.waited = 0.0  # seconds for blocks that were not ready
        self.first = self._opened(0, None)
        self._open = {0: self.first}

    def holding(self, row: int) -> tuple[int, Entry]:
        """The block that has a row of the stream, counted from its beginning, and its number."""
        start = time.perf_counter()
        while not self._entries or self._entries[-1].end_row <= row:
            self._entries.append(self._known(len(self._entries)))
        self.waited += time.perf_counter() - start
        number = bisect_right(self._entries, row, key=lambda entry: entry.first_row) - 1
        return number, self._entries[number]

    def rows(self, number: int) -> Rows:
        """Of a block that `holding` has named.

        Raises:
            ValueError, OSError: see `open_stream` and `Stream.passages`, or the source is no longer what it was.
        """
        if number not in self._open:
            start = time.perf_counter()
            self._open[number] = self._taken(number)
            self.waited += time.perf_counter() - start
            for old in set(self._open) - {0, number - 1, number}:
                self._open.pop(old).held.close()
        if number + 1 not in self._open and self._next is None:
            self._begin(number + 1)
        return self._open[number].rows

    def close(self) -> None:
        """End what nobody waits for."""
        self._ended.set()
        if self._next is not None:
            _, future, thread = self._next
            future.add_done_callback(_release)
            thread.join(PATIENCE)
        for block in self._open.values():
            block.held.close()

    def _before(self, number: int) -> Entry | None:
        return self._entries[number - 1] if number else None

    def _begin(self, number: int) -> None:
        """Make a block in the background."""
        future, work = Future[Block](), partial(self._opened, number, self._before(number))
        thread = Helper(target=_fulfil, args=(future, work), name="block", daemon=True)
        thread.start()
        self._next = number, future, thread

    def _taken(self, number: int) -> Block:
        if self._next is not None:
            (made, future, _), self._next = self._next, None
            if made == number:
                return future.result()
            future.add_done_callback(_release)
        return self._opened(number, self._before(number))

    def _known(self, number: int) -> Entry:
        record = self._record(number)
        if not record.exists() and self._next is not None and self._next[0] == number:
            self._next[1].result()
        elif not record.exists():
            self._make(number, self._before(number))
        return _read(record)

    def _opened(self, number: int, before: Entry | None) -> Block:
        path = self._path(number)
        with ExitStack() as stack:
            while True:
                self._make(number, before)
                with alone(self._folder):  # nobody removes it now
                    if path.exists():
                        stack.enter_context(files.lock(path, shared=True))
                        break
            dataset = open_shards(path)
            _require_same(self._stream, dataset.fingerprint, _read(self._record(number)).fingerprint)
            return Block(dataset, rows_of(dataset, self._data), stack.pop_all())

    def _make(self, number: int, before: Entry | None) -> None:
        if not self._is_complete(number):
            with alone(self._home):
                if not self._is_complete(number):
                    self._build(number, before)
                    self._remove(number)

    def _is_complete(self, number: int) -> bool:
        return self._path(number).exists() and self._record(number).exists()

    def _build(self, number: int, before: Entry | None) -> None:
        for left in self._folder.glob(f"{files.TEMPORARY}*"):  # by a process that was killed: its lock is gone
            files.remove_tree(left)
        path, record = self._path(number), self._record(number)
        start = before.after if before else Position()
        corpus = Corpus(
            partial(self._documents, number, start), self._stream.files, self._stream.fingerprint, (), self._stream.chat
        )
        with files.create_directory(path) as temporary:
            needed = SPLITS[: 1 + (number == 0)]
            build(corpus, self._tokenizer(number), temporary, self._shown(number), needed=needed)
            made = open_shards(temporary, verify=False)
            n_rows, first = len(rows_of(made, self._data)), before.end_row if before else 0
            entry = Entry(first, n_rows, made.fingerprint, self._reader.position)
            if record.exists():
                _require_same(self._stream, entry.fingerprint, _read(record).fingerprint)
            else:
                files.write_atomic(record, json.dumps(asdict(entry)).encode())

    def _documents(self, number: int, start: Position) -> Iterator[Document]:
        """Of one block. The first has the run's validation text, and goes on until there is some; other documents of
        its kind are nobody's text."""
        size, held = 0, number > 0
        for position, document, n_bytes in self._reader.passages(start):
            if self._ended.is_set():
                raise AbandonedError
            if not document.validation:
                size += n_bytes
                yield document
            elif number == 0 and position.epoch == 0:
                held |= n_bytes > 0
                yield document
            if size >= self._data.stream_bytes and (held or position.epoch):
                return

    def _tokenizer(self, number: int) -> Tokenizer:
        if number:
            return self.first.dataset.tokenizer
        stream = self._stream
        once = takewhile(lambda passage: not passage[0].epoch, stream.passages(Position()))
        corpus = Corpus(
            lambda: (document for _, document, _ in once), stream.files, stream.fingerprint, (), stream.chat
        )
        return learn_tokenizer(self._data, corpus, self._progress if stream.files else None)

    def _shown(self, number: int) -> Progress | None:
        """Progress of the first block, which the run begins with."""
        report, size = self._progress, self._data.stream_bytes
        return None if report is None or number else lambda stage, done, _: report(stage, min(done, size), size)

    def _remove(self, number: int) -> None:
        """Blocks before the one that `number` follows, and other runs' ones, unless a process reads them."""
        with alone(self._folder):
            for path in self._folder.iterdir():
                if path.name.isdigit() and int(path.name) not in (0, number - 1, number):
                    with suppress(ValueError), files.lock(path):
                        files.remove_tree(path)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}"

    def _record(self, number: int) -> Path:
        return self._path(number).with_suffix(".json")


def rows_of(dataset: Dataset, data: DataConfig) -> Rows:
    how: Any = {"packing": data.packing, "isolate_documents": data.isolate_documents}
    return Rows(dataset.train, seq_len=data.seq_len, **how)


def _read(record: Path) -> Entry:
    found = json.loads(read_text(record, max_bytes=MAX_BYTES))
    return Entry(**found | {"after": Position(**found["after"])})


def _require_same(stream: Stream, found: str, known: str) -> None:
    remedy = "bring it back, or start another run"
    require(found == known, "data.source", stream.source, "the text that it was when the run read it", remedy)


def _fulfil(future: Future[Block], work: Callable[[], Block]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - raised where the block is needed
        future.set_exception(error)


def _release(future: Future[Block]) -> None:
    if future.exception() is None:
        future.result().held.close()
