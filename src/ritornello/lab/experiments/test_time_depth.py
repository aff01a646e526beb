"""What more loops do to a trained model: how its loss settles, by when, and whether it turns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ritornello.lab import arms, figures, judging, text_arms
from ritornello.lab.arms import ARMS
from ritornello.lab.cell import TEST_SEED, Cell, Trained, build
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import N_QUESTIONS, Costs, Questions, Row, nats, pick_rows, row, values
from ritornello.lab.reading import N_WINDOWS, reading_rows
from ritornello.lab.report import Picture, Table, Verdict
from ritornello.lab.saturation import Saturation, fit, power_r2
from ritornello.lab.statistics import spread
from ritornello.lab.tasks import MATERIALS, TASKS
from ritornello.lab.text_arms import TEXT_ARMS

MODELS: Mapping[str, tuple[str, ...]] = {"text": ("rdt", "fixed"), "chains": ("dense", "fixed-depth", "short-training")}
TITLES = {**ARMS, **TEXT_ARMS}
SAMPLED, FIXED = {"text": "rdt", "chains": "dense"}, {"text": "fixed", "chains": "fixed-depth"}
TRAINED: Mapping[str, int] = {"text": text_arms.MEAN_LOOPS, "chains": 5}  # mean loops in training; 4.5 counts as 5
TIMES = (2, 4, 8)
LOOPS: Mapping[str, tuple[int, ...]] = {
    "text": (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32),
    "chains": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 30, 40),
}
UNITS = {"text": "bits per byte", "chains": "nats a question"}
SMALL = 0.01  # of either unit: a smaller rise is none
FITS = 0.98  # of the variance over loops
MOST = 0.95  # of all that loops bring
KNOWN = "Inconclusive under 3 seeds."
QUICK_STEPS = 300


class DepthAtTest(TrainedExperiment):
    name = "test-time-depth"
    title = "Test-time depth: how far do more loops help?"
    question = "Does loss settle exponentially with loops, by when, and does it rise again far beyond training's?"
    prediction = (
        "On text the loss settles exponentially and by twice the training depth, and rises at 8 times it only in a "
        "model trained at one fixed depth. On chains, where a question is out of reach until loops suffice, the "
        "exponential does not fit."
    )
    rules: ClassVar = {
        "exponential": (
            f"{KNOWN} L(T) = floor + height * exp(-rate * T) by least squares for each seed, from 1 loop to twice the "
            f"training depth. Holds: the mean over seeds of the explained variance (R²) is at least {FITS}, and in "
            f"every seed the curve falls at a rate between .011 and 9, has less than {1 - MOST:.0%} of its height left "
            "at twice the training depth, and explains no less than floor + height * T^(-power) does. Does not hold: "
            "the upper end of the 95% t interval of R² lies below, or one of the rest fails in every seed. Else "
            "inconclusive."
        ),
        "settles": (
            f"{KNOWN} So too where loops bring less than {SMALL} in some seed. Of what loops bring from one loop to "
            "the lowest loss at any number of them, the share that is there at twice the training depth. Holds: its "
            f"mean over seeds is at least {MOST}. Does not hold: the upper end of its 95% t interval lies below. Else "
            "inconclusive."
        ),
        "stays": (
            f"{KNOWN} Loss at {TIMES[-1]} times the training depth less the lowest at any number of loops, seed by "
            f"seed. Holds: the 95% t interval lies at or below {SMALL} (bits per byte, or nats a question). Does not "
            "hold: it lies above. Else inconclusive."
        ),
        "turns more": (
            f"{KNOWN} The rise that `stays` judges, of one model less that of the other, seed by seed. Holds: the mean "
            f"is at least {SMALL} and the 95% t interval lies above 0. Does not hold: it lies below {SMALL}. Else "
            "inconclusive."
        ),
    }
    sources = (
        "Parcae 2604.12946 (L(T) = L∞ + Z·exp(-z·T); settled at the training depth)",
        "OpenMythos issue 58 (perplexity 59.5 at 12 loops, 61.7 at 64 after random depths)",
        "OpenMythos issue 28 (57.9 at 8 loops, 170.7 at 16 after 8 always)",
        "Bansal et al. 2202.05826 (overthinking)",
    )
    budget: ClassVar = {
        "quick": "3 minutes on 2 cores",
        "full": "about 45 core-minutes; 6 beyond depth-extrapolation and parameter-efficiency, whose models it uses",
    }
    masked = False  # said in the notes, of chains alone
    notes = (
        "Text: the looped models of parameter efficiency, trained at Poisson(4) or always 4 loops. Chains: models of "
        "depth extrapolation, trained at 1 to 8 loops, always 5, or 1 to 8 for three tenths of the steps; questions of "
        "1 to 5 hops, each number of the same weight.",
        "Depth mask: on chains a looped model in training is asked only what its loops can reach.",
        "Training depth is the mean number of loops in training: 4 on text, 5 on chains (4.5 counts as 5).",
        "An untrained model's state settles too, since injection forgets: its own fit is in the table.",
        "The lowest loss is searched at the numbers of loops measured, on the windows or questions that are judged; "
        "with a rise near 0 that makes it look larger than it is.",
        "Chains models, and how their accuracy changes up to 64 loops, were known from depth extrapolation when these "
        "rules were written; their losses were not.",
        "Each verdict is at its own 5% level; nothing is corrected for their number. Intervals are over seeds.",
    )
    measured: ClassVar = {
        "loops": LOOPS,
        "windows": N_WINDOWS,
        "questions": N_QUESTIONS,
        "test_seed": TEST_SEED,
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [text_arms.cell(arm, seed=0, steps=QUICK_STEPS) for arm in MODELS["text"]]
        return [
            text_arms.cell(arm, seed=seed) if task == "text" else arms.cell(arm, TASKS[task], seed=seed, masked=True)
            for seed in range(3)
            for task, found in MODELS.items()
            for arm in found
        ]

    def measure(self, found: Trained) -> list[Row]:
        untrained = replace(found, model=build(found.cell).eval())
        rows = self._losses(untrained)
        return [*self._losses(found), *(row | {"metric": "untrained loss"} for row in rows)]

    def _losses(self, found: Trained) -> list[Row]:
        task, loops = found.cell.build_material(), LOOPS[found.cell.task]
        if task.name == "text":
            rows = reading_rows(self.name, found, loops=loops)
            return [row | {"metric": "loss"} for row in pick_rows(rows, metric="bpb")]
        hops = range(1, task.train_hops + 1)
        costs, questions = Costs(found, task), Questions.of(found.model, task, hops, N_QUESTIONS)
        return [
            row(
                self.name,
                found,
                metric="loss",
                value=float(np.mean(list(by_hops.values()))),
                n=len(hops) * N_QUESTIONS,
                loops=at,
                **costs.at(at),
            )
            for at, by_hops in nats(found.model, questions, loops).items()
        ]

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        verdicts = []
        for task, models in MODELS.items():
            curves = {model: Curves(rows, task, model) for model in models if pick_rows(rows, model=model)}
            for found in curves.values():
                verdicts += [self._exponential(rows, found), self._settles(rows, found), self._stays(rows, found)]
            pairs = [(FIXED[task], SAMPLED[task]), ("short-training", SAMPLED[task])]
            verdicts += [self._turns(rows, curves[a], curves[b]) for a, b in pairs if {a, b} <= set(curves)]
        return verdicts

    def _exponential(self, rows: Sequence[Row], found: "Curves") -> Verdict:
        fits, rival = found.fits(), found.power_r2()
        r2 = [one.r2 for one in fits]
        end = TIMES[0] * TRAINED[found.task]
        does = [one.falls and one.left(end) <= 1 - MOST and one.r2 >= r for one, r in zip(fits, rival, strict=True)]
        outcome = judging.reaches(r2, FITS)
        if outcome == "holds" and not all(does):
            outcome = "inconclusive" if any(does) else "does not hold"
        rate, floor = ([getattr(one, name) for one in fits] for name in ("rate", "floor"))
        return self.verdict(
            "exponential",
            rows,
            found.model,
            claim=f"{found.title}: loss settles exponentially with loops",
            outcome=outcome,
            evidence=f"R² {judging.shown(r2)}, of a power law {judging.shown(rival)}; rate {judging.shown(rate)} a "
            f"loop, floor {judging.shown(floor)} {UNITS[found.task]}",
            test=f"mean over seeds against {FITS}; {sum(does)} of {len(does)} seeds settle so",
        )

    def _settles(self, rows: Sequence[Row], found: "Curves") -> Verdict:
        share, at = found.shares(), TIMES[0] * TRAINED[found.task]
        enough = min(found.brought()) >= SMALL
        return self.verdict(
            "settles",
            rows,
            found.model,
            claim=f"{found.title}: settled by {at} loops, twice the training depth",
            outcome=judging.reaches(share, MOST) if enough else "inconclusive",
            evidence=f"{judging.shown(share)} of what loops bring: from {judging.shown(found.at(1))} to "
            f"{judging.shown(found.lowest())} {UNITS[found.task]}",
            test=f"mean over seeds against {MOST}" if enough else "none: loops bring next to nothing",
        )

    def _stays(self, rows: Sequence[Row], found: "Curves") -> Verdict:
        last = TIMES[-1] * TRAINED[found.task]
        outcome, test = judging.costs_at_most(found.at(last), found.lowest(), SMALL)
        said = [f"{at} loops {judging.shown(found.rises(at))}" for at in found.multiples()]
        return self.verdict(
            "stays",
            rows,
            found.model,
            claim=f"{found.title}: {last} loops are no worse than the best number",
            outcome=outcome,
            evidence=f"above the lowest loss, in {UNITS[found.task]}: {', '.join(said)}",
            test=test,
        )

    def _turns(self, rows: Sequence[Row], one: "Curves", other: "Curves") -> Verdict:
        last = TIMES[-1] * TRAINED[one.task]
        a, b = one.rises(last), other.rises(last)
        seeds = min(len(a), len(b))
        outcome, test = judging.is_better_paired(a[:seeds], b[:seeds], margin=SMALL)
        return self.verdict(
            "turns more",
            rows,
            one.model,
            claim=f"{one.title}: turns more than {other.title}",
            outcome=outcome,
            evidence=f"rise by {last} loops {judging.shown(a)} against {judging.shown(b)} {UNITS[one.task]}",
            test=test,
        )

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        found = [
            Curves(rows, task, model)
            for task, models in MODELS.items()
            for model in models
            if pick_rows(rows, model=model)
        ]
        costs = costs_table(rows, [one.model for one in found], arms=TITLES, metric="loss")
        pictures = [
            _picture([one for one in found if one.task == task]) for task in dict.fromkeys(one.task for one in found)
        ]
        return [_table(found), costs], pictures


class Curves:
    """Losses of one model by loops, each number of them a list by seed."""

    def __init__(self, rows: Sequence[Row], task: str, model: str, *, metric: str = "loss") -> None:
        self.task, self.model, self.title = task, model, TITLES[model].title
        self.loops = LOOPS[task]
        self.by_seed = np.array([values(rows, model=model, metric=metric, loops=at) for at in self.loops])  # (T, seeds)
        self.rows = rows

    def at(self, loops: int) -> list[float]:
        return self.by_seed[self.loops.index(loops)].tolist()

    def lowest(self) -> list[float]:
        return self.by_seed.min(axis=0).tolist()

    def rises(self, loops: int) -> list[float]:
        """Above the lowest loss."""
        return (np.asarray(self.at(loops)) - self.lowest()).tolist()

    def multiples(self) -> list[int]:
        return [times * TRAINED[self.task] for times in TIMES]

    def shares(self) -> list[float]:
        """Of what loops bring at most, the share at twice the training depth."""
        left = np.asarray(self.rises(TIMES[0] * TRAINED[self.task]))
        return (1 - left / np.maximum(self.brought(), 1e-12)).tolist()

    def brought(self) -> list[float]:
        """By loops beyond the first, at most."""
        return (np.asarray(self.at(1)) - self.lowest()).tolist()

    def fits(self) -> list[Saturation]:
        """One a seed, from 1 loop to twice the training depth."""
        return [fit(*one) for one in self._used()]

    def power_r2(self) -> list[float]:
        return [power_r2(*one) for one in self._used()]

    def _used(self) -> list[tuple[list[int], list[float]]]:
        """Loops and losses of each seed, up to twice the training depth."""
        used = [i for i, at in enumerate(self.loops) if at <= TIMES[0] * TRAINED[self.task]]
        return [([self.loops[i] for i in used], losses[used].tolist()) for losses in self.by_seed.T]

    def settled(self) -> list[int]:
        """The loops from which on less than 1 - MOST of what they bring at most is missing."""
        missing = (self.by_seed - self.lowest()) <= (1 - MOST) * (self.by_seed[0] - self.lowest())
        return [self.loops[int(np.argmax(column))] for column in missing.T]

    def untrained(self) -> "Curves":
        return Curves(self.rows, self.task, self.model, metric="untrained loss")


def _table(found: Sequence[Curves]) -> Table:
    lines = []
    for one in found:
        fits, control = one.fits(), one.untrained().fits()
        lowest_at = [one.loops[int(i)] for i in one.by_seed.argmin(axis=0)]
        lines.append(
            (
                f"{one.title}, {UNITS[one.task]}",
                judging.seeds(one.by_seed.shape[1]),
                str(TRAINED[one.task]),
                *(judging.shown([getattr(fitted, name) for fitted in fits]) for name in ("r2", "rate", "floor")),
                judging.shown([fitted.loops_until(0.01) for fitted in fits]),
                " ".join(map(str, one.settled())),
                " ".join(map(str, lowest_at)),
                *(judging.shown(one.rises(at)) for at in one.multiples()),
                judging.shown([fitted.r2 for fitted in control]),
                judging.shown([fitted.rate for fitted in control]),
            )
        )
    head = (
        "model, unit",
        "n",
        "training depth",
        "R²",
        "rate a loop",
        "floor",
        "loops to 1% of the height",
        f"loops to {MOST:.0%} of the gain",
        "lowest at",
        *(f"rise at {times} times" for times in TIMES),
        "untrained R²",
        "untrained rate",
    )
    note = (
        "floor + height * exp(-rate * T), fitted up to twice the training depth; mean ± sd over seeds, or each seed's"
    )
    return Table(title="How loss settles", head=head, rows=tuple(lines), note=note)


def _picture(found: Sequence[Curves]) -> Picture:
    task = found[0].task
    lines = [
        figures.Curve(
            label=one.title,
            x=one.loops,
            mean=one.by_seed.mean(-1),
            sd=spread(one.by_seed),
            kind=TITLES[one.model].role,
        )
        for one in found
    ]
    figure = figures.curves(
        lines,
        title=f"Loss by loops: {MATERIALS[task].title}",
        xlabel="loops in the test",
        ylabel=UNITS[task],
        vertical={TRAINED[task]: "training depth"},
        log_x=True,
        log_y=task == "chains",
    )
    caption = f"Loss, {UNITS[task]}, by loops in the test, mean ± sd over seeds."
    return Picture(name=f"{task}-loss-by-loops", caption=caption, image=figures.png(figure))
