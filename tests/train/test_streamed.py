import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ritornello.config import DataConfig
from ritornello.train import checkpoint, files, held_out, stream
from ritornello.train.data import Batch, prepare
from ritornello.train.interrupt import InterruptedRunError
from ritornello.train.shards import Split
from ritornello.train.streamed import Streamed, StreamedBatches, batches, open_data
from tests.train.small import recipe, text_file
from tests.train.test_trainer import Watch, run, untimed, weights

STEPS = 120  # of 3 rows: the 60 documents more than twice
Open = Callable[..., Streamed]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here; a block of this size is mostly syncing."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Blocks of about 14 documents and 30 rows."""
    source = str(text_file(tmp_path))
    return DataConfig(source=source, seq_len=24, validation_fraction=0.2, streaming=True, stream_bytes=700)


@pytest.fixture
def opened(config: DataConfig, tmp_path: Path) -> Iterator[Open]:
    found: list[Streamed] = []

    def one(cache: str = "cache", **changes: Any) -> Streamed:
        dataset = open_data(replace(config, **changes), tmp_path / cache)
        assert isinstance(dataset, Streamed)
        found.append(dataset)
        return dataset

    yield one
    for dataset in found:
        dataset.blocks.close()


def of(dataset: Streamed, *, seed: int = 5) -> StreamedBatches:
    found = batches(dataset, batch_size=3, seed=seed)
    assert isinstance(found, StreamedBatches)
    return found


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def texts(dataset: Any, split: Split) -> list[str]:
    return [dataset.tokenizer.decode(split.tokens[i:j]) for i, j in pairwise(split.offsets)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_blocks_are_the_training_text_in_order(
    config: DataConfig, opened: Open, tmp_path: Path, tokenizer: str
) -> None:
    """In order: every document once in each pass over the source, and validation text never."""
    how: Any = {"tokenizer": tokenizer, "bpe_vocab_size": 300}
    plain, streamed = prepare(replace(config, streaming=False, **how), tmp_path / "cache"), opened(**how)
    known, found, row, sizes = texts(plain, plain.train), list[str](), 0, []
    while len(found) < 3 * len(known):
        number, entry = streamed.blocks.holding(row)
        part = streamed.blocks.rows(number).split
        assert number == len(sizes) and row == entry.first_row
        found, row, sizes = found + texts(streamed, part), entry.end_row, [*sizes, part.n_bytes]
    assert found[: 3 * len(known)] == 3 * known
    assert all(700 <= size < 800 for size in sizes)
    held = texts(streamed, streamed.validation)
    assert held and held == texts(plain, plain.validation)[: len(held)]
    assert not set(held) & set(found)
    assert streamed.tokenizer.to_json() == plain.tokenizer.to_json()


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_is_a_function_of_stream_seed_and_step(opened: Open, packing: bool) -> None:
    dataset = opened(packing=packing)
    reader = of(dataset)
    whole = [reader.batch(step) for step in range(STEPS)]
    assert [batch.indices.tolist() for batch in whole] == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(STEPS)]
    number, _ = dataset.blocks.holding(3 * STEPS)
    assert number > 8 and any(e.first_row % 3 for e in dataset.blocks._entries[1:])  # batches of two blocks were read
    rows = np.concatenate([batch.tokens for batch in whole])[: dataset.blocks._entries[0].n_rows]
    in_order = dataset.blocks.rows(0).read(np.arange(len(rows))).tokens
    assert sorted(rows.tolist()) == sorted(in_order.tolist()) and not np.array_equal(rows, in_order)
    again = of(opened("another", packing=packing))
    for step in (100, 99, 0, 57, 119):
        assert equal(again.batch(step), whole[step])
    other = of(opened(packing=packing), seed=6)
    assert not equal(other.batch(0), whole[0]) and not equal(other.batch(99), whole[99])


def test_two_readers_read_what_one_does(opened: Open) -> None:
    reader = of(opened())
    whole = [reader.batch(step) for step in range(STEPS)]
    found: dict[int, list[Batch]] = {}
    first, second = of(opened("shared")), of(opened("shared"))

    def read(which: int, batches: StreamedBatches, part: slice) -> None:
        found[which] = [batches.batch(step, part) for step in range(STEPS)]

    threads = [
        threading.Thread(target=read, args=(0, first, slice(0, 1))),
        threading.Thread(target=read, args=(1, second, slice(1, 3))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, a, b in zip(whole, found[0], found[1], strict=True):
        assert np.array_equal(np.concatenate([a.tokens, b.tokens]), batch.tokens)
        assert np.array_equal(np.concatenate([a.labels, b.labels]), batch.labels)


def kept(tmp_path: Path) -> list[int]:
    (folder,) = (tmp_path / "cache").glob("*/blocks")
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_old_blocks_go_unless_they_are_read(opened: Open, tmp_path: Path) -> None:
    slow, fast = of(opened()), of(opened())
    before = [slow.batch(step) for step in range(30)]
    reads, _ = slow.blocks.holding(89)
    most = 0
    for step in range(STEPS):
        fast.batch(step)
        most = max(most, len(kept(tmp_path)))
    last, _ = fast.blocks.holding(3 * STEPS - 1)
    fast.blocks.close()
    assert reads in kept(tmp_path) and {0, last} <= set(kept(tmp_path))
    assert most <= 8 < last  # the first one; of each run two, the next one and one that is about to go
    alone = of(opened("alone"))
    assert all(equal(slow.batch(step), alone.batch(step)) for step in range(28, 60))  # makes those again that went
    assert len(before) == 30 and reads not in kept(tmp_path)


def test_blocks_are_made_again_as_they_were_or_not_at_all(
    opened: Open, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ENDS", 100)
    reader = of(opened())
    whole = [reader.batch(step) for step in range(40)]
    reader.blocks.close()
    (folder,) = (tmp_path / "cache").glob("*/blocks")

    def lose() -> None:
        for path in folder.iterdir():
            if path.name.isdigit() and path.name != "000000":
                shutil.rmtree(path)

    lose()
    left = folder / f"{files.TEMPORARY}1-0123456789ab"
    left.mkdir()  # by a process that was killed
    reader = of(opened())
    assert all(equal(a, b) for a, b in zip(whole, map(reader.batch, range(40)), strict=True))
    reader.blocks.close()
    assert not left.exists()
    path = Path(config.source)
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    lines[20:41] = lines[20:41][::-1]  # of the same size, and no end
    path.write_text("".join(lines))
    lose()
    reader = of(opened())
    with pytest.raises(ValueError, match="must be the text that it was when the run read it"):
        [reader.batch(step) for step in range(40)]


def test_a_bad_row_ends_the_run_when_it_is_needed(opened: Open, config: DataConfig) -> None:
    with Path(config.source).open("a") as out:
        out.write('{"text": 7}')
    reader = of(opened())
    good = 0
    with pytest.raises(ValueError, match=r"line 61 'text' = 7: must be a string"):
        for step in range(STEPS):
            reader.batch(step)
            good = step
    assert 3 * good > reader.blocks._entries[1].end_row


def test_a_change_of_the_source_is_seen(opened: Open, config: DataConfig) -> None:
    reader = of(opened())
    time.sleep(0.05)
    Path(config.source).touch()
    with pytest.raises(ValueError, match=r"text0.jsonl = 'changed or removed': must be left alone while it is read"):
        [reader.batch(step) for step in range(STEPS)]


def test_resumed_equals_uninterrupted(config: DataConfig, tmp_path: Path) -> None:
    """Within a block, at the end of one, before and after the source begins again; the cache is lost once."""
    given = replace(recipe(tmp_path, steps=44, log_every=1, eval_every=20, save_every=50), data=config)
    whole = run(given, tmp_path, "whole")
    dataset = open_data(config, tmp_path / "cache")
    assert isinstance(dataset, Streamed)
    entries = [dataset.blocks.holding(row)[1] for row in range(0, 4 * 44, 20)]
    at_end = next(e.end_row // 4 for e in entries if e.end_row % 4 == 0 or e.end_row > 60)
    new_pass = next(e.first_row // 4 + 2 for e in entries if e.after.epoch == 1)
    assert 5 < at_end < new_pass < 44
    dataset.blocks.close()
    for stop in sorted({5, at_end, new_pass - 3, new_pass, new_pass + 5}):
        with pytest.raises(InterruptedRunError, match=f"after step {stop}"):
            run(given, tmp_path, "parts", resume=True, observer=Watch(stop))
        if stop == at_end:
            shutil.rmtree(tmp_path / "cache")
    parts = run(given, tmp_path, "parts", resume=True)
    assert weights(parts) == weights(whole)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    other = run(replace(given, data=replace(config, stream_bytes=900)), tmp_path, "other")
    assert weights(other) != weights(whole)
    found = checkpoint.load(parts.parent.parent)
    rows = held_out.of_run(config, found.manifest.fingerprint, cache_dir=tmp_path / "new").rows
    assert rows.split.n_bytes == dataset.validation.n_bytes
    source = str(text_file(tmp_path, seed=1))
    changed = replace(given, data=replace(config, source=source))
    with pytest.raises(ValueError, match=r"data.source = "):
        run(changed, tmp_path, "parts", resume=True)
    Path(config.source).write_bytes(Path(source).read_bytes())
    with pytest.raises(ValueError, match="data fingerprint = "):
        run(given, tmp_path, "parts", resume=True)
