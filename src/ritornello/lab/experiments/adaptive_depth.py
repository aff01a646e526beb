"""Whether the depth that tokens choose follows how much they need, and what each way of choosing buys."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ritornello.config import ExitRule
from ritornello.lab import arms, figures, judging
from ritornello.lab.cell import Cell, Trained
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import Row, accuracy_rows, pick_rows, stopping_rows, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS, spread, summarise
from ritornello.lab.tasks import TASKS

TASK = "chains"
HOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 20)
MAX_LOOPS = 32
FORCED = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32)
FULL_DEPTH = 24
LEARNED, FREE = "hazard > 0.9", "KL < 0.1"
GATE_RULES = {
    **{f"hazard > {x}": ExitRule("hazard", x) for x in (0.5, 0.9, 0.99)},
    **{f"KL < {x}": ExitRule("kl", x) for x in (1.0, 0.1, 0.01)},
    **{f"change < {x}": ExitRule("delta", x) for x in (0.3, 0.1, 0.03)},
    **{f"entropy < {x}": ExitRule("entropy", x) for x in (1.0, 0.3, 0.1)},
}
ACT_RULES = {f"cumulative > {x}": ExitRule("cumulative", x) for x in (0.9, 0.99)}
MODELS = ("article", "no-prelude", "dense", "act-mixture", "act-last")
OWN_RULE = {"act-mixture": "cumulative > 0.99", "act-last": "cumulative > 0.99"}
FOLLOWS = 0.5  # Spearman's ρ above which loops are said to follow hops
CHEAP = 0.02  # of accuracy that stopping may cost


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
            "Spearman's ρ between hops and loops used, over all test questions. Holds: its 95% t interval over "
            f"seeds lies above {FOLLOWS}. Does not hold: it lies below. Else, or under 3 seeds, inconclusive."
        ),
        "costs": (
            f"Mean over seeds of the accuracy over all test questions. Holds: at most {CHEAP} below that of "
            f"{FULL_DEPTH} loops for every token. Else it does not hold; under 3 seeds inconclusive."
        ),
        "better": (
            "Accuracy over questions of more than 5 hops. Holds: better by at least .1, with p <= .05 in the exact "
            "one-sided permutation test over seeds. Does not hold: the difference is smaller than .1. Else, or "
            "under 3 seeds, inconclusive."
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
        "full": "about 1 core-hour beyond depth-extrapolation, whose models it uses",
    }
    notes = (
        "Depth mask: in training a looped model is asked only those questions that its layers can reach.",
        "The gate is fitted after training, on training problems, to stop where the answer no longer changes.",
    )

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick("dense", TASKS[TASK])]
        return [arms.cell(arm, TASKS[TASK], seed=seed, masked=True) for seed in range(3) for arm in MODELS]

    def measure(self, found: Trained) -> list[Row]:
        rules = ACT_RULES if found.cell.model.halting == "act" else GATE_RULES
        rows = accuracy_rows(self.name, found, hops=HOPS, loops=FORCED)
        return rows + stopping_rows(self.name, found, rules, hops=HOPS, max_loops=MAX_LOOPS)

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        verdicts = []
        there = {row["model"] for row in rows}
        for model in [model for model in MODELS if model in there]:
            for rule in (OWN_RULE[model],) if model in OWN_RULE else (LEARNED, FREE):
                verdicts += [self._follows(rows, model, rule), self._costs_nothing(rows, model, rule)]
        for better, rule, worse, other in (
            ("dense", LEARNED, "dense", FREE),
            ("act-last", OWN_RULE["act-last"], "act-mixture", OWN_RULE["act-mixture"]),
            ("dense", LEARNED, "act-last", OWN_RULE["act-last"]),
        ):
            if {better, worse} <= there:
                verdicts.append(self._better(rows, (better, rule), (worse, other)))
        return verdicts

    def _verdict(
        self, rule: str, rows: Sequence[Row], model: str, claim: str, outcome: Outcome, evidence: str, test: str
    ) -> Verdict:
        found = pick_rows(rows, model=model)
        seeds = len({row["seed"] for row in found})
        scale = f"at {found[0]['total']:,} parameters, on {TASKS[TASK].title}, {judging.seeds(seeds)}"
        return Verdict(claim=claim, outcome=outcome, scale=scale, evidence=evidence, test=test, rule=self.rules[rule])

    def _follows(self, rows: Sequence[Row], model: str, rule: str) -> Verdict:
        rho = values(rows, model=model, rule=rule, metric="rank_correlation")
        claim = f"{arms.ARMS[model].title}, {rule}: loops used follow the hops needed"
        if len(rho) < MIN_SEEDS:
            said = f"ρ {judging.shown(rho)}" if rho else "every token used the same number of loops"
            return self._verdict(
                "follows", rows, model, claim, "inconclusive", said, "none: fewer than 3 seeds with varying loops"
            )
        found = summarise(rho)
        outcome: Outcome = (
            "holds" if found.low > FOLLOWS else "does not hold" if found.high < FOLLOWS else "inconclusive"
        )
        test = f"95% t interval [{found.low:.3f}, {found.high:.3f}] of Spearman's ρ against {FOLLOWS}"
        return self._verdict("follows", rows, model, claim, outcome, f"ρ {judging.shown(rho)}", test)

    def _costs_nothing(self, rows: Sequence[Row], model: str, rule: str) -> Verdict:
        stopped, used = overall(rows, model, rule), overall(rows, model, rule, metric="loops_used")
        forced = forced_overall(rows, model, FULL_DEPTH)
        lost = float(np.mean(forced) - np.mean(stopped))
        outcome: Outcome = "holds" if lost <= CHEAP else "does not hold"
        outcome = outcome if len(stopped) >= MIN_SEEDS else "inconclusive"
        evidence = (
            f"accuracy {judging.shown(stopped)} in {judging.shown(used)} loops against {judging.shown(forced)} in "
            f"{FULL_DEPTH}"
        )
        claim = f"{arms.ARMS[model].title}, {rule}: stopping costs no accuracy"
        test = f"difference of means {lost:+.3f} against {CHEAP}"
        return self._verdict("costs", rows, model, claim, outcome, evidence, test)

    def _better(self, rows: Sequence[Row], one: tuple[str, str], other: tuple[str, str]) -> Verdict:
        a, b = far(rows, *one), far(rows, *other)
        outcome, test = judging.is_better(a, b)
        names = [f"{arms.ARMS[model].title}, {rule}" for model, rule in (one, other)]
        claim = f"{names[0]}, is better beyond the training hops than {names[1]}"
        evidence = f"6 to 20 hops: {judging.shown(a)} against {judging.shown(b)}"
        return self._verdict("better", rows, one[0], claim, outcome, evidence, test)

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        there = {row["model"] for row in rows}
        models = [model for model in MODELS if model in there]
        return [_table(rows, models), costs_table(rows, models)], [
            _price_picture(rows, models),
            _follow_picture(rows, models),
        ]


def overall(rows: Sequence[Row], model: str, rule: str, *, metric: str = "accuracy") -> list[float]:
    """Over all questions, by seed."""
    return values(rows, model=model, rule=rule, metric=metric, hops=None)


def _weighted(rows: Sequence[Row]) -> list[float]:
    """The mean over questions of each seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        part = [row for row in rows if row["seed"] == seed]
        found.append(float(np.average([row["value"] for row in part], weights=[row["n"] for row in part])))
    return found


def forced_overall(rows: Sequence[Row], model: str, loops: int) -> list[float]:
    return _weighted(pick_rows(rows, model=model, rule=None, metric="accuracy", loops=loops))


def far(rows: Sequence[Row], model: str, rule: str) -> list[float]:
    """Accuracy beyond the training hops."""
    found = pick_rows(rows, model=model, rule=rule, metric="accuracy")
    return _weighted([row for row in found if row["hops"] is not None and row["hops"] > 5])


def rules_of(rows: Sequence[Row], model: str) -> list[str]:
    return list(dict.fromkeys(row["rule"] for row in pick_rows(rows, model=model) if row.get("rule")))


def _table(rows: Sequence[Row], models: Sequence[str]) -> Table:
    lines = []
    for model in models:
        for rule in rules_of(rows, model):
            rho = values(rows, model=model, rule=rule, metric="rank_correlation")
            stopped, used = overall(rows, model, rule), overall(rows, model, rule, metric="loops_used")
            shown = judging.shown(rho) if rho else "no variation"
            lines.append((arms.ARMS[model].title, rule, judging.shown(stopped), judging.shown(used), shown))
        lines.append(
            (
                arms.ARMS[model].title,
                f"{FULL_DEPTH} for all",
                judging.shown(forced_overall(rows, model, FULL_DEPTH)),
                str(FULL_DEPTH),
                "–",
            )
        )
    head = ("model", "exit rule", "accuracy", "mean loops", "ρ of hops and loops")
    return Table(
        title="Every rule",
        head=head,
        rows=tuple(lines),
        note=f"1 to 20 hops, at most {MAX_LOOPS} loops; mean ± sd over seeds",
    )


def _price_picture(rows: Sequence[Row], models: Sequence[str]) -> Picture:
    lines = []
    for model in models:
        forced = np.array([forced_overall(rows, model, loops) for loops in FORCED])
        title = arms.ARMS[model].title
        lines.append(
            figures.Curve(label=f"{title}, same for all", x=FORCED, mean=forced.mean(-1), sd=None, kind="plain")
        )
        rules = rules_of(rows, model)
        x = tuple(float(np.mean(overall(rows, model, rule, metric="loops_used"))) for rule in rules)
        y = np.array([np.mean(overall(rows, model, rule)) for rule in rules])
        order = np.argsort(x)
        lines.append(
            figures.Curve(
                label=f"{title}, tokens stop", x=tuple(x[i] for i in order), mean=y[order], sd=None, kind="looped"
            )
        )
    figure = figures.curves(
        lines,
        title="What a mean loop buys",
        xlabel="mean loops a token",
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
