import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ritornello.config import DataConfig
from ritornello.train import files
from ritornello.train.data import NO_LABEL, PADDING, Batches, Rows, prepare, shuffled
from ritornello.train.shards import Dataset, Split

LENGTHS = [5, 1, 12, 3, 3, 30, 7, 2, 1, 9]  # of text; each document's end is one token more


def make(directory: Path, lengths: list[int], vocab_size: int = 257) -> Split:
    """A split whose text is 0, 1, 2 …, so that every token tells its place."""
    documents = [[*range(n), vocab_size - 1] for n in lengths]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokens"
    np.concatenate(documents).astype("<u2").tofile(path)
    byte_lengths = np.append(np.ones(vocab_size - 1, dtype=np.int64), 0)
    found = path.stat()
    before = (found.st_size, found.st_mtime_ns, found.st_ino)
    offsets = np.cumsum([0, *map(len, documents)])
    return Split(path, np.memmap(path, "<u2", "r"), offsets, byte_lengths, vocab_size - 1, sum(lengths), before)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return make(tmp_path_factory.mktemp("split"), LENGTHS)


def expected_rows(split: Split, seq_len: int, packing: bool, isolate: bool) -> list[list[tuple[int, int, int]]]:
    """(token, label, document) of every row, in plain Python."""
    rows = []
    ids, document = split.tokens.tolist(), np.repeat(np.arange(split.n_documents), np.diff(split.offsets)).tolist()
    edges = [0, split.n_tokens] if packing else split.offsets.tolist()
    for first, end in pairwise(edges):
        for start in range(first, end - 1, seq_len):
            row = []
            for i in range(start, start + seq_len):
                if i >= end:
                    row.append((split.eos_id, NO_LABEL, PADDING))
                    continue
                last = i + 1 >= end or (isolate and document[i + 1] != document[i])
                number = document[i] - document[start] if isolate else 0
                row.append((ids[i], NO_LABEL if last else ids[i + 1], number))
            rows.append(row)
    return rows


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 82, 83, 200])
@pytest.mark.parametrize(("packing", "isolate"), [(True, True), (True, False), (False, True)])
def test_rows_are_what_a_plain_loop_says(split: Split, seq_len: int, packing: bool, isolate: bool) -> None:
    rows = Rows(split, seq_len=seq_len, packing=packing, isolate_documents=isolate)
    batch = rows.read(np.arange(len(rows)))
    found = np.stack([batch.tokens, batch.labels, batch.documents], axis=2)
    assert found.tolist() == [list(map(list, row)) for row in expected_rows(split, seq_len, packing, isolate)]
    wrong = expected_rows(split, seq_len, packing, not isolate)
    if packing and seq_len > 2:
        assert found.tolist() != [list(map(list, row)) for row in wrong]  # control
    assert batch.tokens.dtype == batch.labels.dtype == batch.documents.dtype == np.int64


@pytest.mark.parametrize("seq_len", [1, 4, 7, 500])
@pytest.mark.parametrize("packing", [True, False])
def test_every_token_but_the_first_of_a_document_is_a_label_once(split: Split, seq_len: int, packing: bool) -> None:
    batches = list(Rows(split, seq_len=seq_len, packing=packing).evaluation(3))
    labels = np.concatenate([batch.labels[batch.labels != NO_LABEL] for batch in batches])
    expected = np.delete(split.tokens, split.offsets[:-1])
    assert labels.tolist() == expected.tolist()
    assert sum(batch.n_bytes.sum() for batch in batches) == split.n_bytes - split.n_documents


def test_an_evaluation_may_be_a_spread_sample(split: Split) -> None:
    rows = Rows(split, seq_len=2)
    found = np.concatenate([batch.indices for batch in rows.evaluation(4, limit=2)])
    assert found.tolist() == [i * len(rows) // 8 for i in range(8)]
    assert len(np.concatenate([batch.indices for batch in rows.evaluation(4, limit=99)])) == len(rows)


def test_text_shorter_than_the_context_is_padded(tmp_path: Path) -> None:
    batch = Rows(make(tmp_path, [1]), seq_len=6).read(np.array([0]))
    assert batch.tokens.tolist() == [[0, 256, 256, 256, 256, 256]]
    assert batch.labels.tolist() == [[256, *[NO_LABEL] * 5]]
    assert batch.documents.tolist() == [[0, 0, *[PADDING] * 4]]
    assert batch.n_bytes.tolist() == [0]


@given(n=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    found = shuffled(epoch * n + np.arange(n), n=n, seed=seed)
    assert sorted(found.tolist()) == list(range(n))
    assert shuffled(epoch * n + np.arange(n)[::-1], n=n, seed=seed).tolist() == found[::-1].tolist()


def test_the_order_depends_on_seed_and_epoch_and_never_changes() -> None:
    first = shuffled(np.arange(30), n=10, seed=1).tolist()
    assert first == GOLDEN  # a run must resume with a newer version
    assert first[:10] != first[10:20] != first[20:]
    assert shuffled(np.arange(10), n=10, seed=2).tolist() != first[:10]


def test_the_order_looks_random() -> None:
    n = 1000
    orders = np.stack([shuffled(np.arange(n), n=n, seed=seed) for seed in range(200)])
    uniform = orders.mean(axis=0)
    assert abs(uniform - (n - 1) / 2).max() < 5 * n / np.sqrt(12 * 200)
    steps = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(steps) < 5 / np.sqrt(orders.size)
    assert abs((orders == np.arange(n)).sum() / 200 - 1) < 0.5  # fixed points: one is expected
    assert np.corrcoef(np.arange(n - 1), np.arange(1, n))[0, 1] > 0.9  # control: no order at all would show


def test_samples_do_not_depend_on_batches_or_processes(split: Split) -> None:
    whole = Batches(split, seq_len=4, batch_size=8, seed=3)
    halves = Batches(split, seq_len=4, batch_size=4, seed=3)
    for step in range(12):  # several epochs
        batch = whole.batch(step)
        parts = [halves.batch(2 * step), halves.batch(2 * step + 1)]
        ranks = [whole.batch(step, slice(rank, None, 2)) for rank in range(2)]
        assert batch.tokens.tolist() == np.concatenate([part.tokens for part in parts]).tolist()
        assert batch.indices.tolist() == list(range(8 * step, 8 * step + 8))
        for rank in range(2):
            assert ranks[rank].tokens.tolist() == batch.tokens[rank::2].tolist()
            assert ranks[rank].indices.tolist() == batch.indices[rank::2].tolist()
    resumed = Batches(split, seq_len=4, batch_size=8, seed=3).batch(11)
    assert resumed.labels.tolist() == batch.labels.tolist()
    assert Batches(split, seq_len=4, batch_size=8, seed=4).batch(11).labels.tolist() != batch.labels.tolist()  # control


def test_an_epoch_visits_every_row_once(split: Split) -> None:
    batches = Batches(split, seq_len=3, batch_size=1, seed=0)
    n = len(batches.rows)
    for epoch in range(3):
        seen = np.concatenate([batches.batch(epoch * n + i).tokens for i in range(n)])
        assert sorted(seen.tolist()) == sorted(batches.rows.read(np.arange(n)).tokens.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seq_len": 0}, "seq_len = 0"), ({"batch_size": 0}, "batch_size = 0"), ({"seed": -1}, "seed = -1")],
)
def test_bad_sizes_are_refused(split: Split, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(split, **{"seq_len": 4, "batch_size": 2, "seed": 0, **options})  # pyrefly: ignore
    with pytest.raises(ValueError, match="step = -1"):
        Batches(split, seq_len=4, batch_size=2, seed=0).batch(-1)


SPECIAL = "<|endoftext|> is text </s> \0"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{SPECIAL} {i} naïve"}) for i in range(50)))
    return path


def tree(directory: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_prepare_tokenises_once(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    config = DataConfig(source=str(corpus), tokenizer=tokenizer, bpe_vocab_size=300)  # pyrefly: ignore
    seen: list[str] = []

    def ready() -> Dataset:
        return prepare(config, tmp_path / "cache", progress=lambda stage, done, total: seen.append(stage))

    data = ready()
    assert seen
    first = data.tokenizer.decode(data.train.tokens[: data.train.offsets[1]])
    assert first.startswith(SPECIAL)
    assert data.train.n_documents + data.validation.n_documents == 50
    before = tree(tmp_path / "cache")
    seen.clear()
    assert ready().fingerprint == data.fingerprint
    assert not seen
    assert tree(tmp_path / "cache") == before
    with corpus.open("a") as out:
        out.write('\n{"text": "more"}')
    assert ready().fingerprint != data.fingerprint
    assert seen


KILLED = """
import os, sys
from ritornello.config import DataConfig
from ritornello.train import shards
from ritornello.train.data import prepare
shards.BATCH = 64
def progress(stage, done, total):
    if done > total // 2:
        os.kill(os.getpid(), 9)
prepare(DataConfig(source=sys.argv[1]), sys.argv[2], progress=progress)
"""


def test_killed_half_way_the_rerun_is_byte_identical(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    died = subprocess.run([sys.executable, "-c", KILLED, str(corpus), str(cache)], check=False)
    assert died.returncode == -9
    (home,) = cache.iterdir()
    left = [path.name for path in home.iterdir() if path.name.startswith(files.TEMPORARY)]
    assert left  # control: it did die in the middle
    config = DataConfig(source=str(corpus))
    prepare(config, cache)
    prepare(config, tmp_path / "untouched")
    assert tree(cache) == tree(tmp_path / "untouched")


def test_a_second_process_waits_for_the_first(corpus: Path, tmp_path: Path) -> None:
    config, cache = DataConfig(source=str(corpus)), tmp_path / "cache"
    prepare(config, cache)
    (home,) = cache.iterdir()
    files.remove_tree(home / "shards")
    found: list[Dataset] = []
    thread = threading.Thread(target=lambda: found.append(prepare(config, cache)))
    with files.lock(home):
        thread.start()
        time.sleep(0.3)
        assert not found
    thread.join(10)
    assert found[0].train.n_documents > 0


def test_a_damaged_cache_is_named(corpus: Path, tmp_path: Path) -> None:
    config, cache = DataConfig(source=str(corpus)), tmp_path / "cache"
    prepare(config, cache)
    (home,) = cache.iterdir()
    (home / "shards" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"tokenised data '.*shards': must be complete .* remove it to tokenise again"):
        prepare(config, cache)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "text in train = 0: must be at least 1 of 0"), (b"a", "text in validation = 0: must be at least 1 of 1")],
)
def test_too_little_text_leaves_nothing_behind(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare(DataConfig(source=str(tmp_path / "a.txt")), tmp_path / "cache")
    assert not tree(tmp_path / "cache")


def test_broken_utf8_stops_a_bpe_and_not_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 100 + b"\xff\xfe\n" + b"fine\n" * 10)
    assert prepare(DataConfig(source=str(path)), tmp_path / "cache").train.n_bytes > 0
    with pytest.raises(ValueError, match=r"a\.txt byte 500 = .*: must be UTF-8"):
        prepare(DataConfig(source=str(path), tokenizer="bpe"), tmp_path / "cache")


GOLDEN = [6, 8, 2, 1, 3, 7, 9, 5, 0, 4, 5, 6, 9, 4, 3, 0, 8, 1, 7, 2, 6, 4, 9, 2, 5, 7, 8, 0, 1, 3]
