"""Trained on a few hops, tested on many with more loops than in training."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ritornello.config import ExitRule
from ritornello.lab import arms, figures, judging
from ritornello.lab.cell import SOLVED, Cell, Trained
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import Row, accuracy_rows, pick_rows, stopping_rows, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS, spread
from ritornello.lab.tasks import TASKS

HOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 20)
LOOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64)
TEST_LOOPS = 24  # what the claims are about, fixed before any result: enough for 20 hops with a few to spare
FAR, FARTHEST = 10, 20
CHEAP = 0.02  # of accuracy that too many loops may cost
AIMS = {FAR: 0.95, FARTHEST: 0.90}
RULES = {
    "learned hazard > .9": ExitRule("hazard", 0.9),
    "KL < .1": ExitRule("kl", 0.1),
    "change of the state < .1": ExitRule("delta", 0.1),
}

TASK = "chains"
LOOPED = ("article", "no-prelude", "dense")
PLAIN = ("plain-5x64", "plain-depth")
ABLATIONS = ("no-injection", "slow-forgetting", "bf16-carry", "fixed-depth", "short-training")
EVERY = (*LOOPED, *ABLATIONS, *PLAIN)
FIVE_SEEDS = (*LOOPED, "no-injection", *PLAIN)  # the others have three
PANELS = ("article", "no-injection", *PLAIN)


class DepthExtrapolation(TrainedExperiment):
    name = "depth-extrapolation"
    title = "Depth extrapolation: trained on 5 hops, tested on 20"
    question = "Does a looped model trained on questions of at most 5 hops answer 10 and 20 hops when it loops more?"
    prediction = (
        "Looped models reach .95 at 10 hops and .90 at 20 with 24 loops after at most 8 in training; plain "
        "transformers that solve the training hops stay near guessing beyond them."
    )
    rules: ClassVar = {
        "extrapolates": (
            f"Mean over seeds of the accuracy at {TEST_LOOPS} loops. Holds: at least .95 at {FAR} hops and .90 at "
            f"{FARTHEST}. Does not hold: the upper end of the 95% t interval of either lies below. Else, or under 3 "
            "seeds, inconclusive."
        ),
        "fails": (
            f"Inconclusive unless the plain model's mean on each training hop is at least {SOLVED}. Holds: at {FAR} "
            "hops the looped model is better by at least .1, with p <= .05 in the exact one-sided permutation test "
            "over seeds. Does not hold: the difference is smaller than .1. Else, or under 3 seeds, inconclusive."
        ),
        "harmless": (
            f"Mean over seeds and all hops. Holds: at {LOOPS[-1]} loops at most {CHEAP} below {TEST_LOOPS} loops. "
            "Else it does not hold; under 3 seeds inconclusive."
        ),
        "matters": (
            f"Holds: at {FARTHEST} hops and {TEST_LOOPS} loops the unchanged model is better by at least .1, with p "
            "<= .05 in the exact one-sided permutation test over seeds. Does not hold: the difference is smaller "
            "than .1. Else, or under 3 seeds, inconclusive."
        ),
    }
    sources = (
        "Loop, Think & Generalize 2604.07822, section 6",
        "Fan et al. 2409.15647 (input injection, no positions)",
        "Bansal et al. 2202.05826 (recall, overthinking)",
        "Anil et al. 2211.09961 (path independence)",
    )
    budget: ClassVar = {"quick": "4 minutes on 2 cores", "full": "about 4 core-hours"}
    notes = (
        "Depth mask: in training a looped model is asked only those questions that its number of loops can reach "
        "(hops <= loops). It is not told the number of hops, neither then nor in the test.",
        "Plain models are asked every question at every step, and train on until they solve the training hops or "
        "have spent 4 times the article model's training FLOPs.",
        "Guessing among those ends that some node points to is right in .13 of 5-hop questions and .24 of 20-hop ones.",
    )

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick(arm, TASKS[TASK]) for arm in ("dense", "plain-depth")]
        return [_chains(arm, seed) for seed in range(5) for arm in EVERY if seed < 3 or arm in FIVE_SEEDS]

    def measure(self, found: Trained) -> list[Row]:
        rows = accuracy_rows(self.name, found, hops=HOPS, loops=LOOPS)
        if found.cell.model.halting == "gate" and found.cell.role == "looped":
            rows += stopping_rows(self.name, found, RULES, hops=HOPS, max_loops=2 * TEST_LOOPS)
        return rows

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        found = Found(rows)
        verdicts = [self._extrapolates(found, arm) for arm in found.arms(LOOPED)]
        verdicts += [self._harmless(found, arm) for arm in found.arms((*LOOPED, "short-training"))]
        opponents = found.arms(("article", "dense"))
        verdicts += [self._plain_fails(found, looped, arm) for arm in found.arms(PLAIN) for looped in opponents]
        ablations = found.arms(ABLATIONS) if found.arms(("dense",)) else []
        return verdicts + [self._matters(found, arm) for arm in ablations]

    def _verdict(
        self, rule: str, found: "Found", arm: str, claim: str, outcome: Outcome, evidence: str, test: str
    ) -> Verdict:
        scale = f"at {found.parameters(arm):,} parameters, on {TASKS[TASK].title}, {judging.seeds(found.n_seeds(arm))}"
        return Verdict(claim=claim, outcome=outcome, scale=scale, evidence=evidence, test=test, rule=self.rules[rule])

    def _extrapolates(self, found: "Found", arm: str) -> Verdict:
        values = {hops: found.values(arm, hops) for hops in AIMS}
        outcome = judging.all_of([judging.reaches(values[hops], aim) for hops, aim in AIMS.items()])
        said = [f"{hops} hops {judging.shown(values[hops])}" for hops in AIMS]
        claim = f"{arms.ARMS[arm].title}: trained on 5 hops and at most {arms.MAX_LOOPS} loops, answers {FARTHEST} hops"
        test = f"mean over seeds at {TEST_LOOPS} loops against .95 and .90"
        return self._verdict("extrapolates", found, arm, claim, outcome, ", ".join(said), test)

    def _harmless(self, found: "Found", arm: str) -> Verdict:
        before, after = (found.means(arm, loops) for loops in (TEST_LOOPS, LOOPS[-1]))
        lost = float(np.mean(before) - np.mean(after))
        outcome: Outcome = "holds" if lost <= CHEAP else "does not hold"
        outcome = outcome if len(before) >= MIN_SEEDS else "inconclusive"
        evidence = f"1 to 20 hops: {judging.shown(before)} at {TEST_LOOPS} loops, {judging.shown(after)} at {LOOPS[-1]}"
        claim = f"{arms.ARMS[arm].title}: {LOOPS[-1]} loops are no worse than {TEST_LOOPS}"
        return self._verdict("harmless", found, arm, claim, outcome, evidence, f"difference of means {lost:+.3f}")

    def _plain_fails(self, found: "Found", looped: str, arm: str) -> Verdict:
        trained_on = [hops for hops in HOPS if hops <= 5]
        lowest = min(float(np.mean(found.values(arm, hops))) for hops in trained_on)
        outcome, test = judging.is_better(found.values(looped, FAR), found.values(arm, FAR))
        if lowest < SOLVED:
            outcome, test = "inconclusive", f"none: the plain model did not solve the training hops; {test}"
        evidence = (
            f"training hops: lowest mean {lowest:.3f}; {FAR} hops {judging.shown(found.values(arm, FAR))} against "
            f"{judging.shown(found.values(looped, FAR))} of the {arms.ARMS[looped].title}"
        )
        claim = f"{arms.ARMS[arm].title}: falls behind the {arms.ARMS[looped].title} beyond the training hops"
        return self._verdict("fails", found, arm, claim, outcome, evidence, test)

    def _matters(self, found: "Found", arm: str) -> Verdict:
        outcome, test = judging.is_better(found.values("dense", FARTHEST), found.values(arm, FARTHEST))
        evidence = (
            f"{FARTHEST} hops {judging.shown(found.values(arm, FARTHEST))} against "
            f"{judging.shown(found.values('dense', FARTHEST))} unchanged; 5 hops "
            f"{judging.shown(found.values(arm, 5))}"
        )
        claim = f"{arms.ARMS[arm].title}: costs the {arms.ARMS['dense'].title} its {FARTHEST} hops"
        return self._verdict("matters", found, arm, claim, outcome, evidence, test)

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        found = Found(rows)
        every = found.arms(EVERY)
        tables = [_accuracy_table(found, every), _stopping_table(rows, found.arms(LOOPED)), costs_table(rows, every)]
        return tables, [_map_picture(found), _curve_picture(found, every)]


def _chains(arm: str, seed: int) -> Cell:
    return arms.cell(arm, TASKS[TASK], seed=seed, masked=True)


class Found:
    """The accuracies of one task, by arm, hops and loops."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = pick_rows(rows, metric="accuracy", task=TASK, rule=None)
        self._table: dict[tuple[str, int, int], list[float]] = {}
        for row in self.rows:
            self._table.setdefault((row["model"], row["hops"], row["loops"]), []).append(row["value"])

    def arms(self, wanted: Sequence[str]) -> list[str]:
        """Those that have results."""
        there = {row["model"] for row in self.rows}
        return [arm for arm in wanted if arm in there]

    def values(self, arm: str, hops: int, loops: int | None = None) -> list[float]:
        """By seed; a plain model's at its only depth."""
        at = 0 if arms.ARMS[arm].role == "plain" else TEST_LOOPS if loops is None else loops
        return self._table[arm, hops, at]

    def means(self, arm: str, loops: int) -> list[float]:
        """By seed, over all numbers of hops."""
        return np.mean([self.values(arm, hops, loops) for hops in HOPS], axis=0).tolist()

    def parameters(self, arm: str) -> int:
        return pick_rows(self.rows, model=arm)[0]["total"]

    def n_seeds(self, arm: str) -> int:
        return len({row["seed"] for row in pick_rows(self.rows, model=arm)})

    def map(self, arm: str) -> figures.HeatMap:
        loops = () if arms.ARMS[arm].role == "plain" else LOOPS
        by_seed = np.array([[self.values(arm, hops, at) for at in loops or (0,)] for hops in HOPS])
        return figures.HeatMap(
            title=arms.ARMS[arm].title,
            note=f"{self.parameters(arm) / 1e3:.0f}k parameters, {judging.seeds(by_seed.shape[-1])}",
            hops=HOPS,
            loops=loops,
            mean=by_seed.mean(-1),
            sd=spread(by_seed),
        )


def _map_picture(found: Found) -> Picture:
    panels = found.arms((*PANELS, *(() if set(PANELS) <= set(found.arms(PANELS)) else LOOPED)))
    figure = figures.heat_maps(
        [found.map(arm) for arm in dict.fromkeys(panels)],
        train_hops=5,
        train_loops=arms.MAX_LOOPS,
        title="Accuracy by hops and loops: which end does the chain lead to?",
    )
    return Picture(name="hops-by-loops", caption=_caption(found), image=figures.png(figure))


def _caption(found: Found) -> str:
    seeds = max(found.n_seeds(arm) for arm in found.arms(LOOPED))
    return (
        f"Accuracy on test problems by hops (up) and loops (right), mean of {judging.seeds(seeds)}; the box is what "
        "training covered. The number of hops is never given; in training a question is asked only if the loops can "
        "reach it."
    )


def _curve_picture(found: Found, every: Sequence[str]) -> Picture:
    lines = []
    for arm in every:
        by_seed = np.array([found.values(arm, hops) for hops in HOPS])
        role = arms.ARMS[arm].role
        lines.append(
            figures.Curve(label=arms.ARMS[arm].title, x=HOPS, mean=by_seed.mean(-1), sd=spread(by_seed), kind=role)
        )
    figure = figures.curves(
        lines,
        title=f"Accuracy by hops at {TEST_LOOPS} loops",
        xlabel="hops",
        ylabel="accuracy",
        vertical={5: "training"},
        chance=TASKS[TASK].chance,
        ylim=(0, 1.02),
    )
    caption = f"Accuracy by hops: looped models at {TEST_LOOPS} loops, mean ± sd over seeds."
    return Picture(name="accuracy-by-hops", caption=caption, image=figures.png(figure))


def _accuracy_table(found: Found, every: Sequence[str]) -> Table:
    hops = (1, 5, 8, 10, 15, 20)
    rows = [
        (arms.ARMS[arm].title, arms.ARMS[arm].role, *(judging.shown(found.values(arm, k)) for k in hops))
        for arm in every
    ]
    head = ("model", "role", *(f"{k} hops" for k in hops))
    return Table(title=f"Accuracy at {TEST_LOOPS} loops", head=head, rows=tuple(rows), note="mean ± sd over seeds")


def _stopping_table(rows: Sequence[Row], looped: Sequence[str]) -> Table:
    """What each exit rule costs in accuracy and buys in loops."""
    lines = []
    for arm in looped:
        for rule in RULES:
            at = {
                (metric, hops): values(rows, model=arm, rule=rule, metric=metric, hops=hops)
                for metric in ("accuracy", "loops_used")
                for hops in (5, 10, 20)
            }
            cells = (f"{np.mean(at['accuracy', k]):.3f} in {np.mean(at['loops_used', k]):.1f}" for k in (5, 10, 20))
            if all(at.values()):
                lines.append((arms.ARMS[arm].title, rule, *cells))
    head = ("model", "exit rule", "5 hops", "10 hops", "20 hops")
    note = f"accuracy in mean loops, at most {2 * TEST_LOOPS}; mean over seeds"
    return Table(title="Tokens stop by themselves", head=head, rows=tuple(lines), note=note)
