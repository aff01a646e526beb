import contextlib
import errno
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from ritornello import recipes
from ritornello.config import ModelConfig, Recipe
from ritornello.train import checkpoint, files, tensors

RECIPE = Recipe(name="test", model=ModelConfig(dim=32))
FILES = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(5, 3),
        "head.bias": torch.randn(4).bfloat16(),
        "count": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor(0.1 + seed, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }


def save(run: Path, step: int, *, keep: int = 2, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "model_state": weights(step),
        "recipe": RECIPE,
        "tokenizer_json": '{"kind": "bytes"}',
        "optimizer_state": {"AdamW/embed.weight/exp_avg": torch.randn(5, 3), "AdamW/embed.weight/step": step},
        "trainer_state": {"step": step, "losses": [0.1, 1e-300], "depth": {"mean": 4}},
        "fingerprint": "f" * 64,
    }
    return checkpoint.save(run, step=step, keep=keep, **arguments | changes)


def assert_bit_equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, a in left.items():
        b = right[name]
        assert type(a) is type(b) or isinstance(a, Tensor)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            same = torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
            assert same, name
        else:
            assert a == b, name


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def manifest_for(directory: Path, **changes: Any) -> None:
    """A manifest with right sums for whatever lies in `directory`: what an attacker would write."""
    body = json.loads((directory / "manifest.json").read_text())
    for name in body["files"]:
        data = (directory / name).read_bytes()
        body["files"][name] = {"size": len(data), "sha256": checkpoint._sha256(data)}
    body = {name: value for name, value in (body | changes).items() if name != "checksum"}
    (directory / "manifest.json").write_bytes(checkpoint.sealed(body))


@pytest.fixture(autouse=True)
def no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are made and counted; only waiting for the disk is left out."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# --- round trips


def test_round_trip_is_bit_equal(tmp_path: Path):
    directory = save(tmp_path, 500)
    assert directory == tmp_path / "checkpoints" / "step_000500"
    assert sorted(path.name for path in directory.iterdir()) == FILES
    assert checkpoint.latest(tmp_path) == directory
    for path in (tmp_path, directory):
        loaded = checkpoint.load(path)
        assert loaded.directory == directory and loaded.recipe == RECIPE
        assert loaded.tokenizer_json == '{"kind": "bytes"}'
        assert_bit_equal(loaded.model_state, weights(500))
    with pytest.raises(AssertionError):
        assert_bit_equal(loaded.model_state, weights(501))
    optimizer, trainer = checkpoint.training_state(loaded)
    torch.manual_seed(500)
    weights(500)
    assert_bit_equal(optimizer, {"AdamW/embed.weight/exp_avg": torch.randn(5, 3), "AdamW/embed.weight/step": 500})
    assert trainer == {"step": 500, "losses": [0.1, 1e-300], "depth": {"mean": 4}}
    manifest = checkpoint.verify(directory)
    assert manifest.step == 500 and manifest.fingerprint == "f" * 64 and manifest.versions["torch"] == torch.__version__


def test_the_commit_is_recorded_inside_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    assert checkpoint._git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert checkpoint._git_commit() is None


def test_views_and_ties(tmp_path: Path):
    base = torch.arange(12.0)
    state = {
        "tied": base,
        "flat": base.view(3, 4),
        "turned": base.view(3, 4).T,
        "part": base[2:7],
        "twin": base,
        "grad": nn.Parameter(base.clone()),
    }
    files.write_atomic(tmp_path / "a", tensors.pack(state))
    read = tensors.read(tmp_path / "a")
    assert_bit_equal(read, state)
    assert read["twin"] is read["tied"] and len(safetensors.torch.load((tmp_path / "a").read_bytes())) == 5


def test_the_snapshot_is_complete_when_save_returns(tmp_path: Path):
    state = weights(1)
    save(tmp_path, 1, model_state=state)
    for tensor in state.values():
        tensor.zero_()
    assert_bit_equal(checkpoint.load(tmp_path).model_state, weights(1))


def test_what_is_refused_before_anything_is_written(tmp_path: Path):
    bad = weights() | {"embed.weight": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match=r"model\.safetensors: NaN or infinite values in 'embed\.weight'"):
        save(tmp_path, 1, model_state=bad)
    with pytest.raises(ValueError, match="keep = 1: must be an integer >= 2"):
        save(tmp_path, 1, keep=1)
    with pytest.raises(AssertionError, match="must survive JSON"):
        save(tmp_path, 1, trainer_state={"pair": (1, 2)})
    assert list(tmp_path.iterdir()) == []


# --- damage

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b" ",
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing", "swapped", "directory", "link outside", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_previous_checkpoint_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
):
    previous, newest = save(tmp_path, 1), save(tmp_path, 2)
    path = newest / name
    data = path.read_bytes()
    if damage in DAMAGES:
        path.write_bytes(DAMAGES[damage](data))
    elif damage == "swapped":
        path.write_bytes((newest / FILES[FILES.index(name) - 1]).read_bytes())
    else:
        path.unlink()
        (tmp_path / "outside").write_bytes(data if name != "manifest.json" else b"")
        links = {"link outside": lambda: path.symlink_to(tmp_path / "outside")}
        make = {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), **links}
        make.get(damage, lambda: None)()
    with pytest.raises(ValueError, match=f"^{newest}/{name}: "):
        checkpoint.verify(newest)
    with caplog.at_level(logging.WARNING, logger="ritornello"):
        assert checkpoint.latest(tmp_path) == previous
    assert str(path) in caplog.text
    assert_bit_equal(checkpoint.load(tmp_path).model_state, weights(1))
    with pytest.raises(ValueError, match=name):
        checkpoint.load(newest)


def test_random_bit_flips_are_all_found(tmp_path: Path):
    directory, dice = save(tmp_path, 1), random.Random(0)
    for _ in range(500):
        path = directory / dice.choice(FILES)
        data = path.read_bytes()
        position, bit = dice.randrange(len(data)), dice.randrange(8)
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
        with pytest.raises(ValueError, match=f"^{path}: "):
            checkpoint.verify(directory)
        path.write_bytes(data)
    checkpoint.verify(directory)


def test_files_of_another_checkpoint_are_damage(tmp_path: Path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(first / "model.safetensors", second / "model.safetensors")
    with pytest.raises(ValueError, match=r"step_000002/model\.safetensors: damaged: its sha256"):
        checkpoint.verify(second)


def test_nothing_valid(tmp_path: Path):
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(ValueError, match="no valid checkpoint in it"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="no such run or checkpoint"):
        checkpoint.load(tmp_path / "x")
    (save(tmp_path, 1) / "state.json").unlink()
    for read in (checkpoint.load, checkpoint.latest):
        with pytest.raises(ValueError, match="no valid checkpoint among 1"):
            read(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        checkpoint.load(tmp_path / "checkpoints" / "step_000001" / "config.json")


# --- failing and dying at every system call


class Killed(BaseException):
    """The process is gone: nothing after it runs either."""


def interrupt(monkeypatch: pytest.MonkeyPatch, index: int, error: BaseException, *, for_ever: bool) -> list[str]:
    """Let the `index`-th system call fail, and all later ones too if `for_ever`. Returns the log of calls."""
    run, log = files._run, list[str]()

    def failing(*_: object) -> None:
        raise error

    def injected(operation: str, path: Path, call: Callable[..., Any], *arguments: object) -> Any:
        log.append(operation)
        fails = len(log) > index if for_ever else len(log) == index + 1
        return run(operation, path, failing if fails else call, *arguments)

    monkeypatch.setattr(files, "_run", injected)
    return log


def count_calls(tmp_path: Path) -> int:
    """System calls of a save that also purges."""
    run = tmp_path / "counted"
    save(run, 1)
    save(run, 2)
    with pytest.MonkeyPatch.context() as patch:
        log = interrupt(patch, -1, OSError(), for_ever=False)
        save(run, 3)
    assert saved(run) == ["step_000002", "step_000003"] and len(log) > 50
    return len(log)


def test_a_failure_at_every_call_loses_nothing(tmp_path: Path):
    for index in range(count_calls(tmp_path)):
        code = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)[index % 4]
        run = tmp_path / str(index)
        save(run, 1)
        save(run, 2)
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            log = interrupt(patch, index, OSError(code, os.strerror(code)), for_ever=False)
            try:
                save(run, 3)
            except OSError as error:
                failed = True
                assert error.errno == code and "cannot " in str(error) and str(run) in str(error)
                assert not log[index].startswith("write") or " bytes: " in str(error)
        assert failed or "remov" in log[index], "only purging may fail with a mere warning: the new one is safe"
        assert_bit_equal(checkpoint.load(run / "checkpoints" / "step_000002").model_state, weights(2))
        steps = [name for name in saved(run) if not name.startswith(files.TEMPORARY)]
        assert steps == saved(run) or log[index] == "remove", "only what cannot be removed stays"
        newest = 3 if "step_000003" in steps else 2
        assert_bit_equal(checkpoint.load(run).model_state, weights(newest))
        save(run, 4)
        assert saved(run) == sorted(["step_000004", f"step_{newest:06d}"]), "the next save cleans up"


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step again"])
def test_a_kill_at_every_call_loses_nothing(tmp_path: Path, step: int):
    outcomes = set()
    for index in range(count_calls(tmp_path) + 9):
        run = tmp_path / str(index)
        save(run, 1)
        save(run, 2)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            interrupt(patch, index, Killed(), for_ever=True)
            save(run, step, model_state=weights(7))
        found = checkpoint.load(run)
        seed = next(seed for seed in (1, 2, 7) if _is(found, seed))
        assert_bit_equal(found.model_state, weights(seed))
        outcomes.add((found.manifest.step, seed))
        save(run, 4)
        assert not [name for name in saved(run) if name.startswith(files.TEMPORARY)], "a later save cleans up"
        assert_bit_equal(checkpoint.load(run).model_state, weights(4))
    # Only replacing a step has a moment without it, between two renames: then the one before is there.
    assert outcomes == ({(2, 2), (3, 7)} if step == 3 else {(2, 2), (1, 1), (2, 7)})


def _is(found: checkpoint.Checkpoint, seed: int) -> bool:
    return torch.equal(found.model_state["embed.weight"], weights(seed)["embed.weight"])


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(OSError, match=r"not enough disk space: \d+ bytes needed, 100 free") as caught:
        save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "checkpoints")
    assert saved(tmp_path) == ["step_000001"]


# --- which ones stay


def test_keep(tmp_path: Path):
    for step in range(1, 8):
        save(tmp_path, step * 10, keep=3)
    assert saved(tmp_path) == ["step_000050", "step_000060", "step_000070"]
    save(tmp_path, 1_234_567)
    assert saved(tmp_path) == ["step_000070", "step_1234567"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_1234567"


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    (tmp_path / "checkpoints" / "step_000003" / "state.json").unlink()
    save(tmp_path, 4)
    assert saved(tmp_path) == [f"step_{step:06d}" for step in (2, 3, 4)]
    save(tmp_path, 5)
    assert saved(tmp_path) == [f"step_{step:06d}" for step in (4, 5)]


def test_the_one_just_saved_is_never_purged(tmp_path: Path):
    for step in (8, 9, 5):
        save(tmp_path, step)
    assert saved(tmp_path) == [f"step_{step:06d}" for step in (5, 8, 9)]


def test_saving_a_step_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = save(tmp_path, 1)
    inode = first.stat().st_ino
    assert save(tmp_path, 1).stat().st_ino == inode, "the same content is left alone"
    (first / "state.json").unlink()
    assert save(tmp_path, 1).stat().st_ino != inode, "a damaged one is replaced"
    save(tmp_path, 1, model_state=weights(7))
    assert_bit_equal(checkpoint.load(tmp_path).model_state, weights(7))
    assert saved(tmp_path) == ["step_000001"]


# --- hostile checkpoints


def test_a_newer_format_is_refused_with_advice_and_never_skipped(tmp_path: Path):
    save(tmp_path, 1)
    directory = save(tmp_path, 2)
    manifest_for(directory, format=checkpoint.SHARDED + 1)
    for act in (checkpoint.verify, checkpoint.load):
        with pytest.raises(checkpoint.NewerFormatError, match=r"format 4 is newer than this version's 3; upgrade"):
            act(directory)
    with pytest.raises(checkpoint.NewerFormatError):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": True},
        {"step": "1"},
        {"git_commit": 3},
        {"files": {}},
        {"files": []},
        {"files": {"../../../etc/passwd": {"size": 1, "sha256": ""}}},
        {"files": {name: {"size": -1, "sha256": "0"} for name in checkpoint.CONTENTS}},
    ],
)
def test_a_manifest_of_wrong_content(tmp_path: Path, changes: dict[str, Any]):
    directory = save(tmp_path, 1)
    manifest_for(directory, **changes)
    with pytest.raises(ValueError, match=r"step_000001/\w+\.\w+: "):
        checkpoint.load(directory)
    if "files" not in changes:
        manifest_for(directory, format=1, step=1, git_commit=None)
        checkpoint.load(directory)


def header(**entries: object) -> bytes:
    return framed(json.dumps(entries))


def framed(text: str, payload: bytes = bytes(8)) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass") + payload


class Canary:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("canary",)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08\0\0",
    "pickle": pickle.dumps(Canary()),
    "zip": b"PK\x03\x04" + bytes(100),
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "header beyond the file": (100).to_bytes(8, "little") + b"{}",
    "not JSON": framed("{nope"),
    "not UTF-8": (3).to_bytes(8, "little") + b'{"\xff' + bytes(8),
    "an array": framed("[]"),
    "deep": framed('{"a":' + "[" * 50_000),
    "duplicate keys": framed(f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32)}}}'),
    "duplicate inner keys": framed('{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
    "unknown dtype": header(a=F32 | {"dtype": "PICKLE"}),
    "a dtype torch lacks": header(a=F32 | {"dtype": "F6_E2M3"}),
    "shape beyond the data": header(a=F32 | {"shape": [2**40]}),
    "overflowing shape": header(a=F32 | {"shape": [2**62, 2**62]}),
    "negative shape": header(a=F32 | {"shape": [-2]}),
    "offsets outside": header(a=F32 | {"data_offsets": [8, 16]}),
    "offsets reversed": header(a=F32 | {"data_offsets": [8, 0]}),
    "overlapping": header(a=F32, b=F32),
    "unused bytes": framed(json.dumps({"a": F32}), bytes(16)),
    "metadata no map": header(__metadata__=3, a=F32),
    "metadata of numbers": header(__metadata__={"tied": 3}, a=F32),
    "ties no JSON": header(__metadata__={"tied": "{"}, a=F32),
    "ties no map": header(__metadata__={"tied": "[]"}, a=F32),
    "tied to nothing": header(__metadata__={"tied": '{"b": "c"}'}, a=F32),
    "tied to a list": header(__metadata__={"tied": '{"b": []}'}, a=F32),
    "tied over a tensor": header(__metadata__={"tied": '{"a": "a"}'}, a=F32),
    "NaN": framed(json.dumps({"a": F32}), b"\x00\x00\xc0\x7f" * 2),
    "infinite": framed(json.dumps({"a": F32}), b"\x00\x00\x80\x7f" * 2),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    directory = save(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    (directory / "model.safetensors").write_bytes(HOSTILE[case])
    manifest_for(directory)
    with pytest.raises(ValueError, match=f"^{directory}/model.safetensors: ") as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "canary").exists()


def test_the_hostile_ones_differ_from_an_honest_one(tmp_path: Path):
    (tmp_path / "a").write_bytes(header(__metadata__={"tied": '{"b": "a"}'}, a=F32))
    assert_bit_equal(tensors.read(tmp_path / "a"), {"a": torch.zeros(2), "b": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", '{"model": {"dim": "x"}}'),
        ("config.json", '{"model": {"code": "import os"}}'),
        ("state.json", "[]"),
        ("state.json", "{}"),
        ("state.json", '{"optimizer": {}, "trainer": []}'),
        ("state.json", '{"optimizer": {}, "trainer": {"a": NaN}}'),
        ("optimizer.safetensors", "x"),
    ],
)
def test_hostile_others(tmp_path: Path, name: str, content: str):
    directory = save(tmp_path, 1)
    (directory / name).write_text(content)
    manifest_for(directory)
    with pytest.raises(ValueError, match=f"^{directory}/{name}: "):
        checkpoint.training_state(checkpoint.load(directory))


def test_an_index_is_never_followed(tmp_path: Path):
    directory = save(tmp_path, 1)
    index = {"weight_map": {"embed.weight": "../../../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_bit_equal(checkpoint.load(directory).model_state, weights(1))


def test_check_names_what_differs():
    expected = {f"w{i:02d}": torch.zeros(2, device="meta") for i in range(30)}
    state = {name: torch.zeros(2) for name in expected}
    tensors.check(state, expected, "x")
    for name in list(state)[:12]:
        state[name + "!"] = state.pop(name)
    state["w20"], state["w21"] = torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError) as caught:
        tensors.check(state, expected, "x")
    message = str(caught.value)
    assert message.startswith("x: missing 'w00', 'w01'") and "'w09' and 2 more; not in this model 'w00!'" in message
    assert "w10" not in message
    assert "wrong shape 'w20 (3,) instead of (2,)'; wrong dtype 'w21 bfloat16 instead of float32'" in message


# --- optimizers


def model_and_optimizers(*, reverse: bool = False) -> tuple[nn.Module, list[Optimizer]]:
    torch.manual_seed(0)
    first, norm, last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    matrices = [first.weight, last.weight]
    rest = [[first.bias, last.bias], [norm.weight, norm.bias]]
    if reverse:
        matrices, rest = matrices[::-1], [group[::-1] for group in rest[::-1]]
    optimizers: list[Optimizer] = [AdamW([{"params": group} for group in rest], lr=1e-2), Muon(matrices, lr=1e-2)]
    return nn.Sequential(first, norm, last), optimizers[::-1] if reverse else optimizers


def train(model: nn.Module, optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(3, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("reverse", [False, True], ids=["same order", "other order"])
def test_interrupted_equals_uninterrupted(tmp_path: Path, reverse: bool):
    model, optimizers = model_and_optimizers()
    train(model, optimizers, range(3))
    state = checkpoint.flatten_optimizers(optimizers, model)
    assert "AdamW/0.bias/exp_avg_sq" in state and "Muon/2.weight/momentum_buffer" in state
    save(tmp_path, 3, model_state=model.state_dict(), optimizer_state=state)
    train(model, optimizers, range(3, 6))

    loaded = checkpoint.load(tmp_path)
    resumed, others = model_and_optimizers(reverse=reverse)
    resumed.load_state_dict(loaded.model_state)
    checkpoint.restore_optimizers(others, resumed, checkpoint.training_state(loaded)[0])
    train(resumed, others, range(3, 6))
    assert_bit_equal(resumed.state_dict(), model.state_dict())
    assert_bit_equal(
        dict(sorted(checkpoint.flatten_optimizers(others, resumed).items())),
        dict(sorted(checkpoint.flatten_optimizers(optimizers, model).items())),
    )

    forgetful, others = model_and_optimizers()
    forgetful.load_state_dict(loaded.model_state)
    train(forgetful, others, range(3, 6))
    with pytest.raises(AssertionError):
        assert_bit_equal(forgetful.state_dict(), model.state_dict())


def test_optimizer_dtypes_and_scalars_are_kept(tmp_path: Path):
    model = nn.Linear(2, 2, bias=False).bfloat16()
    optimizer = SGD(model.parameters(), lr=1.0)
    values = {"wide": torch.randn(2, 2), "step": torch.tensor(2**40 + 1), "n": 3, "x": 0.1, "flag": True, "none": None}
    optimizer.state[model.weight] = dict(values)
    state = checkpoint.flatten_optimizers([optimizer], model)
    save(tmp_path, 1, optimizer_state=state)
    restored = checkpoint.training_state(checkpoint.load(tmp_path))[0]
    optimizer.state[model.weight] = {"stale": 1}
    checkpoint.restore_optimizers([optimizer], model, restored)
    assert_bit_equal(dict(sorted(optimizer.state[model.weight].items())), dict(sorted(values.items())))


def test_optimizer_state_of_another_model_changes_nothing():
    model, optimizers = model_and_optimizers()
    train(model, optimizers, range(1))
    state = checkpoint.flatten_optimizers(optimizers, model)
    wrong = {"AdamW/9.bias/exp_avg": torch.zeros(6), "AdamW/0.bias/exp_avg": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"no such parameter 'AdamW/9\.bias.*wrong shape 'AdamW/0\.bias/exp_avg'"):
        checkpoint.restore_optimizers(optimizers, model, state | wrong)
    with pytest.raises(ValueError, match="no such parameter 'SGD/0"):
        checkpoint.restore_optimizers(optimizers, model, {"SGD/0.bias/exp_avg": torch.zeros(6)})
    assert_bit_equal(checkpoint.flatten_optimizers(optimizers, model), state)


def test_a_recipe_is_stored_as_recipes_writes_it(tmp_path: Path):
    directory = save(tmp_path, 1)
    assert recipes.from_json((directory / "config.json").read_text()) == RECIPE


def test_names_of_an_earlier_version_are_read_as_todays(tmp_path):
    old = {
        "q_proj.weight": torch.randn(2, 2),
        "q_proj.lora_A": torch.randn(2, 1, 2),
        "q_proj.lora_B": torch.randn(2, 2, 1),
    }
    state = {"AdamW/q_proj.lora_A/exp_avg": torch.randn(2, 1, 2), "AdamW/q_proj.lora_A/step": 3}
    save(tmp_path, 1, model_state=old, optimizer_state=state)
    found = checkpoint.load(tmp_path)
    assert set(found.model_state) == {"q_proj.weight", "q_proj.loop_A", "q_proj.loop_B"}
    assert torch.equal(found.model_state["q_proj.loop_B"], old["q_proj.lora_B"])
    optimizer, _ = checkpoint.training_state(found)
    assert set(optimizer) == {"AdamW/q_proj.loop_A/exp_avg", "AdamW/q_proj.loop_A/step"}
    packed = tmp_path / "packed.safetensors"
    packed.write_bytes(tensors.pack(old))
    assert set(tensors.read(packed)) == set(found.model_state)
