"""ritornello lab"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, Command, option
from ritornello.config import require, require_int


@dataclass(frozen=True, kw_only=True)
class Lab(Command):
    """Test what is claimed of looped models. `list` says which claims; `run NAME` (or `run all`) trains, measures and
    judges, from where it stopped; `report NAME` writes the report of what has been run so far.
    """

    action: Annotated[Positional[Literal["list", "run", "report"]], arg(help="What to do.")]
    name: Annotated[Positional[str], arg(metavar="NAME", help="An experiment, or all.")] = ""
    quick: Annotated[bool, option("The core comparison, one seed, in minutes; it can only be inconclusive.")] = False
    full: Annotated[bool, option("All arms and seeds, in hours.")] = False
    out: Annotated[Path, option("Where models, results and reports go.", metavar="DIR")] = Path("runs/lab")
    workers: Annotated[int, INTEGER, option("Processes. Default: one for each core.")] = 0

    def run(self) -> None:
        if self.action == "list":
            print(listing())
            return
        require(bool(self.name), "NAME", self.name, "an experiment, or all", "ritornello lab list names them")
        require(self.quick != self.full, "--quick, --full", (self.quick, self.full), "one of the two")
        require_int("--workers", self.workers, 0)

        from ritornello.lab import campaign
        from ritornello.lab.experiments import EXPERIMENTS
        from ritornello.lab.report import text

        say = (lambda _: None) if self.common.quiet else lambda line: print(line, flush=True)
        scale = "quick" if self.quick else "full"
        for name in EXPERIMENTS if self.name == "all" else (self.name,):
            if self.action == "run":
                page = campaign.run(name, scale=scale, out=self.out, workers=self.workers, say=say)
            else:
                page = campaign.report_of(name, scale=scale, out=self.out)
            print(text(page))
            print(campaign.folder_of(self.out, scale, name) / "report.html")


def listing() -> str:
    from ritornello.lab.experiments import EXPERIMENTS
    from ritornello.lab.tasks import MATERIALS

    lines = []
    for experiment in EXPERIMENTS.values():
        lines += [experiment.name, f"    {experiment.question}", f"    predicted: {experiment.prediction}"]
        lines += [f"    {experiment.command(scale)}: {budget}" for scale, budget in experiment.budget.items()]
        lines += ["    sources: " + "; ".join(experiment.sources), ""]
    lines.append("tasks: " + ", ".join(f"{name} ({task.title})" for name, task in MATERIALS.items()))
    return "\n".join(lines)
