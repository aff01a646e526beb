"""Checkpoints in parts, on one process: several are imitated by files that are made by hand."""

import errno
import itertools
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ritornello import recipes
from ritornello.cli import main
from ritornello.config import Recipe
from ritornello.engine.generate import load
from ritornello.train import checkpoint, files, parts, sharded, tensors
from ritornello.train.consolidate import consolidate
from ritornello.train.parallel import ALONE
from ritornello.train.parts import Part
from ritornello.train.stored import Stored
from ritornello.train.trainer import train
from tests.train.small import recipe
from tests.train.test_checkpoint import Canary, assert_bit_equal, interrupt, manifest_for, saved, weights

WHOLE = {"w": torch.arange(12.0).view(4, 3), "bias": torch.arange(3.0), "scale": torch.tensor(2.5)}
SHAPES = {name: list(x.shape) for name, x in WHOLE.items()}
HONEST: list[dict[str, Tensor]] = [  # what two processes write
    {"w@0,0": WHOLE["w"][:2], "bias@0": WHOLE["bias"][:2], "scale@": WHOLE["scale"]},
    {"w@2,0": WHOLE["w"][2:, :1], "w@2,1": WHOLE["w"][2:, 1:], "bias@2": WHOLE["bias"][2:]},
]


@pytest.fixture(autouse=True)
def no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(checkpoint, "_git_commit", lambda: None)


def own(state: dict[str, Any]) -> sharded.Own:
    return sharded.own(state, ALONE)


def save(run: Path, step: int, *, keep: int = 2, **changes: Any) -> Path:
    """By one process."""
    arguments: dict[str, Any] = {
        "model_state": own(weights(step)),
        "recipe": Recipe(),
        "tokenizer_json": '{"kind": "bytes"}',
        "optimizer_state": own(
            {"AdamW/embed.weight/exp_avg": torch.full((5, 3), 0.5), "AdamW/embed.weight/step": step}
        ),
        "trainer_state": {"step": step},
        "fingerprint": "f" * 64,
    }
    return sharded.save(run, step=step, keep=keep, world=ALONE, **arguments | changes)


def packed(entries: dict[str, Tensor], shapes: dict[str, Any] = SHAPES) -> bytes:
    """A file of parts, by the library."""
    contiguous = {key: x.contiguous() for key, x in entries.items()}
    return safetensors.torch.save(contiguous, metadata={"shapes": json.dumps(shapes)})


def by_two(run: Path, model: list[bytes]) -> Path:
    """A checkpoint of as many processes as there are files, with right sums."""
    directory = run / "checkpoints" / "step_000001"
    directory.mkdir(parents=True)
    contents = {checkpoint.shard("model", rank): data for rank, data in enumerate(model)}
    contents |= {checkpoint.shard("optimizer", rank): packed({}, {}) for rank in range(len(model))}
    contents |= checkpoint.texts(Recipe(), "{}", {"n": 3}, {"step": 1})
    about = checkpoint.manifest_of(1, "f", checkpoint.SHARDED, checkpoint.records(contents))
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    (directory / checkpoint.MANIFEST).write_bytes(checkpoint.sealed(asdict(about)))
    return directory


# --- geometry


def test_boxes_in_common_are_those_of_their_numbers() -> None:
    dice = random.Random(0)
    for _ in range(300):
        shape = [dice.randint(1, 5) for _ in range(dice.randint(0, 3))]
        boxes = [_box(shape, dice) for _ in range(4)]
        taken = [_numbers(box, shape) for box in boxes]
        common = boxes[0].common(boxes[1])
        assert (taken[0] & taken[1]).sum() == (common.size if common else 0)
        if common:
            whole = torch.arange(taken[0].numel()).view(shape)
            inside = whole[boxes[0].within(parts.whole(shape))][common.within(boxes[0])]
            assert torch.equal(inside, whole[common.within(parts.whole(shape))])
        pairs = [(i, k) for i, k in itertools.combinations(range(4), 2) if (taken[i] & taken[k]).any()]
        found = parts.overlapping(boxes)
        assert (found in pairs) if pairs else found is None


def _box(shape: list[int], dice: random.Random) -> Part:
    offset = tuple(dice.randrange(n) for n in shape)
    return Part(offset, tuple(dice.randint(1, n - start) for start, n in zip(offset, shape, strict=True)))


def _numbers(box: Part, shape: list[int]) -> Tensor:
    found = torch.zeros(shape, dtype=torch.bool)
    found[box.within(parts.whole(shape))] = True
    return found


def test_runs_of_indices() -> None:
    assert parts._runs(torch.tensor([4, 5, 6, 0, 1, 9])) == [(4, slice(0, 3)), (0, slice(3, 5)), (9, slice(5, 6))]
    assert parts._runs(torch.tensor([])) == []


# --- round trips


def test_what_is_streamed_is_what_the_library_writes() -> None:
    state, out = weights(), bytearray()
    tensors.write(out.extend, state, state.__getitem__, tied={})
    assert_bit_equal(safetensors.torch.load(bytes(out)), state)
    assert bytes(out) == tensors.pack(state)


def test_a_round_trip_is_bit_equal(tmp_path: Path) -> None:
    directory = save(tmp_path, 7)
    assert sorted(path.name for path in directory.iterdir()) == [
        *("config.json", "manifest.json", "model-00000.safetensors", "optimizer-00000.safetensors"),
        *("state.json", "tokenizer.json"),
    ]
    found = checkpoint.load(tmp_path)
    assert_bit_equal(found.model_state, weights(7))
    with pytest.raises(AssertionError):
        assert_bit_equal(found.model_state, weights(8))
    optimizer, trainer = checkpoint.training_state(found)
    assert_bit_equal(optimizer, {"AdamW/embed.weight/exp_avg": torch.full((5, 3), 0.5), "AdamW/embed.weight/step": 7})
    assert trainer == {"step": 7} and found.manifest.format == checkpoint.SHARDED == 3


def test_what_several_processes_wrote_is_put_together(tmp_path: Path) -> None:
    by_two(tmp_path, [packed(entries) for entries in HONEST])
    assert_bit_equal(checkpoint.load(tmp_path).model_state, WHOLE)
    assert checkpoint.training_state(checkpoint.load(tmp_path)) == ({"n": 3}, {"step": 1})


def test_weights_are_known_by_all_their_files(tmp_path: Path) -> None:
    """As a calibration knows them."""
    one = by_two(tmp_path / "one", [packed(entries) for entries in HONEST])
    other = by_two(tmp_path / "other", [packed(HONEST[0]), packed(HONEST[1] | {"bias@2": torch.tensor([9.0])})])
    sums = [checkpoint.verify(directory).weights_sha256 for directory in (one, one, other)]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_from_its_parts_as_from_the_plain_form(tmp_path: Path, background: bool) -> None:
    """Saved, continued, and turned into the plain form by the command, on one process."""
    found = {}
    for form in ("plain", "sharded"):
        given = recipe(tmp_path, steps=4, save_every=2, checkpoint_form=form, save_in_background=background)
        half = replace(given, train=replace(given.train, steps=2))
        for each in (half, given):
            train(each, out=tmp_path / form, device="cpu", cache_dir=tmp_path / "cache", resume=True)
        found[form] = checkpoint.load(tmp_path / form)
        assert found[form].manifest.format == {"plain": 2, "sharded": 3}[form]
    assert_bit_equal(found["sharded"].model_state, found["plain"].model_state)
    states = [checkpoint.training_state(found[form]) for form in found]
    assert_bit_equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    loaded = load(tmp_path / "sharded", device="cpu")
    assert_bit_equal(dict(loaded.model.state_dict()), found["plain"].model_state)


# --- the plain form of it


def test_consolidated_it_is_what_one_process_would_have_written(tmp_path: Path) -> None:
    by_two(tmp_path, [packed(entries) for entries in HONEST])
    before = checkpoint.load(tmp_path)
    directory = consolidate(tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == sorted([*checkpoint.CONTENTS, checkpoint.MANIFEST])
    assert (directory / checkpoint.MODEL).read_bytes() == tensors.pack(WHOLE)
    after = checkpoint.load(tmp_path)
    assert_bit_equal(after.model_state, WHOLE)
    assert checkpoint.training_state(after) == ({"n": 3}, {"step": 1})
    kept = ("step", "fingerprint", "versions", "git_commit")
    assert all(getattr(before.manifest, name) == getattr(after.manifest, name) for name in kept)
    inode = directory.stat().st_ino
    assert consolidate(directory).stat().st_ino == inode, "a plain one stays"
    assert saved(tmp_path) == ["step_000001"]


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_two(tmp_path, [packed(entries) for entries in HONEST])
    events: list[str] = []
    read, write = Stored.tensor, files.Writer.write
    monkeypatch.setattr(Stored, "tensor", lambda self, name: events.append(name) or read(self, name))
    monkeypatch.setattr(files.Writer, "write", lambda self, data: events.append("write") or write(self, data))
    consolidate(tmp_path)
    assert events[:7] == ["write", "bias", "write", "scale", "write", "w", "write"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    by_two(run, [packed(entries) for entries in HONEST])
    (run / "config.json").write_text(recipes.to_json(Recipe()))
    assert main(["runs", "consolidate", str(run)]) == 0
    assert str(run / "checkpoints" / "step_000001") in capsys.readouterr().out
    assert checkpoint.load(run).manifest.format == checkpoint.FORMAT
    with files.lock(run):
        pid = os.fork()
        if not pid:
            os._exit(main(["runs", "consolidate", str(run)]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2, "a run in use is left alone"
    assert main(["runs", "consolidate", str(tmp_path)]) == 2


# --- damage


@pytest.mark.parametrize("name", ["model-00000.safetensors", "model-00001.safetensors", "optimizer-00001.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "swapped", "cut", "changed", "link"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    model = [packed({"w@0,0": torch.ones(1, 3)}, {"w": [2, 3]}), packed({"w@1,0": torch.ones(1, 3)}, {"w": [2, 3]})]
    directory = by_two(tmp_path, model)
    (directory / "optimizer-00001.safetensors").write_bytes(packed({}, {"nothing": [0]}))
    manifest_for(directory)
    checkpoint.load(tmp_path)
    path = directory / name
    data, other = path.read_bytes(), directory / name.translate(str.maketrans("01", "10", "00"))
    other = directory / (name.replace("00000", "00001") if "00000" in name else name.replace("00001", "00000"))
    path.unlink()
    if damage == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif damage == "link":
        (tmp_path / "outside").write_bytes(data)
        path.symlink_to(tmp_path / "outside")
    elif damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    named = "|".join(map(str, (path, other))) if damage == "swapped" else str(path)
    with pytest.raises(ValueError, match=f"^({named}): "):
        checkpoint.find(directory)


W = WHOLE["w"]
FIRST, SECOND, BOTH = "model-00000.safetensors", "model-00001.safetensors", "model-*.safetensors"
HOSTILE: dict[
    str, tuple[str, str, list[dict[str, Tensor]], list[Any]]
] = {  # sums are right; file, message, parts, shapes
    "overlap": (SECOND, "'w@1,0' overlaps 'w@0,0'", [{"w@0,0": W[:2]}, {"w@1,0": W[1:]}], [{"w": [4, 3]}] * 2),
    "twice": (SECOND, "'w@0,0' overlaps", [{"w@0,0": W}, {"w@0,0": W}], [{"w": [4, 3]}] * 2),
    "a scalar twice": (SECOND, "'s@' overlaps", [{"s@": W[0, 0]}, {"s@": W[0, 0]}], [{"s": []}] * 2),
    "hole": (BOTH, "'w': 3 of 12 numbers are in no file", [{"w@0,0": W[:1]}, {"w@2,0": W[2:]}], [{"w": [4, 3]}] * 2),
    "end missing": (BOTH, "'w': 6 of 12 numbers", [{"w@0,0": W[:2]}, {}], [{"w": [4, 3]}] * 2),
    "outside": (
        SECOND,
        r"'w@3,0': \(2, 3\) reaches outside",
        [{"w@0,0": W[:3]}, {"w@3,0": W[2:]}],
        [{"w": [4, 3]}] * 2,
    ),
    "far outside": (FIRST, "reaches outside", [{"w@999999999999999999,0": W}, {}], [{"w": [4, 3]}] * 2),
    "huge": (BOTH, "numbers are in no file", [{"w@0,0": W}, {}], [{"w": [2**62, 2**62]}] * 2),
    "another dtype": (
        SECOND,
        "of a tensor of torch.float64",
        [{"w@0,0": W[:2]}, {"w@2,0": W[2:].double()}],
        [{"w": [4, 3]}] * 2,
    ),
    "another shape": (SECOND, r"\(5, 3\), but", [{"w@0,0": W[:2]}, {"w@2,0": W[2:]}], [{"w": [4, 3]}, {"w": [5, 3]}]),
    "another rank": (FIRST, "2 offsets", [{"w@0": W}, {}], [{"w": [4, 3]}] * 2),
    "fewer dims": (FIRST, "reaches outside", [{"w@0,0": W}, {}], [{"w": [12]}] * 2),
    "no offset": (FIRST, "must be a name, @", [{"w": W}, {}], [{"w": [4, 3]}] * 2),
    "a negative offset": (FIRST, "must be a name, @", [{"w@-1,0": W}, {}], [{"w": [4, 3]}] * 2),
    "other digits": (FIRST, "must be a name, @", [{"w@٣,0": W}, {}], [{"w": [4, 3]}] * 2),
    "no shape": (FIRST, "'w' = None", [{"w@0,0": W}, {}], [{}, {}]),
    "a negative shape": (FIRST, "must be a list of integers", [{"w@0,0": W}, {}], [{"w": [-4, 3]}] * 2),
    "a shape of truths": (FIRST, "must be a list of integers", [{"w@0,0": W}, {}], [{"w": [True, 3]}] * 2),
    "shapes no map": (FIRST, "must be a list of integers", [{"w@0,0": W}, {}], [[], []]),
    "not a number": (
        SECOND,
        "NaN or infinite values in 'w'",
        [{"w@0,0": W[:2]}, {"w@2,0": W[2:] / 0}],
        [{"w": [4, 3]}] * 2,
    ),
    "a dtype": (FIRST, "must be one of", [{"w@0,0": W.to(torch.float8_e4m3fn)}, {}], [{"w": [4, 3]}] * 2),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_parts(tmp_path: Path, case: str) -> None:
    named, message, entries, shapes = HOSTILE[case]
    directory = by_two(tmp_path, [packed(*each) for each in zip(entries, shapes, strict=True)])
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert str(caught.value).startswith(f"{directory / named}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["pickle", "zip", "metadata"])
def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    directory = by_two(tmp_path, [packed(entries) for entries in HONEST])
    hostile = pickle.dumps(Canary()) if case != "zip" else b"PK\x03\x04" + pickle.dumps(Canary())
    if case == "metadata":  # where torch.distributed.checkpoint keeps its index
        (directory / ".metadata").write_bytes(hostile)
        assert_bit_equal(checkpoint.load(tmp_path).model_state, WHOLE)
        consolidate(tmp_path)
    else:
        (directory / SECOND).write_bytes(hostile)
        manifest_for(directory)
        for act in (checkpoint.load, consolidate):
            with pytest.raises(ValueError, match=f"^{directory / SECOND}: not a safetensors file; pickles"):
                act(tmp_path)
    assert not (tmp_path / "canary").exists()
    pickle.loads(hostile[4 * (case == "zip") :])
    assert (tmp_path / "canary").exists(), "the canary works"


@pytest.mark.parametrize(
    "change",
    [
        lambda names: names - {"model-00001.safetensors"},
        lambda names: names - {"model-00001.safetensors", "optimizer-00000.safetensors"},
        lambda names: names | {"model-00002.safetensors"},
        lambda names: {name.replace("00001", "00007") for name in names},
        lambda names: {name for name in names if name.endswith(".json")},
        lambda names: names - {"state.json"},
        lambda names: names - {"model-00001.safetensors"} | {"model-../../x"},
    ],
)
def test_a_manifest_lists_every_process(tmp_path: Path, change: Callable[[set[str]], set[str]]) -> None:
    directory = by_two(tmp_path, [packed(entries) for entries in HONEST])
    source = directory / checkpoint.MANIFEST
    body = json.loads(source.read_text())
    del body["checksum"]
    record = body["files"]["state.json"]
    body["files"] = {name: body["files"].get(name, record) for name in change(set(body["files"]))}
    source.write_bytes(checkpoint.sealed(body))
    with pytest.raises(ValueError, match=f"^{source}: must list the files"):
        checkpoint.load(directory)


# --- failing at every system call


@pytest.mark.parametrize("name", ["save", "consolidate"])
def test_a_failure_at_every_call_loses_nothing(tmp_path: Path, name: str) -> None:
    for act in [consolidate if name == "consolidate" else lambda run: save(run, 3)]:
        for index in itertools.count():
            run = tmp_path / f"{name} {index}"
            save(run, 1)
            save(run, 2)
            failed = False
            with pytest.MonkeyPatch.context() as patch:
                log = interrupt(patch, index, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), for_ever=False)
                try:
                    act(run)
                except OSError as error:
                    failed = True
                    assert error.errno == errno.ENOSPC and "cannot " in str(error) and str(run) in str(error)
            if len(log) <= index:
                assert index > 40
                break
            assert failed or "remov" in log[index]
            found = checkpoint.load(run)
            assert_bit_equal(found.model_state, weights(found.manifest.step))
            assert found.manifest.step == 2 or not failed or log[index] in ("sync", "open"), "renamed, not yet synced"
            left = [each for each in saved(run) if each.startswith(files.TEMPORARY)]
            replaced = name == "consolidate" and found.manifest.format == checkpoint.FORMAT  # the old one is set aside
            assert not left or "remov" in log[index] or replaced
            save(run, 4)
            assert not [each for each in saved(run) if each.startswith(files.TEMPORARY)], "the next save cleans up"


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    bad = own({"w": torch.tensor([1.0, float("inf")])})
    with pytest.raises(ValueError, match=r"model-00000\.safetensors: NaN or infinite values in 'w@0'"):
        save(tmp_path, 1, model_state=bad)
    assert list(tmp_path.iterdir()) == []
