"""Rows of a source too large to tokenise first, in their own order without end, from any position in it.

Local files are read by the readers of `corpus`: `datasets` would turn text that looks like a date into one.
Data sets of the Hugging Face hub are streamed by `datasets`, without its shuffle, whose buffer no position brings back.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ritornello.config import DataConfig, require, shown
from ritornello.train.corpus import (
    ROWS,
    Column,
    Document,
    hub_package,
    listed_files,
    one_line,
    require_hub_name,
    require_key,
    row_bytes,
    row_documents,
    stamp,
)

ENDS = 1 << 20  # bytes of a file's beginning and of its end that tell it from others of its name and size
BATCH_ROWS = 256  # of the hub's Parquet files, that are in memory at once
PAUSES = (1.0, 5.0, 25.0)  # seconds, after which a connection that fails is tried again
Stamps = Mapping[Path, tuple[int, int, int]]


@dataclass(frozen=True)
class Position:
    """Before the first row of a pass over the source, or after so many of its rows."""

    epoch: int = 0
    row: int = 0
    place: Any = None  # JSON by which the source finds the row; None: at the beginning

    @property
    def order(self) -> tuple[int, int]:
        return self.epoch, self.row


Passage = tuple[Position, Document, int]  # the position after a row, the row, its bytes
Rows = Callable[[Position], Iterator[tuple[Any, str, bytes]]]  # the place after a row, its name for errors, its text


@dataclass(frozen=True)
class Stream:
    """`rows(position)` are those that are left of its pass."""

    source: str
    rows: Rows
    files: Stamps  # none of a data set of the hub
    fingerprint: str  # sha256 over what tells the source from others: it isn't read for that
    validation_fraction: float
    chat: bool  # rows are conversations

    def passages(self, start: Position) -> Iterator[Passage]:
        """Rows after `start`; when the source ends, it begins again.

        Raises:
            ValueError: a row without text, named; a source without training text.
            OSError: a connection failed again and again.
        """
        while True:
            row, found = start.row, bool(start.row)
            for place, where, text in self.rows(start):
                row += 1
                for document in row_documents([(where, text)], self.validation_fraction, self.chat):
                    found |= bool(text) and not document.validation
                    yield Position(start.epoch, row, place), document, len(text)
            remedy = "give more text, or change data.validation_fraction"
            require(found, "training text in data.source", self.source, "some", remedy)
            start = Position(start.epoch + 1)


class Reader:
    """Passages of a stream from any position. What lies ahead is reached by reading on: to find a place anew, a file
    may have to be read from its beginning."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.position = stream, Position()
        self._passages: Iterator[Passage] | None = None

    def passages(self, start: Position) -> Iterator[Passage]:
        """As `Stream.passages`; `position` is that after the last one."""
        if self._passages is None or start.order < self.position.order:
            self.position, self._passages = start, self.stream.passages(start)
        passages, self._passages = self._passages, None  # one that fails is not read on
        for passage in passages:
            self.position = passage[0]
            if self.position.order > start.order:
                self._passages = passages
                yield passage
                self._passages = None


def open_stream(data: DataConfig, *, offline: bool = False) -> Stream:
    """`data.source`: a .jsonl or .parquet file, a folder of them, or a Hugging Face name (`name` or `name:config`).

    Raises:
        ValueError: nothing of that kind there.
    """
    path, column = Path(data.source), Column(data.row_field, data.format == "chat")
    require(bool(data.source), "source", data.source, "a file, a folder or a data set's name")
    try:
        if path.is_symlink() or path.exists():
            files = listed_files(path)
            whole = next((name for name in files if Path(name).suffix.lower() not in ROWS), None)
            allowed = f"of {', '.join(ROWS)} files alone with data.streaming"
            require(whole is None, "data.source", data.source, allowed, f"{shown(whole)} has no rows")
            stamps = {file: stamp(file) for file in files.values()}
            rows, identity = _local(list(stamps), column), _ends(files)
        else:
            require_hub_name(data.source)
            stamps = {}
            rows, identity = _hub(data.source, column, offline)
    except OSError as error:
        raise ValueError(f"source = {shown(data.source)}: must be readable; {one_line(error)}") from error
    known = [identity, column.name, *(["chat"] if column.chat else [])]
    fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return Stream(data.source, rows, stamps, fingerprint, data.validation_fraction, column.chat)


def _local(paths: list[Path], column: Column) -> Rows:
    def rows(start: Position) -> Iterator[tuple[Any, str, bytes]]:
        first, done = start.place or (0, 0)
        for number in range(first, len(paths)):
            found = ROWS[paths[number].suffix.lower()](paths[number], column)
            for where, text in islice(found, done, None):
                done += 1
                yield [number, done], where, text
            done = 0

    return rows


def _ends(files: Mapping[str, Path]) -> list[Any]:
    """What tells local files from others, the same on every machine: names, sizes, how they begin and how they end."""
    found = []
    for name, path in files.items():
        size = path.stat().st_size
        with path.open("rb") as stream:
            begin = stream.read(ENDS)
            stream.seek(max(0, size - ENDS))
            found.append([name, size, *(hashlib.sha256(text).hexdigest() for text in (begin, stream.read(ENDS)))])
    return found


def _hub(source: str, column: Column, offline: bool) -> tuple[Rows, list[Any]]:
    """The "train" split, and which revision of which files it is."""
    datasets = hub_package(source, offline=offline)
    name, _, config = source.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        names = builder.as_streaming_dataset(split="train").column_names
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        allowed = "local files when offline" if offline else "a file, a folder, or a data set that can be streamed"
        raise ValueError(f"source = {shown(source)}: must be {allowed}; {one_line(error)}") from error
    if names is not None:
        require_key(column.name, names, source)
    for option, value in (("columns", [column.name]), ("batch_size", BATCH_ROWS)):
        if hasattr(builder.config, option):  # Parquet's and its like: nothing else is fetched, no row group whole
            setattr(builder.config, option, value)
    files = (builder.config.data_files or {}).get("train", [builder.hash])  # their addresses have the revision

    def rows(start: Position) -> Iterator[tuple[Any, str, bytes]]:
        row = start.row
        for state, found in _retried(lambda: builder.as_streaming_dataset(split="train"), source, start.place):
            row += 1
            where = f"{source} row {row}"
            yield state, where, row_bytes(found, column, where)

    return rows, [source, *map(str, files)]


def _retried(opened: Callable[[], Any], source: str, state: Any) -> Iterator[tuple[Any, Any]]:
    """(state after a row, the row) from `state` on. A connection that fails is opened again, where it was."""
    from huggingface_hub.errors import HTTPError

    pauses = iter(PAUSES)
    while True:
        try:
            table = opened()
            if state is not None:
                table.load_state_dict(state)
            for row in table:
                state = table.state_dict()
                yield state, row
                pauses = iter(PAUSES)
            return
        except (OSError, HTTPError) as error:
            pause = next(pauses, None)
            if pause is None:
                raise OSError(f"source = {shown(source)}: the connection failed; {one_line(error)}") from error
            time.sleep(pause)
        except ValueError as error:
            raise ValueError(f"source = {shown(source)}: must be readable; {one_line(error)}") from error
