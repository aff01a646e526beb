"""Which part of the article's model earns its place: each is taken away in turn; and what prelude and coda compute."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ritornello.lab import arms, judging, text_arms
from ritornello.lab.cell import TEST_SEED, Cell, Trained, build, sizes
from ritornello.lab.experiments.accuracies import (
    HOPS,
    LEARNT,
    TEST_LOOPS,
    Accuracies,
    accuracy_table,
    curve_picture,
)
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import N_QUESTIONS, Questions, Row, accuracy_rows, pick_rows, row, values
from ritornello.lab.reading import N_WINDOWS, beats_trigrams, reading_rows, trigram_row
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.stages import RIDGE, reached, skipping
from ritornello.lab.statistics import MIN_SEEDS
from ritornello.lab.tasks import TASKS
from ritornello.lab.text_arms import MEAN_LOOPS, TEXT

CHAINS = "chains"
MODEL, BARE = "article", "article-bare"
PARTS = {
    "article-no-prelude": "prelude",
    "article-no-coda": "coda",
    BARE: "prelude with coda",
    "article-no-lora": "LoRA",
    "article-no-loop-embedding": "loop embedding",
    "article-dense-active": "mixture of experts",
    "article-no-halting": "halting",
    "article-no-injection": "injection",
}
EVERY = (MODEL, *PARTS)
LOOPS = (arms.MAX_LOOPS, TEST_LOOPS)
# Of the probes: problems, their hops, the loops after which they read, and the nodes, up to so many hops on.
N_PROBLEMS, DEEP, READ_LOOPS, N_AHEAD = 96, 20, 3, 6
TEXT_LOOPS = (1, 2, 4, 8, 16)
TEXT_STEPS = 600
CLOSE = 0.01  # bits per byte; a smaller difference isn't worth a claim
KNOWN = 0.5  # of a probe's accuracy from which on a state is said to hold a node; guessing has .03


@dataclass(frozen=True)
class Gauge:
    """A number by seed that says how good an arm is on a task, the larger the better; the difference that counts;
    whether an arm knows enough for the number to say anything, and what one that doesn't lacks.

    loss: the smaller the better; seeds are compared in pairs, which read the same windows in the same order, and only
    the arm that would be the better one has to know anything.
    """

    name: str
    of: Callable[[Sequence[Row], str], list[float]]
    margin: float = judging.MARGIN
    loss: bool = False
    knows: Callable[[Sequence[Row], str], bool] = lambda rows, arm: True
    lacks: str = ""


@dataclass(frozen=True)
class Trial:
    """The cell of an arm and a seed on one task, what is measured of it, and the gauges that judge it. A new task is a
    line in TRIALS."""

    seeds: int
    cell: Callable[[str, int], Cell]
    measure: Callable[[str, Trained], list[Row]]
    gauges: tuple[Gauge, ...]


def _accuracies(rows: Sequence[Row]) -> Accuracies:
    return Accuracies(rows, CHAINS, test_loops=TEST_LOOPS)


def _training_hops(rows: Sequence[Row], arm: str) -> list[float]:
    found = _accuracies(rows)
    return found.means(arm, found.training, arms.MAX_LOOPS)


def _hops_beyond(rows: Sequence[Row], arm: str) -> list[float]:
    found = _accuracies(rows)
    return found.means(arm, found.beyond, TEST_LOOPS)


def _knows_training_hops(rows: Sequence[Row], arm: str) -> bool:
    return _accuracies(rows).lowest(arm) >= LEARNT


def _cell_on_chains(arm: str, seed: int) -> Cell:
    return arms.cell(arm, TASKS[CHAINS], seed=seed, masked=True)


def _measure_chains(experiment: str, found: Trained) -> list[Row]:
    """Accuracies, with and without loop and coda; and what each stage holds, before training too."""
    rows, task = accuracy_rows(experiment, found, hops=HOPS, loops=LOOPS), found.cell.build_task()
    of = sizes(found.cell)
    skipped = skipping(found.model, Questions.of(found.model, task, HOPS), arms.MAX_LOOPS)
    for part, by_hops in skipped.items():
        for k, value in by_hops.items():
            where: dict[str, Any] = {"hops": k, "loops": arms.MAX_LOOPS, "skipped": part, **of}
            rows.append(row(experiment, found, metric="accuracy_skipped", value=value, n=N_QUESTIONS, **where))
    how: dict[str, Any] = {"hops": DEEP, "n_loops": READ_LOOPS, "n_ahead": N_AHEAD, "n_problems": N_PROBLEMS}
    for name, model in (("trained", found.model), ("untrained", build(found.cell))):
        for stage, by_node in reached(model, task, **how).items():
            for k, value in enumerate(by_node):
                where = {"hops": DEEP, "loops": READ_LOOPS, "of": name, "stage": stage, "ahead": k, **of}
                rows.append(row(experiment, found, metric="probe", value=value, n=N_PROBLEMS, **where))
    return rows


def _bits(rows: Sequence[Row], arm: str) -> list[float]:
    return values(rows, model=arm, metric="bpb", loops=MEAN_LOOPS)


def _knows_text(rows: Sequence[Row], arm: str) -> bool:
    return beats_trigrams(rows, _bits(rows, arm))


def _cell_on_text(arm: str, seed: int) -> Cell:
    return text_arms.cell(arm, seed=seed, steps=TEXT_STEPS)


def _measure_text(experiment: str, found: Trained) -> list[Row]:
    rows = reading_rows(experiment, found, loops=TEXT_LOOPS)
    return [*rows, trigram_row(experiment, found)] if found.cell.arm == MODEL else rows


TRIALS: Mapping[str, Trial] = {
    CHAINS: Trial(
        3,
        _cell_on_chains,
        _measure_chains,
        (
            Gauge("training hops", _training_hops),
            Gauge("hops beyond", _hops_beyond, knows=_knows_training_hops, lacks="did not learn the training hops"),
        ),
    ),
    TEXT.name: Trial(
        5,
        _cell_on_text,
        _measure_text,
        (
            Gauge(
                "held-out text",
                _bits,
                margin=CLOSE,
                loss=True,
                knows=_knows_text,
                lacks="is no better than trigrams",
            ),
        ),
    ),
}


class Ablation(TrainedExperiment):
    name = "ablation"
    title = "Ablation: which part of the article's model earns its place?"
    question = (
        "What does the article model lose on depth extrapolation, and on real text, when one of its parts is taken "
        "away, and do prelude and coda compute or only adapt?"
    )
    prediction = (
        "Injection earns its place. Prelude, coda, LoRA, loop embedding, experts and halting do not, and without some "
        "of them the model reaches further. The prelude takes one hop, the coda none. On text prelude, coda and "
        "experts earn their place, being most of the parameters; LoRA, loop embedding, halting and injection do not."
    )
    rules: ClassVar = {
        "earns": (
            f"On chains the mean accuracy over the training hops at {arms.MAX_LOOPS} loops, or over those beyond (6 "
            f"to 20) at {TEST_LOOPS}; of the latter inconclusive unless both models have a mean of at least {LEARNT} "
            "on each training hop. Holds: the article model is better than without the part by at least .1, with p "
            "<= .05 in the exact one-sided permutation test over seeds. Does not hold: the 95% interval of the "
            "difference (Welch) lies below .1. Else, or under 3 seeds, inconclusive. On text bits per byte at "
            f"{MEAN_LOOPS} loops; inconclusive unless the article model reads better than a byte trigram model of "
            f"the same text, on the mean. Holds: the article model's are lower by at least {CLOSE}, and the 95% t "
            f"interval of the difference, seed by seed, lies above 0. Does not hold: it lies below {CLOSE}. Else, or "
            "under 3 seeds, inconclusive."
        ),
        "burdens": (
            "The same means and tests the other way round: the model without the part is better by as much, and on "
            "text has to read better than trigrams."
        ),
        "works": (
            f"Mean accuracy over the training hops at {arms.MAX_LOOPS} loops. Holds: the mean over seeds is at least "
            f"{LEARNT}. Does not hold: the 95% t interval lies below. Else, or under 3 seeds, inconclusive."
        ),
        "computes": (
            "A linear map from a question's state to the node k hops on, fitted on training problems, read on test "
            f"problems, for k up to {N_AHEAD}. A stage holds the nodes that it names with an accuracy of at least "
            f"{KNOWN}; how far it has come is the largest such k. Computes hops (holds): in every seed the part's "
            "output has come further than its input: prelude against embedding, coda against the state after "
            f"{READ_LOOPS} loops. Does not: in none. Else, under 3 seeds, unless the training hops are known (as "
            f"above), or where the input holds {N_AHEAD} hops already, inconclusive."
        ),
    }
    sources = (
        "2604.07822, sections 5 and 6 (loops, no positions)",
        "Bansal et al. 2202.05826 (recall: without injection, no extrapolation)",
        "Tuned lens 2303.08112",
    )
    budget: ClassVar = {
        "quick": "5 minutes on 2 cores",
        "full": "about 2 core-hours beyond routing, whose models it uses",
    }
    notes = (
        "Depth mask: in training a looped model is asked only those questions that its number of loops can reach "
        "(hops <= loops). It is not told the number of hops, neither then nor in the test.",
        "Every arm trains on the same problems for as many steps at the same rate, chosen for the smallest looped "
        "model; input_init and the zero initial state were chosen for the article model with its prelude "
        "(experiments/LOG.md, entries 4 to 6), so that what is taken away may have lost what was set for it.",
        f"On text: the shape and injection of parameter-efficiency's looped models and {TEXT_STEPS} of its steps at "
        f"Poisson({MEAN_LOOPS}) loops, a LoRA for each loop that training may reach, a gate. What is taken away "
        "takes its parameters along, and layers away are FLOPs away: the table of costs says how many. The rate is "
        "the best of three for the whole model after 300 steps; without experts twice that was better by .013 bits, "
        "so that arm has it; for the others no rate was tried (experiments/LOG.md, entry 26).",
        "On text 4 loops gave the whole model .025 bits more than one in that pilot: what acts through loops alone "
        "has not much to earn there.",
        "Without injection more of the state lasts, and output projections begin 6.6 times smaller on text and 3.3 "
        "times on chains, as the rule of initialisation has it: both are taken away at once.",
        "At 20 hops alone the article model is known to be near guessing (.27 in five seeds of depth-extrapolation, "
        "guessing .24), where nothing can be lost; so the rule reads the mean over all hops beyond (known: .58).",
        "Without experts: one dense expert of equal active parameters. Without injection the loop starts from e, or "
        "the input would never arrive. Without halting there is neither gate nor probe; both are fitted to detached "
        "states and change training by their share of the clipped gradient's norm alone, so that what halting is for, "
        "loops saved, is not judged here but in adaptive-depth.",
        "Skipped loop: the coda, or the head alone, reads the prelude's output. Parts were not trained for what they "
        "then read: that a skipped part costs does not show what it computes, that it costs nothing does show it.",
        f"Probes read questions of at least {N_AHEAD} hops in problems of {DEEP}, whose nodes all differ, {N_PROBLEMS} "
        "problems to fit and as many to read; before training only the node asked about can be read.",
        "A first look at probes and skipped parts was taken on seed 0 of the article model, which comes with the "
        "toolkit, before the rules; of the models without a part, only one without LoRA and loop embedding had been "
        "seen, of another seed (experiments/LOG.md, entry 25).",
        "Each verdict is at its own 5% level; nothing is corrected for their number. Intervals are over seeds: all "
        "answer the same questions. Where seeds differ by .1, three of them can hardly refute a difference of .1.",
    )
    measured: ClassVar = {
        "hops": HOPS,
        "loops": LOOPS,
        "questions": N_QUESTIONS,
        "probes": (N_PROBLEMS, DEEP, READ_LOOPS, N_AHEAD, RIDGE),
        "text": (TEXT_LOOPS, N_WINDOWS),
        "test_seed": TEST_SEED,
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick(arm, TASKS[CHAINS]) for arm in (MODEL, BARE)]
        return [
            trial.cell(arm, seed)
            for seed in range(max(trial.seeds for trial in TRIALS.values()))
            for trial in TRIALS.values()
            for arm in EVERY
            if seed < trial.seeds
        ]

    def measure(self, found: Trained) -> list[Row]:
        return TRIALS[found.cell.task].measure(self.name, found)

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        verdicts = []
        for task, trial in TRIALS.items():
            found = pick_rows(rows, task=task)
            there = {row["model"] for row in found}
            for arm in [arm for arm in PARTS if {arm, MODEL} <= there]:
                verdicts += [self._differs(found, g, arm, rule) for g in trial.gauges for rule in ("earns", "burdens")]
            if task == CHAINS and BARE in there:
                verdicts.append(self._works(found))
            if task == CHAINS and MODEL in there:
                last = f"loop {READ_LOOPS}"
                verdicts.append(self._computes(found, "prelude", "embedding", "prelude"))
                verdicts.append(self._computes(found, "coda", last, "coda"))
        return verdicts

    def _differs(self, rows: Sequence[Row], gauge: Gauge, arm: str, rule: str) -> Verdict:
        whole, without = gauge.of(rows, MODEL), gauge.of(rows, arm)
        better = MODEL if rule == "earns" else arm
        pair = (whole, without) if (better == MODEL) != gauge.loss else (without, whole)
        if gauge.loss:
            n = min(map(len, pair))
            outcome, test = judging.is_better_paired(pair[0][:n], pair[1][:n], margin=gauge.margin)
        else:
            outcome, test = judging.is_better(*pair, margin=gauge.margin)
        if not all(gauge.knows(rows, each) for each in ((better,) if gauge.loss else (MODEL, arm))):
            who = "it" if gauge.loss else "one of the two"
            outcome, test = "inconclusive", f"not judged: {who} {gauge.lacks} ({test})"
        digits = 3 if gauge.loss else 2
        said = (f"{judging.shown(found)} ({judging.listed(found, digits)})" for found in (without, whole))
        claim = "earns its place" if rule == "earns" else "is a burden"
        return self.verdict(
            rule,
            rows,
            arm,
            claim=f"{PARTS[arm]}: {claim} on the {gauge.name}",
            outcome=outcome,
            evidence=f"{gauge.name} " + " without, with ".join(said),
            test=test,
        )

    def _works(self, rows: Sequence[Row]) -> Verdict:
        found = _training_hops(rows, BARE)
        beyond = _hops_beyond(rows, BARE)
        return self.verdict(
            "works",
            rows,
            BARE,
            claim="the article model works with neither prelude nor coda",
            outcome=judging.reaches(found, LEARNT),
            evidence=f"training hops {judging.shown(found)} ({judging.listed(found)}), beyond {judging.shown(beyond)}",
            test=f"mean over seeds against {LEARNT}",
        )

    def _computes(self, rows: Sequence[Row], part: str, before: str, after: str) -> Verdict:
        came, comes = (farthest(rows, MODEL, stage) for stage in (before, after))
        gains = [b - a for a, b in zip(came, comes, strict=True)]
        outcome: Outcome = "inconclusive"
        if len(gains) >= MIN_SEEDS and max(came) < N_AHEAD and _knows_training_hops(rows, MODEL):
            outcome = "holds" if min(gains) > 0 else "does not hold" if max(gains) <= 0 else "inconclusive"
        shown = (" ".join(map(str, found)) for found in (came, comes))
        skipped = values(rows, model=MODEL, skipped="coda", hops=5)
        said = f"; 5 hops without the coda {judging.shown(skipped)}" if part == "coda" else ""
        return self.verdict(
            "computes",
            rows,
            MODEL,
            claim=f"article model: the {part} carries the walk on, as a linear map reads it",
            outcome=outcome,
            evidence="hops that can be read, by seed: "
            + f" from the {before}, ".join(shown)
            + f" from its output{said}",
            test="in every seed, or in none",
        )

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        found, tables, pictures = _accuracies(rows), [], []
        if walked := found.arms(EVERY):
            tables += [_stage_table(rows, walked), _skip_table(rows, walked), accuracy_table(found, walked)]
            tables.append(costs_table(found.rows, walked))
            pictures.append(curve_picture(found, walked))
        text = pick_rows(rows, task=TEXT.name)
        if read := [arm for arm in EVERY if pick_rows(text, model=arm)]:
            costs = costs_table(text, read, metric="bpb", loops=dict.fromkeys(read, MEAN_LOOPS))
            tables += [_text_table(text, read), replace(costs, title="What the arms cost on text")]
        return tables, pictures


def probes(rows: Sequence[Row], arm: str, stage: str, *, of: str = "trained") -> np.ndarray:
    """(seeds, hops on): accuracy"""
    found = values(rows, model=arm, metric="probe", stage=stage, of=of)
    return np.reshape(found, (-1, N_AHEAD + 1))


def farthest(rows: Sequence[Row], arm: str, stage: str) -> list[int]:
    """By seed, the most hops on that a linear map can read; 0 where it reads none."""
    return [int(max(np.flatnonzero(by_node >= KNOWN), default=0)) for by_node in probes(rows, arm, stage)]


def _stage_table(rows: Sequence[Row], every: Sequence[str]) -> Table:
    lines = []
    stages = list(dict.fromkeys(row["stage"] for row in pick_rows(rows, metric="probe")))
    for arm in every:
        for of in ("trained", "untrained") if arm == MODEL else ("trained",):
            for stage in stages:
                by_node = probes(rows, arm, stage, of=of).T
                cells = (judging.shown(found.tolist()) for found in by_node)
                lines.append((arms.ARMS[arm].title, of, stage, *cells))
    head = ("model", "", "stage", *(f"{k} on" for k in range(N_AHEAD + 1)))
    note = f"accuracy of a linear map to the node so many hops on, in problems of {DEEP} hops; mean ± sd over seeds"
    return Table(title="What can be read on the way", head=head, rows=tuple(lines), note=note)


def _skip_table(rows: Sequence[Row], every: Sequence[str]) -> Table:
    lines = []
    for arm in every:
        for part in ("loop", "loop and coda", "coda"):
            pick = {"model": arm, "metric": "accuracy_skipped", "skipped": part}
            cells = (judging.shown(values(rows, hops=k, **pick)) for k in (1, 2, 3, 5, 8))
            lines.append((arms.ARMS[arm].title, part, *cells))
    head = ("model", "without", *(f"{k} hops" for k in (1, 2, 3, 5, 8)))
    note = f"the coda is skipped after {arms.MAX_LOOPS} loops; mean ± sd over seeds"
    return Table(title="Accuracy with a part left out of the trained model", head=head, rows=tuple(lines), note=note)


def _text_table(rows: Sequence[Row], every: Sequence[str]) -> Table:
    lines = []
    for arm in every:
        cells = (judging.shown(values(rows, model=arm, metric="bpb", loops=at)) for at in TEXT_LOOPS)
        lines.append((arms.ARMS[arm].title, *cells))
    note = f"mean ± sd over seeds; {MEAN_LOOPS} loops are judged, the mean of training"
    trigram = values(rows, metric="trigram")
    note += f"; a byte trigram model of all the training text: {trigram[0]:.3f}" if trigram else ""
    head = ("model", *(f"{at} loops" for at in TEXT_LOOPS))
    return Table(title="Bits per byte of held-out text", head=head, rows=tuple(lines), note=note)
