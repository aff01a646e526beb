"""The command line: finds the verb, parses its arguments, and turns every failure into one line and an exit code.

Exit codes: 0 done; 1 a defect of this program; 2 what the message explains: a mistake, or something the system refused;
3 another process of the run died, failed or hangs; 130 interrupted, a run after it was saved; 141 the reader of
standard output went away.
"""

import io
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ritornello import __version__
from ritornello.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig, require_choice, shown
from ritornello.progress import process_rank

if TYPE_CHECKING:
    from ritornello.commands import Command

# verb: the class in commands/<verb>.py, and its line in the help; a table so that help need not import them
VERBS = {
    "demo": ("Demo", "train a small model in minutes and show what depth is worth"),
    "train": ("Train", "train a model as a recipe says"),
    "generate": ("Generate", "continue a text with a trained model"),
    "chat": ("Chat", "talk with a model trained on conversations"),
    "serve": ("Serve", "answer OpenAI's clients, and a page to try it out"),
    "calibrate": ("Calibrate", "find an exit threshold that keeps a stated risk"),
    "eval": ("Eval", "score a model on lm-eval's tasks, at any number of loops"),
    "export": ("Export", "write a model as transformers reads it"),
    "convert": ("Convert", "write a published looped model as one of this package"),
    "loopify": ("Loopify", "search layers of a plain model to run again, untrained"),
    "runs": ("Runs", "list, compare, consolidate and remove runs"),
    "lab": ("Lab", "test the claims: loops, depth, stability, halting"),
    "plan": ("Plan", "memory, layout and time of one training run"),
    "info": ("Info", "what a preset costs: parameters, FLOPs, cache"),
    "doctor": ("Doctor", "what this machine can run, for a bug report"),
}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
OUT_OF_MEMORY_LATER = "out of memory; lower --loops or --max-tokens: the cache has room for all of them"
OUT_OF_MEMORY = (
    "out of memory; lower train.microbatch_size (same batch, more accumulation) or train.backprop_loops (gradients "
    "through the last loops only), or set train.checkpoint_activations=true (activations are computed again)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command = None
    if sys.stderr is None:  # closed by whoever started this: what is said there must not end up among the results
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    try:
        command = parse(list(sys.argv[1:] if argv is None else argv))
        if command:
            prepare_environment(offline=command.common.offline)
            command.run()
        if sys.stdout:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        settle_output()
        return 141
    except KeyboardInterrupt as interrupt:  # a run says where it was saved
        say(interrupt, str(interrupt) or "interrupted")
        return 130
    except Exception as error:  # noqa: BLE001 - the boundary: no traceback reaches a user who did not ask for one
        if command and command.common.verbose:
            traceback.print_exc()
        code, message = explain(error, type(command).__name__)
        say(error, f"error: {one_line(message)}")
        settle_output()
        if hasattr(error, "exit_code"):  # another process is gone: at exit a backend might wait for it
            os._exit(code)
        return code


def say(error: BaseException, text: str) -> None:
    """On standard error; of several processes, one says what is the same for all, the others what is theirs."""
    several, told = int(os.environ.get("WORLD_SIZE", 1)) > 1, getattr(error, "said", None)
    same = several and os.environ.get("LOCAL_RANK", "0") != "0"  # before they have met: on one machine all see the same
    if same if told is None else told:
        return
    print(f"[rank {process_rank()}] ritornello:" if several else "ritornello:", text, file=sys.stderr, flush=True)


def settle_output() -> None:
    """Python flushes standard output once more at exit: where that would fail, nothing is left to complain about."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(args: list[str]) -> "Command | None":
    """The command that `args` ask for; None if they asked for help or the version, which is then printed."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return None
    if args[0] == "--version":
        print("ritornello", __version__)
        return None
    place = next((i for i, arg in enumerate(args) if not arg.startswith("-")), 0)  # -q and the like may come first
    verb = args[place]
    require_choice("verb", verb, tuple(VERBS))
    kind: type[Command] = getattr(import_module(f"ritornello.commands.{verb}"), VERBS[verb][0])
    return parse_verb(kind, verb, args[:place] + args[place + 1 :])


def parse_verb(kind: type["Command"], verb: str, args: list[str]) -> "Command | None":
    import tyro

    out, err = io.StringIO(), io.StringIO()  # not a terminal: tyro colours its output without asking NO_COLOR
    try:
        with redirect_stdout(out), redirect_stderr(err):
            command, unknown = tyro.cli(
                kind,
                prog=f"ritornello {verb}",
                args=args,
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(f"{unboxed(err.getvalue())}; see ritornello {verb} --help") from None
        print(out.getvalue(), end="")
        return None
    if unknown:
        raise ValueError(unknown_argument(kind, verb, unknown[0]))
    return command


def usage() -> str:
    lines = [f"  {verb:<10}{summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join(["usage: ritornello VERB ...", "", *lines, "", "ritornello VERB --help tells more."])


def option_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def unknown_argument(kind: type["Command"], verb: str, token: str) -> str:
    """Names what was meant: the nearest option, or the setting that is given by --set."""
    if not token.startswith("-"):
        return f"{verb}: unexpected argument {shown(token)}"
    from ritornello.commands import Common

    name = token.partition("=")[0]
    setting = name.removeprefix("--").replace("-", "_")
    tables = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "parallel": ParallelConfig}
    tables_with = [table for table, config in tables.items() if setting in {field.name for field in fields(config)}]
    options = [option_name(field.name) for field in (*fields(kind), *fields(Common))]
    near = get_close_matches(name, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if tables_with and "--set" in options:
        hint = f"; settings are given as --set {tables_with[0]}.{setting}=VALUE"
    return f"{verb}: unknown option {shown(name)}{hint}"


def unboxed(panel: str) -> str:
    """The words of tyro's error panel: without its title, up to its first blank line or rule."""
    lines = [line.strip("│║| ") for line in panel.splitlines()[2:]]
    end = next((i for i, line in enumerate(lines) if set(line) <= set("─-╰╯")), len(lines))
    return " ".join(" ".join(lines[:end]).split()).rstrip(".")


def prepare_environment(*, offline: bool) -> None:
    """Settle what the Hugging Face libraries do: they read these variables when they are imported."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if offline:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))


def explain(error: Exception, command: str) -> tuple[int, str]:
    """Exit code and message for the user of a command, by the name of its class."""
    stopped: int | None = getattr(error, "exit_code", None)  # another process' doing
    said = "".join(f"; {note}" for note in getattr(error, "__notes__", ()) if "\n" not in note)
    if stopped is not None:
        return stopped, str(error) + said
    if is_out_of_memory(error):
        return 2, OUT_OF_MEMORY_LATER if command in ("Generate", "Chat", "Serve") else OUT_OF_MEMORY
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}{said}"
    absent = isinstance(error, ImportError) and not (error.name or "").startswith("ritornello")
    if absent or isinstance(error, ValueError | OSError | ArithmeticError):
        return 2, (str(error) or type(error).__name__) + said
    return 1, f"{type(error).__name__}: {error}; this is a defect: please report it with -v and `ritornello doctor`"


def is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def one_line(message: str) -> str:
    """Control characters escaped and cut at 2,000 characters, so that an argument cannot forge or flood a terminal."""
    joined = " ".join(message.split())
    safe: Iterable[str] = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined[:2000])
    return "".join(safe)


if __name__ == "__main__":
    sys.exit(main())
