"""ritornello eval"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, REAL, TEXT, Command, option
from ritornello.commands.exits import exit_rule
from ritornello.config import MAX_LOOPS, require, require_float, require_int

if TYPE_CHECKING:
    from ritornello.hub.sweep import Sweep

Results = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Score a model on lm-eval's tasks, at any number of loops: texts that are given run once for all of them."""

    path: Annotated[
        Positional[Path],
        arg(
            metavar="RUN", help="A run, a checkpoint, an exported or converted folder, or `python`, which comes along."
        ),
    ]
    tasks: Annotated[str, TEXT, option("What lm-eval calls them: NAME,NAME.", metavar="NAMES")]
    loops: Annotated[str | None, TEXT, option("Depths, as 1,2,4,8. Default: the model's own.", metavar="N,N")] = None
    exit: Annotated[
        str | None, option("Stop early: hazard, cumulative, kl, delta, entropy; --loops then bounds.", metavar="RULE")
    ] = None
    exit_threshold: Annotated[float | None, REAL, option("When --exit stops; each rule has its own.")] = None
    min_loops: Annotated[int, INTEGER, option("With --exit: no token leaves before.")] = 1
    tasks_path: Annotated[Path | None, option("Tasks of your own, as lm-eval's YAML files.", metavar="DIR")] = None
    num_fewshot: Annotated[int | None, INTEGER, option("Examples before each question. Default: the task's.")] = None
    apply_chat_template: Annotated[bool, option("Put questions in the form of the model's conversations.")] = False
    limit: Annotated[float | None, REAL, option("The first N of each task, or below 1 that share, to try out.")] = None
    batch_size: Annotated[str, option("Texts at a time; auto: as many as fit.", metavar="N")] = "1"
    output: Annotated[Path | None, option("All results, as JSON.", metavar="FILE")] = None
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"

    def run(self) -> None:
        tasks = [name for name in self.tasks.split(",") if name]
        depths = [] if self.loops is None else [_depth(text) for text in self.loops.split(",")]
        rule = exit_rule(self.exit, self.exit_threshold, self.min_loops)
        counts = self.batch_size == "auto" or (self.batch_size.isdecimal() and int(self.batch_size) > 0)
        require(counts, "--batch-size", self.batch_size, "an integer >= 1, or auto")
        if self.limit is not None:
            require_float("--limit", self.limit, 0, open_low=True)
        if self.output is not None:
            require(self.output.absolute().parent.is_dir(), "--output", str(self.output), "in a folder that exists")

        from ritornello.hub.sweep import Sweep, sweep

        how: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device}
        if rule is not None:
            how |= {"exit": rule.rule, "exit_threshold": rule.threshold, "min_loops": rule.min_loops}
        options = {
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
            "limit": self.limit,
            "batch_size": self.batch_size,
        }
        with aside(quiet=self.common.quiet):
            lm = Sweep(self.path, depths=depths, **how)
            found = sweep(lm, tasks, folder=self.tasks_path, log_samples=False, **options)
        show(found)
        if self.output is not None:
            asked = {"tasks": tasks, "exit": rule and asdict(rule), **options}
            write(self.output, {"model": str(self.path), **asked}, lm, found)


def _depth(text: str) -> int:
    require(text.isdecimal(), "--loops", text, "integers with commas between, such as 1,2,4,8")
    require_int("--loops", int(text), 1, MAX_LOOPS)
    return int(text)


@contextmanager
def aside(*, quiet: bool) -> Iterator[None]:
    """What lm-eval prints on its way is not the result."""
    with redirect_stderr(StringIO() if quiet else sys.stderr), redirect_stdout(sys.stderr):
        yield


def show(found: Results) -> None:
    """Each metric of each task by loops, with its standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task")
    table.add_column("metric", no_wrap=True)
    for n in found:
        table.add_column(f"{n} loop{'s' * (n > 1)}", justify="right")
    for task, metric in rows(found):
        table.add_row(
            task, metric.removesuffix(",none"), *(cell(one["results"][task], metric) for one in found.values())
        )
    Console().print(table)


def rows(found: Results) -> list[tuple[str, str]]:
    """Tasks with their metrics, without what is beside these."""
    first = next(iter(found.values()))["results"]
    return [(task, name) for task, values in first.items() for name in values if "," in name and "_stderr," not in name]


def cell(values: Mapping[str, Any], metric: str) -> str:
    """A figure with its standard error, where there is one."""
    name, _, filtered = metric.partition(",")
    value, error = values[metric], values.get(f"{name}_stderr,{filtered}")
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" + (f" ±{error:.4f}" if isinstance(error, float) else "")


def write(path: Path, asked: dict[str, Any], lm: "Sweep", found: Results) -> None:
    """What was asked, of which weights, by which versions, and all that lm-eval found by depth."""
    import platform
    from importlib.metadata import version

    from lm_eval.utils import handle_non_serializable
    from pydantic_core import to_json

    from ritornello.train import files

    packages = ("ritornello", "torch", "transformers", "datasets", "lm_eval")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    record = {**asked, "weights_sha256": lm.weights_sha256, "versions": versions, "results": found}
    text = to_json(record, indent=2, inf_nan_mode="null", fallback=handle_non_serializable)
    files.write_atomic(path, text + b"\n")
