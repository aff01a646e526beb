"""Documents from files, folders, the Hugging Face hub and Python's own standard library, with their split.

Which document is validation text depends on content or names alone, never on the order of reading or on a seed.
"""

import hashlib
import io
import json
import re
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ritornello.config import ROW_FIELDS, require, shown
from ritornello.train import chat as chats

PIECE = 1 << 20  # bytes of a document that are in memory, and tokenised, at a time
MAX_LINE = 64 << 20  # bytes of a .jsonl line, which has to be parsed whole
NAMES = ".txt, .jsonl or .parquet"
CHAT_SOURCES = "give a .jsonl or .parquet file, a folder of them, or a Hugging Face name"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
HIDDEN = re.compile(r"\..*", re.DOTALL)
# Tests, installed packages and what the build of one machine wrote; `encodings` is tables whose lines repeat.
NOT_STDLIB = re.compile(r"tests?|idle_test|site-packages|dist-packages|encodings|lib-dynload|_sysconfig.+|config-.+")


@dataclass(frozen=True)
class Column:
    """What is read of a row."""

    name: str
    chat: bool


@dataclass(frozen=True)
class Document:
    name: str  # for error messages
    validation: bool
    pieces: Iterable[bytes]  # the text in order, each at most PIECE bytes, cut between characters; or one conversation


@dataclass(frozen=True)
class Corpus:
    """`documents()` starts from the beginning at each call and needs memory for one document's piece or row."""

    documents: Callable[[], Iterator[Document]]
    files: Mapping[Path, tuple[int, int, int]]  # with the `stamp` each had before it was read
    fingerprint: str  # sha256 over the names and contents of all files
    held_out: tuple[str, ...]  # packages or text files that are validation text; rows are told by their hash
    chat: bool = False  # a document is a conversation, as `chat.to_bytes` spells it

    @property
    def n_bytes(self) -> int:
        return sum(size for size, _, _ in self.files.values())


def open_corpus(
    source: str,
    *,
    field: str = "",
    validation_fraction: float = 0.1,
    utf8: bool = False,
    offline: bool = False,
    chat: bool = False,
) -> Corpus:
    """The documents of `source`: "stdlib", a file, a folder of files, or a Hugging Face name (`name` or `name:config`).

    A `.txt` file is one document; of a single one, the end is validation text. Rows of `.jsonl`, `.parquet` and
    data sets are documents, held out by the hash of their text. `utf8`: refuse text that is not UTF-8. `chat`: rows are
    conversations, and nothing else is read. `field` of a row; "": text, or messages.

    Raises:
        ValueError: nothing readable there, or a row without text, or without a conversation that `chat.check` accepts;
            the message names the file and the place.
    """
    require(bool(source), "source", source, "a file, a folder, a data set's name or 'stdlib'")
    column = Column(field or ROW_FIELDS["chat" if chat else "text"], chat)
    split = partial(_assemble, column=column, validation_fraction=validation_fraction, utf8=utf8)
    try:
        if source == "stdlib":
            require(not chat, "data.source", source, "rows of conversations with data.format = 'chat'", CHAT_SOURCES)
            return split(_stdlib(), group=_package)
        path = Path(source)
        if path.is_symlink() or path.exists():
            return split(listed_files(path), group=str)
    except OSError as error:
        raise ValueError(f"source = {shown(source)}: must be readable; {error}") from error
    require_hub_name(source)
    return _hub(source, column=column, validation_fraction=validation_fraction, offline=offline)


def require_hub_name(source: str) -> None:
    is_name = HUB_NAME.fullmatch(source) and Path(source).suffix.lower() not in READERS
    require(bool(is_name), "source", source, "a file or folder that exists, or a Hugging Face name")


def stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced: its size, time (ns) and inode."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def require_unchanged(path: Path, before: tuple[int, int, int]) -> None:
    """Raise ValueError if `path` is gone, or is no longer the file that had the stamp `before`."""
    try:
        same = stamp(path) == before
    except FileNotFoundError:
        same = False
    require(same, _printable(path), "changed or removed", "left alone while it is read", "start again")


def held_out(sizes: Mapping[str, int], fraction: float) -> frozenset[str]:
    """The groups that are validation text: about `fraction` of all bytes, no group more than an eighth of that.

    Groups are taken in the order of their names' hashes, each that still fits; if none does, the smallest.
    """
    target = fraction * sum(sizes.values())
    left, chosen = target, set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()):
        if sizes[name] <= min(left, target / 8):
            chosen.add(name)
            left -= sizes[name]
    return frozenset(chosen or {min(sizes, key=lambda name: (sizes[name], name))})


def _stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in _walk(root, NOT_STDLIB, set()) if path.suffix == ".py"] if root.is_dir() else []
    require(bool(found), "source", "stdlib", f"installed as .py files in {root}", "choose a file instead")
    return _named(root, found)


def _package(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def listed_files(root: Path) -> dict[str, Path]:
    """Readable files of a known kind, by name, in sorted order; hidden ones and other kinds are not looked at."""
    if not root.is_dir():
        require(root.suffix.lower() in READERS, "source", str(root), f"a folder or a {NAMES} file")
        return _named(root.parent, [root])
    found = [path for path in _walk(root, HIDDEN, set()) if path.suffix.lower() in READERS]
    require(bool(found), "source", str(root), f"a folder with a {NAMES} file in it")
    return _named(root, found)


def _walk(folder: Path, skip: re.Pattern[str], seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Follow symbolic links, but enter no directory twice: that is what survives a loop of them."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for path in folder.iterdir():
        if skip.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _walk(path, skip, seen)
        else:
            yield path


def _named(root: Path, paths: list[Path]) -> dict[str, Path]:
    """In the order of names, which is the same on every machine. A FIFO would block for ever, a device never end."""
    for path in paths:
        mode = path.stat().st_mode
        require(stat.S_ISREG(mode), _printable(path), stat.filemode(mode), "a regular file")
    return {path.relative_to(root).as_posix(): path for path in sorted(paths, key=lambda path: path.parts)}


def _fingerprint(files: Mapping[str, Path]) -> str:
    total = hashlib.sha256()
    for name, path in files.items():
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(json.dumps([name, content]).encode())
    return total.hexdigest()


def _assemble(
    files: Mapping[str, Path], *, group: Callable[[str], str], column: Column, validation_fraction: float, utf8: bool
) -> Corpus:
    stamps = {path: stamp(path) for path in files.values()}
    sizes: dict[str, int] = {}
    for name, path in files.items():
        is_text = path.suffix.lower() not in ROWS
        allowed = "rows of conversations with data.format = 'chat'"
        require(not (is_text and column.chat), _printable(path), "text", allowed, CHAT_SOURCES)
        if is_text and stamps[path][0]:
            sizes[group(name)] = sizes.get(group(name), 0) + stamps[path][0]
    chosen = held_out(sizes, validation_fraction) if len(sizes) > 1 else frozenset()

    def documents() -> Iterator[Document]:
        for name, path in files.items():
            if rows := ROWS.get(path.suffix.lower()):
                yield from row_documents(rows(path, column), validation_fraction, column.chat)
            elif len(sizes) == 1:
                yield from _cut_in_two(path, stamps[path][0], validation_fraction, utf8)
            else:
                yield _text(path, 0, stamps[path][0], group(name) in chosen, utf8)

    return Corpus(documents, stamps, _fingerprint(files), tuple(sorted(chosen)), column.chat)


def row_documents(rows: Iterable[tuple[str, bytes]], validation_fraction: float, chat: bool) -> Iterator[Document]:
    """Rows with equal text share a hash, so no copy of a validation document is training text."""
    for name, text in rows:
        share = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
        pieces = [text] if chat else _pieces(io.BytesIO(text), len(text), name)
        yield Document(name, share < validation_fraction, pieces)


def _cut_in_two(path: Path, size: int, validation_fraction: float, utf8: bool) -> Iterator[Document]:
    """Cut at the last line that ends before validation begins, or between two characters if that is far off."""
    wanted = round(size * (1 - validation_fraction))
    look_back = min(wanted, PIECE, max(4, (size - wanted) // 2))
    with path.open("rb") as stream:
        before = stream.seek(wanted - look_back)
        cut = before + _boundary(stream.read(look_back))
    yield _text(path, 0, cut, False, utf8)
    yield _text(path, cut, size, True, utf8)


def _text(path: Path, start: int, stop: int, validation: bool, utf8: bool) -> Document:
    def pieces() -> Iterator[bytes]:
        offset = start
        with path.open("rb") as stream:
            stream.seek(start)
            for piece in _pieces(stream, stop - start, _printable(path)):
                if utf8:
                    _require_utf8(piece, _printable(path), offset)
                offset += len(piece)
                yield piece

    return Document(_printable(path), validation, pieces())


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _printable(path: Path) -> str:
    """Whole, with control characters escaped."""
    return repr(str(path))[1:-1]


def _require_utf8(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{where} byte {offset + error.start}"
        remedy = "convert the file, or choose the tokenizer 'bytes'"
        raise ValueError(f"{place} = {data[error.start : error.start + 4]!r}: must be UTF-8; {remedy}") from error


def _pieces(stream: BinaryIO, n_bytes: int, where: str) -> Iterator[bytes]:
    """`n_bytes` of `stream`, in pieces that end with a line where one ends, and between two characters elsewhere."""
    rest = b""
    while n_bytes:
        fresh = stream.read(min(PIECE - len(rest), n_bytes))
        require(bool(fresh), where, "truncated", "left alone while it is read", "start again")
        n_bytes -= len(fresh)
        piece = rest + fresh
        cut = _boundary(piece) if n_bytes else len(piece)
        rest = piece[cut:]
        yield piece[:cut]


def _boundary(data: bytes) -> int:
    """Where to cut near the end of `data`: after its last newline, else before a character that may be incomplete."""
    if newline := data.rfind(b"\n") + 1:
        return newline
    for back in range(1, min(4, len(data))):
        if data[-back] >= 0xC0:
            return len(data) - back
        if data[-back] < 0x80:
            break
    return len(data)


def _jsonl(path: Path, column: Column) -> Iterator[tuple[str, bytes]]:
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            where = f"{_printable(path)} line {number}"
            size = f"{len(line)} bytes or more"
            require(
                len(line) <= MAX_LINE, where, size, f"at most {MAX_LINE} bytes", "cut it, or give it as a .txt file"
            )
            if line.strip():
                yield where, row_bytes(_parsed(line, where), column, where)


def _parsed(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of 10**6 digits, deep nesting
        raise ValueError(f"{where} = {shown(line)}: must be a JSON object in UTF-8; {error}") from error


def _parquet(path: Path, column: Column) -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as table:  # else all of it is kept in memory
            require_key(column.name, table.schema_arrow.names, _printable(path))
            for batch in table.iter_batches(batch_size=256, columns=[column.name]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    where = f"{_printable(path)} row {number}"
                    yield where, row_bytes({column.name: value}, column, where)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{_printable(path)}: must be a readable Parquet file; {one_line(error)}") from error


def require_key(field: str, names: Iterable[object], where: str) -> None:
    keys = [str(name) for name in names]
    near = get_close_matches(field, keys, n=1)
    remedy = f"did you mean data.field = {near[0]!r}?" if near else f"it has {shown(keys)}"
    require(field in keys, "data.field", field, f"a key of {where}", remedy)


def row_bytes(row: Any, column: Column, where: str) -> bytes:
    """Its text, or its conversation."""
    require(isinstance(row, dict), where, row, f"an object with the key {column.name!r}")
    require_key(column.name, row, where)
    value, where = row[column.name], f"{where} {column.name!r}"
    if column.chat:
        chats.check_example(value, where=where)
        return chats.to_bytes(value)
    require(isinstance(value, str), where, value, "a string")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: must be valid Unicode; {error}") from error


ROWS: dict[str, Callable[[Path, Column], Iterator[tuple[str, bytes]]]] = {".jsonl": _jsonl, ".parquet": _parquet}
READERS = (".txt", *ROWS)


def hub_package(source: str, *, offline: bool) -> Any:
    """`datasets`, which says nothing about its user, and asks nobody for anything when `offline`."""
    try:
        import datasets.config
        import datasets.exceptions
        import huggingface_hub.constants
    except ImportError as error:
        remedy = "pip install 'ritornello[data]' for Hugging Face names"
        raise ValueError(f"source = {shown(source)}: must be a file or folder that exists; {remedy}") from error
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return datasets


def _hub(source: str, *, column: Column, validation_fraction: float, offline: bool) -> Corpus:
    """The "train" split of a Hugging Face data set, held on disk by `datasets`; its other splits are not read."""
    datasets = hub_package(source, offline=offline)
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split="train", keep_in_memory=False)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        allowed = "in the cache when offline" if offline else "a file, a folder, or a data set that can be loaded"
        raise ValueError(f"source = {shown(source)}: must be {allowed}; {one_line(error)}") from error
    require_key(column.name, table.column_names, source)

    def rows() -> Iterator[tuple[str, bytes]]:
        for number, value in enumerate(table[column.name], 1):
            where = f"{source} row {number}"
            yield where, row_bytes({column.name: value}, column, where)

    paths = [Path(found["filename"]) for found in table.cache_files]
    files = {path: stamp(path) for path in paths}
    fingerprint = _fingerprint({str(i): path for i, path in enumerate(paths)})
    return Corpus(lambda: row_documents(rows(), validation_fraction, column.chat), files, fingerprint, (), column.chat)
