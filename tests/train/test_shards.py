import json
import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import final

import numpy as np
import pytest

from ritornello.train import files, shards
from ritornello.train.corpus import Corpus, Document, open_corpus
from ritornello.train.shards import Dataset, Split, build, open_shards
from ritornello.train.tokenizer import ByteTokenizer, OwnTokenizer, Tokenizer, train_bpe

TEXTS = [f"document {i}\n" * (1 + i % 7) for i in range(60)] + ["", "<|endoftext|>\0é🙂"]


def write_jsonl(path: Path, texts: Sequence[str] = TEXTS) -> Corpus:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return open_corpus(str(path), validation_fraction=0.3)


def built(directory: Path, corpus: Corpus, tokenizer: Tokenizer | None = None) -> Path:
    directory.mkdir()
    build(corpus, tokenizer or ByteTokenizer(), directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts(split: Split, tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes(split.tokens[start:stop]) for start, stop in pairwise(split.offsets)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return built(tmp_path / "shards", write_jsonl(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(TEXTS, 300)], ids=["bytes", "bpe"])
def test_documents_come_back(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH", 50)
    corpus = write_jsonl(tmp_path / "a.jsonl")
    data = open_shards(built(tmp_path / "shards", corpus, tokenizer))
    for split, held in (data.train, False), (data.validation, True):
        expected = [b"".join(one.pieces) for one in corpus.documents() if one.validation == held]
        assert texts(split, tokenizer) == [text for text in expected if text]
        assert (split.tokens[split.offsets[1:] - 1] == tokenizer.eos_id).all()
        assert (split.tokens == tokenizer.eos_id).sum() == split.n_documents
        assert split.n_bytes == sum(map(len, expected)) == split.byte_lengths[split.tokens].sum()
    assert data.tokenizer.to_json() == tokenizer.to_json()


@final
class Wide(OwnTokenizer):
    """Ids that need 32 bits."""

    def __init__(self) -> None:
        super().__init__([b"?"] * 70_000)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8).astype(np.uint32) + 69_000 for text in texts]

    def to_json(self) -> str:
        return "{}"


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "from_json", lambda text: Wide())
    data = open_shards(built(tmp_path / "shards", write_jsonl(tmp_path / "a.jsonl"), Wide()))
    assert data.train.tokens.dtype == np.dtype("<u4")
    assert int(data.train.tokens.max()) == 70_000
    assert data.train.tokens[0] == TEXTS[0].encode()[0] + 69_000


def test_the_fingerprint_covers_text_and_tokenizer(tmp_path: Path) -> None:
    def fingerprint(name: str, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> str:
        corpus = write_jsonl(tmp_path / "a.jsonl", texts)
        return open_shards(built(tmp_path / name, corpus, tokenizer)).fingerprint

    first = fingerprint("a", TEXTS)
    assert fingerprint("b", TEXTS) == first
    assert fingerprint("c", [*TEXTS[:-1], "another"]) != first
    assert fingerprint("d", TEXTS, train_bpe(TEXTS, 300)) != first


def test_a_rerun_after_any_failed_write_is_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH", 200)
    corpus = write_jsonl(tmp_path / "a.jsonl")
    expected = contents(built(tmp_path / "whole", corpus))
    write, calls = files.Writer.write, [0]

    def failing(self: files.Writer, data: bytes) -> int:
        calls[0] -= 1
        if calls[0] == 0:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(files.Writer, "write", failing)
    for n in range(1, 100):
        calls[0] = n
        directory = tmp_path / str(n)
        try:
            built(directory, corpus)
        except OSError:
            assert not (directory / "meta.json").exists()
            assert not [name for name in os.listdir(directory) if name.startswith(files.TEMPORARY)]
            with pytest.raises(ValueError, match="must be complete"):
                open_shards(directory)
            build(corpus, ByteTokenizer(), directory)
        else:
            break
        assert contents(directory) == expected
    assert 10 < n < 99
    assert contents(directory) == expected


def one_document(held: bool, text: bytes = b"a") -> Corpus:
    return Corpus(lambda: iter([Document("a", held, [text])]), {}, "", ())


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (one_document(False), "documents with text in validation = 0: must be at least 1 of 1"),
        (one_document(True), "documents with text in train = 0: must be at least 1 of 1"),
        (one_document(True, b""), "documents with text in train = 0: must be at least 1 of 0"),
    ],
)
def test_a_split_without_text_is_refused(tmp_path: Path, corpus: Corpus, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        built(tmp_path / "shards", corpus)
    assert not (tmp_path / "shards" / "meta.json").exists()


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl")
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    with pytest.raises(ValueError, match=r"a\.jsonl = 'changed or removed'"):
        built(tmp_path / "shards", corpus)


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(change((directory / name).read_bytes()))

    return damage


def poke(name: str, offset: int, value: bytes) -> Callable[[Path], None]:
    return edit(name, lambda data: data[:offset] + value + data[offset + len(value) :])


def meta(**changes: object) -> Callable[[Path], None]:
    return edit("meta.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


def as_uint32(data: bytes) -> bytes:
    return np.frombuffer(data, "<u2").astype("<u4").tobytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("train.tokens", lambda data: data[:-2]), "size of train.tokens = "),
        (edit("validation.tokens", lambda data: data + b"\0\0"), "size of validation.tokens = "),
        (edit("train.tokens", as_uint32), "it is truncated or of another type"),
        (edit("train.tokens", lambda data: b""), "size of train.tokens = 0: must be"),
        (poke("train.tokens", 20, b"b\0"), "sha256 of train.tokens = "),
        (poke("train.tokens", 20, b"\x01\x01"), "train.tokens at offset 10: token id = 257: must be in [0, 256]"),
        (poke("validation.tokens", 0, b"\xff\xff"), "validation.tokens at offset 0: token id = 65535: must be in"),
        (poke("train.offsets", 8, b"\x02"), "sha256 of train.offsets = "),
        (edit("train.offsets", lambda data: data[8:]), "size of train.offsets = "),
        (edit("tokenizer.json", lambda data: data + b" "), "sha256 of tokenizer.json = "),
        (lambda directory: (directory / "validation.tokens").unlink(), "No such file"),
        (lambda directory: (directory / "meta.json").unlink(), "no such file"),
        (edit("meta.json", lambda data: data[:50]), "must be complete and unchanged"),
        (edit("meta.json", lambda data: b"[]"), "must be complete and unchanged"),
        (edit("meta.json", lambda data: b"{}"), "no 'format'"),
        (meta(format=2), "format = 2: must be an integer in [1, 1]"),
        (meta(dtype="<f4"), "dtype = '<f4': must be one of <u2, <u4"),
        (meta(dtype="<u4"), "sha256 of meta.json = "),
        (meta(splits={}), "sha256 of meta.json = "),
        (meta(held_out=None), "must be complete and unchanged"),
    ],
)
def test_damage_is_named(directory: Path, damage: Callable[[Path], None], message: str) -> None:
    assert open_shards(directory).train.n_documents > 0  # control
    damage(directory)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_shards(directory)
    assert str(caught.value).endswith("remove it to tokenise again")


def truncate(path: Path) -> None:
    os.truncate(path, 2)


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("change", [truncate, replace, rewrite, Path.unlink])
def test_a_change_during_a_run_is_noticed(directory: Path, change: Callable[[Path], None]) -> None:
    data: Dataset = open_shards(directory)
    at = np.arange(10)
    assert (data.train.read(at) == data.train.tokens[:10]).all()
    change(data.train.path)
    with pytest.raises(ValueError, match=r"train\.tokens = 'changed or removed': must be left alone"):
        data.train.read(at)


def test_ids_are_checked_when_read_too(directory: Path) -> None:
    poke("train.tokens", 20, b"\x01\x01")(directory)
    data = open_shards(directory, verify=False)
    data.train.read(np.arange(10))  # control
    with pytest.raises(ValueError, match=r"train\.tokens at offset 10: token id = 257"):
        data.train.read(np.arange(20).reshape(4, 5))
