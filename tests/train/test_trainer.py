import errno
import gzip
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ritornello import recipes
from ritornello.config import Recipe
from ritornello.engine.generate import load
from ritornello.train import checkpoint, files, runs, tensors
from ritornello.train.interrupt import InterruptedRunError
from ritornello.train.trainer import train
from tests.train.small import recipe, text_file
from tests.train.test_checkpoint import manifest_for

TIMING = frozenset({"tok_per_s", "peak_mb"})  # what differs between two runs of one recipe


class Watch:
    """Sends `signum` to this process after `step`, and notes what it is told."""

    def __init__(self, step: int = -1, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum = step, signum
        self.seen: list[tuple[int, dict[str, float]]] = []

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen.append((step, dict(metrics)))
        if step == self.step and "loss" in metrics:
            os.kill(os.getpid(), self.signum)


def run(a_recipe: Recipe, folder: Path, name: str = "run", **options: Any) -> Path:
    return train(a_recipe, out=folder / name, device="cpu", cache_dir=folder / "cache", **options)


def weights(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)]


def untimed(directory: Path) -> list[dict[str, Any]]:
    lines = runs.lines(directory)
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


MODELS = {
    "moe": ({"dropout": 0.1, "initial_state": "noise"}, {"optimizer": "muon"}, (3, 17, 30)),
    "gate": ({"halting": "gate"}, {"depth": "lognormal_poisson", "depth_ramp_steps": 9, "steps": 20}, (11,)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_equals_uninterrupted(kind, tmp_path):
    model, settings, stops = MODELS[kind]
    given = recipe(tmp_path, model=model, **settings)
    whole = run(given, tmp_path, "whole")
    for stop, signum in zip(stops, itertools.cycle((signal.SIGTERM, signal.SIGINT)), strict=False):
        with pytest.raises(InterruptedRunError, match=f"after step {stop}"):
            run(given, tmp_path, "parts", resume=True, observer=Watch(stop, signum))
        assert checkpoint.load(tmp_path / "parts").manifest.step == stop
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    parts = run(given, tmp_path, "parts", resume=True)
    assert weights(parts) == weights(whole)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    other = run(replace(given, train=replace(given.train, seed=1)), tmp_path, "other", resume=True)
    assert weights(other)[0] != weights(whole)[0] and untimed(tmp_path / "other") != untimed(tmp_path / "whole")


def test_a_run_killed_between_checkpoints_is_repeated_from_the_last_one(tmp_path):
    given = recipe(tmp_path, steps=20)

    class Killed(Watch):
        def update(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 15:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(given, tmp_path, "parts", observer=Killed())
    assert [line["step"] for line in runs.lines(tmp_path / "parts")][-1] == 15
    with (tmp_path / "parts" / runs.METRICS).open("ab") as lines:
        lines.write(b'{"step": 1')  # a line that the kill cut short
    parts, whole = run(given, tmp_path, "parts", resume=True), run(given, tmp_path, "whole")
    assert weights(parts) == weights(whole)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")


def test_what_a_run_leaves_behind(tmp_path):
    given, watch = recipe(tmp_path, steps=20, log_every=5), Watch()
    directory = run(given, tmp_path, observer=watch)
    lines = runs.lines(tmp_path / "run")
    assert [(line["step"], "loss" in line) for line in lines] == [
        (5, True), (10, True), (10, False), (15, True), (20, True), (20, False),
    ]  # fmt: skip
    first, evaluation = lines[0], lines[2]
    names = {"loss", "bpb", "lr", "grad_norm", "tok_per_s", "mean_loops", "router_violation", "router_entropy"}
    assert names <= first.keys() and {"val_bpb_1", "val_bpb_2", "val_bpb_4"} <= evaluation.keys()
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-2]["loss"] < first["loss"]
    assert [{"step": step, **values} for step, values in watch.seen] == lines
    assert directory == tmp_path / "run" / "checkpoints" / "step_000020"
    assert sorted(path.name for path in directory.parent.iterdir()) == ["step_000010", "step_000020"]
    saved = checkpoint.load(tmp_path / "run")
    assert saved.recipe == given
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )


def test_a_run_is_not_overwritten(tmp_path):
    given = recipe(tmp_path, steps=2)
    done = run(given, tmp_path)
    before = weights(done)
    with pytest.raises(ValueError, match="without a run; resume it"):
        run(given, tmp_path)
    assert run(given, tmp_path, resume=True) == done and weights(done) == before


def test_resume_refuses_another_model_or_data(tmp_path):
    given = recipe(tmp_path, steps=2)
    run(given, tmp_path)
    longer = replace(given, train=replace(given.train, steps=4))
    with pytest.raises(ValueError, match=r"model\.dim = 32: must be 16, as in the run"):
        run(replace(longer, model=replace(given.model, dim=32)), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"data\.seq_len = 12: must be 24"):
        run(replace(longer, data=replace(given.data, seq_len=12)), tmp_path, resume=True)
    text_file(tmp_path, seed=1).replace(given.data.source)
    with pytest.raises(ValueError, match=r"data fingerprint = .*other_data"):
        run(longer, tmp_path, resume=True)
    assert run(longer, tmp_path, resume=True, other_data=True).name == "step_000004"


def test_the_vocabulary_must_hold_the_tokenizers(tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size = 200: must be >= 257"):
        run(recipe(tmp_path, model={"vocab_size": 200}), tmp_path)
    assert not (tmp_path / "run").exists()


def test_second_signal_does_not_wait(tmp_path):
    class Twice(Watch):
        def update(self, step: int, metrics: Mapping[str, float]) -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(recipe(tmp_path), tmp_path, observer=Twice())
    assert not isinstance(caught.value, InterruptedRunError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_warm_start_keeps_the_function_at_other_depths(tmp_path):
    given = recipe(tmp_path, steps=10, eval_loops=(1, 4, 8))
    run(given, tmp_path, "first")
    depths = {"max_loops": 8, "mean_loops": 5.0, "lr": 1e-12, "steps": 1, "router_bias_rate": 0.0}
    deeper = replace(
        given,
        model=replace(given.model, n_loops=8, halting="kl"),
        train=replace(given.train, warm_start=str(tmp_path / "first"), **depths),
    )
    run(deeper, tmp_path, "second")
    run(replace(deeper, train=replace(deeper.train, warm_start="")), tmp_path, "cold")
    before, after, cold = (runs.lines(tmp_path / name)[-1] for name in ("first", "second", "cold"))
    for name in ("val_bpb_1", "val_bpb_4", "val_bpb_8"):
        assert after[name] == pytest.approx(before[name], abs=1e-5)
        assert abs(cold[name] - before[name]) > 0.1


def test_warm_start_names_what_does_not_fit(tmp_path):
    given = recipe(tmp_path, steps=1)
    run(given, tmp_path, "first")
    start = replace(given.train, warm_start=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="wrong shape"):
        run(replace(given, model=replace(given.model, ffn_dim=48), train=start), tmp_path, "second")
    with pytest.raises(ValueError, match="no such run"):
        run(replace(given, train=replace(start, warm_start=str(tmp_path / "none"))), tmp_path, "third")


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard")
    run(recipe(tmp_path, steps=2, tensorboard=True), tmp_path)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_trackers_get_the_same_figures(tmp_path, monkeypatch, capsys, package):
    """Their calls, on a stand-in: what the packages themselves do is theirs."""
    calls: list[tuple[str, Any]] = []
    stand_in(
        monkeypatch,
        package,
        init=lambda **how: calls.append(("init", how)) or print("hello"),
        log=lambda metrics, step: calls.append(("log", (step, metrics))),
        finish=lambda **how: calls.append(("finish", how)),
    )
    for steps in (2, 3):
        given = recipe(tmp_path, steps=steps, schedule="constant", **{package: True})
        run(given, tmp_path, resume=True, offline=True)
    assert [name for name, _ in calls if name != "log"] == ["init", "finish"] * 2 and calls[-1][0] == "finish"
    how, again = (about for name, about in calls if name == "init")
    assert how["name"].startswith("run") and how["resume"] == "allow" and how["config"]["train"]["steps"] == 2
    assert ("mode" in how and how["mode"] == "offline") is (package == "wandb")
    assert calls[-1][1] == ({"exit_code": 0} if package == "wandb" else {})
    logged = [{"step": step, **metrics} for name, (step, metrics) in [c for c in calls if c[0] == "log"]]
    assert logged == runs.lines(tmp_path / "run")
    assert not capsys.readouterr().out
    number = "id" if package == "wandb" else "name"
    assert how[number] == again[number]
    run(given, tmp_path / "elsewhere")
    assert calls[-1][0] == "finish" and [about for name, about in calls if name == "init"][2][number] != how[number]


def stand_in(monkeypatch: pytest.MonkeyPatch, package: str, **functions: Callable[..., object]) -> None:
    fake = ModuleType(package)
    fake.__spec__ = ModuleSpec(package, None)
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, package, fake)


def test_a_tracker_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    """Once the run is on its way; the run's failure is told to it."""
    finished: list[dict[str, Any]] = []

    def log(metrics: Any, step: int) -> None:
        raise ConnectionError("no network")

    stand_in(monkeypatch, "wandb", init=lambda **how: None, log=log, finish=lambda **how: finished.append(how))
    run(recipe(tmp_path, steps=2, wandb=True), tmp_path)
    said = [record.getMessage() for record in caplog.records if "network" in record.getMessage()]
    assert said == ["wandb: no network; the figures are in metrics.jsonl"] and runs.lines(tmp_path / "run")

    class Broken:
        def update(self, step: int, metrics: Any) -> None:
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        run(recipe(tmp_path, steps=2, wandb=True), tmp_path, "broken", observer=Broken())
    assert finished == [{"exit_code": 0}, {"exit_code": 1}]


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def init(**how: Any) -> None:
        raise PermissionError("no key")

    stand_in(monkeypatch, "wandb", init=init)
    with pytest.raises(ValueError, match=r"train\.wandb = True: wandb did not start: no key; --offline"):
        run(recipe(tmp_path, steps=2, wandb=True), tmp_path)


def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train\.wandb = True: must be False without the package wandb; pip "):
        run(recipe(tmp_path, steps=2, wandb=True), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_state_that_training_did_not_write_is_named(tmp_path):
    given = recipe(tmp_path, steps=4)
    saved = run(given, tmp_path)
    state = json.loads((saved / "state.json").read_text())
    for spoil in ({"step": "4"}, {"step": 0}, {"guard": {}}, {"guard": {**state["trainer"]["guard"], "losses": ["x"]}}):
        (saved / "state.json").write_text(json.dumps({**state, "trainer": {**state["trainer"], **spoil}}))
        manifest_for(saved)
        with pytest.raises(ValueError, match=r"state\.json: trainer: (step|guard)"):
            run(replace(given, train=replace(given.train, steps=5)), tmp_path, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_without_a_valid_checkpoint_is_not_begun_anew(tmp_path, resume):
    given = recipe(tmp_path, steps=20)
    for path in run(given, tmp_path).parent.iterdir():
        (path / "state.json").unlink()
    before = (tmp_path / "run" / runs.METRICS).read_bytes()
    with pytest.raises(ValueError, match="no valid checkpoint among 2"):
        run(given, tmp_path, resume=resume)
    assert (tmp_path / "run" / runs.METRICS).read_bytes() == before


def test_a_second_trainer_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with files.lock(tmp_path / "run"), pytest.raises(ValueError, match=f"in use by process {os.getpid()};"):
        run(recipe(tmp_path, steps=2), tmp_path, resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_read_only_directory_can_be_read(tmp_path, monkeypatch):
    given, opened = recipe(tmp_path, steps=2), os.open
    run(given, tmp_path)

    def refuse(path: Any, flags: int, *more: Any, **how: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", refuse)
    assert load(tmp_path / "run", device="cpu") and runs.read(tmp_path / "run").state == "done"
    with pytest.raises(OSError, match=r"cannot open: Read-only.*run"):
        run(given, tmp_path, resume=True)


def test_optimizer_states_that_are_no_numbers_are_refused(tmp_path):
    given = recipe(tmp_path, steps=2)
    saved = run(given, tmp_path)
    states = tensors.read(saved / checkpoint.OPTIMIZER)
    next(iter(states.values())).fill_(math.nan)
    (saved / checkpoint.OPTIMIZER).write_bytes(tensors.pack(states))
    manifest_for(saved)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: NaN or infinite values in"):
        run(replace(given, train=replace(given.train, steps=3)), tmp_path, resume=True)


def test_sigterm_ends_a_process_with_130_and_all_saved(tmp_path):
    given = recipe(tmp_path, steps=5000, eval_every=5000, save_every=5000)
    (tmp_path / "config.json").write_text(recipes.to_json(given))
    script = "import sys; from pathlib import Path; from ritornello import cli, recipes; "
    script += "recipes.find = Path; recipes.read_toml = lambda path: recipes.parse_json(path.read_text(), path); "
    command = [script + "sys.exit(cli.main())", "train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", *command], stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr
        while not runs.lines(tmp_path / "run"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.terminate()
        said = process.stderr.read().decode()
    assert process.returncode == 130 and "interrupted after step" in said
    assert checkpoint.load(tmp_path / "run").manifest.step == runs.lines(tmp_path / "run")[-1]["step"]


def test_steps_are_traced(tmp_path):
    run(recipe(tmp_path, steps=6, log_every=6), tmp_path, profile=2)
    trace = json.loads(gzip.decompress((tmp_path / "run" / "profile" / "trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 2 and any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_steps_of_the_metrics_never_fall(tmp_path):
    run(recipe(tmp_path, steps=12), tmp_path)
    steps = [line["step"] for line in runs.lines(tmp_path / "run")]
    assert all(a <= b for a, b in itertools.pairwise(steps))
