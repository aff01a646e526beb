"""The command line: what it passes on, and how it fails. Backends are stood in for, so that only it is tested."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ritornello import cli, recipes
from ritornello.config import ExitRule, Recipe
from ritornello.device import fallbacks, pick_device
from ritornello.engine.request import Draft


class Backend:
    """Records the call that a command makes, then does what the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.fails: BaseException | None = None
        entries = {name: self._wrap(function) for name, function in functions.items()}
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**entries))

    def _wrap(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            if self.fails:
                raise self.fails
            return function(*args, **kwargs)

        return call


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text('name = "mine"\n[train]\nsteps = 7\n')

    def train(recipe: Recipe, *, out: Path, observer: Any, data_progress: Any, **_: Any) -> None:
        data_progress("tokenise", 1, 2)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(recipes.to_json(recipe))
        if not (out / "metrics.jsonl").exists():
            (out / "metrics.jsonl").write_text('{"step": 7, "peak_mb": 512.5}')
        observer.update(recipe.train.steps, {"loss": 1.5, "tok_per_s": 2e4})

    return Backend(monkeypatch, "ritornello.train.trainer", train=train)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Backend:
    loaded = SimpleNamespace(model="model", tokenizer="tokenizer", recipe="recipe")
    functions = {"load": lambda path, device: loaded, "stream": lambda *_, **__: iter(["a", "b"])}
    return Backend(monkeypatch, "ritornello.engine.generate", **functions)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(args)
    return code, *capsys.readouterr()


def one_error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a command that must fail as a user's mistake does."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("ritornello: error: ") and err.count("\n") == 1
    return err


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert run(capsys) == (0, out, "")


def test_help_takes_less_than_half_a_second() -> None:
    """Processor time of the child: the clock on the wall also counts what else the machine is doing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ritornello.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, err = run(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert all(option in out for option in ("--quiet", "--verbose", "--offline"))
    assert "\x1b" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith("ritornello ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("trian r.toml", "did you mean 'train'?"),
        ("--foo", "verb = '--foo'"),
        ("train", "RECIPE"),
        ("train r.toml --resme", "did you mean --resume?"),
        ("train r.toml --lr nan", "--set train.lr=VALUE"),
        ("train r.toml --n-loops 3", "--set model.n_loops=VALUE"),
        ("train r.toml more", "unexpected argument 'more'"),
        ("train r.toml --set train.lr=nan", "train.lr = nan"),
        ("train r.toml --set train.lr=1e400", "train.lr = inf"),
        ("train r.toml --set train.lrr=1", "train.lrr"),
        ("train r.toml --set lr", "key=value"),
        ("train absent.toml", "absent.toml"),
        ("train .", "recipe = '.'"),
        ("train r.toml --out r.toml", "--out = 'r.toml': must be a directory"),
        ("train r.toml --out .", "--resume continues"),
        ("train r.toml --set name=../x", "without folders"),
        ("train r.toml --set name=..", "without folders"),
        ('train r.toml --set name=""', "without folders"),
        ("generate run", "--prompt = None: must be a text; or --input FILE"),
        ("generate run --prompt x --input a", "--input = 'a': must be used without --prompt"),
        ("generate run --input a", "--output = None: must be given with --input"),
        ("generate run --prompt x --output a", "--output = 'a': must be used with --input"),
        ("generate run --prompt", "--prompt"),
        ("train r.toml --device tpu", "device = 'tpu'"),
        ("generate run --prompt x --loops 1e9", "'1e9' is not an integer"),
        ("generate run --prompt x --loops 2.5", "'2.5' is not an integer"),
        ("generate run --prompt x --loops 0", "--loops = 0: must be an integer in [1, 4096]"),
        ("generate run --prompt x --loops 1000000000", "--loops = 1000000000"),
        ("generate run --prompt x --temperature nan", "'nan' is not a finite number"),
        ("generate run --prompt x --temperature 1e400", "'1e400' is not a finite number"),
        ("generate run --prompt x --exit hazrd", "did you mean 'hazard'?"),
        ("generate run --prompt x --exit kl --exit-threshold -1", "--exit-threshold = -1.0"),
        ("generate run --prompt x --exit-threshold 1", "used with --exit"),
        ("generate run --prompt x --min-loops 2", "used with --exit"),
        ("generate run --prompt x --json-schema a.json --regex a", "used without --json-schema"),
        ("generate run --prompt x --json-schema absent.json", "absent.json: no such file"),
        ("info 2t", "preset = '2t'"),
        ("plan 2t", "recipe = '2t'"),
        ("plan 1b --gpu h1000", "did you mean 'h100'?"),
        ("plan 1b --gpus 0", "--gpus = 0"),
        ("plan 1b --gpus 8.5", "not an integer"),
        ("plan 1b --batch 100", "--batch = 100.0: must be >= 4096 tokens"),
        ("plan 1b --loops 0.5", "--loops = 0.5"),
        ("plan 1b --tokens 0", "--tokens = 0"),
        ("plan 1b --context 0", "--context = 0"),
        ("plan 1b --set train.backprop_loops=x", "train.backprop_loops"),
        ("plan 1b --set model.carry_streams=2", "model.carry_streams = 2: must be 1 for a plan"),
        ("plan 1b --lr 3", "--set train.lr=VALUE"),
        ("plan 100b --gpus 1", "--gpus = 1: must be enough for"),
        ("info 1t --attention mha", "mla"),
        ("doctor --jsn", "did you mean --json?"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], trainer: Backend, args: str, said: str) -> None:
    assert said in one_error(capsys, *args.split())
    assert not trainer.calls


def test_a_long_or_hostile_argument_cannot_flood_or_forge(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(one_error(capsys, "train", "x" * 10**6)) < 300
    assert "\\x1b[31m" in one_error(capsys, "train", "recipe", "--\x1b[31m\nritornello: fine")


def test_train_hands_over_the_recipe(capsys: pytest.CaptureFixture[str], trainer: Backend) -> None:
    code, out, err = run(capsys, "train", "r.toml", "--set", "train.lr=2e-3", "data.seq_len=9", "--set", "model.dim=64")
    assert (code, out) == (0, "runs/mine\n")
    assert "step 7/7  loss 1.5000  20.0k tok/s" in err
    assert all(said in err for said in fallbacks(pick_device()))
    ((recipe,), options) = trainer.calls[0]
    assert (recipe.train.lr, recipe.data.seq_len, recipe.model.dim, recipe.train.steps) == (2e-3, 9, 64, 7)
    settings = {name: value for name, value in options.items() if "observer" not in name and "progress" not in name}
    assert settings == {
        "out": Path("runs/mine"),
        "resume": False,
        "device": "auto",
        "offline": False,
        "other_data": False,
        "profile": 0,
    }
    assert "tokenise 50%" in err and "peak memory 512.5 MB; 0.0 MB on disk" in err


def test_quiet_may_come_before_the_verb(capsys: pytest.CaptureFixture[str], trainer: Backend) -> None:
    assert run(capsys, "-q", "train", "r.toml", "--out", "new") == (0, "new\n", "")
    assert run(capsys, "train", "r.toml", "--out", "newer", "--quiet") == (0, "newer\n", "")


def test_a_used_directory_needs_resume(capsys: pytest.CaptureFixture[str], trainer: Backend, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run(capsys, "train", "r.toml", "--out", "run")[0] == 0  # empty: as good as new
    (tmp_path / "run/metrics.jsonl").write_text("kept")
    assert "--resume" in one_error(capsys, "train", "r.toml", "--out", "run")
    assert run(capsys, "train", "r.toml", "--out", "run", "--resume")[0] == 0
    assert [options["resume"] for _, options in trainer.calls] == [False, True]
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept"


def test_generate_streams(capsys: pytest.CaptureFixture[str], generator: Backend) -> None:
    depth = "--loops 4 --exit kl --min-loops 2 --device cpu --loop-budget 3.5 --draft-loops 2 --draft-tokens 3".split()
    sampling = "--max-tokens 5 --temperature 0 --top-k 3 --top-p .9 --min-p .1 --seed 8".split()
    stops = ["--stop", "a b", "--stop", "c"]
    code, out, err = run(capsys, "generate", "run", "--prompt=--x", *depth, *sampling, *stops)
    assert (code, out, err) == (0, "ab\n", "")
    (load_args, load_options), (stream_args, options) = generator.calls
    assert (load_args, load_options) == ((Path("run"),), {"device": "cpu"})
    assert (stream_args[0].model, stream_args[1]) == ("model", "--x")
    assert options == {
        "max_tokens": 5,
        "n_loops": 4,
        "exit": ExitRule("kl", 0.01, 2),
        "loop_budget": 3.5,
        "draft": Draft(n_loops=2, n_tokens=3),
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 8,
        "stop": ("a b", "c"),
        "constraint": None,
    }


def test_generate_forces_the_depth_unless_asked(capsys: pytest.CaptureFixture[str], generator: Backend) -> None:
    assert run(capsys, "generate", "run", "--prompt", "x", "--no-stream") == (0, "ab\n", "")
    assert generator.calls[1][1]["exit"] is None


def test_generate_hands_a_constraint_over(
    capsys: pytest.CaptureFixture[str], generator: Backend, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    arguments = ["generate", "run", "--prompt", "x"]
    assert run(capsys, *arguments, "--json-schema", str(tmp_path / "schema.json"))[0] == 0
    assert run(capsys, *arguments, "--regex", "[ab]+")[0] == 0
    found = [options["constraint"] for _, options in generator.calls if "constraint" in options]
    assert [(one.json_schema, one.regex) for one in found] == [('{"type": "integer"}', None), (None, "[ab]+")]
    assert "regex = '('" in one_error(capsys, *arguments, "--regex", "(")


def test_generate_takes_any_prompt(capsys: pytest.CaptureFixture[str], generator: Backend) -> None:
    for prompt in ("None", ""):
        assert run(capsys, "generate", "run", "--prompt", prompt) == (0, "ab\n", "")
        assert generator.calls[-1][0][1] == prompt


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch, generator: Backend) -> Backend:
    def run_file(*_: Any, observer: Any, **__: Any) -> Counter[str]:
        observer(1, 3)
        observer(3, 3)
        return Counter(length=1, failed=2)

    return Backend(monkeypatch, "ritornello.engine.batch", run_file=run_file)


FILES = ("generate", "run", "--input", "a.jsonl", "--output", "b.jsonl")


def test_generate_answers_a_file(capsys: pytest.CaptureFixture[str], batch: Backend) -> None:
    code, out, err = run(capsys, *FILES, "--loops", "4", "--seed", "8")
    assert (code, out) == (0, "b.jsonl\n")
    assert err.splitlines()[:2] == ["1/3", "3/3  ETA 0:00:00"] and "2 failed: logits that are not numbers" in err
    (loaded, *paths), options = batch.calls[0]
    assert (loaded.model, paths) == ("model", [Path("a.jsonl"), Path("b.jsonl")])
    assert (options["n_loops"], options["seed"], options["max_tokens"], options["exit"]) == (4, 8, 256, None)
    assert run(capsys, *FILES, "-q") == (0, "b.jsonl\n", "")


def test_an_interrupted_file_goes_on(capsys: pytest.CaptureFixture[str], batch: Backend) -> None:
    batch.fails = KeyboardInterrupt()
    said = "ritornello: interrupted; the same command goes on where b.jsonl ends\n"
    assert run(capsys, *FILES) == (130, "", said)


def test_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "plan", "1b", "--gpus", "2", "--context", "8192", "--batch", "1e6", "--json")
    facts = json.loads(out)
    assert code == 0 and "budget" not in facts
    assert (facts["run"]["context"], facts["run"]["batch_sequences"]) == (8192, 122)
    options = ["--loops", "3", "--backprop-loops", "0", "--optimizer", "muon", "--precision", "fp32", "--tokens", "2e9"]
    code, out, _ = run(capsys, "plan", "1b", "--attention", "mla", *options)
    assert code == 0 and "1b, mla, 8 × h100" in out and "muon" in out and "gpu hours" in out
    (tmp_path / "r.toml").write_text('[model]\npreset = "tiny"\n[train]\nbatch_size = 6\nmicrobatch_size = 3\n')
    code, out, _ = run(capsys, "plan", str(tmp_path / "r.toml"), "--gpus", "3", "--json")
    facts = json.loads(out)
    assert (facts["run"]["batch_sequences"], facts["layout"]["microbatch_size"]) == (6, 3)
    assert facts["run"]["context"] == 256 and facts["run"]["precision"] == "fp32"


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"parameters": 1_003_000_000, "share": {"experts": 0.75}, "name": "x"}
    backend = Backend(monkeypatch, "ritornello.accounting", describe=lambda config: facts)
    code, out, _ = run(capsys, "info", "1b", "--attention", "mla", "--json")
    assert code == 0 and json.loads(out) == facts
    assert backend.calls[0][0][0].attention == "mla"
    code, out, _ = run(capsys, "info", "1b")
    assert code == 0 and "1.003 B" in out and "0.75" in out


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ritornello.commands.demo import Demo

    backend = SimpleNamespace(run=lambda **options: print(options))
    monkeypatch.setitem(sys.modules, "ritornello.demo", backend)
    monkeypatch.setattr("ritornello.demo", backend, raising=False)
    code, out, _ = run(capsys, "demo", "--out", str(tmp_path), "-q")
    assert code == 0 and out == f"{ {'out': tmp_path, 'quiet': True} }\n"
    assert Demo().out == Path("runs/demo")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("train.lr = -1: must be positive"), 2, "error: train.lr = -1: must be positive\n"),
        (OSError(28, "cannot write 12 bytes: No space left", "runs/x"), 2, "runs/x: cannot write 12 bytes"),
        (ImportError("data.source needs the package 'datasets'"), 2, "'datasets'"),
        (FloatingPointError("loss is not finite at step 3"), 2, "step 3"),
        (torch.OutOfMemoryError("CUDA: tried to allocate 2 GiB"), 2, "train.microbatch_size"),
        (MemoryError("Unable to allocate"), 2, "train.backprop_loops"),
        (RuntimeError("MPS backend out of memory"), 2, "train.checkpoint_activations"),
        (RuntimeError("shapes differ"), 1, "this is a defect"),
        (ImportError("cannot import", name="ritornello.train"), 1, "this is a defect"),
        (AssertionError(), 1, "this is a defect"),
    ],
)
def test_a_failure_is_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], trainer: Backend, error: Exception, code: int, said: str
) -> None:
    trainer.fails = error
    got, _, err = run(capsys, "train", "r.toml", "-q")
    assert got == code and said in err and err.count("\n") == 1
    got, _, err = run(capsys, "train", "r.toml", "-v")
    assert got == code and said in err and "Traceback" in err


def test_what_was_noted_is_said(capsys: pytest.CaptureFixture[str], trainer: Backend) -> None:
    trainer.fails = FloatingPointError("diverged")
    trainer.fails.add_note("not written: disk full")
    trainer.fails.add_note("a traceback\nof many lines")
    assert one_error(capsys, "train", "r.toml", "-q").endswith("diverged; not written: disk full\n")


def test_generation_out_of_memory_has_a_remedy_of_its_own(
    capsys: pytest.CaptureFixture[str], generator: Backend
) -> None:
    generator.fails = MemoryError()
    assert "--loops" in one_error(capsys, "generate", "run", "--prompt", "x")


def test_other_data_is_handed_over(capsys: pytest.CaptureFixture[str], trainer: Backend) -> None:
    run(capsys, "train", "r.toml", "-q", "--other-data")
    assert trainer.calls[0][1]["other_data"]


def test_a_full_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        how: Any = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-m", "ritornello.cli", "--version"], **how)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_are_no_defect(closed: str) -> None:
    command = f"{sys.executable} -m ritornello.cli trian {closed}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True)
    assert done.returncode == 2 and done.stdout == b"" and (closed == "2>&-" or b"did you mean" in done.stderr)


def test_a_real_allocation_failure_is_recognised(capsys: pytest.CaptureFixture[str], trainer: Backend) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    trainer.fails = caught.value
    assert "out of memory" in one_error(capsys, "train", "r.toml", "-q")


def test_interrupted(capsys: pytest.CaptureFixture[str], trainer: Backend) -> None:
    trainer.fails = KeyboardInterrupt("interrupted after step 5; saved in runs/x")
    assert run(capsys, "train", "r.toml", "-q") == (130, "", "ritornello: interrupted after step 5; saved in runs/x\n")
    trainer.fails = KeyboardInterrupt()
    assert run(capsys, "train", "r.toml", "-q") == (130, "", "ritornello: interrupted\n")


FAKE = """
import sys, time
from types import SimpleNamespace
from ritornello.cli import main
def stream(*_, **__):
    while True:
        yield "word "
        time.sleep(0.001)
loaded = SimpleNamespace(model=None, tokenizer=None)
sys.modules["ritornello.engine.generate"] = SimpleNamespace(load=lambda path, device: loaded, stream=stream)
sys.exit(main(["generate", "run", "--prompt", "x"]))
"""


@pytest.fixture
def endless() -> Iterator[subprocess.Popen[bytes]]:
    """A process that generates for ever, and has begun."""
    with subprocess.Popen([sys.executable, "-c", FAKE], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read(5) == b"word "
        yield process
        process.kill()


def test_closed_output_ends_quietly(endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout and endless.stderr
    endless.stdout.close()
    assert endless.stderr.read() == b""
    assert endless.wait(10) == 141


def test_control_c_leaves_no_traceback(endless: subprocess.Popen[bytes]) -> None:
    endless.send_signal(signal.SIGINT)
    assert endless.stderr and endless.stderr.read() == b"ritornello: interrupted\n"
    assert endless.wait(10) == 130


WATCHED = """
import socket, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK", event, args, flush=True)
        raise SystemExit(99)
sys.addaudithook(watch)
"""
IN_A_WATCHED_PROCESS = "from ritornello.cli import main; sys.exit(main())"
BACKENDS = ("train.trainer", "engine.generate", "accounting")
BUILT = all(find_spec(f"ritornello.{name}") for name in BACKENDS)


def watched(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WATCHED + code, *args], capture_output=True, text=True)


def test_doctor_never_speaks_to_the_network() -> None:
    assert watched(IN_A_WATCHED_PROCESS, "doctor").returncode == 0


@pytest.mark.skipif(not BUILT, reason=f"needs {', '.join(BACKENDS)}")
def test_a_whole_run_never_speaks_to_the_network(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"{i}: " + "the passage that comes back again and again. " * 20)
    sizes = "train.steps=2 train.batch_size=2 train.eval_batches=1 train.eval_loops=[1] data.seq_len=32".split()
    (tmp_path / "in.jsonl").write_text('{"prompt": "the"}')
    out, files = str(tmp_path / "run"), ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    commands = (
        ["train", "tiny", "--out", out, "--set", f"data.source={texts}", *sizes],
        ["generate", out, "--prompt", "the", "--max-tokens", "3"],
        ["generate", out, *files, "--max-tokens", "3"],
        ["info", "1b", "--json"],
        ["plan", "1b", "--gpus", "1", "--json"],
    )
    for args in commands:
        done = watched(IN_A_WATCHED_PROCESS, *args)
        assert done.returncode == 0, done


def test_control_the_watch_notices_a_connection() -> None:
    assert watched("socket.create_connection(('192.0.2.1', 80))").returncode == 99


def test_offline_reaches_the_hub_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", *cli.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    cli.prepare_environment(offline=False)
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and not any(name in os.environ for name in cli.OFFLINE)
    cli.prepare_environment(offline=True)
    assert all(os.environ[name] == "1" for name in cli.OFFLINE)
