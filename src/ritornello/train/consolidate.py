"""From the form that several processes write to the plain one, a tensor at a time."""

from dataclasses import asdict, replace
from pathlib import Path

from ritornello.train import checkpoint, files, tensors
from ritornello.train.checkpoint import FileRecord


def consolidate(run_or_checkpoint: str | Path) -> Path:
    """Replace a checkpoint, the newest one of a run, by its plain form, bit for bit; returns its path.

    One that is plain stays as it is. The caller holds the run's lock. Needs the disk space of both, and the memory of
    the largest tensor.

    Raises:
        OSError: the path and the bytes needed; the checkpoint is as it was.
        ValueError: nothing valid there; the file is named.
    """
    found = checkpoint.find(run_or_checkpoint)
    if found.manifest.format != checkpoint.SHARDED:
        return found.directory
    parent, records = found.directory.parent, found.manifest.files
    checkpoint.clear(parent)
    files.require_space(parent, sum(record.size for record in records.values()))
    with files.create_directory(found.directory) as temporary:
        wrote = {f"{kind}.safetensors": _whole(found, kind, temporary) for kind in checkpoint.KINDS}
        for name in sorted(checkpoint.TEXTS):
            files.write_atomic(temporary / name, (found.directory / name).read_bytes())
            wrote[name] = records[name]
        manifest = replace(found.manifest, format=checkpoint.FORMAT, files=wrote)
        files.write_atomic(temporary / checkpoint.MANIFEST, checkpoint.sealed(asdict(manifest)))
    return found.directory


def _whole(found: checkpoint.Checkpoint, kind: str, directory: Path) -> FileRecord:
    stored = found.stored(kind)
    path = directory / f"{kind}.safetensors"
    return checkpoint.written(path, lambda out: tensors.write(out, stored.described, stored.tensor, tied={}))
