"""ritornello calibrate"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, REAL, Command, option
from ritornello.config import ExitName, Measure
from ritornello.progress import Progress

if TYPE_CHECKING:
    from ritornello.engine.calibrate import Outcome


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Find the exit threshold with the fewest loops whose risk, against full depth, is at most what you allow, with the
    confidence you ask for. It is saved as exit.json beside the run's config.json; generate --exit calibrated uses it.
    """

    path: Annotated[
        Positional[Path],
        arg(metavar="RUN", help="A run, one of its checkpoints, or `python`, a model that comes along."),
    ]
    risk: Annotated[float, REAL, option("Of a sequence, in the mean; between 0 and 1.")] = 0.05
    confidence: Annotated[float, REAL, option("That the risk is no higher; between 0 and 1.")] = 0.95
    rule: Annotated[ExitName | None, option("When tokens stop. Default: the model's own.")] = None
    measure: Annotated[
        Measure, option("The risk: the share of tokens predicted otherwise, or the rise in loss, in nats.")
    ] = "disagreement"
    loops: Annotated[int | None, INTEGER, option("Full depth. Default: the model's own.")] = None
    min_loops: Annotated[int, INTEGER, option("No token stops before.")] = 1
    data: Annotated[
        Path | None, option("Text that it hasn't learnt from. Default: the run's validation split.", metavar="PATH")
    ] = None
    tokens: Annotated[int | None, INTEGER, option("Tokens to test on. Default: 512 sequences.")] = None
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"

    def run(self) -> None:
        from ritornello.engine.calibrate import calibrate
        from ritornello.engine.calibration import EXIT, save
        from ritornello.engine.generate import load
        from ritornello.recipes import find_model

        path = find_model(self.path)
        with Progress(1, quiet=self.common.quiet) as progress:
            outcome = calibrate(
                load(path, device=self.device),
                risk=self.risk,
                confidence=self.confidence,
                rule=self.rule,
                measure=self.measure,
                n_loops=self.loops,
                min_loops=self.min_loops,
                data=self.data,
                tokens=self.tokens,
                offline=self.common.offline,
                progress=progress.stage,
            )
        show(outcome)
        if outcome.calibration is None:
            stays = (path / EXIT).exists()
            raise ValueError(outcome.shortfall() + (f"; {path / EXIT} of before stays" if stays else ""))
        save(outcome.calibration, path)
        print(outcome.calibration)


def show(outcome: "Outcome") -> None:
    """The thresholds, from careful to bold."""
    from rich.console import Console
    from rich.table import Table

    from ritornello.engine.calibration import NAMES

    goal = outcome.goal
    table = Table(title=f"{outcome.n_sequences} sequences of {outcome.seq_len} tokens")
    for name in (f"exit {goal.rule}", "mean loops", NAMES[goal.measure], f"p of > {goal.shown(goal.risk)}"):
        table.add_column(name, justify="right")
    table.add_column("holds")
    for one in outcome.tested:
        condition = goal.condition(one.threshold).removeprefix(goal.rule)
        numbers = f"{one.mean_loops:.2f}", goal.shown(one.mean_risk), f"{one.p_value:.2g}"
        table.add_row(condition, *numbers, "yes" if one.holds else "no")
    Console().print(table)
