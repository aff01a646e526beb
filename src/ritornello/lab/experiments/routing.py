"""Whether each pass through the block takes other experts, what its choice goes with, and what experts are worth."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from ritornello.lab import arms, judging
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
from ritornello.lab.experiments.routing_shown import (
    DEEP,
    N_OFFSETS,
    OVERLAPS,
    SHALLOW,
    about_nodes,
    change,
    change_table,
    follows,
    forced_means,
    forced_table,
    information_table,
    load_table,
    overlap_picture,
    region,
    walk_picture,
)
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import N_QUESTIONS, Questions, Row, accuracy, accuracy_rows, row, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.routes import FORCED, N_AHEAD, N_SHUFFLES, Routes, forced, observe
from ritornello.lab.statistics import MIN_SEEDS, summarise
from ritornello.lab.tasks import TASKS
from ritornello.model.rdt import RecurrentDepthTransformer

TASK = "chains"
MODEL, SILENT = "article", "article-no-signals"
SIGNALS = ("article", "article-no-lora", "article-no-loop-embedding")  # arms in which something tells loops apart
ROUTED = (*SIGNALS, SILENT)
OPPONENTS = ("article-dense-active", "article-dense-total")
EVERY = (*ROUTED, *OPPONENTS)
LOOPS = (arms.MAX_LOOPS, TEST_LOOPS)
N_PROBLEMS = 32
BITS = 0.1  # of information; less is no dependence
ROOM = 2  # an expert that gets less than half an equal share, or more than twice, is out of balance
SHARE = (
    "(1 - overlap of its experts) / (1 - overlap of the experts of two different tokens of the same role), which is 0 "
    "where they are the same and 1 where they are as different as another token's"
)


class Routing(TrainedExperiment):
    name = "routing"
    title = "Routing: does each loop take other experts?"
    question = (
        "Does a mixture of experts in the loop let each pass route differently, does the route depend on what tells "
        "the loops apart, and are experts better than a dense loop?"
    )
    prediction = (
        "A token's experts change from loop to loop, more than before training, while its question has hops left; "
        "they follow the node that its walk has reached, with loop embedding and LoRA or without. Load is even. At "
        "equal active parameters experts answer no better than a dense loop, and holding the first loop's experts "
        "costs little."
    )
    rules: ClassVar = {
        "differs": (
            f"On problems of {SHALLOW} hops. The change of a token's experts between two different loops of training's "
            f"{arms.MAX_LOOPS}, all pairs, is {SHARE}. Holds: it is larger by at least .1 than in the same model "
            "before training, and the 95% t interval of the difference, seed by seed, lies above 0. Does not hold: it "
            "lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "while": (
            f"On problems of {DEEP} hops. The change, as above, between consecutive loops of questions that still have "
            "hops left before the first of the two (one loop counted as one hop), against that of questions that have "
            "none. Holds: it is larger by at least .1, and the 95% t interval of the difference, seed by seed, lies "
            "above 0. Does not hold: it lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "walk": (
            f"On problems of {DEEP} hops. Information of a question's expert about the node that lies k hops on, less "
            f"that about shuffled questions. In loop t = 1 to {arms.MAX_LOOPS} of training, k = t + a, where a is the "
            f"one of 0 to {N_OFFSETS - 1} that gives the most, by the mean over seeds and loops. Holds: the experts "
            "tell more of that node than of either neighbour, one hop less or more: the 95% t interval over seeds of "
            f"the difference, a mean over loops, lies above {BITS} bits. Does not hold: it lies below. Else, or under "
            "3 seeds, inconclusive."
        ),
        "told": (
            f"On problems of {SHALLOW} hops. The change of a token's experts in a loop, with the same state and "
            f"another loop index, all pairs of training's {arms.MAX_LOOPS}; change is {SHARE}. Holds: its 95% t "
            "interval over seeds lies above .1. Does not hold: it lies below. Else, or under 3 seeds, inconclusive. "
            "Without LoRA and loop embedding it is 0."
        ),
        "signals": (
            "The change of `differs`, with both and without either. Holds: with, it is larger by at least .1, with "
            "p <= .05 in the exact one-sided permutation test over seeds. Does not hold: the 95% interval of the "
            "difference (Welch) lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "held": (
            f"Inconclusive unless the mean on each training hop, at training's most loops, is at least {LEARNT}. "
            "Accuracy with the router's experts against accuracy with those of each token's first loop in every loop, "
            "by a model not trained for it. Holds: holding them costs at least .1, and the 95% t interval of the "
            "difference, seed by seed, lies above 0. Does not hold: it lies below .1. Else, or under 3 seeds, "
            "inconclusive."
        ),
        "worth": (
            "Of the hops beyond training's, inconclusive unless the mean of both models on each training hop, at "
            f"training's most loops, is at least {LEARNT}. Mean accuracy over the training hops at {arms.MAX_LOOPS} "
            f"loops, or over those beyond at {TEST_LOOPS}. Holds: experts are better by at least .1, with p <= .05 in "
            "the exact one-sided permutation test over seeds. Does not hold: the 95% interval of the difference "
            "(Welch) lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "balanced": (
            f"On problems of {SHALLOW} hops, tokens that an expert gets over training's {arms.MAX_LOOPS} loops, as a "
            f"multiple of an equal share. Holds: the mean over seeds of the least is at least {1 / ROOM}, of the most "
            f"at most {ROOM}. Does not hold: the 95% t interval of either lies beyond. Else, or under 3 seeds, "
            "inconclusive."
        ),
    }
    sources = (
        "2605.09165, section 6.1 (25 to 53% of tokens use disjoint experts between loops)",
        "DeepSeek-V3 2412.19437 (experts, balance by a bias)",
    )
    budget: ClassVar = {
        "quick": "5 minutes on 2 cores",
        "full": "about 75 core-minutes beyond depth-extrapolation, whose article models it uses",
    }
    notes = (
        "Depth mask: in training a looped model is asked only those questions that its number of loops can reach "
        "(hops <= loops). It is not told the number of hops, neither then nor in the test.",
        "16 experts, 2 active and 1 shared, in one recurrent layer. A dense loop is one expert that every token gets: "
        f"{arms.ARMS['article-dense-active'].model['expert_dim']} wide at equal active parameters, "
        f"{arms.ARMS['article-dense-total'].model['expert_dim']} at equal total ones; prelude and coda stay as they "
        "are. All arms train on the same problems for as many steps at the same rate, which was chosen for the "
        "smallest looped model and kept for the article model (experiments/LOG.md, entries 4 and 6); nothing was tuned "
        "for the arms here.",
        "Overlap is Jaccard's: shared experts over all experts of both sets. Two tokens: all pairs of two questions, "
        "or of two edges, in consecutive loops: what load and role alone would give. Order control: consecutive loops "
        "against all pairs of a token's loops.",
        f"Bits of information are less what {N_SHUFFLES} shuffles of the labels give: over a token's loops for the "
        "loop index, over tokens for the rest.",
        "Balance is what the bias on the router's choice is there for (1e-3 a step); before training there is none.",
        "An expert that tells something of a node need not be used for it: that is what holding and swapping test. "
        "Swapped: every token takes the experts of the token before it.",
        "How seed 0 of the article model routes was seen while this was written, since it comes with the toolkit, and "
        "how a shorter-trained one without LoRA and loop embedding does, of seed 101 (experiments/LOG.md, entry 25); "
        "accuracies of the article model's seeds were known from depth-extrapolation.",
        "Each verdict is at its own 5% level; nothing is corrected for their number. Intervals are over seeds: all "
        "answer the same questions.",
    )
    measured: ClassVar = {
        "hops": HOPS,
        "loops": LOOPS,
        "questions": N_QUESTIONS,
        "problems": N_PROBLEMS,
        "depths": (SHALLOW, DEEP),
        "shuffles": N_SHUFFLES,
        "forced": FORCED,
        "ahead": N_AHEAD,
        "test_seed": TEST_SEED,
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick(arm, TASKS[TASK]) for arm in (MODEL, SILENT)]
        return [arms.cell(arm, TASKS[TASK], seed=seed, masked=True) for seed in range(3) for arm in EVERY]

    def measure(self, found: Trained) -> list[Row]:
        rows = accuracy_rows(self.name, found, hops=HOPS, loops=LOOPS)
        if found.cell.model.n_experts > 1:
            rows += self._forced_rows(found)
            for of, model in (("trained", found.model), ("untrained", build(found.cell))):
                rows += self._route_rows(found, model, of)
        return rows

    def _forced_rows(self, found: Trained) -> list[Row]:
        rows, questions = [], Questions.of(found.model, found.cell.build_task(), HOPS)
        for how in FORCED:
            with forced(found.model, how):
                by_loops = accuracy(found.model, questions, LOOPS)
            for at, by_hops in by_loops.items():
                for k, value in by_hops.items():
                    where = {"hops": k, "loops": at, **sizes(found.cell)}
                    rows.append(row(self.name, found, metric=f"accuracy_{how}", value=value, n=N_QUESTIONS, **where))
        return rows

    def _route_rows(self, found: Trained, model: RecurrentDepthTransformer, of: str) -> list[Row]:
        rows, task = [], found.cell.build_task()
        for hops in (SHALLOW, DEEP):
            routes = observe(model, task, hops, n_loops=arms.MAX_LOOPS, n_problems=N_PROBLEMS)
            where: dict[str, Any] = {"hops": hops, "of": of, "n": routes.sets.shape[1], **sizes(found.cell)}
            rows += [row(self.name, found, **where, **measured) for measured in _measured(routes)]
        return rows

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        found = Accuracies(rows, TASK, test_loops=TEST_LOOPS)
        routed = found.arms(ROUTED)
        verdicts = [self._differs(rows, arm) for arm in routed if arm in (MODEL, SILENT)]
        if MODEL in routed:
            verdicts += [self._while_moving(rows), self._follows_walk(rows)]
        verdicts += [self._told(rows, arm) for arm in routed if arm in SIGNALS]
        if {MODEL, SILENT} <= set(routed):
            verdicts.append(self._signals(rows))
        if MODEL in routed:
            verdicts += [self._held(found, rows, training) for training in (True, False)]
            verdicts += [self._worth(found, arm, on) for arm in found.arms(OPPONENTS) for on in (True, False)]
            verdicts.append(self._balanced(rows))
        return verdicts

    def _differs(self, rows: Sequence[Row], arm: str) -> Verdict:
        after, before = (change(rows, arm, "overlap_two_loops", of=of) for of in ("trained", "untrained"))
        outcome, test = judging.is_better_paired(after, before)
        apart = [judging.shown(values(rows, model=arm, of="trained", hops=SHALLOW, metric=m)) for m in OVERLAPS]
        return self.verdict(
            "differs",
            rows,
            arm,
            claim=f"{arms.ARMS[arm].title}: a token's experts differ between loops, more than before training",
            outcome=outcome,
            evidence=f"change {judging.shown(after)} ({judging.listed(after)}), before training "
            f"{judging.shown(before)}; overlap {apart[0]} of two loops, {apart[1]} of two tokens",
            test=test,
        )

    def _while_moving(self, rows: Sequence[Row]) -> Verdict:
        moving, arrived = (change(rows, MODEL, f"overlap_{kind}", hops=DEEP) for kind in ("moving", "arrived"))
        outcome, test = judging.is_better_paired(moving, arrived)
        before = [change(rows, MODEL, f"overlap_{kind}", hops=DEEP, of="untrained") for kind in ("moving", "arrived")]
        return self.verdict(
            "while",
            rows,
            MODEL,
            claim=f"{arms.ARMS[MODEL].title}: experts change while a question has hops left, more than afterwards",
            outcome=outcome,
            evidence=f"change from loop to loop {judging.shown(moving)} with hops left, {judging.shown(arrived)} with "
            f"none; before training {judging.shown(before[0])} and {judging.shown(before[1])}",
            test=test,
        )

    def _follows_walk(self, rows: Sequence[Row]) -> Verdict:
        bits = about_nodes(rows, MODEL)
        ahead, margin = follows(bits)
        loops = np.arange(bits.shape[1])
        there = bits[:, loops, loops + 1 + ahead].mean(-1).tolist()
        outcome, test = _above(margin, BITS, "bits")
        before = follows(about_nodes(rows, MODEL, of="untrained"), ahead)[1]
        return self.verdict(
            "walk",
            rows,
            MODEL,
            claim=f"{arms.ARMS[MODEL].title}: experts follow the node that a question's walk has reached",
            outcome=outcome,
            evidence=f"in loop t, {judging.shown(there)} bits about the node t + {ahead} hops on, "
            f"{judging.shown(margin)} more than about its better neighbour; before training {judging.shown(before)}",
            test=test,
        )

    def _told(self, rows: Sequence[Row], arm: str) -> Verdict:
        moved = change(rows, arm, "overlap_elsewhere")
        outcome, test = _above(moved, judging.MARGIN, "of change")
        bits = judging.shown(values(rows, model=arm, of="trained", hops=SHALLOW, metric="bits_loop"))
        claim = f"{arms.ARMS[arm].title}: the same state takes other experts when told another loop index"
        evidence = f"change {judging.shown(moved)} ({judging.listed(moved)}); an expert tells {bits} bits of the loop"
        return self.verdict("told", rows, arm, claim=claim, outcome=outcome, evidence=evidence, test=test)

    def _signals(self, rows: Sequence[Row]) -> Verdict:
        a, b = (change(rows, arm, "overlap_two_loops") for arm in (MODEL, SILENT))
        outcome, test = judging.is_better(a, b)
        claim = "experts differ between loops more with LoRA and loop embedding than without either"
        evidence = f"change {judging.shown(a)} with, {judging.shown(b)} without"
        return self.verdict("signals", rows, MODEL, claim=claim, outcome=outcome, evidence=evidence, test=test)

    def _held(self, found: Accuracies, rows: Sequence[Row], training: bool) -> Verdict:
        hops, loops, name = region(found, training)
        own = found.means(MODEL, hops, loops)
        held, swapped = (forced_means(rows, how, hops, loops, MODEL) for how in ("held", "swapped"))
        outcome, test = judging.is_better_paired(own, held)
        if found.lowest(MODEL) < LEARNT:
            outcome, test = "inconclusive", f"not judged: the training hops were not learnt ({test})"
        return self.verdict(
            "held",
            rows,
            MODEL,
            claim=f"{arms.ARMS[MODEL].title}: holding the first loop's experts costs accuracy on the {name}",
            outcome=outcome,
            evidence=f"{judging.shown(own)} with the router's experts, {judging.shown(held)} with those of the first "
            f"loop, {judging.shown(swapped)} with another token's, at {loops} loops",
            test=test,
        )

    def _worth(self, found: Accuracies, arm: str, training: bool) -> Verdict:
        hops, loops, name = region(found, training)
        a, b = (found.means(each, hops, loops) for each in (MODEL, arm))
        outcome, test = judging.is_better(a, b)
        if not training and min(found.lowest(MODEL), found.lowest(arm)) < LEARNT:
            outcome, test = "inconclusive", f"not judged: one of the two did not learn the training hops ({test})"
        said = arms.ARMS[arm].title.removeprefix("article model, ")
        return self.verdict(
            "worth",
            found.rows,
            MODEL,
            claim=f"{arms.ARMS[MODEL].title}: experts are better than a {said} on the {name}",
            outcome=outcome,
            evidence=f"{judging.shown(a)} ({judging.listed(a)}) with experts, {judging.shown(b)} ({judging.listed(b)}) "
            f"dense, at {loops} loops",
            test=test,
        )

    def _balanced(self, rows: Sequence[Row]) -> Verdict:
        pick = lambda metric, of: values(rows, model=MODEL, of=of, hops=SHALLOW, metric=metric)  # noqa: E731
        least, most = (pick(metric, "trained") for metric in ("load_least", "load_most"))
        outcome = judging.all_of([judging.reaches(least, 1 / ROOM), judging.reaches([-x for x in most], -ROOM)])
        before = [judging.shown(pick(metric, "untrained")) for metric in ("load_least", "load_most")]
        dead = sum(pick("dead", "trained"))
        return self.verdict(
            "balanced",
            rows,
            MODEL,
            claim=f"{arms.ARMS[MODEL].title}: experts share the load",
            outcome=outcome,
            evidence=f"least {judging.shown(least)}, most {judging.shown(most)} of an equal share, {dead:.0f} experts "
            f"never taken; before training {before[0]} and {before[1]}",
            test=f"means over seeds against {1 / ROOM} and {ROOM}",
        )

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        found = Accuracies(rows, TASK, test_loops=TEST_LOOPS)
        every, routed = found.arms(EVERY), found.arms(ROUTED)
        tables = [accuracy_table(found, every), costs_table(found.rows, every)]
        pictures = [curve_picture(found, every)]
        if routed:
            tables = [change_table(rows, routed), information_table(rows, routed), load_table(rows, routed), *tables]
            tables.insert(3, forced_table(found, rows, routed))
            pictures = [overlap_picture(rows, routed), walk_picture(rows, routed[0]), *pictures]
        return tables, pictures


def _of_all_loops(routes: Routes) -> dict[str, float]:
    moving, arrived = routes.on_their_way()
    load = routes.load()
    all_loops = load.mean(0)
    return {
        "overlap_two_loops": routes.of_two_loops(),
        "overlap_two_tokens": routes.of_two_tokens(),
        "overlap_elsewhere": routes.elsewhere,
        "overlap_moving": moving,
        "overlap_arrived": arrived,
        "bits_loop": routes.about_loops(),
        "bits_role": routes.about_roles(),
        "bits_left": routes.about_hops_left(),
        "load_least": float(all_loops.min()),
        "load_most": float(all_loops.max()),
        "load_cv": float(all_loops.std()),
        "load_cv_loop": float(load.std(1).mean()),
        "dead": float((all_loops == 0).sum()),
    }


def _measured(routes: Routes) -> Iterator[dict[str, Any]]:
    """Metric, value and loops, which count from 1; an overlap of two loops stands at the later one."""
    for metric, value in _of_all_loops(routes).items():
        yield {"metric": metric, "value": value, "loops": arms.MAX_LOOPS}
    by_loop = {"overlap_next": routes.consecutive(), "overlap_first": routes.from_first(), "entropy": routes.entropy()}
    for metric, found in by_loop.items():
        for loop, value in enumerate(found, start=arms.MAX_LOOPS + 1 - len(found)):
            yield {"metric": metric, "value": value, "loops": loop}
    for (i, k), bits in np.ndenumerate(routes.about_nodes()):
        yield {"metric": "bits_node", "value": bits, "loops": i + 1, "ahead": k}


def _above(found: Sequence[float], threshold: float, unit: str) -> tuple[Outcome, str]:
    """Whether the whole 95% interval of a mean over seeds lies above `threshold`; refuted where it lies below."""
    if len(found) < MIN_SEEDS:
        return "inconclusive", f"none: {judging.seeds(len(found))}"
    mean = summarise(found)
    test = f"95% t interval {judging.interval(mean)} against {threshold} {unit}"
    return judging.side(mean, threshold), test
