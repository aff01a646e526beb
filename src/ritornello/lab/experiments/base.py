"""What an experiment is: a claim with its rule, the cells that test it, what is measured of each, what follows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from ritornello.lab import judging
from ritornello.lab.cell import Cell, Trained, trained
from ritornello.lab.measure import Row, pick_rows
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.tasks import MATERIALS

Scale = Literal["quick", "full"]


class Experiment(ABC):
    """`rules` say in words what `judge` computes, and are written before the results that they judge; `notes` say what
    was changed later."""

    name: str
    title: str
    question: str
    prediction: str
    rules: ClassVar[Mapping[str, str]]
    sources: tuple[str, ...]
    budget: ClassVar[Mapping[Scale, str]]
    notes: tuple[str, ...] = ()
    masked: bool = False  # looped models are asked only what their loops can reach, in training
    measured: ClassVar[Mapping[str, Any]] = {}  # how a cell is measured; in another way its rows are other results

    @abstractmethod
    def cells(self, scale: Scale) -> list[Cell]:
        """In the order in which they are to run: whole seeds first, so that a part of them is a fair part."""

    @abstractmethod
    def judge(self, rows: Sequence[Row]) -> list[Verdict]: ...

    @abstractmethod
    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]: ...

    @abstractmethod
    def run(self, cell: Cell, store: Path) -> list[Row]:
        """The rows of one cell; models are kept in `store` where another experiment may want them."""

    def verdict(
        self, rule: str, rows: Sequence[Row], model: str, *, claim: str, outcome: Outcome, evidence: str, test: str
    ) -> Verdict:
        """By the rule called `rule`, of an arm that has some of `rows`, all of one task."""
        found = pick_rows(rows, model=model)
        seeds = judging.seeds(len({row["seed"] for row in found}))
        task = MATERIALS[found[0]["task"]]
        scale = f"at {found[0]['total']:,} parameters, on {task.title}, {seeds}"
        masked = self.masked and task.max_hops > 1 and not task.loops_say_hops
        scale += ", looped models trained with the depth mask" if masked else ""
        return Verdict(claim=claim, outcome=outcome, scale=scale, evidence=evidence, test=test, rule=self.rules[rule])

    def command(self, scale: Scale) -> str:
        return f"ritornello lab run {self.name} --{scale}"


class TrainedExperiment(Experiment):
    """Measures models after training."""

    masked = True

    def run(self, cell: Cell, store: Path) -> list[Row]:
        return self.measure(trained(cell, store))

    @abstractmethod
    def measure(self, found: Trained) -> list[Row]: ...
