"""The accuracies of one task by arm, hops and loops, and what every experiment on hops draws of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ritornello.lab import arms, figures, judging
from ritornello.lab.measure import Row, pick_rows, values
from ritornello.lab.report import Picture, Table
from ritornello.lab.statistics import spread
from ritornello.lab.tasks import TASKS

HOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 20)
SHOWN = (1, 5, 8, 10, 15, 20)  # in tables
TEST_LOOPS = 24  # what the claims are about, fixed before any result: enough for 20 hops with a few to spare
LEARNT = 0.9  # of accuracy: below, a model has not learnt those hops, and says nothing about depth
CHEAP = 0.02  # of accuracy that a way of stopping, or of not stopping, may cost


def knows(rows: Sequence[Row], hops: Sequence[int], **where: Any) -> bool:
    """Whether the mean over seeds on each of these hops is at least LEARNT."""
    return all(np.mean(values(rows, metric="accuracy", hops=k, **where)) >= LEARNT for k in hops)


class Accuracies:
    """test_loops: those of a looped model where nothing else is said; 0: as many as the question has hops."""

    def __init__(self, rows: Sequence[Row], task: str, *, test_loops: int) -> None:
        self.task, self.test_loops = TASKS[task], test_loops
        self.rows = pick_rows(rows, metric="accuracy", task=task, rule=None)
        self._table: dict[tuple[str, int, int], list[float]] = {}
        for row in self.rows:
            self._table.setdefault((row["model"], row["hops"], row["loops"]), []).append(row["value"])
        self.hops = tuple(sorted({row["hops"] for row in self.rows}))
        self.loops = tuple(sorted({row["loops"] for row in self.rows} - {0}))
        self.training = tuple(k for k in self.hops if k <= self.task.train_hops)
        self.beyond = tuple(k for k in self.hops if k > self.task.train_hops)

    def arms(self, wanted: Sequence[str]) -> list[str]:
        """Those that have results."""
        there = {row["model"] for row in self.rows}
        return [arm for arm in wanted if arm in there]

    def values(self, arm: str, hops: int, loops: int | None = None) -> list[float]:
        """By seed; a plain model's at its only depth."""
        at = 0 if arms.ARMS[arm].role == "plain" else loops or self.test_loops or hops
        return self._table[arm, hops, at]

    def means(self, arm: str, hops: Sequence[int], loops: int | None = None) -> list[float]:
        """By seed, over several numbers of hops, each of the same weight."""
        return np.mean([self.values(arm, k, loops) for k in hops], axis=0).tolist()

    def lowest(self, arm: str) -> float:
        """The mean over seeds on the training hop that it is worst at, at as many loops as its training had at most."""
        loops = self.train_loops(arm) if self.test_loops else None
        return min(float(np.mean(self.values(arm, k, loops))) for k in self.training)

    def train_loops(self, arm: str) -> int:
        return arms.ARMS[arm].train.get("max_loops", arms.MAX_LOOPS)

    def parameters(self, arm: str) -> int:
        return pick_rows(self.rows, model=arm)[0]["total"]

    def n_seeds(self, arm: str) -> int:
        return len({row["seed"] for row in pick_rows(self.rows, model=arm)})

    def said_loops(self) -> str:
        return f"{self.test_loops} loops" if self.test_loops else "as many loops as hops"

    def map(self, arm: str) -> figures.HeatMap:
        loops = () if arms.ARMS[arm].role == "plain" else self.loops
        by_seed = np.array([[self.values(arm, hops, at) for at in loops or (0,)] for hops in self.hops])
        return figures.HeatMap(
            title=arms.ARMS[arm].title,
            note=f"{self.parameters(arm) / 1e3:.0f}k parameters, {judging.seeds(by_seed.shape[-1])}",
            hops=self.hops,
            loops=loops,
            mean=by_seed.mean(-1),
            sd=spread(by_seed),
        )


def map_picture(found: Accuracies, panels: Sequence[str], *, train_loops: int, caption: str) -> Picture:
    figure = figures.heat_maps(
        [found.map(arm) for arm in panels],
        train_hops=found.task.train_hops,
        train_loops=train_loops,
        title=f"Accuracy by hops and loops: {found.task.title}",
    )
    return Picture(name=f"{found.task.name}-hops-by-loops", caption=caption, image=figures.png(figure))


def curve_picture(found: Accuracies, every: Sequence[str]) -> Picture:
    lines = []
    for arm in every:
        by_seed = np.array([found.values(arm, hops) for hops in found.hops])
        kind, title = arms.ARMS[arm].role, arms.ARMS[arm].title
        lines.append(figures.Curve(label=title, x=found.hops, mean=by_seed.mean(-1), sd=spread(by_seed), kind=kind))
    figure = figures.curves(
        lines,
        title=f"{found.task.title.capitalize()}: accuracy by hops at {found.said_loops()}",
        xlabel="hops",
        ylabel="accuracy",
        vertical={found.task.train_hops: "training"},
        chance={hops: found.task.guessing(hops) for hops in found.hops},
        ylim=(0, 1.02),
    )
    caption = f"Accuracy by hops: looped models at {found.said_loops()}, mean ± sd over seeds."
    return Picture(name=f"{found.task.name}-accuracy-by-hops", caption=caption, image=figures.png(figure))


def accuracy_table(found: Accuracies, every: Sequence[str]) -> Table:
    rows = []
    for arm in every:
        there = (judging.shown(found.values(arm, k)) for k in SHOWN)
        rows.append((arms.ARMS[arm].title, arms.ARMS[arm].role, judging.seeds(found.n_seeds(arm)), *there))
    head = ("model", "role", "n", *(f"{k} hops" for k in SHOWN))
    title = f"{found.task.title.capitalize()}: accuracy at {found.said_loops()}"
    return Table(title=title, head=head, rows=tuple(rows), note="mean ± sd over seeds; plain models without loops")
