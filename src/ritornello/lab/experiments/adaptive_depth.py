"""Whether the depth that tokens choose follows how much they need, and what each way of choosing buys."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ritornello.config import ExitRule
from ritornello.lab import arms, figures, judging
from ritornello.lab.cell import TEST_SEED, Cell, Trained
from ritornello.lab.experiments.accuracies import CHEAP, HOPS, LEARNT, TEST_LOOPS
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import Row, accuracy_rows, correlation_rows, pick_rows, stopping_rows, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS, spread, summarise
from ritornello.lab.tasks import TASKS

TASK = "chains"
TRAINING, DEEP = HOPS[:5], HOPS[5:]
N_QUESTIONS = 64  # for each number of hops
N_PROBLEMS = 16  # of the greatest depth, all their questions: how loops follow hops
MAX_LOOPS = 32
FORCED = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32)
LEARNED, FREE = "hazard > 0.9", "KL < 0.1"
GATE_RULES = {
    **{f"hazard > {x}": ExitRule("hazard", x) for x in (0.5, 0.9, 0.99)},
    **{f"KL < {x}": ExitRule("kl", x) for x in (1.0, 0.1, 0.01)},
    **{f"change < {x}": ExitRule("delta", x) for x in (0.3, 0.1)},
    "entropy < 0.3": ExitRule("entropy", 0.3),
}
ACT_RULES = {f"cumulative > {x}": ExitRule("cumulative", x) for x in (0.9, 0.99)}
MODELS = ("article", "dense", "act-mixture", "act-last")
OWN_RULE = {"act-mixture": "cumulative > 0.99", "act-last": "cumulative > 0.99"}
FOLLOWS = 0.5  # Spearman's ρ above which loops are said to follow hops
KNOWN = (
    f"Inconclusive unless the mean on each training hop is at least {LEARNT}: at {arms.MAX_LOOPS} loops, or where ACT "
    "models stop by their own rule."
)


class AdaptiveDepth(TrainedExperiment):
    name = "adaptive-depth"
    title = "Adaptive depth: do tokens loop as long as they need?"
    question = "Does the depth at which tokens stop follow the hops that their question takes, and what does it cost?"
    prediction = (
        "Loops used rise with hops for a gate fitted afterwards and for the training-free KL rule alike, at no loss "
        "of accuracy; halting trained from the start (ACT) stops at training's depth and loses the hops beyond it."
    )
    rules: ClassVar = {
        "follows": (
            f"{KNOWN} Spearman's ρ between hops and loops used, over all questions of at least one hop in test "
            f"problems of {HOPS[-1]} hops; 0 where all took as many loops. Holds: its 95% t interval over seeds lies "
            f"above {FOLLOWS}. Does not hold: it lies below. Else, or under 3 seeds, inconclusive."
        ),
        "costs": (
            f"{KNOWN} Accuracy lost against {TEST_LOOPS} loops for every token, seed by seed, over the training hops "
            f"and over those beyond; ACT models are held against the {arms.ARMS['dense'].title}, which has another "
            "halting head, loss and, for the mixture, read-out. Holds: the 95% t intervals of both lie at or below "
            f"{CHEAP}. Does not hold: one lies above it. Else, or under 3 seeds, inconclusive."
        ),
        "better": (
            f"{KNOWN} Mean accuracy over questions of more than 5 hops, seed by seed. Holds: better by at least .1 "
            "and the 95% t interval of the difference lies above 0. Does not hold: it lies below .1. Else, or under "
            "3 seeds, inconclusive."
        ),
    }
    sources = (
        "Graves 1603.08983 (ACT)",
        "PonderNet 2107.05407",
        "Loop, Think & Generalize 2604.07822 (KL and entropy)",
        "2607.20519 (training-free criteria match learned gates)",
    )
    budget: ClassVar = {
        "quick": "4 minutes on 2 cores",
        "full": "about half a core-hour beyond depth-extrapolation, whose models it uses",
    }
    notes = (
        "Depth mask: in training a looped model is asked only those questions that its layers can reach.",
        "Each verdict is at its own 5% level; nothing is corrected for their number.",
        "ACT has the rate of the other looped models; its ponder weight is the best of four (last state) or three "
        "(mixture), on one other seed after 1,000 steps; between 3e-3, where the last state hardly ever stops, and "
        "1e-2, where it stops at once, nothing was tried (experiments/LOG.md, entry 13).",
        "The article model and the smallest one are those of depth extrapolation. How accurate they are, and how they "
        "stop by hazard and KL, was known from there when the rules here got their last form (entry 12).",
        "Loops used are those of the questions asked; tokens that are not asked may stop sooner. Loops are cut at 32.",
        "Intervals are over seeds: all answer the same questions.",
        "The gate is fitted after training, on training problems, to stop where the answer no longer changes.",
    )

    measured: ClassVar = {
        "hops": HOPS,
        "loops": FORCED,
        "questions": N_QUESTIONS,
        "problems": N_PROBLEMS,
        "test_seed": TEST_SEED,
        "rules": {name: (rule.rule, rule.threshold) for name, rule in (GATE_RULES | ACT_RULES).items()},
        "max_loops": MAX_LOOPS,
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick("dense", TASKS[TASK])]
        return [arms.cell(arm, TASKS[TASK], seed=seed, masked=True) for seed in range(3) for arm in MODELS]

    def measure(self, found: Trained) -> list[Row]:
        rules = ACT_RULES if found.cell.model.halting == "act" else GATE_RULES
        rows = accuracy_rows(self.name, found, hops=HOPS, loops=FORCED, n=N_QUESTIONS)
        rows += stopping_rows(self.name, found, rules, hops=HOPS, max_loops=MAX_LOOPS, n=N_QUESTIONS)
        return rows + correlation_rows(self.name, found, rules, hops=HOPS[-1], max_loops=MAX_LOOPS, n=N_PROBLEMS)

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        verdicts = []
        there = {row["model"] for row in rows}
        for model in [model for model in MODELS if model in there]:
            for rule in (OWN_RULE[model],) if model in OWN_RULE else (LEARNED, FREE):
                verdicts.append(self._follows(rows, model, rule))
                if model not in OWN_RULE or "dense" in there:
                    verdicts.append(self._costs_nothing(rows, model, rule))
        for better, rule, worse, other in (
            ("dense", LEARNED, "dense", FREE),
            ("act-last", OWN_RULE["act-last"], "act-mixture", OWN_RULE["act-mixture"]),
            ("dense", LEARNED, "act-last", OWN_RULE["act-last"]),
        ):
            if {better, worse} <= there:
                verdicts.append(self._better(rows, (better, rule), (worse, other)))
        return verdicts

    def _follows(self, rows: Sequence[Row], model: str, rule: str) -> Verdict:
        rho = values(rows, model=model, rule=rule, metric="rank_correlation")
        outcome: Outcome = "inconclusive"
        test = f"none: {judging.seeds(len(rho))}"
        if not learnt(rows, model):
            test = "none: the training hops were not learnt"
        elif len(rho) >= MIN_SEEDS:
            found = summarise(rho)
            outcome = judging.side(found, FOLLOWS)
            test = f"95% t interval [{found.low:.3f}, {found.high:.3f}] of Spearman's ρ against {FOLLOWS}"
        claim = f"{arms.ARMS[model].title}, {rule}: loops used follow the hops needed"
        evidence = f"ρ {judging.shown(rho)}"
        return self.verdict("follows", rows, model, claim=claim, outcome=outcome, evidence=evidence, test=test)

    def _costs_nothing(self, rows: Sequence[Row], model: str, rule: str) -> Verdict:
        full = "dense" if model in OWN_RULE else model
        pairs, said = {}, []
        for name, hops in (("training hops", TRAINING), ("beyond", DEEP)):
            before, after = forced(rows, full, TEST_LOOPS, hops), stopped(rows, model, rule, hops)
            seeds = min(len(before), len(after))
            pairs[name] = (before[:seeds], after[:seeds])
            used = stopped(rows, model, rule, hops, metric="loops_used")
            said.append(
                f"{name} {judging.shown(after)} in {judging.shown(used)} loops against {judging.shown(before)} in "
                f"{TEST_LOOPS}"
            )
        outcome, test = judging.all_cost_at_most(pairs, CHEAP)
        known = learnt(rows, model) and learnt(rows, full)
        what = "stopping costs no accuracy"
        if model in OWN_RULE:
            what = f"as accurate as the {arms.ARMS[full].title} at {TEST_LOOPS} loops"
        return self.verdict(
            "costs",
            rows,
            model,
            claim=f"{arms.ARMS[model].title}, {rule}: {what}",
            outcome=outcome if known else "inconclusive",
            evidence="; ".join(said),
            test=test if known else "none: the training hops were not learnt",
        )

    def _better(self, rows: Sequence[Row], one: tuple[str, str], other: tuple[str, str]) -> Verdict:
        a, b = stopped(rows, *one, DEEP), stopped(rows, *other, DEEP)
        seeds = min(len(a), len(b))
        outcome, test = judging.is_better_paired(a[:seeds], b[:seeds])
        if not (learnt(rows, one[0]) and learnt(rows, other[0])):
            outcome, test = "inconclusive", f"not judged: one of the two did not learn the training hops ({test})"
        names = [f"{arms.ARMS[model].title}, {rule}" for model, rule in (one, other)]
        claim = f"{names[0]}, is better beyond the training hops than {names[1]}"
        evidence = f"6 to 20 hops: {judging.shown(a)} against {judging.shown(b)}"
        return self.verdict("better", rows, one[0], claim=claim, outcome=outcome, evidence=evidence, test=test)

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        there = {row["model"] for row in rows}
        models = [model for model in MODELS if model in there]
        return [_table(rows, models), costs_table(rows, models)], [
            _price_picture(rows, models),
            _follow_picture(rows, models),
        ]


def stopped(
    rows: Sequence[Row], model: str, rule: str, hops: Sequence[int], *, metric: str = "accuracy"
) -> list[float]:
    """By seed, where `rule` ends the loops."""
    return _means(rows, hops, model=model, rule=rule, metric=metric)


def forced(rows: Sequence[Row], model: str, loops: int, hops: Sequence[int]) -> list[float]:
    """By seed, with the same number of loops for every token."""
    return _means(rows, hops, model=model, rule=None, metric="accuracy", loops=loops)


def _means(rows: Sequence[Row], hops: Sequence[int], **wanted: Any) -> list[float]:
    """By seed, over several numbers of hops, each of the same weight."""
    return np.mean([values(rows, hops=k, **wanted) for k in hops], axis=0).tolist()


def learnt(rows: Sequence[Row], model: str) -> bool:
    """Whether the mean over seeds on each training hop is at least LEARNT, with the loops that training had: at most
    MAX_LOOPS, and an ACT model's own."""
    own = OWN_RULE.get(model)
    by_hop = (stopped(rows, model, own, (k,)) if own else forced(rows, model, arms.MAX_LOOPS, (k,)) for k in TRAINING)
    return all(np.mean(found) >= LEARNT for found in by_hop)


def rules_of(rows: Sequence[Row], model: str) -> list[str]:
    return list(dict.fromkeys(row["rule"] for row in pick_rows(rows, model=model) if row.get("rule")))


def _table(rows: Sequence[Row], models: Sequence[str]) -> Table:
    lines = []
    for model in models:
        for rule in rules_of(rows, model):
            rho = values(rows, model=model, rule=rule, metric="rank_correlation")
            cells = [
                judging.shown(stopped(rows, model, rule, hops, metric=metric))
                for metric in ("accuracy", "loops_used")
                for hops in (TRAINING, DEEP)
            ]
            lines.append((arms.ARMS[model].title, rule, *cells, judging.shown(rho)))
        full = [judging.shown(forced(rows, model, TEST_LOOPS, hops)) for hops in (TRAINING, DEEP)]
        all_loops = str(TEST_LOOPS)
        lines.append((arms.ARMS[model].title, f"{TEST_LOOPS} for all", *full, all_loops, all_loops, "–"))
    head = (
        "model",
        "exit rule",
        "accuracy, 1–5 hops",
        "accuracy, 6–20 hops",
        "mean loops, 1–5 hops",
        "mean loops, 6–20 hops",
        "ρ of hops and loops",
    )
    return Table(
        title="Every rule",
        head=head,
        rows=tuple(lines),
        note=f"1 to 20 hops, at most {MAX_LOOPS} loops; ρ within problems of {HOPS[-1]} hops; mean ± sd over seeds",
    )


def _price_picture(rows: Sequence[Row], models: Sequence[str]) -> Picture:
    lines = []
    for model in models:
        same = np.array([np.mean(forced(rows, model, loops, HOPS)) for loops in FORCED])
        title = arms.ARMS[model].title
        lines.append(figures.Curve(label=f"{title}, same for all", x=FORCED, mean=same, sd=None, kind="plain"))
        rules = rules_of(rows, model)
        x = tuple(float(np.mean(stopped(rows, model, rule, HOPS, metric="loops_used"))) for rule in rules)
        y = np.array([np.mean(stopped(rows, model, rule, HOPS)) for rule in rules])
        order = np.argsort(x)
        lines.append(
            figures.Curve(
                label=f"{title}, tokens stop", x=tuple(x[i] for i in order), mean=y[order], sd=None, kind="looped"
            )
        )
    figure = figures.curves(
        lines,
        title="What a mean loop buys",
        xlabel="mean loops a question",
        ylabel="accuracy, 1 to 20 hops",
        ylim=(0, 1.02),
    )
    caption = (
        "Accuracy over all test questions against mean loops: the same number for every token, or stopping by a rule."
    )
    return Picture(name="accuracy-by-mean-loops", caption=caption, image=figures.png(figure))


def _follow_picture(rows: Sequence[Row], models: Sequence[str]) -> Picture:
    lines = []
    for model in models:
        for rule in (OWN_RULE[model],) if model in OWN_RULE else (LEARNED, FREE):
            used = np.array([values(rows, model=model, rule=rule, metric="loops_used", hops=k) for k in HOPS])
            kind = "ablation" if model in OWN_RULE else "looped"
            lines.append(
                figures.Curve(
                    label=f"{arms.ARMS[model].title}, {rule}", x=HOPS, mean=used.mean(-1), sd=spread(used), kind=kind
                )
            )
    figure = figures.curves(
        lines, title="Loops used by hops needed", xlabel="hops", ylabel="mean loops used", vertical={5: "training"}
    )
    caption = "Mean loops that questions of so many hops take before they stop, mean ± sd over seeds."
    return Picture(name="loops-by-hops", caption=caption, image=figures.png(figure))
