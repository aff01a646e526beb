"""Whether an answer is right for every further loop: attracting orbits of the trained loop, certified one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ritornello.lab import arms, figures, judging, orbits
from ritornello.lab.cell import TEST_SEED, Cell, Trained, build
from ritornello.lab.experiments.accuracies import CHEAP, HOPS, LEARNT, knows
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import Costs, Row, all_questions, pick_rows, row, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS, spread
from ritornello.lab.tasks import TASKS, Task, build_task
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import NO_LABEL

CHAINS, CYCLE = "chains", "cyclic"
MAIN, ABLATIONS = "dense", ("short-training", "slow-forgetting")
SEEDS = (1, 2, 3)  # seed 0 is the model that comes along, on which the certificate was developed
TRAINING, DEEP = HOPS[:5], HOPS[5:]
PROBLEMS = {TRAINING: 8, DEEP: 24}  # as deep as the deepest of these hops, all their questions
N_CYCLES = 8
SETTLED, LONG = 64, 10_000  # loops
KICKS = (0.1, 1.0, 10.0)  # RMS of noise
AIM = 0.9  # share of questions
NODES = {"n_nodes": 12}
ON_CYCLE: dict[str, Any] = {
    "sizes": NODES,
    "steps": 2000,
    "lr": 1e-3,
    "batch_size": 32,
    "model": {"n_heads": 4, "n_kv_heads": 4, "head_dim": 16, "embedding_init": "unit"},
}
KNOWN = f"Inconclusive unless the mean on each training hop, at {arms.MAX_LOOPS} loops, is at least {LEARNT}."


class CertifiedDepth(TrainedExperiment):
    name = "certified-depth"
    title = "Certified depth: answers that no further loop can change"
    question = "Can it be certified, question by question, that an answer is right after every further loop?"
    prediction = (
        "On chains the trained loop is attracted, problem by problem, to a fixed point or a short cycle whose answer "
        f"is right: at least {AIM} of the questions of 1 to 20 hops are certified, and none of these changes its "
        f"answer in {LONG:,} loops. Short training and slow forgetting are certified less; a model that was not "
        "trained is never certified to be right. On a cycle the state goes round with the answer for ever."
    )
    rules: ClassVar = {
        "certified": (
            f"{KNOWN} By seed, the mean over 1 to 20 hops of the share of questions certified to be right for ever. "
            f"Holds: its mean over seeds is at least {AIM}. Does not hold: the upper end of its 95% t interval lies "
            "below. Else, or under 3 seeds, inconclusive."
        ),
        "kept": (
            f"Every question whose answers are certified, right or wrong, in every trained model: holds if after each "
            f"number of loops from the certified one to {LONG:,} the answer is the certified one. One that differs "
            "refutes. Under 3 seeds, or if nothing is certified, inconclusive."
        ),
        "lasting": (
            f"{KNOWN} By seed, the mean over 1 to 20 hops of the share of right answers, lost from {SETTLED} loops to "
            f"all of {SETTLED} to {LONG:,} (a question counts if it is right after each). Holds: the 95% t interval "
            f"lies at or below {CHEAP}. Does not hold: it lies above it. Else, or under 3 seeds, inconclusive."
        ),
        "trained": (
            "Share certified, right or wrong, on 1 to 5 hops, seed by seed, against the same model before training. "
            "Holds: better by at least .1 and the 95% t interval of the difference lies above 0. Does not hold: it "
            "lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "matters": (
            f"{KNOWN} So for both models. Mean over 1 to 20 hops of the share certified, right or wrong. Holds: that "
            "of the unchanged model is larger by at least .1, with p <= .05 in the exact one-sided permutation test "
            "over seeds. Does not hold: the 95% interval of the difference (Welch) lies below .1. Else, or under 3 "
            "seeds, inconclusive."
        ),
        "round": (
            f"Of the seeds that know the training hops (at least {LEARNT} on each, at as many loops as hops): the "
            "share of questions certified to have the right answer, the k-th successor with k the number of loops, "
            f"for ever. Holds: its mean is at least {AIM}. Does not hold: the upper end of its 95% t interval lies "
            "below. Else, or with under 3 such seeds, inconclusive."
        ),
    }
    sources = (
        "Anil et al. 2211.09961 (path independence predicts extrapolation)",
        "Bansal et al. 2202.05826 (overthinking)",
        "Winston and Kolter 2006.08591 (monotone operator equilibrium networks: contraction by construction)",
    )
    budget: ClassVar = {
        "quick": "6 minutes on 2 cores",
        "full": "about 30 core-minutes beyond depth-extrapolation, whose chain models it uses",
    }
    notes = (
        "Depth mask: in training on chains a looped model is asked only those questions that its loops can reach.",
        "A certificate is numerical, no proof: Banach's theorem for F^m, m = "
        f"{', '.join(map(str, orbits.LENGTHS))}, on a ball around the state after {orbits.START} loops. The Lipschitz "
        f"factors are estimates: {orbits.SAFETY:g} times the largest of {orbits.PROBES} Jacobian-vector products with "
        "Gaussian vectors, each at its own point of the ball, along the directions that grow most for half of them; "
        "a factor that is larger somewhere in the ball can be missed. Read-out, distances and sums are computed as "
        "they stand; rounding to float32 is allowed for with twice the largest that was met.",
        "A certificate covers the state of all tokens up to and with the question, which by causality is a system "
        "of its own: one token before it that wanders leaves the question uncertified, whether it matters or not.",
        "The oracle says whether a certified answer is right. What is certified and wrong is reported apart.",
        "The certificate was developed on the model that comes along, which is seed 0 of depth extrapolation, with "
        f"the tuning problems; seeds here are 1 to 3. Rules were written before any of their results, {AIM} after that "
        "model had .94.",
        "Intervals are over seeds, which all answer the same few problems; deep questions of one problem stand or fall "
        "together, since they share what comes before them.",
        f"The cycle has {NODES['n_nodes']} nodes; its model has 4 heads of 16, embeddings of variance 1 and training "
        "of its own.",
        "Each verdict is at its own 5% level; nothing is corrected for their number.",
    )
    measured: ClassVar = {
        "hops": HOPS,
        "problems": [*PROBLEMS.values(), N_CYCLES],
        "loops": (SETTLED, LONG),
        "start": orbits.START,
        "lengths": orbits.LENGTHS,
        "sizes": orbits.SIZES,
        "probes": orbits.PROBES,
        "safety": orbits.SAFETY,
        "factor": orbits.FACTOR,
        "rounded": orbits.PHASES_ROUNDED,
        "kicks": KICKS,
        "test_seed": TEST_SEED,
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.quick(MAIN, TASKS[CHAINS])]
        cells = []
        for seed in SEEDS:
            cells += [arms.cell(arm, TASKS[CHAINS], seed=seed, masked=True) for arm in (MAIN, *ABLATIONS)]
            cells.append(arms.cell(MAIN, build_task(CYCLE, NODES), seed=seed, masked=True, **ON_CYCLE))
        return cells

    def measure(self, found: Trained) -> list[Row]:
        task, rows = found.cell.build_task(), []
        costs = Costs(found, task)
        for hops, n in {None: N_CYCLES}.items() if task.loops_say_hops else PROBLEMS.items():
            asked = Asked.of(task, hops, n)
            watched = Watched.of(found.model, asked, LONG)
            for k, there in asked.by_hops():
                for loops, metric, value in watched.measurements(there):
                    where = {"hops": k, "loops": loops, **costs.at(loops)}
                    rows.append(row(self.name, found, metric=metric, value=value, n=int(there.sum()), **where))
        if found.cell.arm == MAIN and not task.loops_say_hops:
            asked = Asked.of(task, TRAINING, PROBLEMS[TRAINING])
            watched = Watched.of(build(found.cell).eval(), asked, orbits.START)
            for k, there in asked.by_hops():
                for metric, mark in (("certified", watched.right), ("certified_wrong", watched.wrong)):
                    value = float(mark[there].mean())
                    where = {"hops": k, "loops": LONG, **costs.at(LONG)}
                    rows.append(
                        row(self.name, found, metric=f"untrained_{metric}", value=value, n=int(there.sum()), **where)
                    )
        return rows

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        chains, cycle = pick_rows(rows, task=CHAINS), pick_rows(rows, task=CYCLE)
        there = {r["model"] for r in chains}
        verdicts = []
        if MAIN in there:
            verdicts += [self._certified(chains), self._lasting(chains), self._trained(chains)]
            verdicts += [self._matters(chains, arm) for arm in ABLATIONS if arm in there]
        verdicts += [self._round(cycle)] if cycle else []
        return [*verdicts, self._kept(rows)] if rows else []

    def _certified(self, rows: Sequence[Row]) -> Verdict:
        found, known = by_seed(rows, MAIN, "certified"), learnt(rows, MAIN)
        parts = [
            f"{name} {judging.shown(by_seed(rows, MAIN, metric, hops))}"
            for name, metric, hops in (
                ("1 to 5 hops", "certified", TRAINING),
                ("6 to 20", "certified", DEEP),
                ("certified and wrong", "certified_wrong", HOPS),
            )
        ]
        return self.verdict(
            "certified",
            rows,
            MAIN,
            claim=f"{title(MAIN)}: answers up to 20 hops are certified to be right for ever",
            outcome=judging.reaches(found, AIM) if known else "inconclusive",
            evidence=f"{judging.shown(found)} of questions ({', '.join(parts)})",
            test=f"mean over seeds against {AIM}" if known else "none: the training hops were not learnt",
        )

    def _lasting(self, rows: Sequence[Row]) -> Verdict:
        before, after = by_seed(rows, MAIN, "accuracy", loops=SETTLED), by_seed(rows, MAIN, "kept")
        outcome, test = judging.costs_at_most(before, after, CHEAP)
        known = learnt(rows, MAIN)
        return self.verdict(
            "lasting",
            rows,
            MAIN,
            claim=f"{title(MAIN)}: {LONG:,} loops are no worse than {SETTLED}",
            outcome=outcome if known else "inconclusive",
            evidence=f"{judging.shown(before)} right at {SETTLED} loops, {judging.shown(after)} at each to {LONG:,}",
            test=test if known else "none: the training hops were not learnt",
        )

    def _trained(self, rows: Sequence[Row]) -> Verdict:
        after, before = certain(rows, MAIN, TRAINING), certain(rows, MAIN, TRAINING, "untrained_")
        outcome, test = judging.is_better_paired(after, before)
        right = [by_seed(rows, MAIN, f"{when}certified", TRAINING) for when in ("", "untrained_")]
        evidence = f"1 to 5 hops: {judging.shown(after)} certified against {judging.shown(before)} before training; "
        evidence += f"right are {judging.shown(right[0])} and {judging.shown(right[1])}"
        claim = f"{title(MAIN)}: it is training that makes answers certain"
        return self.verdict("trained", rows, MAIN, claim=claim, outcome=outcome, evidence=evidence, test=test)

    def _matters(self, rows: Sequence[Row], arm: str) -> Verdict:
        ours, other = certain(rows, MAIN), certain(rows, arm)
        outcome, test = judging.is_better(ours, other)
        if not (learnt(rows, MAIN) and learnt(rows, arm)):
            outcome, test = "inconclusive", f"not judged: one of the two did not learn the training hops ({test})"
        right = by_seed(rows, arm, "accuracy", loops=SETTLED)
        return self.verdict(
            "matters",
            rows,
            arm,
            claim=f"{title(arm)}: fewer answers are certified",
            outcome=outcome,
            evidence=f"{judging.shown(other)} of questions against {judging.shown(ours)} unchanged; at {SETTLED} loops "
            f"{judging.shown(right)} are right",
            test=test,
        )

    def _round(self, rows: Sequence[Row]) -> Verdict:
        seeds = sorted({r["seed"] for r in rows})
        know = [s for s in seeds if values(rows, seed=s, metric="lowest")[0] >= LEARNT]
        found = [values(rows, seed=s, metric="certified")[0] for s in know]
        kept = [values(rows, seed=s, metric="kept")[0] for s in know]
        outcome: Outcome = judging.reaches(found, AIM) if len(know) >= MIN_SEEDS else "inconclusive"
        said = f"{len(know)} of {judging.seeds(len(seeds))} know the training hops"
        if know:
            said += f"; certified {judging.shown(found)} ({judging.listed(found)}), right after each number of loops "
            said += f"from {SETTLED} to {LONG:,}: {judging.shown(kept)}"
        claim = f"{title(MAIN)}, on a cycle: the state goes round with the right answer for ever"
        test = f"mean over these seeds against {AIM}" if len(know) >= MIN_SEEDS else f"none: {judging.seeds(len(know))}"
        return self.verdict("round", rows, MAIN, claim=claim, outcome=outcome, evidence=said, test=test)

    def _kept(self, rows: Sequence[Row]) -> Verdict:
        there = pick_rows(rows, metric="broken")
        n = round(sum(r["value"] * r["n"] for r in there))
        total = sum(r["value"] * r["n"] for m in ("certified", "certified_wrong") for r in pick_rows(rows, metric=m))
        seeds = {r["seed"] for r in there}
        outcome: Outcome = "does not hold" if n else "holds"
        model = there[0]["model"]
        return self.verdict(
            "kept",
            pick_rows(rows, task=there[0]["task"]),
            model,
            claim=f"what is certified is what {LONG:,} loops give",
            outcome=outcome if len(seeds) >= MIN_SEEDS and total else "inconclusive",
            evidence=f"{n} of {total:.0f} certified questions, of all arms and tasks, changed their answer",
            test="count of questions",
        )

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        chains = pick_rows(rows, task=CHAINS)
        models = [arm for arm in (MAIN, *ABLATIONS) if pick_rows(chains, model=arm)]
        tables = [_share_table(rows), _orbit_table(rows)]
        if not models:
            return tables, []
        return [*tables, costs_table(chains, models, loops=dict.fromkeys(models, SETTLED))], [_picture(chains, models)]


@dataclass(frozen=True)
class Asked:
    """tokens (B, T, C); asked (B, T): which questions count; hops (B, T); wanted (P, B, T): the right answers after t
    loops are wanted[t % P]."""

    tokens: torch.Tensor
    asked: NDArray[np.bool_]
    hops: NDArray[np.int64]
    wanted: NDArray[np.int64]

    @staticmethod
    def of(task: Task, hops: Sequence[int] | None, n: int) -> "Asked":
        """All questions of `hops` hops in n test problems as deep as the deepest; None: all, whatever loops say."""
        batch, needed = all_questions(task, max(hops or (1,)), n=n)
        asked, found = batch.labels != NO_LABEL, np.zeros_like(batch.labels)
        found[asked] = needed
        periods: Any = range(task.n_nodes) if task.loops_say_hops else (1,)  # pyrefly: ignore
        wanted = np.stack([task.solve(batch.tokens, np.full(n, k)) for k in periods])
        asked &= np.isin(found, hops) if hops else True
        return Asked(torch.from_numpy(batch.tokens), asked, found, wanted)

    def by_hops(self) -> Iterator[tuple[int | None, NDArray[np.bool_]]]:
        """Each number of hops with its questions; None and all, where loops say it."""
        if len(self.wanted) > 1:
            yield None, self.asked
            return
        for k in np.unique(self.hops[self.asked]):
            yield int(k), self.asked & (self.hops == k)


@dataclass(frozen=True)
class Watched:
    """(B, T) each. right, wrong: certified so. broken: certified, and changed in the run. kept: right after each number
    of loops from SETTLED on. since: the loops from which on the run is right, -1: not at its end. entered: those from
    which on it is certified. at: by loops, right answers. kicks: by size, the old answer after noise. rounds: whether
    the right answer changes with loops."""

    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    since: NDArray[np.int64]
    entered: NDArray[np.int64]
    at: dict[int, NDArray[np.bool_]]
    kicks: dict[float, NDArray[np.bool_]]
    found: orbits.Certificates
    rounds: bool

    @staticmethod
    def of(model: RecurrentDepthTransformer, asked: Asked, n_loops: int) -> "Watched":
        found = orbits.certify(model, asked.tokens)
        run = orbits.run(model, asked.tokens, n_loops, found.centre)
        entered, loops = found.entered(run), np.arange(n_loops + 1)
        certain, P = entered >= 0, len(asked.wanted)
        phases = np.arange(len(found.answers))
        agree = found.answers == asked.wanted[(orbits.START + phases) % P]
        right = certain & (agree | (phases[:, None, None] >= found.length)).all(axis=0)
        broken = np.zeros_like(certain)
        for b, t in np.argwhere(certain & asked.asked):
            rest = loops[entered[b, t] :]
            broken[b, t] = (run.answers[rest, b, t] != found.answers[rest % found.period[b, t], b, t]).any()
        correct = run.answers == asked.wanted[loops % P]
        since = np.where(correct[-1], len(correct) - correct[::-1].argmin(axis=0), -1)
        since[correct.all(axis=0)] = 0
        depths = (*range(1, arms.MAX_LOOPS + 1), SETTLED, n_loops)
        kicks = {size: orbits.kicked(model, asked.tokens, found, size) for size in KICKS}
        return Watched(
            right=right,
            wrong=certain & ~right,
            broken=broken,
            kept=correct[SETTLED:].all(axis=0),
            since=since,
            entered=entered,
            at={n: correct[n] for n in depths},
            kicks=kicks,
            found=found,
            rounds=P > 1,
        )

    def measurements(self, there: NDArray[np.bool_]) -> Iterator[tuple[int, str, float | None]]:
        """(loops, metric, value) of the questions `there`; None where no question has it."""
        mean = lambda x, some=there: float(x[some].mean()) if some.any() else None  # noqa: E731
        for loops in (arms.MAX_LOOPS, SETTLED, LONG):
            yield loops, "accuracy", mean(self.at[loops])
        if self.rounds:  # on a cycle as many loops as hops are right
            yield LONG, "lowest", min(float(self.at[k][there].mean()) for k in TRAINING)
        certain = there & (self.right | self.wrong)
        for metric, mark in (("certified", self.right), ("certified_wrong", self.wrong), ("broken", self.broken)):
            yield LONG, metric, mean(mark)
        yield LONG, "kept", mean(self.kept)
        yield LONG, "kept_uncertified", mean(self.kept, there & ~certain)
        yield LONG, "entered", mean(self.entered, there & self.right)
        yield LONG, "since", mean(self.since, there & self.right)
        yield LONG, "still", mean(self.found.period == 1, certain)
        yield LONG, "period", float(np.median(self.found.period[certain])) if certain.any() else None
        yield LONG, "radius", mean(self.found.radius, certain)
        for size, mark in self.kicks.items():
            yield LONG, f"kicked_{size:g}", mean(mark, certain)


def title(arm: str) -> str:
    return arms.ARMS[arm].title


def by_seed(rows: Sequence[Row], arm: str, metric: str, hops: Sequence[int] = HOPS, **more: Any) -> list[float]:
    """The mean over several numbers of hops, each of the same weight; what could not be measured is left out."""
    found = pick_rows(rows, model=arm, metric=metric, **more)
    means = []
    for seed in sorted({r["seed"] for r in found}):
        there = values([r for r in found if r["hops"] in hops], seed=seed)
        means += [float(np.mean(there))] if there else []
    return means


def certain(rows: Sequence[Row], arm: str, hops: Sequence[int] = HOPS, when: str = "") -> list[float]:
    """By seed, the share that is certified, right or wrong."""
    parts = [by_seed(rows, arm, when + metric, hops) for metric in ("certified", "certified_wrong")]
    return np.sum(parts, axis=0).tolist()


def learnt(rows: Sequence[Row], arm: str) -> bool:
    return knows(rows, TRAINING, model=arm, loops=arms.MAX_LOOPS)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Each task's arms: what to call them, the arm, its rows."""
    for task in (CHAINS, CYCLE):
        for arm in (MAIN, *ABLATIONS):
            found = pick_rows(rows, task=task, model=arm)
            if found:
                yield title(arm) + (", cycle" if task == CYCLE else ""), arm, found


def _share_table(rows: Sequence[Row]) -> Table:
    lines = []
    for name, arm, found in _groups(rows):
        for said, hops in (("1–5", TRAINING), ("6–20", DEEP)) if found[0]["task"] == CHAINS else (("all", (None,)),):
            cells = []
            for metric, more in (
                ("certified", {}),
                ("certified_wrong", {}),
                ("accuracy", {"loops": SETTLED}),
                ("accuracy", {"loops": LONG}),
                ("kept", {}),
                ("kept_uncertified", {}),
            ):
                there = by_seed(found, arm, metric, hops, **more)  # pyrefly: ignore
                cells.append(judging.shown(there) if there else "–")
            lines.append((name, said, *cells))
    head = (
        "model",
        "hops",
        "certified right",
        "certified wrong",
        f"right at {SETTLED} loops",
        f"right at {LONG:,}",
        f"right at each, {SETTLED} to {LONG:,}",
        "the same, of those not certified",
    )
    note = "shares of questions, each number of hops of the same weight; mean ± sd over seeds"
    return Table(title="What is certain, and what 10,000 loops give", head=head, rows=tuple(lines), note=note)


def _orbit_table(rows: Sequence[Row]) -> Table:
    metrics = ("still", "period", "since", "entered", "radius", *(f"kicked_{size:g}" for size in KICKS))
    lines = []
    for name, arm, found in _groups(rows):
        hops: Any = HOPS if found[0]["task"] == CHAINS else (None,)
        shown = [by_seed(found, arm, metric, hops) for metric in metrics]
        lines.append((name, *(f"{np.mean(there):.3g}" if there else "–" for there in shown)))
    head = (
        "model",
        "stand still",
        "period, median",
        "right from loop",
        "certified from loop",
        "radius",
        *(f"back after noise {size:g}" for size in KICKS),
    )
    note = (
        "of certified questions, means over hops and seeds: share whose state comes to a fixed point, the others' runs "
        "in a cycle; loops from which the answer stays right, and from which that is certified; radius of the ball, "
        "per number of the state (RMS about 2); share with the old answer after noise of this RMS on all tokens"
    )
    return Table(title="Orbits", head=head, rows=tuple(lines), note=note)


def _picture(rows: Sequence[Row], models: Sequence[str]) -> Picture:
    lines = []
    for arm in models:
        for metric, label in (("certified", "certified"), ("kept", f"right at each to {LONG:,}")):
            found = np.array([values(rows, model=arm, metric=metric, hops=k) for k in HOPS])
            kind = "looped" if metric == "certified" else "plain"
            label = f"{title(arm)}, {label}"
            lines.append(figures.Curve(label=label, x=HOPS, mean=found.mean(-1), sd=spread(found), kind=kind))
    figure = figures.curves(
        lines,
        title="Answers that stay right for ever",
        xlabel="hops",
        ylabel="share of questions",
        vertical={5: "training"},
        ylim=(0, 1.02),
    )
    caption = (
        "Solid: certified to be right for every further loop. Dashed: right after each number of loops from "
        f"{SETTLED} to {LONG:,}. Mean ± sd over seeds."
    )
    return Picture(name="certified-by-hops", caption=caption, image=figures.png(figure))
