"""Facts that were only ever asked alone, and walks that combine them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import numpy as np

from ritornello.accounting import count_parameters, fit_ffn
from ritornello.lab import arms, figures, judging
from ritornello.lab.cell import TEST_SEED, Cell, Trained, training_flops
from ritornello.lab.experiments.accuracies import CHEAP, LEARNT, Accuracies
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import N_QUESTIONS, Questions, Row, accuracy, accuracy_rows, pick_rows, row, values
from ritornello.lab.report import Picture, Table, Verdict
from ritornello.lab.statistics import spread
from ritornello.lab.tasks import TASKS
from ritornello.lab.tasks.walks import START, Kind, Walks
from ritornello.train.data import NO_LABEL

TASK = "walks"
KINDS: Mapping[Kind, str] = {"in": "known facts", "mixed": "known and new facts", "out": "new facts"}
COMBINED: tuple[Kind, ...] = ("mixed", "out")
HOPS = (1, 2, 3, 4, 5, 6, 8)
LOOPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)
TEST_LOOPS = arms.MAX_LOOPS  # the most that training has
PAIR, AIM, AIMED = 2, 0.9, (2, 3)
LOOPED, PLAIN = ("tied", "anchored"), ("plain-tied-5x32", "plain-tied-depth")
EVERY = (*LOOPED, *PLAIN)
STEPS, QUICK_STEPS = 4000, 1500
TIMES, MOST = 4, 3  # a plain model gets so many times the looped one's training FLOPs, or so many times its steps
# Order matters in a walk: rotary positions. Nothing here stops by itself: no gate.
MODEL: dict[str, Any] = {"positions": "rope", "halting": "none"}
BATCH = 64


class SystematicGeneralisation(TrainedExperiment):
    name = "systematic-generalisation"
    title = "Systematic generalisation: facts combined that were never combined in training"
    question = "Does a looped model follow a walk through facts each of which it has only ever been asked alone?"
    prediction = (
        "All models answer walks of known facts that they have not seen. On walks of new facts plain models stay near "
        "guessing; a looped model whose state is anchored to the vocabulary after each loop reaches .9 at 2 hops, one "
        "without does not."
    )
    rules: ClassVar = {
        "in": (
            f"Accuracy on test walks of known facts, at {TEST_LOOPS} loops. Holds: the mean over seeds on each of 2 to "
            f"5 hops is at least {LEARNT}. Does not hold: the 95% t interval of one lies below. Else, or under 3 "
            "seeds, inconclusive."
        ),
        "better": (
            f"Inconclusive unless both models know what is to be combined: a mean of at least {LEARNT} on single new "
            f"facts and on {PAIR} hops of known ones. Accuracy on {PAIR} hops, looped models at {TEST_LOOPS} loops. "
            "Holds: better by at least .1, with p <= .05 in the exact one-sided permutation test over seeds. Does not "
            "hold: the 95% interval of the difference (Welch) lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "reaches": (
            f"Inconclusive unless single new facts and {PAIR} hops of known ones have a mean of at least {LEARNT}. "
            f"Accuracy on walks of new facts only, at {TEST_LOOPS} loops. Holds: the mean over seeds is at least "
            f"{AIM}. Does not hold: the 95% t interval lies below. Else, or under 3 seeds, inconclusive."
        ),
        "harmless": (
            "Inconclusive unless the mean on each of 2 to 5 hops of known facts, at as many loops as hops, is at "
            f"least {LEARNT}, and on {PAIR} hops of new ones at least {LEARNT / 2}: where little is known, little can "
            f"be lost. Accuracy lost from as many loops as hops to {LOOPS[-1]} loops by the same models: over 2 to 5 "
            f"hops of known facts, and at {PAIR} hops of new ones. Holds: the 95% t intervals of both lie at or below "
            f"{CHEAP}. Does not hold: one lies above it. Else, or under 3 seeds, inconclusive."
        ),
    }
    sources = (
        "Loop, Think & Generalize 2604.07822, section 5 (2,000 entities, 1.2M steps: .75 to .8 against 0)",
        "Wang et al. 2405.15071 (composition generalises in distribution only; shared layers help)",
        "Altabaa et al. 2510.14095 (a discrete anchor for the state)",
    )
    budget: ClassVar = {"quick": "4 minutes on 2 cores", "full": "about 40 core-minutes"}
    notes = (
        "32 entities and 10 relations, each a permutation of them, one table of facts for all seeds. A fifth of every "
        "entity's facts are new: asked alone in every training row, in no training walk. Walks of known facts are of "
        "up to 5 hops in training, and the test's begin with two hops that no training walk has begun with.",
        "Of the questions of one hop, two thirds are the new facts asked alone before a walk, whatever its kind.",
        "Depth mask: in training a looped model is asked only those questions that its number of loops can reach "
        "(hops <= loops). It is not told the number of hops, neither then nor in the test.",
        "All models write answers with the table that they read tokens by, and train on the same batches. "
        f"Plain models get {TIMES} times the training FLOPs of the anchored model, or {MOST} times its steps where "
        "those are fewer: a narrow model takes so few FLOPs a step that their number would measure overhead.",
        "Anchored: after each loop the state becomes the mean of the token embeddings, weighed by its prediction.",
        "Settings were chosen on another seed and another table of facts, while looking at accuracy on new facts "
        "(experiments/LOG.md, entry 22).",
        "Guessing gets 1/32; as a check of the measure, answers are scored against those of other questions of "
        f"{PAIR} hops.",
        f"There are 64 single new facts and 128 walks of {PAIR} of them: the {N_QUESTIONS} questions drawn repeat "
        "some. Intervals say nothing of other tables of facts.",
        "Each verdict is at its own 5% level; nothing is corrected for their number. Intervals are over seeds: all "
        "answer the same questions.",
    )
    measured: ClassVar = {
        "hops": HOPS,
        "loops": LOOPS,
        "questions": N_QUESTIONS,
        "test_seed": TEST_SEED,
        "kinds": tuple(KINDS),
        "another_answer": (PAIR, TEST_LOOPS),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [_cell(arm, 0, QUICK_STEPS) for arm in ("anchored", "plain-tied-depth")]
        return [_cell(arm, seed, STEPS) for seed in range(3) for arm in EVERY]

    def measure(self, found: Trained) -> list[Row]:
        rows = []
        for kind in KINDS:
            task = Walks(kind=kind)
            rows += accuracy_rows(self.name, found, hops=HOPS, loops=LOOPS, task=task, kind=kind)
            value, where = another_answer(found, task), {"hops": PAIR, "loops": TEST_LOOPS, "kind": kind}
            rows.append(row(self.name, found, metric="another_answer", value=value, n=N_QUESTIONS, **where))
        return rows

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        found = by_kind(rows)
        looped, plain = (found["in"].arms(wanted) for wanted in (LOOPED, PLAIN))
        verdicts = [self._in_distribution(found, arm) for arm in (*looped, *plain)]
        verdicts += [self._better(found, *what) for what in product(looped, plain, COMBINED)]
        if len(looped) > 1:
            verdicts.append(self._better(found, "anchored", "tied", "out"))
        verdicts += [self._reaches(found, arm, hops) for arm, hops in product(looped, AIMED)]
        return verdicts + [self._harmless(found, arm) for arm in looped]

    def _in_distribution(self, found: "ByKind", arm: str) -> Verdict:
        training = [hops for hops in found["in"].training if hops > 1]
        outcome = judging.all_of([judging.reaches(found["in"].values(arm, hops), LEARNT) for hops in training])
        said = [f"{hops} hops {judging.shown(found['in'].values(arm, hops))}" for hops in training]
        return self.verdict(
            "in",
            found["in"].rows,
            arm,
            claim=f"{arms.ARMS[arm].title}: answers walks of known facts that it has not seen",
            outcome=outcome,
            evidence=", ".join(said),
            test=f"means over seeds against {LEARNT}",
        )

    def _better(self, found: "ByKind", winner: str, arm: str, kind: Kind) -> Verdict:
        one, other = (found[kind].values(model, PAIR) for model in (winner, arm))
        outcome, test = judging.is_better(one, other)
        if not (knows_facts(found, winner) and knows_facts(found, arm)):
            outcome, test = "inconclusive", f"not judged: one of the two does not know what is to be combined ({test})"
        return self.verdict(
            "better",
            found[kind].rows,
            winner,
            claim=f"{arms.ARMS[winner].title}: better than {arms.ARMS[arm].title} at {PAIR} hops of {KINDS[kind]}",
            outcome=outcome,
            evidence=f"{judging.shown(one)} against {judging.shown(other)}; {said_facts(found, winner, arm)}",
            test=test,
        )

    def _reaches(self, found: "ByKind", arm: str, hops: int) -> Verdict:
        there = found["out"].values(arm, hops)
        outcome, known = judging.reaches(there, AIM), knows_facts(found, arm)
        return self.verdict(
            "reaches",
            found["out"].rows,
            arm,
            claim=f"{arms.ARMS[arm].title}: {AIM} on {hops} hops of new facts",
            outcome=outcome if known else "inconclusive",
            evidence=f"{judging.shown(there)} ({judging.listed(there)}); {said_facts(found, arm)}",
            test=f"mean over seeds against {AIM}" if known else "none: what is to be combined is not known",
        )

    def _harmless(self, found: "ByKind", arm: str) -> Verdict:
        training = [hops for hops in found["in"].training if hops > 1]
        asked: dict[Kind, list[int]] = {"in": training, "out": [PAIR]}
        pairs = {}
        for kind, hops in asked.items():
            enough = np.mean([found[kind].values(arm, k, k) for k in hops], axis=0).tolist()
            pairs[KINDS[kind]] = (enough, found[kind].means(arm, hops, LOOPS[-1]))
        outcome, test = judging.all_cost_at_most(pairs, CHEAP)
        said = [
            f"{name} {judging.shown(before)} at as many loops as hops, {judging.shown(after)} at {LOOPS[-1]}"
            for name, (before, after) in pairs.items()
        ]
        lowest = min(float(np.mean(found["in"].values(arm, k, k))) for k in training)
        known = lowest >= LEARNT and float(np.mean(found["out"].values(arm, PAIR, PAIR))) >= LEARNT / 2
        return self.verdict(
            "harmless",
            found["in"].rows,
            arm,
            claim=f"{arms.ARMS[arm].title}: {LOOPS[-1]} loops are no worse than as many as hops",
            outcome=outcome if known else "inconclusive",
            evidence="; ".join(said),
            test=test if known else "none: too little was learnt to be lost",
        )

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        found = by_kind(rows)
        every = found["in"].arms(EVERY)
        tables = [_accuracy_table(rows, found, every), _loops_table(found), costs_table(found["in"].rows, every)]
        return tables, [_curve_picture(found[kind], kind, every) for kind in KINDS] + _map_picture(found)


ByKind = Mapping[Kind, Accuracies]


def _cell(arm: str, seed: int, steps: int) -> Cell:
    """All arms read the same batches, of which a plain model gets more."""
    if arms.ARMS[arm].role != "plain":
        return _make(arm, seed, steps, MODEL)
    looped, plain = _make("anchored", seed, steps, MODEL), _make(arm, seed, steps, MODEL)
    if arm == "plain-tied-5x32":
        size = count_parameters(_make("tied", seed, steps, MODEL).model)["total"]
        plain = _make(arm, seed, steps, MODEL | {"ffn_dim": fit_ffn(plain.model, size).ffn_dim})
    seq_len = START + 1 + plain.hops
    spent = steps * training_flops(looped, seq_len=seq_len, loops=looped.train.mean_loops)
    affordable = TIMES * spent / training_flops(plain, seq_len=seq_len, loops=1)
    return replace(plain, train=replace(plain.train, steps=min(int(affordable), MOST * steps)))


def _make(arm: str, seed: int, steps: int, model: Mapping[str, Any]) -> Cell:
    return arms.cell(arm, TASKS[TASK], seed=seed, masked=True, model=model, batch_size=BATCH, steps=steps)


def another_answer(found: Trained, task: Walks) -> float:
    """The control: how often the answer is that of the question before, which guessing would get right as often."""
    questions = Questions.of(found.model, task, (PAIR,))
    labels = questions.asked[PAIR].labels
    asked = labels != NO_LABEL
    labels[asked] = np.roll(labels[asked], 1)
    return accuracy(found.model, questions, (TEST_LOOPS,))[TEST_LOOPS][PAIR]


def by_kind(rows: Sequence[Row]) -> ByKind:
    return {kind: Accuracies(pick_rows(rows, kind=kind), TASK, test_loops=TEST_LOOPS) for kind in KINDS}


def facts_known(found: ByKind, arm: str) -> dict[str, float]:
    return {
        "single new facts": float(np.mean(found["out"].values(arm, 1))),
        f"{PAIR} hops of known facts": float(np.mean(found["in"].values(arm, PAIR))),
    }


def knows_facts(found: ByKind, arm: str) -> bool:
    return min(facts_known(found, arm).values()) >= LEARNT


def said_facts(found: ByKind, *models: str) -> str:
    known = [facts_known(found, arm) for arm in models]
    return ", ".join(f"{name} {' and '.join(f'{each[name]:.3f}' for each in known)}" for name in known[0])


def _accuracy_table(rows: Sequence[Row], found: ByKind, every: Sequence[str]) -> Table:
    lines = []
    for arm, kind in product(every, KINDS):
        there = (judging.shown(found[kind].values(arm, hops)) for hops in HOPS)
        control = values(rows, model=arm, kind=kind, metric="another_answer")
        lines.append((arms.ARMS[arm].title, KINDS[kind], *there, judging.shown(control)))
    head = ("model", "walks of", *(f"{hops} hops" for hops in HOPS), "another's answer")
    title = f"Accuracy on walks, looped models at {TEST_LOOPS} loops"
    note = f"mean ± sd over {judging.seeds(found['in'].n_seeds(every[0]))}; guessing gets .031, as the control must"
    return Table(title=title, head=head, rows=tuple(lines), note=note)


def _loops_table(found: ByKind) -> Table:
    lines = [
        (
            arms.ARMS[arm].title,
            KINDS[kind],
            str(hops),
            *(judging.shown(found[kind].values(arm, hops, loops)) for loops in LOOPS),
        )
        for arm, kind, hops in product(found["in"].arms(LOOPED), KINDS, (2, 3, 5))
    ]
    head = ("model", "walks of", "hops", *(f"{loops} loops" for loops in LOOPS))
    return Table(title="More loops than hops", head=head, rows=tuple(lines), note="mean ± sd over seeds")


def _curve_picture(found: Accuracies, kind: Kind, every: Sequence[str]) -> Picture:
    lines = []
    for arm in every:
        by_seed = np.array([found.values(arm, hops) for hops in HOPS])
        role, title = arms.ARMS[arm].role, arms.ARMS[arm].title
        lines.append(figures.Curve(label=title, x=HOPS, mean=by_seed.mean(-1), sd=spread(by_seed), kind=role))
    figure = figures.curves(
        lines,
        title=f"Walks of {KINDS[kind]}: accuracy by hops at {TEST_LOOPS} loops",
        xlabel="hops",
        ylabel="accuracy",
        vertical={found.task.train_hops: "training"},
        chance=dict.fromkeys(HOPS, found.task.chance),
        ylim=(0, 1.02),
    )
    caption = f"Walks of {KINDS[kind]}: looped models at {TEST_LOOPS} loops, mean ± sd over seeds."
    return Picture(name=f"{TASK}-{kind}-by-hops", caption=caption, image=figures.png(figure))


def _map_picture(found: ByKind) -> list[Picture]:
    panels = [
        replace(found[kind].map(arm), title=f"{arms.ARMS[arm].title}: {KINDS[kind]}")
        for arm, kind in product(found["in"].arms(LOOPED), KINDS)
    ]
    if not panels:
        return []
    task = TASKS[TASK]
    figure = figures.heat_maps(
        panels, train_hops=task.train_hops, train_loops=arms.MAX_LOOPS, title="Accuracy by hops and loops: walks"
    )
    caption = (
        "Accuracy on test walks by hops (up) and loops (right); the box is what training covered, of known facts. In "
        "training a question is asked only if the loops can reach it; the number of hops is never given."
    )
    return [Picture(name=f"{TASK}-hops-by-loops", caption=caption, image=figures.png(figure))]
