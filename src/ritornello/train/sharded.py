"""A checkpoint that all processes write, each what it holds; the guarantees are `checkpoint`'s.

    runs/<name>/checkpoints/step_000500/
        model-00000.safetensors  optimizer-00000.safetensors     what process 0 wrote; and so on for each
        config.json  tokenizer.json  state.json  manifest.json   as in the plain form

What several processes hold, one of them writes. After each stage they agree, in a group of their own where training
goes on meanwhile: where one fails all of them raise, and nothing is published.
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ritornello.config import Recipe
from ritornello.train import checkpoint, files, tensors
from ritornello.train.checkpoint import KINDS, FileRecord, Scalar
from ritornello.train.parallel import World
from ritornello.train.stored import SHAPES, Stored, keyed


@dataclass(frozen=True)
class Own:
    """What one process writes of a state: parts by their keys, and how large the whole tensors are, by name. And what
    is no tensor, which the first process writes."""

    parts: dict[str, Tensor]
    shapes: dict[str, list[int]]
    scalars: dict[str, Scalar]

    def copied(self) -> "Own":
        """In the host's memory, where nothing else writes to."""
        return replace(self, parts=tensors.copied(self.parts))

    @property
    def n_bytes(self) -> int:
        return sum(x.nbytes for x in self.parts.values())


def own(state: Mapping[str, Any], world: World) -> Own:
    """What this process writes of `state`: each part is written by one of those that hold it, chosen by its key so that
    all have something to do. All processes ask together."""
    spread = {name: state[name] for name in sorted(state) if isinstance(state[name], Tensor)}  # whatever was read first
    held = {key: (name, part) for name, x in spread.items() for key, part in keyed(name, x)}
    numbers = {key: _number(key, part) for key, (_, part) in held.items()}
    holders: dict[int, list[int]] = {}
    for rank, theirs in enumerate(_lists(list(numbers.values()), world)):
        for number in theirs:
            holders.setdefault(number, []).append(rank)
    mine = {key: held[key] for key, n in numbers.items() if holders[n][n % len(holders[n])] == world.rank}
    return Own(
        parts={key: part for key, (_, part) in mine.items()},
        shapes={name: list(spread[name].shape) for name, _ in mine.values()},
        scalars={name: x for name, x in state.items() if name not in spread},
    )


def save(
    run_dir: str | Path,
    *,
    step: int,
    model_state: Own,
    recipe: Recipe,
    tokenizer_json: str,
    optimizer_state: Own,
    trainer_state: Mapping[str, Any],
    fingerprint: str,
    keep: int,
    world: World,
) -> Path:
    """As `checkpoint.save`, by all processes of `world` together; returns its path.

    Raises:
        OSError, ValueError: see there; ValueError where another process failed.
    """
    target, states = checkpoint.path_of(run_dir, step), dict(zip(KINDS, (model_state, optimizer_state), strict=True))
    texts = checkpoint.texts(recipe, tokenizer_json, optimizer_state.scalars, trainer_state)
    names = {kind: checkpoint.shard(kind, world.rank) for kind in KINDS}
    with world.together():
        tensors.require_finite(model_state.parts, names["model"])
    n_bytes = int(world.summed(torch.tensor(sum(state.n_bytes for state in states.values()))))
    with ExitStack() as stack:
        temporary = _opened(target, n_bytes + sum(map(len, texts.values())), stack, world)
        with world.together():
            wrote = [_write(temporary / names[kind], states[kind]) for kind in KINDS]
        about = checkpoint.records(texts) | _collected(wrote, world)
        with world.first() as first:
            if first:
                manifest = checkpoint.manifest_of(step, fingerprint, checkpoint.SHARDED, about)
                _complete(temporary, texts, manifest)
                stack.close()  # publishes it
    checkpoint.purge(target, keep, world)
    return target


def _opened(target: Path, n_bytes: int, stack: ExitStack, world: World) -> Path:
    """The directory that all write in, which the first process publishes as `target` when its `stack` is closed."""
    name = ""
    with world.first() as first:
        if first:
            checkpoint.clear(target.parent)
            name = stack.enter_context(files.create_directory(target)).name
    with world.together():
        files.require_space(target.parent, n_bytes)
    return target.with_name(world.told(name))


def _write(path: Path, state: Own) -> FileRecord:
    def fill(out: Any) -> None:
        tensors.write(out, state.parts, state.parts.__getitem__, **{SHAPES: state.shapes})

    return checkpoint.written(path, fill)


def _complete(directory: Path, texts: Mapping[str, bytes], manifest: checkpoint.Manifest) -> None:
    """Write what is not tensors; the manifest last, and only if each number has been written once."""
    for kind in KINDS:
        Stored([directory / name for name in manifest.of(kind)])
    for name, data in texts.items():
        files.write_atomic(directory / name, data)
    files.write_atomic(directory / checkpoint.MANIFEST, checkpoint.sealed(asdict(manifest)))


def _collected(mine: list[FileRecord], world: World) -> dict[str, FileRecord]:
    """By name, the files of all processes, of which these are this one's."""
    rows = world.rows(torch.tensor([[record.size, *bytes.fromhex(record.sha256)] for record in mine]))
    return {
        checkpoint.shard(kind, rank): FileRecord(size=size, sha256=bytes(digest).hex())
        for rank, row in enumerate(rows.tolist())
        for kind, (size, *digest) in zip(KINDS, row, strict=True)
    }


def _lists(mine: list[int], world: World) -> list[list[int]]:
    """The numbers of every process."""
    lengths = world.rows(torch.tensor(len(mine))).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.int64)
    padded[: len(mine)] = torch.tensor(mine, dtype=torch.int64)
    return [row[:n] for row, n in zip(world.rows(padded).tolist(), lengths, strict=True)]


def _number(key: str, part: Tensor) -> int:
    """Of 64 bits, the same for the same part in every process."""
    said = f"{key} {tuple(part.shape)}".encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "little", signed=True)
