import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ritornello.train import corpus
from ritornello.train.corpus import held_out, open_corpus, require_unchanged, stamp


def contents(source: str | Path, **options: Any) -> list[tuple[bool, bytes]]:
    found = open_corpus(str(source), **options).documents()
    return [(document.validation, b"".join(document.pieces)) for document in found]


def refused(message: str, source: str | Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        contents(source, **options)
    assert "\n" not in str(caught.value)


def test_stdlib_is_source_without_tests_split_by_package() -> None:
    found = open_corpus("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).parts for path in found.files]
    assert 5e6 < found.n_bytes < 20e6
    assert {Path(name[-1]).suffix for name in names} == {".py"}
    parts = {part for name in names for part in name}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"}
    assert {"json", "ast.py", "unittest"} <= parts
    packages = {name[0].removesuffix(".py") for name in names}
    assert set(found.held_out) < packages
    documents = list(found.documents())
    assert len(documents) == len(names)
    for document in documents:
        package = Path(document.name).relative_to(root).parts[0].removesuffix(".py")
        assert document.validation == (package in found.held_out)
    share = sum(len(text) for validation, text in contents("stdlib") if validation) / found.n_bytes
    assert 0.08 < share <= 0.1
    assert open_corpus("stdlib").fingerprint == found.fingerprint


@given(sizes=st.dictionaries(st.text(max_size=4), st.integers(1, 100), min_size=2), share=st.floats(0.05, 0.5))
def test_held_out_stays_within_its_share(sizes: dict[str, int], share: float) -> None:
    chosen, target = held_out(sizes, share), share * sum(sizes.values())
    assert chosen == held_out(dict(reversed(sizes.items())), share)
    if len(chosen) > 1:
        assert sum(sizes[name] for name in chosen) <= target
        assert max(sizes[name] for name in chosen) <= target / 8
    assert chosen < sizes.keys()


def test_no_giant_is_held_out_and_few_groups_leave_the_smallest() -> None:
    small = {f"p{i}": 10 for i in range(200)}
    assert "giant" not in held_out({**small, "giant": 150}, 0.1)
    assert "p7x" in held_out({**{f"p{i}x": 10 for i in range(8)}, "p7x": 1}, 0.9)
    assert held_out({"a": 5, "b": 3, "c": 4}, 0.1) == {"b"}


def test_the_end_of_a_single_text_file_is_validation(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"line %d\r\n" % i for i in range(1000)))
    (was, train), (now, validation) = contents(path, validation_fraction=0.2)
    assert (was, now) == (False, True)
    assert train + validation == path.read_bytes()
    assert train.endswith(b"\n")
    assert 0.2 <= len(validation) / path.stat().st_size < 0.21
    path.write_text("é" * 501)  # no line to cut at: never inside a character
    (_, train), (_, validation) = contents(path, utf8=True)
    assert (train + validation).decode() == train.decode() + validation.decode() == "é" * 501
    path.write_text("a\n" + "b" * 1000)  # the only line end is far from the cut
    assert len(contents(path)[1][1]) < 120


@given(text=st.text(st.characters(exclude_categories=["Cs"])), size=st.integers(4, 20))
def test_pieces_join_to_the_text_and_never_cut_a_character(
    text: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_text(json.dumps({"text": text}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", size)
        (document,) = open_corpus(str(path)).documents()
        pieces = list(document.pieces)
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)
    data = text.encode()
    naive = [data[i : i + size] for i in range(0, len(data), size)]
    if any(piece.decode(errors="ignore").encode() != piece for piece in naive):  # control: plain slices do cut some
        assert pieces != naive


def test_a_folder_is_read_in_order_with_symlink_loops(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/a.txt", "b/c/d.TXT", ".git/hidden.txt", "ignored.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to("self")
    (tmp_path / "e.jsonl").write_text('{"text": "row"}\n\n{"text": "other"}')
    found = [text for _, text in contents(tmp_path)]
    assert found == [b"b/a.txt", b"b/c/d.TXT", b"row", b"other", b"z.txt"]
    before = open_corpus(str(tmp_path))
    (tmp_path / "z.txt").write_text("Z.txt")
    assert open_corpus(str(tmp_path)).fingerprint != before.fingerprint
    assert open_corpus(str(tmp_path)).held_out == before.held_out == ("z.txt",)


def test_rows_are_held_out_by_their_text(tmp_path: Path) -> None:
    rows = [{"text": f"row {i % 500}", "n": i} for i in range(1000)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = contents(path, validation_fraction=0.2)
    train, validation = ({text for held, text in found if held == want} for want in (False, True))
    assert not train & validation  # every second row is a copy
    assert 60 < len(validation) < 140
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert contents(tmp_path / "b.parquet", validation_fraction=0.2) == found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "a.jsonl line 2 = [1, 2]: must be an object with the key 'text'"),
        ("null", "a.jsonl line 2 = None: must be an object"),
        ("42", "a.jsonl line 2 = 42: must be an object"),
        ('{"txt": "a"}', "did you mean data.field = 'txt'?"),
        ('{"body": "a"}', "it has ['body']"),
        ('{"text": null}', "a.jsonl line 2 'text' = None: must be a string"),
        ('{"text": ["a"]}', "a.jsonl line 2 'text' = ['a']: must be a string"),
        ('{"text": "\\ud800"}', "a.jsonl line 2 'text': must be valid Unicode"),
        ('{"text": "a"', "a.jsonl line 2 = "),
        ("[" * 100_000, "a.jsonl line 2 = "),
        ("1" * 10_000, "a.jsonl line 2 = "),
        (b'{"text": "\xff"}', "a.jsonl line 2 = "),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    data = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "good"}\n' + data + b"\n")
    refused(message, path)
    path.write_bytes(b'{"text": "good"}\n')
    assert len(contents(path)) == 1  # control


def test_a_huge_line_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as out:
        out.write(b'{"text": "')
        out.truncate(1 << 30)  # a hole: takes no disk
    monkeypatch.setattr(corpus, "_fingerprint", lambda files: "")
    refused(f"a.jsonl line 1 = '{corpus.MAX_LINE + 1} bytes or more': must be at most", path)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    refused("a.parquet: must be a readable Parquet file", path)
    pq.write_table(pa.table({"texts": ["a"]}), path)
    refused("did you mean data.field = 'texts'?", path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    refused("a.parquet row 2 'text' = None: must be a string", path)
    pq.write_table(pa.table({"text": [1]}), path)
    refused("a.parquet row 1 'text' = 1: must be a string", path)
    pq.write_table(pa.table({"text": ["a" * 1000] * 1000}), path)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    refused("a.parquet: must be a readable Parquet file", path)


def test_broken_utf8_is_named_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 3 + b"nul \0 and \xff broken\n" + b"good line\n" * 9)
    monkeypatch.setattr(corpus, "PIECE", 16)
    assert b"".join(text for _, text in contents(path)) == path.read_bytes()
    refused(
        r"a.txt byte 40 = b'\xff br': must be UTF-8; convert the file, or choose the tokenizer 'bytes'", path, utf8=True
    )


def pipe(path: Path) -> None:
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("make", "message"), [(pipe, "must be a regular file"), (dangling, "must be readable"), (loop, "must be readable")]
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None], message: str, folder: bool) -> None:
    make(tmp_path / "a.txt")
    refused(message, tmp_path if folder else tmp_path / "a.txt")


def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("source = '': must be", "")
    refused("must be a file or folder that exists", "no/such/place.txt")
    refused("must be a file or folder that exists", "a\0b")
    refused("must be readable; [Errno 36]", "a" * 5000)
    refused("a folder with a .txt, .jsonl or .parquet file in it", tmp_path)
    (tmp_path / "a.csv").write_text("a")
    refused("a folder or a .txt, .jsonl or .parquet file", tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("a")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "a.txt")

    monkeypatch.setattr(Path, "open", denied)
    refused("must be readable; [Errno 13]", tmp_path / "a.txt")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text " * 100)
    before = stamp(path)
    require_unchanged(path, before)
    documents = open_corpus(str(path)).documents()
    next(documents)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt = 'truncated': must be left alone"):
        list(next(documents).pieces)
    with pytest.raises(ValueError, match=r"a\.txt = 'changed or removed': must be left alone"):
        require_unchanged(path, before)
    path.unlink()
    with pytest.raises(ValueError, match="changed or removed"):
        require_unchanged(path, before)


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb.jsonl"
    path.write_text("[]")
    refused(r"a\x1b[31m\nb.jsonl line 1 = []", path)


def test_a_missing_optional_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("pip install 'ritornello[data]'", "someone/some-data")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets`, with every switch that a test may flip put back afterwards."""
    import datasets.config
    import huggingface_hub.constants

    for module, name in [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    return datasets


def test_offline_refuses_what_is_not_cached(hub: Any) -> None:
    refused(
        "source = 'someone/some-data:part': must be in the cache when offline", "someone/some-data:part", offline=True
    )


def test_rows_of_a_data_set(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {i}" for i in range(100)]
    hub.Dataset.from_dict({"text": rows, "n": list(range(100))}).save_to_disk(tmp_path)
    asked = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options["split"]))
        return hub.load_from_disk(tmp_path)

    monkeypatch.setattr(hub, "load_dataset", load)
    found = open_corpus("someone/some-data:part")
    assert asked == [("someone/some-data", "part", "train")]
    assert [b"".join(document.pieces).decode() for document in found.documents()] == rows
    assert found.n_bytes > 0
    refused(
        "data.field = 'txt': must be a key of someone/some-data; did you mean data.field = 'text'?",
        "someone/some-data",
        field="txt",
    )
    refused("someone/some-data row 1 'n' = 0: must be a string", "someone/some-data", field="n")
