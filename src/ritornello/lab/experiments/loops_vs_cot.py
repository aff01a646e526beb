"""The same hops in silence, loop by loop, or in writing, token by token."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ritornello.config import ModelConfig
from ritornello.lab import arms, figures, judging
from ritornello.lab.cell import TEST_SEED, Cell, Trained
from ritornello.lab.experiments.accuracies import CHEAP, HOPS, LEARNT
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.turns import (
    DEEP,
    ENOUGH,
    EVERY,
    GATE,
    LOOPED,
    N_QUESTIONS,
    NO_GATE,
    ONE,
    PROMPT,
    RANGES,
    REPEATS,
    TASK,
    TIMED,
    TURNS,
    WRITER,
    flops,
    hops_a_turn,
    latency,
    learnt,
    own,
    paired,
    silent_rows,
    time_rows,
    timing,
    written_rows,
)
from ritornello.lab.measure import Row, pick_rows, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS, spread, summarise
from ritornello.lab.tasks import TASKS
from ritornello.lab.writing import Asked, loop_flops, token_flops
from ritornello.train.evaluate import evaluating

COMPARED = {ONE: TASK.train_hops, DEEP: 8}  # hops at which writing is compared with answering at once


class LoopsVsCot(TrainedExperiment):
    name = "loops-vs-cot"
    title = "Loops against chain of thought: the same hops in silence or in writing"
    question = "Is a loop worth a written token, in accuracy, in FLOPs and in time?"
    prediction = (
        "Within the training hops both are right; one loop goes as far as one written token. Beyond, writing stays "
        "right, as each token is a question of one hop, and loops lose a little. A loop over the whole prompt takes "
        "many tokens' FLOPs and about one token's time."
    )
    rules: ClassVar = {
        "as accurate": (
            f"Inconclusive unless both have a mean of at least {LEARNT} on each training hop, the looped model at "
            f"{arms.MAX_LOOPS} loops. Each stops by itself: "
            "the looped model's tokens by its gate, the writer when it has written a node twice. Accuracy lost by the "
            f"looped model against the writer of its seed, over these hops. Holds: the 95% t interval lies at or below "
            f"{CHEAP}. Does not hold: it lies above. Else, or under 3 seeds, inconclusive."
        ),
        "cheaper": (
            f"Inconclusive unless both have a mean of at least {LEARNT} on each training hop. What an answer takes the "
            "looped model over what it takes the writer of its seed, each stopping by itself, of the means over the "
            "training hops and over those beyond. Holds: the 95% t intervals of both lie below 1. Does not hold: one "
            "lies above. Else, or under 3 seeds, inconclusive."
        ),
        "writing": (
            f"Inconclusive unless the writer has a mean of at least {LEARNT} on each training hop. Accuracy at "
            f"{COMPARED[ONE]} hops against the same model that answers at once, at {COMPARED[DEEP]} against one of "
            f"{arms.MAX_LOOPS} layers. Holds: better by at least .1, with p <= .05 in the exact one-sided permutation "
            "test over seeds. Does not hold: the 95% interval of the difference (Welch) lies below .1. Else, or under "
            "3 seeds, inconclusive."
        ),
    }
    sources = (
        "Saunshi et al. 2502.17416, theorem 5.4 (loops simulate chain of thought)",
        "Huginn 2502.05171 (4.93 in silence against 24.87 in writing on GSM8K)",
    )
    budget: ClassVar = {
        "quick": "4 minutes on 2 cores",
        "full": "about 15 core-minutes beyond depth-extrapolation, two of whose arms it uses",
    }
    notes = (
        "Chains of 32 nodes; every prompt is the 32 edges and one question. The looped model is the smallest of depth "
        "extrapolation, trained on prompts with a question for every node, under its depth mask (hops <= loops). The "
        "writer has one layer of the same shape and no loop, and reads the same graphs for the same number of steps "
        "and tokens: its rows go on from the edges with chains written out, every next node being asked for. It is "
        "shown the hops in between, which a looped model is not.",
        "A written node is embedded as a question is, so that each token asks what one-hop questions ask: the easiest "
        "chain of thought there is. Greedy decoding with a cache; nodes only are chosen from, in silence too.",
        "Neither is told the number of hops. Both need one more turn than hops to notice that they have arrived.",
        "FLOPs of silence: each token its own loops, as `compact` computes them, and in brackets all tokens looping as "
        "long as the question; those of probe and gate are counted. FLOPs of writing: the prompt once, then a token at "
        "a time with a cache. The head reads the last token of a prompt only. Latency: one prompt, eager, one thread, "
        "beside other cells; "
        "all tokens of the prompt loop, and the gate is read; medians, both models by turns in one process, and a "
        "straight line through them over loops or tokens.",
        "The plain model of 8 layers is that of depth extrapolation, with four times the article model's training "
        "FLOPs; the one of one layer is trained as long as the writer, on the looped model's rows.",
        "Settings of the writer were looked at on another seed (experiments/LOG.md, entry 22); those of the others "
        "are depth extrapolation's, whose results on these seeds were known when these rules were written.",
        "Guessing among those ends that some node points to is right in .13 of 5-hop questions and .24 of 20-hop ones.",
        "Each verdict is at its own 5% level; nothing is corrected for their number. Intervals are over seeds: all "
        "answer the same questions.",
    )
    measured: ClassVar = {
        "hops": HOPS,
        "turns": TURNS,
        "timed": TIMED,
        "repeats": REPEATS,
        "questions": N_QUESTIONS,
        "test_seed": TEST_SEED,
        "gate": (GATE.rule, GATE.threshold),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick(LOOPED, TASKS["chains"]), _cell(WRITER, 0, steps=arms.QUICK_STEPS["looped"])]
        return [
            _cell(arm, seed, steps=arms.STEPS) if arm in (WRITER, ONE) else _cell(arm, seed)
            for seed in range(3)
            for arm in EVERY
        ]

    def measure(self, found: Trained) -> list[Row]:
        asked = {hops: Asked.of(TASK, hops, N_QUESTIONS) for hops in HOPS}
        how = written_rows if found.cell.arm == WRITER else silent_rows
        with evaluating(found.model), torch.no_grad():
            rows = how(self.name, found, asked)
        return rows + (time_rows(self.name, found, _shape(LOOPED)) if found.cell.arm == WRITER else [])

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        there, verdicts = {r["model"] for r in rows}, []
        if {LOOPED, WRITER} <= there:
            verdicts += [self._as_accurate(rows, name) for name in RANGES]
            verdicts += [self._cheaper(rows, "FLOPs", flops), self._cheaper(rows, "latency", latency)]
        return verdicts + [self._writing(rows, arm) for arm in COMPARED if {arm, WRITER} <= there]

    def _as_accurate(self, rows: Sequence[Row], name: str) -> Verdict:
        hops = RANGES[name]
        before, after = (own(rows, arm, "accuracy", hops) for arm in (WRITER, LOOPED))
        outcome, test = judging.costs_at_most(*paired(before, after), CHEAP)
        known = all(learnt(rows, arm) for arm in (LOOPED, WRITER))
        used = [judging.shown(own(rows, arm, "turns_used", hops)) for arm in (LOOPED, WRITER)]
        return self.verdict(
            "as accurate",
            rows,
            LOOPED,
            claim=f"Silent loops are as accurate as written hops, {_range(name)}",
            outcome=outcome if known else "inconclusive",
            evidence=(
                f"{judging.shown(after)} in {used[0]} loops against {judging.shown(before)} in {used[1]} written tokens"
            ),
            test=test if known else "none: one of the two did not learn the training hops",
        )

    def _cheaper(self, rows: Sequence[Row], what: str, cost: Any) -> Verdict:
        outcomes, tests, said = [], [], []
        for name, hops in RANGES.items():
            silent, written = paired(cost(rows, LOOPED, hops), cost(rows, WRITER, hops))
            outcome, test = is_below_one((np.asarray(silent) / np.asarray(written)).tolist())
            outcomes.append(outcome)
            tests.append(f"{name}: {test}")
            said.append(f"{name} {_number(silent)} against {_number(written)}")
        known = all(learnt(rows, arm) for arm in (LOOPED, WRITER))
        return self.verdict(
            "cheaper",
            rows,
            LOOPED,
            claim=f"Silent loops take less than written hops for an answer: {what}",
            outcome=judging.all_of(outcomes) if known else "inconclusive",
            evidence=f"{'; '.join(said)} {'FLOPs' if what == 'FLOPs' else 'ms'}",
            test="; ".join(tests) if known else "none: one of the two did not learn the training hops",
        )

    def _writing(self, rows: Sequence[Row], arm: str) -> Verdict:
        hops = COMPARED[arm]
        one, other = own(rows, WRITER, "accuracy", (hops,)), own(rows, arm, "accuracy", (hops,))
        outcome, test = judging.is_better(one, other)
        if not learnt(rows, WRITER):
            outcome, test = "inconclusive", f"not judged: the writer did not learn the training hops ({test})"
        return self.verdict(
            "writing",
            rows,
            WRITER,
            claim=f"Writing is better than {arms.ARMS[arm].title}, answering at once, at {hops} hops",
            outcome=outcome,
            evidence=f"{judging.shown(one)} against {judging.shown(other)}",
            test=test,
        )

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        every = [arm for arm in EVERY if pick_rows(rows, model=arm)]
        both = {LOOPED, WRITER} <= set(every)
        tables = [_answers_table(rows, every), _arms_table(rows, every)]
        pictures = [_accuracy_picture(rows, every)]
        if both:
            tables.insert(0, _exchange_table(rows))
            pictures.append(_cost_picture(rows))
        return tables, pictures


def _cell(arm: str, seed: int, **changes: Any) -> Cell:
    task = TASKS["written-chains" if arm == WRITER else "chains"]
    return arms.cell(arm, task, seed=seed, masked=True, **changes)


def is_below_one(ratios: Sequence[float]) -> tuple[Outcome, str]:
    """Whether the 95% t interval of `ratios`, one a seed, lies below 1."""
    if len(ratios) < MIN_SEEDS:
        return "inconclusive", f"none: {judging.seeds(len(ratios))}"
    found = summarise(ratios)
    test = f"ratio {found.mean:.3g}, 95% t interval [{found.low:.3g}, {found.high:.3g}]"
    if found.high < 1:
        return "holds", test
    return ("does not hold" if found.low > 1 else "inconclusive"), test


def _range(name: str) -> str:
    return f"{RANGES[name][0]} to {RANGES[name][-1]} hops"


def _number(x: Sequence[float]) -> str:
    """Mean ± sd of large or small numbers."""
    found = summarise(x)
    return f"{found.mean:,.3g}" + (f" ± {found.sd:.2g}" if found.n > 1 else "")


def _shape(arm: str) -> ModelConfig:
    return _cell(arm, 0).model


def _exchange_table(rows: Sequence[Row]) -> Table:
    loop, token = (hops_a_turn(rows, arm) for arm in (LOOPED, WRITER))
    gated, free, ms = ([each for each, _ in timing(rows, way)] for way in (LOOPED, NO_GATE, WRITER))
    one, written = loop_flops(_shape(LOOPED), PROMPT), token_flops(_shape(WRITER), PROMPT + 8)
    ratio = lambda a, b: _number([x / y for x, y in zip(*paired(a, b), strict=True)])  # noqa: E731
    lines = [
        ("hops answered by one more", _number(loop), _number(token), ratio(loop, token)),
        ("FLOPs, of the question's token", _number([one]), _number([written]), ratio([one], [written])),
        ("FLOPs, of all 33 tokens", _number([PROMPT * one]), _number([written]), ratio([PROMPT * one], [written])),
        ("milliseconds, all 33 tokens, gate read", _number(gated), _number(ms), ratio(gated, ms)),
        ("milliseconds, all 33 tokens, no gate", _number(free), _number(ms), ratio(free, ms)),
    ]
    head = ("what", "one loop", "one written token", "a loop in tokens")
    note = (
        f"mean ± sd over seeds. Hops: by the line through the fewest loops or tokens that answer {ENOUGH} of the "
        "questions of each number of hops. A written token is read by the cache, a loop is run on what the prompt holds"
    )
    return Table(title="What a loop is worth in written tokens", head=head, rows=tuple(lines), note=note)


def _answers_table(rows: Sequence[Row], every: Sequence[str]) -> Table:
    lines = []
    for arm in every:
        for name, hops in RANGES.items():
            said = [judging.shown(own(rows, arm, metric, hops)) for metric in ("accuracy", "turns_used")]
            cost = _number(flops(rows, arm, hops))
            if arm == LOOPED:
                every_loop = [values(rows, model=arm, metric="flops", hops=k, rule="all loop") for k in hops]
                cost += f" ({_number(np.mean(every_loop, axis=0).tolist())})"
            timed = arm in (LOOPED, WRITER) and pick_rows(rows, metric="milliseconds")
            lines.append(
                (arms.ARMS[arm].title, _range(name), *said, cost, _number(latency(rows, arm, hops)) if timed else "–")
            )
    head = ("model", "questions", "accuracy", "loops or tokens", "FLOPs an answer", "ms an answer")
    note = "each stopping by itself; in brackets: all tokens loop as long as the question; mean ± sd over seeds"
    return Table(title="What an answer takes", head=head, rows=tuple(lines), note=note)


def _arms_table(rows: Sequence[Row], every: Sequence[str]) -> Table:
    lines = []
    for arm in every:
        there = pick_rows(rows, model=arm, metric="accuracy", rule="own", hops=1)
        mean = lambda name, there=there: float(np.mean([r[name] for r in there]))  # noqa: E731
        total, steps = f"{there[0]['total']:,}", f"{mean('steps'):,.0f}"
        spent = (f"{mean('training_flops') / 1e12:.1f}", f"{mean('training_seconds') / 60:.1f}")
        lines.append((arms.ARMS[arm].title, judging.seeds(len(there)), total, steps, *spent))
    head = ("model", "n", "parameters", "steps", "training TFLOPs", "minutes")
    return Table(title="What the arms cost", head=head, rows=tuple(lines), note="means over seeds")


def _curve(arm: str, by_seed: np.ndarray) -> figures.Curve:
    """by_seed (hops, seeds)"""
    role, title = arms.ARMS[arm].role, arms.ARMS[arm].title
    return figures.Curve(label=title, x=HOPS, mean=by_seed.mean(-1), sd=spread(by_seed), kind=role)


def _accuracy_picture(rows: Sequence[Row], every: Sequence[str]) -> Picture:
    lines = [_curve(arm, np.array([own(rows, arm, "accuracy", (k,)) for k in HOPS])) for arm in every]
    figure = figures.curves(
        lines,
        title="Accuracy by hops, each stopping by itself",
        xlabel="hops",
        ylabel="accuracy",
        vertical={TASK.train_hops: "training"},
        ylim=(0, 1.02),
    )
    caption = "Accuracy by hops: loops end by a gate, writing at a node written twice; mean ± sd over seeds."
    return Picture(name="accuracy-by-hops", caption=caption, image=figures.png(figure))


def _cost_picture(rows: Sequence[Row]) -> Picture:
    lines = [_curve(arm, np.array([flops(rows, arm, (k,)) for k in HOPS])) for arm in (LOOPED, WRITER)]
    every = np.array([values(rows, model=LOOPED, metric="flops", hops=k, rule="all loop") for k in HOPS])
    lines.append(
        figures.Curve(label="all tokens loop as long", x=HOPS, mean=every.mean(-1), sd=spread(every), kind="ablation")
    )
    figure = figures.curves(
        lines, title="FLOPs of an answer by hops", xlabel="hops", ylabel="FLOPs", log_y=True, vertical={5: "training"}
    )
    caption = "FLOPs of one answer, each stopping by itself; mean ± sd over seeds."
    return Picture(name="flops-by-hops", caption=caption, image=figures.png(figure))
