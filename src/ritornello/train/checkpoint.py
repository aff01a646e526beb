"""A checkpoint is a directory that is complete and verified, or does not exist.

    runs/<name>/checkpoints/step_000500/
        model.safetensors  config.json  tokenizer.json      all that generation needs
        optimizer.safetensors  state.json                   what training continues from
        manifest.json                                       sizes and sha256 of the others, written last

This is the plain form; `sharded` writes another, in which each process has a file of its own for its part of the model
and one for the optimizer's. Both are read here. Every byte goes through `files`. Reading trusts nothing: no pickle, no
code, no index, and every damage is a `ValueError` that names the file.
"""

import hashlib
import json
import logging
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ritornello import recipes
from ritornello.config import Recipe, require_int
from ritornello.train import files, tensors
from ritornello.train.parallel import ALONE, World, is_spread
from ritornello.train.runs import CHECKPOINTS, CONFIG
from ritornello.train.stored import Stored
from ritornello.train.tokenizer import MAX_BYTES

FORMAT = 2
SHARDED = 3  # format 2, tensors apart
KINDS = ("model", "optimizer")  # of tensors
MODEL, OPTIMIZER = (f"{kind}.safetensors" for kind in KINDS)
TOKENIZER, STATE, MANIFEST = "tokenizer.json", "state.json", "manifest.json"
TEXTS = {CONFIG, TOKENIZER, STATE}
CONTENTS = {MODEL, OPTIMIZER, *TEXTS}

Scalar = int | float | bool | str | None
OptimizerState = Mapping[str, Tensor | Scalar]
logger = logging.getLogger("ritornello")


class NewerFormatError(ValueError):
    """The checkpoint was written by a later version: nothing is wrong with it, so nothing may fall back from it."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: int
    step: int
    fingerprint: str  # of the data
    versions: dict[str, str]
    git_commit: str | None
    files: dict[str, FileRecord]

    def of(self, kind: str) -> list[str]:
        """The files with the tensors of a kind."""
        return sorted(name for name in self.files if name.startswith(kind))

    @property
    def weights_sha256(self) -> str:
        """What no other weights have: of the plain form its file's, else of all their files'."""
        found = [self.files[name].sha256 for name in self.of("model")]
        return found[0] if self.format != SHARDED else _sha256("".join(found).encode())


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified directory, of which everything is read when asked for; `training_state` reads the rest of it.

    Raises:
        ValueError: when read, where what was written is nonsense; the file is named.
    """

    directory: Path
    manifest: Manifest

    @cached_property
    def recipe(self) -> Recipe:
        return recipes.read_json(self.directory / CONFIG)

    @cached_property
    def tokenizer_json(self) -> str:
        return recipes.read_text(self.directory / TOKENIZER, max_bytes=MAX_BYTES)

    @cached_property
    def model(self) -> Stored:
        return self.stored("model")

    @cached_property
    def model_state(self) -> dict[str, Tensor]:
        """Whole."""
        return self.model.read()

    def stored(self, kind: str) -> Stored:
        """The tensors of a kind, unread."""
        return Stored([self.directory / name for name in self.manifest.of(kind)])


def save(
    run_dir: str | Path,
    *,
    step: int,
    model_state: Mapping[str, Tensor],
    recipe: Recipe,
    tokenizer_json: str,
    optimizer_state: OptimizerState,
    trainer_state: Mapping[str, Any],
    fingerprint: str,
    keep: int = 2,
) -> Path:
    """Write `run_dir`/checkpoints/step_<step>, then remove all but the newest `keep` valid ones; returns its path.

    The caller holds `files.lock(run_dir)`. The snapshot is complete when this returns. `trainer_state` is plain JSON.

    Raises:
        OSError: the path and the bytes needed; the earlier checkpoints are intact and nothing temporary is left.
        ValueError: a weight is not finite.
    """
    require_int("keep", keep, 2)
    tensors.require_finite(model_state, MODEL)
    contents = {
        MODEL: tensors.pack(model_state),
        OPTIMIZER: tensors.pack({name: value for name, value in optimizer_state.items() if isinstance(value, Tensor)}),
        **texts(recipe, tokenizer_json, optimizer_state, trainer_state),
    }
    manifest = manifest_of(step, fingerprint, FORMAT, records(contents))
    target = path_of(run_dir, step)
    if not _holds(target, manifest):
        _write(target, contents | {MANIFEST: sealed(asdict(manifest))})
    purge(target, keep)
    return target


def texts(
    recipe: Recipe, tokenizer_json: str, optimizer_state: OptimizerState, trainer_state: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of a checkpoint that hold no tensors."""
    scalars = {name: value for name, value in optimizer_state.items() if not isinstance(value, Tensor)}
    state = json.dumps({"optimizer": scalars, "trainer": trainer_state}, indent=2, allow_nan=False)
    assert json.loads(state)["trainer"] == trainer_state, "trainer_state must survive JSON: no tuples, keys are strings"
    return {CONFIG: recipes.to_json(recipe).encode(), TOKENIZER: tokenizer_json.encode(), STATE: state.encode()}


def records(contents: Mapping[str, bytes]) -> dict[str, FileRecord]:
    return {name: FileRecord(size=len(data), sha256=_sha256(data)) for name, data in contents.items()}


def manifest_of(step: int, fingerprint: str, format: int, files: dict[str, FileRecord]) -> Manifest:
    """Of a checkpoint that is written now."""
    return Manifest(
        format=format,
        step=step,
        fingerprint=fingerprint,
        versions=_versions(),
        git_commit=_git_commit(),
        files=files,
    )


def path_of(run_dir: str | Path, step: int) -> Path:
    """Where a run's checkpoint of a step lies."""
    return Path(run_dir, CHECKPOINTS, f"step_{step:06d}")


def verify(directory: str | Path, share: slice = slice(None)) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written, else a `ValueError` that names the file.

    share: of its files, those that are read: several processes share the work.
    """
    directory = Path(directory)
    source = directory / MANIFEST
    text = recipes.read_text(source)
    body = recipes.parse_json(text, source)
    if not isinstance(body, dict) or sealed({k: v for k, v in body.items() if k != "checksum"}) != text.encode():
        raise ValueError(f"{source}: damaged: its checksum differs")
    if isinstance(body.get("format"), int) and body["format"] > SHARDED:
        advice = "upgrade with pip install -U ritornello"
        raise NewerFormatError(f"{source}: format {body['format']} is newer than this version's {SHARDED}; {advice}")
    try:
        manifest = recipes.validated(Manifest, body)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    expected = CONTENTS if manifest.format != SHARDED else _shards(len(manifest.files)) | TEXTS
    if not 1 <= manifest.format <= SHARDED or manifest.files.keys() != expected:
        names = ", ".join(sorted(expected)[:10])
        raise ValueError(
            f"{source}: must list the files {names}{' …' * (len(expected) > 10)} in a format up to {SHARDED}"
        )
    for name in sorted(manifest.files)[share]:
        _verify_file(directory / name, manifest.files[name])
    return manifest


def newest(run_dir: str | Path, world: World = ALONE) -> Checkpoint | None:
    """The newest valid checkpoint of a run; damaged ones are skipped with a warning that names the file.

    All processes of `world` ask together: each verifies a share of the files, and all find the same.

    Raises:
        ValueError: there are checkpoints, but none is valid: what is left may be worth a look.
    """
    directory = Path(run_dir, CHECKPOINTS)
    listed = _directories(directory, world)
    found = next(_valid(listed, world), None)
    if listed and found is None:
        raise ValueError(f"{directory}: no valid checkpoint among {len(listed)}; move them away to begin anew")
    return found


def latest(run_dir: str | Path) -> Path | None:
    """Where the newest valid checkpoint of a run is: see `newest`."""
    found = newest(run_dir)
    return found.directory if found else None


def find(run_or_checkpoint: str | Path) -> Checkpoint:
    """The newest checkpoint of a run directory, or the one of a checkpoint directory, verified and not yet read."""
    path = Path(run_or_checkpoint)
    if not path.is_dir():
        raise ValueError(f"{path}: " + ("not a directory" if path.exists() else "no such run or checkpoint"))
    is_checkpoint = (path / MANIFEST).exists() or _step(path) is not None
    found = Checkpoint(directory=path, manifest=verify(path)) if is_checkpoint else newest(path)
    if found is None:
        raise ValueError(f"{path}: no valid checkpoint in it")
    return found


def load(run_or_checkpoint: str | Path) -> Checkpoint:
    """As `find`, with the weights and what they need read, by one process."""
    found = find(run_or_checkpoint)
    _ = found.model_state, found.recipe, found.tokenizer_json
    return found


def training_state(
    checkpoint: Checkpoint, layout: Callable[[str], Tensor | None] = lambda _: None, *, rest: bool = True
) -> tuple[dict[str, Tensor | Scalar], dict[str, Any]]:
    """The `optimizer_state` and `trainer_state` that `save` was given; of the former, what `layout` and `rest` say, as
    `Stored.read` does: see `optimizer_layout`."""
    source = checkpoint.directory / STATE
    state = recipes.parse_json(recipes.read_text(source), source)
    match state:
        case {"optimizer": dict(scalars), "trainer": dict(trainer)}:
            for older in range(checkpoint.manifest.format, FORMAT):
                trainer = MIGRATIONS[older](trainer)
            scalars = {tensors.renamed(name): x for name, x in scalars.items()}
            scalars = {name: x for name, x in scalars.items() if rest or layout(name) is not None}
            return {**checkpoint.stored("optimizer").read(layout, rest=rest), **scalars}, trainer
    raise ValueError(f"{source}: must hold an optimizer's and a trainer's state")


def _without_guard(trainer: dict[str, Any]) -> dict[str, Any]:
    return {**trainer, "guard": {"losses": [], "grad_norms": [], "lost": [], "n_skipped": 0}}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _without_guard}  # of a format to the next one


def flatten_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor | Scalar]:
    """Every state of every optimizer by "<optimizer class>/<parameter name>/<key>".

    Rates and other options are not state here: the recipe defines them, for any step.
    """
    return {
        f"{owner}/{key}": value
        for owner, (optimizer, _, parameter) in _owners(optimizers, model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizers(optimizers: Sequence[Optimizer], model: nn.Module, state: OptimizerState) -> None:
    """Put back what `flatten_optimizers` returned, bit for bit, whatever the order of the groups.

    `load_state_dict` would go by position and cast to the parameter's dtype. Nothing is changed if anything is wrong.
    """
    owners = _owners(optimizers, model)
    unknown = [name for name in state if name.rpartition("/")[0] not in owners]
    wrong = [
        name
        for name, value in state.items()
        if name not in unknown and isinstance(value, Tensor) and value.ndim
        if value.shape != owners[name.rpartition("/")[0]][2].shape
    ]
    if unknown or wrong:
        problems = filter(None, [tensors.listed("no such parameter", unknown), tensors.listed("wrong shape", wrong)])
        raise ValueError(f"{OPTIMIZER}: {'; '.join(problems)}; is the recipe another one?")
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, value in state.items():
        owner, _, key = name.rpartition("/")
        optimizer, group, parameter = owners[owner]
        if isinstance(value, Tensor):  # torch keeps step counters on the CPU unless the kernel reads them
            on_device = value.ndim > 0 or group.get("fused") or group.get("capturable")
            assert not value.ndim or is_spread(value) == is_spread(parameter), (name, "read as its parameter lies")
            value = value.to(parameter.device if on_device else "cpu", copy=True)
        optimizer.state[parameter][key] = value


def optimizer_layout(optimizers: Sequence[Optimizer], model: nn.Module) -> Callable[[str], Tensor | None]:
    """By the name of an optimizer's state, the parameter that it belongs to, beside which it lies."""
    owners = _owners(optimizers, model)
    return lambda name: owners[owner][2] if (owner := name.rpartition("/")[0]) in owners else None


def _owners(
    optimizers: Sequence[Optimizer], model: nn.Module
) -> dict[str, tuple[Optimizer, dict[str, Any], nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{type(optimizer).__name__}/{names[parameter]}": (optimizer, group, parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _write(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Publish `contents` as `directory`, the manifest written last; what it was before is replaced."""
    parent = directory.parent
    clear(parent)
    files.require_space(parent, sum(map(len, contents.values())))
    with files.create_directory(directory) as temporary:
        for name, data in contents.items():
            files.write_atomic(temporary / name, data)


def clear(checkpoints: Path) -> None:
    """Make the directory, without anything that a killed process left in it: this one holds the run's lock."""
    files.make_directory(checkpoints)
    for stale in checkpoints.glob(f"{files.TEMPORARY}*"):
        files.remove_tree(stale)


def written(path: Path, fill: Callable[[Callable[[memoryview], object]], None]) -> FileRecord:
    """Create `path` with what `fill` hands on, bit by bit."""
    digest, size = hashlib.sha256(), 0
    with files.create(path) as out:

        def take(data: memoryview) -> None:
            nonlocal size
            digest.update(data)
            size += out.write(data)

        fill(take)
    return FileRecord(size=size, sha256=digest.hexdigest())


def _holds(directory: Path, manifest: Manifest) -> bool:
    """Whether `directory` is this very checkpoint: replacing it would be the one moment without it."""
    try:
        return directory.exists() and verify(directory) == manifest
    except ValueError:
        return False


def purge(saved: Path, keep: int, world: World = ALONE) -> None:
    """Remove what is older than the newest `keep` valid checkpoints. `saved` is kept, even if later steps exist."""
    listed = _directories(saved.parent, world)
    if len(listed) <= keep:
        return
    kept = [found.directory for found in islice(_valid(listed, world), keep)]
    for directory in listed[listed.index(kept[-1]) + 1 :] if len(kept) == keep and not world.rank else []:
        try:
            if directory != saved:
                files.remove_tree(directory)
        except OSError as error:  # the new checkpoint is safe; the next save tries again
            logger.warning("an old checkpoint stays: %s", error)


def _directories(checkpoints: Path, world: World = ALONE) -> list[Path]:
    """Every checkpoint by name, newest first, valid or not, as the first process sees them."""
    listed = checkpoints.iterdir() if checkpoints.is_dir() else ()
    found = [path for path in listed if _step(path) is not None and path.is_dir()]
    found.sort(key=lambda path: _step(path) or 0, reverse=True)
    return [checkpoints / name for name in world.told("/".join(path.name for path in found)).split("/") if name]


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step_(\d{6,18})", path.name)
    return int(match[1]) if match else None


def _valid(directories: Iterable[Path], world: World) -> Iterator[Checkpoint]:
    for directory in directories:
        manifest = None
        try:
            manifest = verify(directory, slice(world.rank, None, world.size))
        except NewerFormatError:
            raise
        except ValueError as error:
            logger.warning("checkpoint skipped: %s", error)
        if not world.any(manifest is None) and manifest is not None:
            yield Checkpoint(directory=directory, manifest=manifest)


def _shards(n_files: int) -> set[str]:
    """The tensors' files of a sharded checkpoint of so many files, and at least one process."""
    return {shard(kind, rank) for kind in KINDS for rank in range(max(1, (n_files - len(TEXTS)) // len(KINDS)))}


def shard(kind: str, rank: int) -> str:
    """The file in which a process has its part of the tensors of a kind."""
    return f"{kind}-{rank:05d}.safetensors"


def _verify_file(path: Path, record: FileRecord) -> None:
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: " + ("missing" if not path.exists() else "not a regular file of this directory"))
        size = path.stat().st_size
        if size != record.size:
            raise ValueError(f"{path}: damaged: {size} bytes instead of {record.size}")
        with path.open("rb") as source:
            if hashlib.file_digest(source, "sha256").hexdigest() != record.sha256:
                raise ValueError(f"{path}: damaged: its sha256 differs from the manifest's")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def sealed(body: Mapping[str, Any]) -> bytes:
    """The bytes of JSON that nobody edits: one form only, closed by a checksum, so that any change shows."""
    checksum = _sha256(json.dumps(body).encode())
    return (json.dumps({**body, "checksum": checksum}, indent=2) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("ritornello", "torch", "safetensors")}
    return {**packages, "python": platform.python_version()}


def _git_commit() -> str | None:
    """The commit of the checkout that the process runs in, if it runs in one."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
