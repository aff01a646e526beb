import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ritornello.config import DataConfig
from ritornello.train import stream
from ritornello.train.stream import Passage, Position, Reader, Stream, open_stream

N_ROWS = 90
HUB = "someone/some-data:part"


def write(folder: Path, kind: str) -> None:
    """Three files of 30 rows, Parquet's in row groups of 7; one row looks like a date."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    texts = [f"row {i} " + "é" * (i % 5) for i in range(N_ROWS)]
    texts[40] = "2026-11-01"
    for number in range(3):
        part = texts[30 * number : 30 * (number + 1)]
        if kind == "parquet":
            table = pa.table({"text": part, "n": range(30)})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=7)
        else:
            lines = [json.dumps({"n": n, "text": text}) for n, text in enumerate(part)]
            (folder / f"{number}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`datasets`, for which the files of a folder are a data set of the hub; its switches are put back afterwards."""
    import datasets
    import huggingface_hub.constants

    for module, name in [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS"),
        (datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    original = datasets.load_dataset_builder

    def load(name: str, config: str | None) -> Any:
        assert (name, config) == ("someone/some-data", "part")
        paths = sorted(map(str, (tmp_path / "files").iterdir()))
        kind = "parquet" if paths[0].endswith("parquet") else "json"
        return original(kind, data_files=paths, cache_dir=str(tmp_path / "datasets"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    yield datasets


def read(passages: Iterator[Passage], n: int) -> list[tuple[Position, str, bool]]:
    found = islice(passages, n)
    return [(at, b"".join(document.pieces).decode(), document.validation) for at, document, _ in found]


def exact(opened: Callable[[], Stream]) -> None:
    """From every position, through JSON as a block's record is, the rest is the rest, over the end of the source."""
    whole = read(opened().passages(Position()), 2 * N_ROWS + 60)
    assert whole[0][1:] == whole[N_ROWS][1:] == whole[2 * N_ROWS][1:]
    assert len({text for _, text, _ in whole}) == N_ROWS and {kind for *_, kind in whole} == {False, True}
    for cut in (1, 6, 7, 8, 20, 29, 30, 31, 60, 89, 90, 91, 130, 180):
        at = whole[cut - 1][0]
        again = Position(at.epoch, at.row, json.loads(json.dumps(at.place)))
        assert [row[1:] for row in read(opened().passages(again), 50)] == [row[1:] for row in whole[cut : cut + 50]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_local_rows_from_any_position(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "files", kind)
    exact(partial(open_stream, DataConfig(source=str(tmp_path / "files")), offline=True))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_rows_from_any_position(tmp_path: Path, kind: str, hub: Any) -> None:
    write(tmp_path / "files", kind)
    exact(partial(open_stream, DataConfig(source=HUB)))


def test_the_shuffle_of_datasets_is_not_brought_back(tmp_path: Path, hub: Any) -> None:
    """Control: why blocks are shuffled here, and not by `datasets`."""
    write(tmp_path / "files", "parquet")
    hub.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    opened, builder = stream._retried, hub.load_dataset_builder("someone/some-data", "part")

    def shuffled() -> Any:
        return builder.as_streaming_dataset(split="train").shuffle(seed=0, buffer_size=20)

    whole = [row["text"] for _, row in opened(shuffled, HUB, None)]
    state = next(islice(opened(shuffled, HUB, None), 44, None))[0]
    assert [row["text"] for _, row in opened(shuffled, HUB, state)] != whole[45:]


def test_parquet_is_not_kept_in_memory(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.table({"text": [str(i) * 100 for i in range(10_000, 20_000)]})
    pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    del table

    def held(rows: Iterator[Any]) -> int:
        before = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - before for _ in rows)

    found = open_stream(DataConfig(source=str(path)))
    assert held(found.rows(Position())) < path.stat().st_size / 4
    with pq.ParquetFile(path) as plain:  # control
        assert held(plain.iter_batches(256)) > path.stat().st_size / 2


def test_a_reader_reads_on_and_goes_back(tmp_path: Path) -> None:
    write(tmp_path / "files", "jsonl")
    found = open_stream(DataConfig(source=str(tmp_path / "files")))
    opened: list[Position] = []

    def rows(start: Position) -> Any:
        opened.append(start)
        return found.rows(start)

    reader = Reader(Stream("x", rows, found.files, found.fingerprint, 0.1, False))
    whole = read(found.passages(Position()), 80)
    for first, last in ((0, 10), (10, 30), (45, 50)):  # others have read rows 30 … 44
        start = whole[first - 1][0] if first else Position()
        assert read(reader.passages(start), last - first) == whole[first:last]
    assert len(opened) == 1
    assert read(reader.passages(whole[19][0]), 5) == whole[20:25]
    assert opened[1:] == [whole[19][0]]


class Failing:
    """A table that ends with an error after so many rows."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.state = n_rows, 0

    def state_dict(self) -> int:
        return self.state

    def load_state_dict(self, state: int) -> None:
        self.state = state

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.n_rows):
            self.state += 1
            yield self.state
        raise ConnectionError("no\nanswer")


def test_a_connection_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(stream.time, "sleep", slept.append)
    failing, found = iter([7, 3, 0, 5]), []
    with pytest.raises(OSError, match=r"source = 'a/b': the connection failed; no answer"):
        for _, row in stream._retried(lambda: Failing(next(failing, 0)), "a/b", None):
            found.append(row)
    assert found == list(range(1, 16)) and slept == [1.0, 1.0, 5.0, 1.0, 5.0, 25.0]


def refused(message: str, source: object, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        read(open_stream(DataConfig(source=str(source), **settings)).passages(Position()), 10**9)


def test_what_cannot_be_streamed_is_named(tmp_path: Path, hub: Any) -> None:
    (tmp_path / "a.txt").write_text("text")
    refused(r"data.source = '.*a.txt': must be of .jsonl, .parquet files alone", tmp_path / "a.txt")
    refused("source = 'no such.jsonl': must be a file or folder that exists", "no such.jsonl")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "0.jsonl").write_text('{"text": "a"}\n{"text": 3}')
    refused(r"0.jsonl line 2 'text' = 3: must be a string", tmp_path / "files")
    refused(r"did you mean data.field = 'text'", tmp_path / "files", field="txt")
    (tmp_path / "files" / "0.jsonl").write_text('{"text": ""}\n{"text": ""}')
    refused(r"training text in data.source = .*files': must be some", tmp_path / "files")
    (tmp_path / "files" / "0.jsonl").write_text('{"text": "a", "n": 1}\n{"text": null, "n": 2}')
    refused(r"someone/some-data:part row 2 'text' = None: must be a string", HUB)
    refused(r"someone/some-data:part row 1 'n' = 1: must be a string", HUB, field="n")


def test_offline_streams_no_data_set_of_the_hub(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"source = 'someone/some-data': must be local files when offline"):
        open_stream(DataConfig(source="someone/some-data"), offline=True)


def test_a_source_is_told_from_others(tmp_path: Path) -> None:
    write(tmp_path / "files", "jsonl")
    config, path = DataConfig(source=str(tmp_path / "files")), tmp_path / "files" / "1.jsonl"
    known = open_stream(config).fingerprint
    os.utime(path, (1, 1))
    os.rename(tmp_path / "files", tmp_path / "moved")
    moved = DataConfig(source=str(tmp_path / "moved"))
    assert open_stream(moved).fingerprint == known  # a copy on another machine
    path = tmp_path / "moved" / "1.jsonl"
    path.write_text(path.read_text().replace("row 31", "row 13"))
    assert open_stream(moved).fingerprint != known
