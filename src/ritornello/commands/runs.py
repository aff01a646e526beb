"""ritornello runs"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ritornello.commands import Command, option
from ritornello.config import require

if TYPE_CHECKING:
    from ritornello.train.runs import Run


@dataclass(frozen=True, kw_only=True)
class Runs(Command):
    """The runs on this disk. `ls [DIR]` lists them; `compare RUN RUN ...` shows in which settings and results they
    differ; `rm RUN ...` removes runs with all their checkpoints, at once and for good; `consolidate RUN ...` puts
    the last checkpoint together in one file, where several processes have written theirs.
    """

    action: Annotated[Positional[Literal["ls", "compare", "rm", "consolidate"]], arg(help="What to do.")]
    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH", help="Runs, or for ls where to look.")] = ()
    json: Annotated[bool, option("Print JSON instead of a table.")] = False

    def run(self) -> None:
        from ritornello.train import runs

        if self.action == "ls":
            readable = []
            for path in [path for root in self.paths or (Path("runs"),) for path in runs.find(root)]:
                try:
                    readable.append(runs.read(path))
                except (OSError, ValueError) as error:  # the others are to be seen
                    print(f"ritornello: left out: {error}", file=sys.stderr)
            self.show_list(readable)
            return
        least = 2 if self.action == "compare" else 1
        require(len(self.paths) >= least, "PATH", len(self.paths), f"at least {least} runs")
        if self.action == "compare":
            self.show_differences([runs.read(path) for path in self.paths])
            return
        for path in self.paths:
            if self.action == "rm":
                print(f"{path}: {megabytes(runs.remove(path))} freed")
            else:
                print(consolidated(path))

    def show_list(self, found: "list[Run]") -> None:
        columns = ["run", "state", "step", "loss", "best val bpb", "peak memory", "on disk", "changed"]
        rows: list[list[Any]] = []
        for run in found:
            losses = [value for name, value in run.metrics.items() if name.startswith("val_bpb")]
            steps, ago = f"{run.step}/{run.recipe.train.steps}", age(time.time() - run.changed)
            peak = run.metrics.get("peak_mb")
            numbers = [run.metrics.get("loss"), min(losses, default=None), peak and megabytes(peak * 1e6)]
            rows.append([str(run.path), run.state, steps, *numbers, megabytes(run.n_bytes), ago])
        self.show(columns, rows)

    def show_differences(self, found: "list[Run]") -> None:
        from ritornello.train.runs import differences

        names = sorted({name for run in found for name in run.metrics})
        rows: list[list[Any]] = [[name, *values] for name, values in differences(found).items()]
        rows += [["step", *[run.step for run in found]]]
        rows += [[name, *[run.metrics.get(name) for run in found]] for name in names]
        self.show(["", *[str(run.path) for run in found]], rows)

    def show(self, columns: list[str], rows: list[list[Any]]) -> None:
        if self.json:
            import json

            print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2, default=str))
            return
        from rich.console import Console
        from rich.table import Table

        from ritornello.train.runs import text

        table = Table(*columns)
        for row in rows:
            table.add_row(*("" if value is None else text(value) for value in row))
        Console().print(table)


def consolidated(run: Path) -> Path:
    from ritornello.train import files, runs
    from ritornello.train.consolidate import consolidate

    require(runs.is_run(run), "RUN", str(run), "the directory of a run", "ritornello runs ls names them")
    with files.lock(run):
        return consolidate(run)


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def age(seconds: float) -> str:
    """How long ago, in the largest unit that gives more than one."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
