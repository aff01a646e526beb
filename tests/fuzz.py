"""Every reader of a file somebody else may have written, fed with bytes: it may raise ValueError, and nothing else.

`test_fuzz.py` changes valid files at random. `python -m tests.fuzz READER SECONDS` lets atheris (pip install atheris)
look for inputs that reach new code, starting from the same files; what it finds goes into `FOUND`.
"""

import atexit
import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FunctionType

import pyarrow as pa
import pyarrow.parquet as parquet_file
import safetensors.torch
import torch

from ritornello import recipes
from ritornello.commands.runs import megabytes
from ritornello.config import ModelConfig, Recipe
from ritornello.engine import batch, calibration, prompts
from ritornello.engine.generate import Loaded
from ritornello.lab import arms, cell
from ritornello.lab.tasks import build_task
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, runs, shards, tensors
from ritornello.train.corpus import open_corpus
from ritornello.train.guard import Guard, NonFiniteError
from ritornello.train.tokenizer import ByteTokenizer, from_json, train_bpe
from ritornello.train.trainer import State

TEXTS = ("def f(x):\n    return x", "naïve — 🙂", "", "a b c " * 20)
ASKED: list[dict[str, object]] = [
    {"prompt": "a", "id": "x", "max_tokens": 3, "loops": 2, "exit": "kl", "exit_threshold": 0.5, "min_loops": 2},
    {"prompt": "", "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 9, "stop": ["a", "b"]},
    {"prompt": "b", "repetition_penalty": 1.5, "presence_penalty": 1, "logit_bias": {"7": -2.5}, "logprobs": 3},
]
Reader = Callable[[bytes], object]


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def toml(data: bytes) -> Recipe:
    return recipes.from_mapping(recipes.apply_sets(recipes.read_toml(_file("recipe.toml", data)), []))


def config(data: bytes) -> Recipe:
    return recipes.read_json(_file("config.json", data))


def setting(data: bytes) -> Recipe:
    return recipes.from_mapping(recipes.apply_sets({}, [data.decode(errors="surrogateescape")]))


def tokenizer(data: bytes) -> list[int]:
    return from_json(data.decode(errors="surrogateescape")).encode("a b")


def weights(data: bytes) -> object:
    return tensors.read(_file("model.safetensors", data))


def manifest(data: bytes) -> object:
    """As it is, and with the checksum that its content should have."""
    with contextlib.suppress(ValueError):
        return checkpoint.verify(_file("step_000001/manifest.json", data).parent)
    body = recipes.parse_json(data.decode(), "manifest")
    if not isinstance(body, dict):
        raise ValueError
    body.pop("checksum", None)
    return checkpoint.verify(_file("step_000001/manifest.json", checkpoint.sealed(body)).parent)


def state(data: bytes) -> State:
    """A trainer's, inside a checkpoint whose sums are right."""
    directory = _file("step_000002/state.json", data).parent
    (directory / checkpoint.OPTIMIZER).write_bytes(seed("weights"))
    body = json.loads(_manifest())
    about = checkpoint.Manifest(**{name: value for name, value in body.items() if name != "checksum"})
    found = checkpoint.Checkpoint(directory=directory, manifest=about)
    return recipes.validated(State, checkpoint.training_state(found)[1])


def lab_cell(data: bytes) -> object:
    return cell.read(_file("cell/cell.json", data).parent)


def corpus(name: str, data: bytes) -> int:
    documents = open_corpus(str(_file(name, data)), utf8=True).documents()
    return sum(len(piece) for document in documents for piece in document.pieces)


def tokenised(data: bytes) -> object:
    _shards()
    return shards.open_shards(_file("shards/meta.json", data).parent)


def metrics(data: bytes) -> str:
    """As `ritornello runs` shows them."""
    run = _file("run/metrics.jsonl", data).parent
    _file("run/config.json", seed("config"))
    found = runs.read(run)
    return " ".join(map(runs.text, found.metrics.values())) + megabytes(found.metrics.get("peak_mb", 0) * 1e6)


@functools.cache
def _loaded() -> Loaded:
    """A model that could answer, and never does."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(ModelConfig(dim=32, ffn="dense", halting="kl"))
    return Loaded(model, ByteTokenizer(), Recipe())


def requests(data: bytes) -> list[str]:
    return [asked.key for asked in prompts.read(_file("prompts.jsonl", data), _loaded(), {}, "model")]


def answers(data: bytes) -> set[str]:
    return batch.resumed(_file("answers.jsonl", data), {"a": "k", "b": "l"})


def exit_rule(data: bytes) -> object:
    return calibration.read(_file("exit.json", data))


READERS: dict[str, Reader] = {
    "toml": toml,
    "config": config,
    "setting": setting,
    "tokenizer": tokenizer,
    "weights": weights,
    "manifest": manifest,
    "state": state,
    "cell": lab_cell,
    "text": functools.partial(corpus, "corpus.txt"),
    "jsonl": functools.partial(corpus, "corpus.jsonl"),
    "parquet": functools.partial(corpus, "corpus.parquet"),
    "shards": tokenised,
    "metrics": metrics,
    "requests": requests,
    "answers": answers,
    "exit": exit_rule,
}


@functools.cache
def _shards() -> bytes:
    """Tokenised data beside which another meta.json is put; returns the right one."""
    path = _file("small.jsonl", b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS * 9))
    (folder() / "shards").mkdir()
    shards.build(open_corpus(str(path)), ByteTokenizer(), folder() / "shards")
    return (folder() / "shards" / "meta.json").read_bytes()


def _parquet() -> bytes:
    stream = io.BytesIO()
    parquet_file.write_table(pa.table({"text": list(TEXTS)}), stream)
    return stream.getvalue()


def _manifest() -> bytes:
    files = {name: checkpoint.FileRecord(size=3, sha256="0" * 64) for name in sorted(checkpoint.CONTENTS)}
    return checkpoint.sealed(
        {
            "format": checkpoint.FORMAT,
            "step": 1,
            "fingerprint": "f",
            "versions": {},
            "git_commit": None,
            "files": {name: vars(record) for name, record in files.items()},
        }
    )


def _trainer() -> dict[str, object]:
    guard = Guard(6.0)
    guard.done(5.5, 1.0)
    guard.skipped(NonFiniteError(2, [3, 4], float("nan"), 1.0, "not finite"))
    return {"step": 3, "guard": guard.state()}


def _cell() -> bytes:
    made = arms.cell("dense", build_task("chains", {"n_nodes": 8, "n_chains": 2}), seed=0, masked=True)
    facts = cell.Facts(steps=3, seconds=1.5, flops=1e9, peak_bytes=10**8, loss=2.5)
    return json.dumps({"cell": asdict(made), "trained": asdict(facts)}).encode()


def _exit() -> bytes:
    found = calibration.Calibration(
        goal=calibration.Goal(rule="kl", n_loops=8),
        threshold=0.0123,
        mean_loops=3.25,
        mean_risk=0.01,
        p_value=0.04,
        n_sequences=500,
        seq_len=128,
        step=7,
        weights_sha256="a" * 64,
        data_fingerprint="b" * 64,
    )
    return calibration.save(found, folder()).read_bytes()


@functools.cache
def seed(reader: str) -> bytes:
    """A valid file. The manifest's describes files that are not there."""
    recipe = Recipe(name="r", model=ModelConfig(dim=32))
    return {
        "toml": lambda: b'name = "r"\n[model]\npreset = "tiny"\n[train]\nlr = 1e-3\neval_loops = [1, 2]\n',
        "config": lambda: recipes.to_json(recipe).encode(),
        "setting": lambda: b"train.eval_loops=[1, 2]",
        "tokenizer": lambda: train_bpe(TEXTS, 270).to_json().encode(),
        "weights": lambda: safetensors.torch.save({"a": torch.zeros(2), "b": torch.ones(3, 1)}, {"tied": '{"c": "a"}'}),
        "manifest": _manifest,
        "state": lambda: json.dumps({"optimizer": {"AdamW/a/step": 3.0}, "trainer": _trainer()}).encode(),
        "cell": _cell,
        "text": lambda: "\n".join(TEXTS).encode(),
        "jsonl": lambda: b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS),
        "parquet": _parquet,
        "shards": _shards,
        "metrics": lambda: b'{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.25, "peak_mb": 300.5}\n',
        "requests": lambda: b"".join(json.dumps(row).encode() + b"\n" for row in ASKED),
        "answers": lambda: (
            b'{"id": "a", "text": "", "key": "k"}\n{"id": "b", "text": "c", "key": "l"}\n{"id": "c", "te'
        ),
        "exit": _exit,
    }[reader]()


LARGE = (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'"' + b"a" * 100_000)
FOUND: dict[str, list[bytes]] = {
    "metrics": [b"3\n", b'{"step": "x"}', b'{"step": 1, "peak_mb": "x"}', b'{"step": 1, "a": 1' + b"0" * 400 + b"}"],
    "state": [b'{"optimizer": {}, "trainer": {"step": 1}}', b'{"optimizer": {}, "trainer": {}}'],
}


def _followed() -> Iterator[FunctionType]:
    """Our functions, and those of the standard library's parsers: following all that torch brings takes minutes."""
    names = [name for name in sys.modules if name.split(".")[0] in ("ritornello", "json", "tomllib")]
    for name in names:
        for value in vars(sys.modules[name]).values():
            inside = vars(value).values() if isinstance(value, type) else (value,)
            yield from (x for x in inside if isinstance(x, FunctionType) and x.__module__ == name)


def main() -> None:
    import atheris

    name, seconds = sys.argv[1], sys.argv[2]
    reader, start = READERS[name], folder() / "seeds"
    start.mkdir()
    for i, data in enumerate((seed(name), *FOUND.get(name, []))):
        (start / str(i)).write_bytes(data)
    for function in _followed():
        atheris.instrument_func(function)

    def one(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            reader(data)

    limits = [f"-max_total_time={seconds}", "-max_len=8192", "-rss_limit_mb=4096", "-timeout=20", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", str(start)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
