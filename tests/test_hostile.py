"""Files made to run code when they are read: no reader unpickles, compiles, executes or starts anything."""

import io
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.engine.generate import load
from tests.fuzz import READERS, seed
from tests.train.small import recipe
from tests.train.test_checkpoint import Canary, manifest_for
from tests.train.test_trainer import run

WATCHED = {"pickle.find_class", "marshal.loads", "compile", "exec", "os.system", "subprocess.Popen"}
listening: list[list[str]] = []  # a hook can't be taken away again: it writes into what is here


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event in WATCHED:
        for heard in listening:
            heard.append(event)


sys.addaudithook(hear)


@contextmanager
def watched() -> Iterator[list[str]]:
    heard: list[str] = []
    listening.append(heard)
    try:
        yield heard
    finally:
        listening.remove(heard)


def archive(write: Callable[[Any], None], kind: Callable[..., Any], mode: str) -> bytes:
    stream = io.BytesIO()
    with kind(stream, mode) if kind is zipfile.ZipFile else kind(fileobj=stream, mode=mode) as out:
        write(out)
    return stream.getvalue()


def torch_saved(*, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"canary": Canary()}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def array_of_objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Canary()], dtype=object), allow_pickle=True)
    return stream.getvalue()


HOSTILE: dict[str, bytes] = {
    "pickle": pickle.dumps(Canary()),
    "old pickle": pickle.dumps(Canary(), protocol=0),
    "torch": torch_saved(zipped=True),
    "old torch": torch_saved(zipped=False),
    "array of objects": array_of_objects(),
    "zip": archive(lambda out: out.writestr("../canary", "x"), zipfile.ZipFile, "w"),
    "tar": archive(lambda out: out.addfile(tarfile.TarInfo("../../canary")), tarfile.open, "w"),
    "python": b"__import__('os').mkdir('canary')\n",
    "yaml": b"!!python/object/apply:os.mkdir [canary]\n",
    "template": b"{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(9) %}{% endfor %}",
    "class": b'{"auto_map": {"AutoModel": "canary.Model"}, "__class__": "os.mkdir", "py/reduce": ["os.mkdir"]}',
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_it_reads(reader: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")  # paths that lead upwards end where it is looked
    for data in (seed(reader), HOSTILE[case]):  # what is imported or built at the first use
        with suppress(ValueError):
            READERS[reader](data)
    with watched() as heard, suppress(ValueError):
        READERS[reader](HOSTILE[case])
    assert not heard and sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_canary.py", "__init__.py", "model.safetensors.index.json"]
)
def test_a_checkpoint_brings_no_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies beside its files, and whatever they hold."""
    saved = run(recipe(tmp_path, steps=1), tmp_path)
    monkeypatch.chdir(tmp_path)
    before = load(saved).model.state_dict()
    (saved / name).write_bytes(HOSTILE["pickle" if name.endswith("bin") else "python"])
    with watched() as heard:
        after = load(saved).model.state_dict()
    assert not heard and all(torch.equal(before[key], after[key]) for key in before)
    for own in ("model.safetensors", "optimizer.safetensors", "config.json", "state.json", "tokenizer.json"):
        good = (saved / own).read_bytes()
        (saved / own).write_bytes(HOSTILE["torch"])
        manifest_for(saved)
        with watched() as heard, suppress(ValueError):
            load(saved)
        assert not heard and not (tmp_path / "canary").exists()
        (saved / own).write_bytes(good)


@pytest.mark.parametrize("case", ["pickle", "old pickle", "torch", "old torch", "array of objects"])
def test_control_they_do_harm_where_they_are_unpickled(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO(HOSTILE[case])
    unpickle = {
        "torch": lambda: torch.load(stream, weights_only=False),
        "array of objects": lambda: np.load(stream, allow_pickle=True),
    }
    with watched() as heard, suppress(TypeError):
        unpickle.get(case.removeprefix("old "), lambda: pickle.loads(HOSTILE[case]))()
    assert "pickle.find_class" in heard and (tmp_path / "canary").is_dir()
