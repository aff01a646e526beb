"""Whether a looped model searches a graph in breadth: how many frontier nodes a state holds, and whether they count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ritornello.lab import arms, figures, judging, probes
from ritornello.lab.cell import TEST_SEED, Cell, Trained, build
from ritornello.lab.experiments.accuracies import HOPS, LEARNT, knows
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import STREAM, Costs, Row, accuracy_rows, pick_rows, row, values
from ritornello.lab.orbits import Loops
from ritornello.lab.probes import Marks, Numbers
from ritornello.lab.report import Picture, Table, Verdict
from ritornello.lab.statistics import spread
from ritornello.lab.tasks import TASKS, Task
from ritornello.lab.tasks.graphs import read_parents, walk
from ritornello.lab.tasks.reachability import Reachability
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import depth

GRAPH, CHAINS = "reachability", "chains"
MAIN = "dense"
SEEDS = (1, 2, 3)  # the chain model of seed 0, which comes along, was looked at before
STEPS = 6000  # on graphs: experiments/LOG.md, entries 20 and 23
LOOPS = tuple(range(arms.MAX_LOOPS + 1))
DISTANCES = (1, 2, 3, 4)
JUDGED = (2, 3)  # distances, each at as many loops: beyond the edges of the target itself
AFTER = 8  # loops after a patch
FITTED, TESTED = 192, 96  # problems
TRAINING = HOPS[:5]
KNOWN = f"Inconclusive unless the mean on each training hop, at {arms.MAX_LOOPS} loops, is at least {LEARNT}."
CONTROLS = {"found": "trained", "untrained": "before training", "shuffled": "another question's set"}


class Superposition(TrainedExperiment):
    name = "superposition"
    title = "Superposition: does a loop search in breadth?"
    question = "Does the state of a question hold all nodes at distance t after t loops, and do answers depend on them?"
    prediction = (
        "After t loops a linear probe reads the nodes t edges above the target from the question's state, more of "
        "them than one at a time; a state moved to another problem goes on from its nodes there."
    )
    rules: ClassVar = {
        "read": (
            f"{KNOWN} Linear probes from a question's state after {' and '.join(map(str, JUDGED))} loops to the nodes "
            "at that distance from its target, fitted on training problems; share of a set's k nodes among the k "
            "highest scores, on test problems, mean over both. Against the better of two controls, seed by seed: the "
            "same before training, and probes fitted to the sets of other questions. Holds: better by at least .1 "
            "and the 95% t interval of the difference lies above 0. Does not hold: it lies below .1. Else, or under "
            "3 seeds, inconclusive."
        ),
        "many": (
            f"{KNOWN} The same over sets of at least two nodes, against what knowing one node of each set for "
            "certain, and no other, would find. Holds: better by at least .1 and the 95% t interval of the "
            "difference lies above 0. Does not hold: it lies below .1. Else, or under 3 seeds, inconclusive."
        ),
        "counts": (
            f"{KNOWN} After {' and '.join(map(str, JUDGED))} loops a question's state is replaced by one from another "
            "problem, whose nodes at that distance all lead, in the problem at hand, to one answer that is not its "
            f"own. Share that give this answer {AFTER} loops later, mean over both, against the share that do where "
            "the state is replaced by that of a question drawn without regard to its nodes, seed by seed. Holds: "
            "more by at least .1 and the 95% t interval of the difference lies above 0. Does not hold: it lies below "
            ".1. Else, or under 3 seeds, inconclusive."
        ),
    }
    sources = (
        "Zhu et al. 2505.12514 (reasoning by superposition: continuous thoughts hold search frontiers)",
        "Coconut 2412.06769 (breadth-first search in latent space)",
    )
    budget: ClassVar = {
        "quick": "6 minutes on 2 cores",
        "full": "about 20 core-minutes beyond depth-extrapolation, whose chain models it uses",
    }
    notes = (
        "Depth mask: in training a looped model is asked only those questions that its loops can reach.",
        "Nodes are counted upwards from the target: on graphs, where every node below a source has two parents, sets "
        "of up to six; on chains, the contrast, one node each. Sources and ends, which lead to themselves, end the "
        "count: questions with no node at a distance are left out there.",
        "A probe is a ridge regression from 64 numbers to the marks of all nodes; names are drawn anew in every "
        "problem. What it finds the model need not use: patching asks that.",
        "A patch moves the state alone; the input that comes back in every loop stays that of the question patched.",
        "Each verdict is at its own 5% level; nothing is corrected for their number.",
    )
    measured: ClassVar = {
        "loops": LOOPS,
        "distances": DISTANCES,
        "problems": (FITTED, TESTED),
        "after": AFTER,
        "ridge": probes.RIDGE,
        "test_seed": TEST_SEED,
    }

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [arms.cell(MAIN, TASKS[GRAPH], seed=0, masked=True, steps=STEPS)]
        cells = []
        for seed in SEEDS:
            cells.append(arms.cell(MAIN, TASKS[GRAPH], seed=seed, masked=True, steps=STEPS))
            cells.append(arms.cell(MAIN, TASKS[CHAINS], seed=seed, masked=True))
        return cells

    def measure(self, found: Trained) -> list[Row]:
        task, start = found.cell.build_task(), build(found.cell).eval()
        rows = accuracy_rows(self.name, found, hops=TRAINING, loops=(arms.MAX_LOOPS,))
        costs = Costs(found, task)
        fitted, tested = Searches.of(task, FITTED, "train"), Searches.of(task, TESTED, "test")
        trained = [states(model, s) for model in (found.model, start) for s in (fitted, tested)]
        for loops in LOOPS:
            for distance in DISTANCES:
                read = readings(fitted, tested, [x[loops] for x in trained], distance)
                for metric, value, n in read:
                    where = {"hops": distance, "loops": loops, **costs.at(max(1, loops))}
                    rows.append(row(self.name, found, metric=metric, value=value, n=n, **where))
        for loops in DISTANCES:
            for metric, value, n in patched(found.model, tested, trained[1], loops):
                where = {"hops": loops, "loops": loops, **costs.at(loops)}
                rows.append(row(self.name, found, metric=metric, value=value, n=n, **where))
        return rows

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        verdicts = []
        for task in (GRAPH, CHAINS):
            found = pick_rows(rows, task=task)
            if found:
                verdicts += [self._read(found), self._counts(found)]
                verdicts += [self._many(found)] if task == GRAPH else []
        return verdicts

    def _read(self, rows: Sequence[Row]) -> Verdict:
        found, shuffled, untrained = (judged(rows, name) for name in ("found", "shuffled", "untrained"))
        control = np.maximum(shuffled, untrained).tolist()
        said = f"{judging.shown(found)} of the nodes, {judging.shown(untrained)} before training, "
        said += f"{judging.shown(shuffled)} with sets of other questions"
        return self._compared("read", rows, "a probe reads the nodes at distance t after t loops", found, control, said)

    def _many(self, rows: Sequence[Row]) -> Verdict:
        found, one = judged(rows, "found_many"), judged(rows, "one")
        said = f"of sets of two and more: {judging.shown(found)} of the nodes, {judging.shown(one)} if one were known; "
        said += f"whole sets {judging.shown(judged(rows, 'whole'))}"
        return self._compared("many", rows, "the state holds more than one node at once", found, one, said)

    def _counts(self, rows: Sequence[Row]) -> Verdict:
        follows, control = judged(rows, "follows"), judged(rows, "control")
        said = f"{judging.shown(follows)} give the answer of the nodes moved there, {judging.shown(control)} with any "
        said += f"other state; {judging.shown(judged(rows, 'stays'))} keep their own"
        return self._compared("counts", rows, "a state moved goes on from its nodes", follows, control, said)

    def _compared(
        self, rule: str, rows: Sequence[Row], claim: str, ours: list[float], other: list[float], said: str
    ) -> Verdict:
        outcome, test = judging.is_better_paired(ours, other)
        if not knows(rows, TRAINING):
            outcome, test = "inconclusive", f"not judged: the training hops were not learnt ({test})"
        claim = f"{arms.ARMS[MAIN].title}, {TASKS[rows[0]['task']].title}: {claim}"
        return self.verdict(rule, rows, MAIN, claim=claim, outcome=outcome, evidence=said, test=test)

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        tables, pictures = [], []
        for task in (GRAPH, CHAINS):
            found = pick_rows(rows, task=task)
            if found:
                tables += [_read_table(found), _patch_table(found), costs_table(found, (MAIN,))]
                pictures.append(_picture(found))
        return tables, pictures


@dataclass(frozen=True)
class Searches:
    """Problems as deep as training's. tokens (B, T, C); the last Q of T ask. sets (B, Q, distances + 1, N): the nodes
    at each distance above a question's target. answers (B, Q): where it leads; ends (B, N): where each node does, −1
    where to several."""

    tokens: torch.Tensor
    sets: Marks
    answers: NDArray[np.int64]
    ends: NDArray[np.int64]

    @staticmethod
    def of(task: Task, n: int, split: Any) -> "Searches":
        rng = depth.generator(TEST_SEED, split == "test", STREAM + 1)
        found = task.sample(rng, np.full(n, task.train_hops), split=split)
        last = max(DISTANCES)
        if isinstance(task, Reachability):
            sets = task.frontiers(found.tokens, last)
            answers = found.answers[:, -sets.shape[1] :]
            return Searches(torch.from_numpy(found.tokens), sets, answers, _sources(task, found.tokens))
        parents = read_parents(found.tokens)
        n_nodes = parents.shape[1]
        at = np.stack([walk(parents, np.full(n, d)) for d in range(last + 1)], axis=2)
        sets = at[..., None] == np.arange(n_nodes)
        sets[:, :, 1:] &= (at[:, :, 1:] != at[:, :, :-1])[..., None]  # an end leads nowhere but to itself
        answers = found.answers[:, -n_nodes:]
        return Searches(torch.from_numpy(found.tokens), sets, answers, answers)


def _sources(task: Reachability, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, N): the source that reaches each node, −1 for sinks, which both reach."""
    reached = task.frontiers(tokens, task.n_nodes, forwards=True)
    sources, nodes = reached[:, :, 0].argmax(axis=2), reached.any(axis=2)
    return np.where(nodes.sum(axis=1) == 1, (nodes * sources[..., None]).sum(axis=1), -1)


@torch.no_grad()
def states(model: RecurrentDepthTransformer, searches: Searches) -> list[torch.Tensor]:
    """(B, T, D) after each number of LOOPS."""
    loops = Loops(model, searches.tokens)
    found = [loops.first()]
    for i in LOOPS[1:]:
        found.append(loops(found[-1], i - 1))
    return found


def readings(
    fitted: Searches, tested: Searches, at: Sequence[torch.Tensor], distance: int
) -> Iterator[tuple[str, float, int]]:
    """(metric, value, n) of probes for the nodes at `distance`, from states `at` one number of loops: trained model on
    fitted and tested problems, then untrained."""
    Q = fitted.sets.shape[1]
    there = [s.sets[:, :, distance].any(axis=2) for s in (fitted, tested)]
    sets = [s.sets[:, :, distance][mark] for s, mark in zip((fitted, tested), there, strict=True)]
    x = [h[:, -Q:].double().numpy()[mark] for h, mark in zip(at, there * 2, strict=True)]
    scores = probes.score(probes.fit(x[0], sets[0]), x[1])
    found, many = probes.found(scores, sets[1]), sets[1].sum(axis=1) > 1
    yield "found", float(found.mean()), len(found)
    yield "untrained", mean(probes.found(probes.score(probes.fit(x[2], sets[0]), x[3]), sets[1])), len(found)
    order = np.random.default_rng(0).permutation(len(sets[0]))
    yield "shuffled", mean(probes.found(probes.score(probes.fit(x[0], sets[0][order]), x[1]), sets[1])), len(found)
    if many.any():
        yield "found_many", mean(found[many]), int(many.sum())
        yield "whole", mean((found == 1)[many]), int(many.sum())
        yield "one", mean(probes.held_one(sets[1][many])), int(many.sum())


@torch.no_grad()
def patched(
    model: RecurrentDepthTransformer, tested: Searches, at: Sequence[torch.Tensor], loops: int
) -> Iterator[tuple[str, float, int]]:
    """One question of each problem gets, after `loops`, the state of one in the next problem whose nodes then lead to
    one answer here that is not the question's own. Or, the control, that of a question drawn at random; the same
    answer is looked for."""
    B, Q = tested.answers.shape
    rng, h = np.random.default_rng(0), at[loops]
    pairs = [pair for b in range(B) if (pair := _pair(tested, b, (b + 1) % B, loops, rng)) is not None]
    if not pairs:
        return
    rows, questions, givers, expected = (np.array(x) for x in zip(*pairs, strict=True))
    here, T = np.arange(len(rows)), h.shape[1]
    runner = Loops(model, tested.tokens[rows])

    def answers(giver: NDArray[np.int64]) -> NDArray[np.int64]:
        now = h[rows].clone()
        now[here, T - Q + questions] = h[(rows + 1) % B, T - Q + giver]
        for i in range(AFTER):
            now = runner(now, loops + i)
        return runner.read(now)[here, T - Q + questions].argmax(-1).numpy()

    moved, other = answers(givers), answers(rng.integers(Q, size=len(rows)))
    own = tested.answers[rows, questions]
    for metric, hit in (("follows", moved == expected), ("stays", moved == own), ("control", other == expected)):
        yield metric, mean(hit), len(rows)


def _pair(
    tested: Searches, here: int, there: int, distance: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """(problem, question, giver, answer expected) or None where no pair of questions fits."""
    ends = tested.ends[here]
    nodes = tested.sets[there, :, distance]
    lead = [set(ends[marks]) if marks.any() else set() for marks in nodes]
    givers = [(q, next(iter(to))) for q, to in enumerate(lead) if len(to) == 1 and -1 not in to]
    fits = [(q, g, to) for g, to in givers for q in np.flatnonzero(tested.answers[here] != to)]
    if not fits:
        return None
    q, g, to = fits[rng.integers(len(fits))]
    return here, int(q), int(g), int(to)


def mean(x: Numbers | Marks) -> float:
    return float(np.mean(x))


def judged(rows: Sequence[Row], metric: str) -> list[float]:
    """By seed, the mean over JUDGED distances, each at as many loops."""
    return np.mean([values(rows, metric=metric, hops=d, loops=d) for d in JUDGED], axis=0).tolist()


def _read_table(rows: Sequence[Row]) -> Table:
    lines = []
    for distance in DISTANCES:
        for metric, name in (*CONTROLS.items(), ("found_many", "sets of two and more")):
            found = [values(rows, metric=metric, hops=distance, loops=n) for n in LOOPS]
            if any(found):
                lines.append((str(distance), name, *(f"{np.mean(there):.2f}" if there else "–" for there in found)))
    head = ("distance", "probe", *(f"{n} loops" for n in LOOPS))
    note = "share of a set's k nodes among the k highest scores of a linear probe; mean over seeds"
    title = f"{TASKS[rows[0]['task']].title.capitalize()}: what the state says of nodes above the target"
    return Table(title=title, head=head, rows=tuple(lines), note=note)


def _patch_table(rows: Sequence[Row]) -> Table:
    lines = []
    for n in DISTANCES:
        found = [values(rows, metric=metric, loops=n, hops=n) for metric in ("follows", "stays", "control")]
        if all(found):
            count = pick_rows(rows, metric="follows", loops=n)[0]["n"]
            lines.append((str(n), str(count), *(judging.shown(there) for there in found)))
    head = ("after loops", "patches", "answer of the nodes moved", "own answer kept", "expected by chance")
    note = f"{AFTER} loops after the state of one question was replaced by another problem's; mean ± sd over seeds"
    title = f"{TASKS[rows[0]['task']].title.capitalize()}: states moved to another problem"
    return Table(title=title, head=head, rows=tuple(lines), note=note)


def _picture(rows: Sequence[Row]) -> Picture:
    lines = []
    for distance in DISTANCES:
        for metric, kind in (("found", "looped"), ("untrained", "plain")):
            found = np.array([values(rows, metric=metric, hops=distance, loops=n) for n in LOOPS])
            label = f"distance {distance}, {CONTROLS[metric]}"
            lines.append(figures.Curve(label=label, x=LOOPS, mean=found.mean(-1), sd=spread(found), kind=kind))
    task = TASKS[rows[0]["task"]]
    figure = figures.curves(
        lines,
        title=f"{task.title.capitalize()}: nodes read from the question's state",
        xlabel="loops",
        ylabel="share of nodes found",
        ylim=(0, 1.02),
    )
    caption = f"{task.title.capitalize()}: nodes at each distance above the target, read by a linear probe, by loops."
    return Picture(name=f"{task.name}-nodes-by-loops", caption=caption, image=figures.png(figure))
