"""What a loop is worth in parameters: looped and plain language models on the same real text."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ritornello.lab import figures, judging, text_arms
from ritornello.lab.cell import Cell, Trained
from ritornello.lab.experiments.base import Scale, TrainedExperiment
from ritornello.lab.experiments.tables import costs_table
from ritornello.lab.measure import Row, pick_rows, values
from ritornello.lab.reading import N_WINDOWS, beats_trigrams, reading_rows, trigram_row
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS, Summary, spread, summarise
from ritornello.lab.text_arms import MEAN_LOOPS, RATIO, TEXT_ARMS

LOOPS = (1, 2, 4, 8, 16)
CLOSE = 0.01  # bits per byte: what counts as the same quality
WORSE = 1.05  # times the perplexity: what counts as worse
BIG, SMALL = "plain", "plain-small"
UNROLLED, FIXED, NO_CARRY = "unrolled", "fixed", "fixed-none"
FAMILIES = ((BIG, SMALL), ("stem", "stem-small"))  # plain models: as large as the claim has them, and as small as ours
ONCE = ("stem", "stem-small", UNROLLED)  # of the looped models' class, with one loop
LOOPED = ("rdt", "rdt-flops", "rdt-8")
MODELS = tuple(TEXT_ARMS)
FLAT = (BIG, SMALL, *ONCE)  # whatever loops they were given
READ_AT = dict.fromkeys((*LOOPED, FIXED, NO_CARRY), MEAN_LOOPS) | {"rdt-8": 2 * MEAN_LOOPS} | dict.fromkeys(ONCE, 1)
# What a looped model that is as good shows, by whether a plain one as small is as good too.
EASY: dict[Outcome, Outcome] = {
    "holds": "not tested at this scale",
    "does not hold": "holds",
    "inconclusive": "inconclusive",
}
QUICK = ("rdt", *FAMILIES[0], *FAMILIES[1])
QUICK_STEPS = 200
KNOWN = (
    "Bits per byte of held-out text; looped models at the mean number of loops of their training. Inconclusive under 3 "
    "seeds, or unless both models beat a byte trigram model of the same text on the mean."
)


class ParameterEfficiency(TrainedExperiment):
    name = "parameter-efficiency"
    title = f"Parameter efficiency: is a looped model with {RATIO} of the parameters as good?"
    question = f"Does a looped model with {RATIO} of a plain transformer's parameters read real text as well?"
    prediction = (
        "At 4 loops and equal tokens the looped model makes good about half of what a plain model loses with the same "
        "few parameters, as a loop worth .46 of a layer says, and does not reach the larger one; 8 loops make good "
        "more; equal FLOPs less. Against as many separate layers as the loops unroll to it stays behind. At a fixed "
        "number of loops injection is worth nothing."
    )
    rules: ClassVar = {
        "reaches": (
            f"{KNOWN} Its bits per byte less those of the larger model, seed by seed. Holds: the 95% t interval of the "
            f"difference lies at or below {CLOSE}. Does not hold: it lies above it. Else inconclusive. Where it would "
            f"hold, the larger one's likeness of {RATIO} of the parameters has to fall short by the same rule: if that "
            "reaches it too, it is not tested at this scale; if it cannot be told, it is inconclusive."
        ),
        "closes": (
            f"{KNOWN} Of what a plain model gains on its likeness of {RATIO} of the parameters, the mean over seeds, "
            "the share that the looped model gains, seed by seed. Holds: the 95% t interval of the share lies above 0. "
            "Does not hold: it lies below. Else, or where the interval of the gain itself is not above 0, inconclusive."
        ),
        "unrolled": (
            f"{KNOWN} Perplexity of a token, of the model that always loops {MEAN_LOOPS} times over that of one "
            "with the same stem whose layers have the same shape and are as many as the loops unroll to, seed by seed. "
            f"Holds: the 95% t interval of the ratio (of its logarithm) lies above {WORSE}. Does not hold: it lies "
            "below. Else inconclusive. Published: 1.25."
        ),
        "carry": (
            f"{KNOWN} Both models always loop {MEAN_LOOPS} times, in training and in the test. Holds: without "
            f"injection bits per byte are lower by at least {CLOSE}, and the 95% t interval of the paired difference "
            f"lies above 0. Does not hold: it lies below {CLOSE}. Else inconclusive."
        ),
    }
    sources = (
        "Parcae 2604.12946 (770M looped against 1.3B plain)",
        "2604.21106 (a loop is worth .46 of a layer)",
        "OpenMythos issue 21 (25% more perplexity than as many layers)",
        "OpenMythos issue 28 (best at a fixed depth without the carry)",
    )
    budget: ClassVar = {"quick": "3 minutes on 2 cores", "full": "about an hour of one core"}
    masked = False
    notes = (
        "Text: the source of Python's own standard library; another version of Python has other text (`data` in the "
        "results); whole packages are held out. 2.2 bytes a token, of 512.",
        f"{RATIO} is of all parameters, the vocabulary's included (12% of the larger plain model, 20% of the others); "
        "of the rest the looped model has .54. Feed-forward widths are fitted to it.",
        "Equal FLOPs: the looped model trains on fewer tokens, so that its training takes what the plain model's does.",
        "Models are small and train on .9 million tokens, 3 to 5 for each parameter, where published runs have 20 and "
        "more: all would gain from longer training, and nothing says that each gains as much.",
        "Equal effective depth: 1 layer before the loop, 4 times 1, 1 after it, against 6 layers of the same width.",
        "Learning rates: three tried for the plain model and three for the looped one, on another seed and other "
        "windows of the held-out packages, after half of the steps (experiments/LOG.md, entry 24). The looped model's "
        "best was the highest of its three. The other arms take theirs from these two.",
        "The prediction is older than that pilot, in which the looped model read better than the plain one.",
        "A looped model differs from a plain one in more than loops: what enters the loop is normalised, and "
        "injected. Plain models with that stem have it too, and no layer that runs twice: in the pilot the stem was "
        "worth more than the loops, which is why they are here. They train at the looped model's rate, not tuned for "
        "them: if it is wrong for them, that favours the looped models.",
        "Intervals are over seeds, which change weights and windows of training; all read the same held-out windows. "
        "Their standard error (`error` in the results) says how far another text would move all of them.",
        "The trigram model has seen all of the training text, language models a fifth of it.",
        "Each verdict is at its own 5% level; nothing is corrected for their number.",
    )
    measured: ClassVar = {"loops": LOOPS, "windows": N_WINDOWS}

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [text_arms.cell(arm, seed=0, steps=QUICK_STEPS) for arm in QUICK]
        return [text_arms.cell(arm, seed=seed) for seed in range(3) for arm in MODELS]

    def measure(self, found: Trained) -> list[Row]:
        rows = reading_rows(self.name, found, loops=(1,) if found.cell.arm in ONCE else LOOPS)
        return [*rows, trigram_row(self.name, found)] if found.cell.arm == BIG else rows

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        there = {row["model"] for row in rows}
        looped = [arm for arm in LOOPED if arm in there]
        families = [(big, small) for big, small in FAMILIES if {big, small} <= there]
        verdicts = [self._reaches(rows, arm, *family) for family in families for arm in looped]
        verdicts += [self._closes(rows, arm, *family) for family in families for arm in looped]
        verdicts += [self._unrolled(rows)] if {UNROLLED, FIXED} <= there else []
        return verdicts + ([self._carry(rows)] if {NO_CARRY, FIXED} <= there else [])

    def _reaches(self, rows: Sequence[Row], arm: str, big: str, small: str) -> Verdict:
        ours, theirs = together(rows, arm, big)
        outcome, test = judging.costs_at_most(ours, theirs, CLOSE)
        if outcome == "holds":
            fewer, more = together(rows, small, big)
            easy, said = judging.costs_at_most(fewer, more, CLOSE)
            outcome = EASY[easy]
            test += f"; {TEXT_ARMS[small].title}: {said}"
        return self._said(
            "reaches",
            rows,
            (arm, big),
            claim=f"{TEXT_ARMS[arm].title}: as good as {TEXT_ARMS[big].title}",
            outcome=outcome,
            evidence=f"{judging.shown(ours)} against {judging.shown(theirs)} bits per byte",
            test=test,
        )

    def _closes(self, rows: Sequence[Row], arm: str, larger: str, smaller: str) -> Verdict:
        ours, small, big = together(rows, arm, smaller, larger)
        outcome: Outcome = "inconclusive"
        evidence = f"{' / '.join(map(judging.shown, (small, ours, big)))} bits per byte, small / looped / plain"
        test = f"none: {judging.seeds(len(ours))}"
        if len(ours) >= MIN_SEEDS:
            gain, share = judging.paired(small, big), shares(ours, small, big)
            outcome = judging.side(share, 0) if gain.low > 0 else "inconclusive"
            evidence += f"; share of the gap {judging.interval(share)}"
            test = f"95% t interval of the share; the gap {judging.interval(gain)}"
        return self._said(
            "closes",
            rows,
            (arm, smaller, larger),
            claim=f"{TEXT_ARMS[arm].title}: better than {TEXT_ARMS[smaller].title}",
            outcome=outcome,
            evidence=evidence,
            test=test,
        )

    def _unrolled(self, rows: Sequence[Row]) -> Verdict:
        ours, theirs = together(rows, FIXED, UNROLLED, metric="nats")
        outcome: Outcome = "inconclusive"
        test = f"none: {judging.seeds(len(ours))}"
        shown = [judging.shown(np.exp(nats).tolist()) for nats in (ours, theirs)]
        if len(ours) >= MIN_SEEDS:
            found = judging.paired(ours, theirs)
            ratio, low, high = (float(np.exp(x)) for x in (found.mean, found.low, found.high))
            outcome = judging.side(found, float(np.log(WORSE)))
            test = f"95% t interval of the ratio {ratio:.3f} [{low:.3f}, {high:.3f}] against {WORSE}"
        return self._said(
            "unrolled",
            rows,
            (FIXED, UNROLLED),
            claim=f"{TEXT_ARMS[FIXED].title}: worse than as many layers as its loops unroll to",
            outcome=outcome,
            evidence=f"perplexity of a token {shown[0]} against {shown[1]}",
            test=test,
        )

    def _carry(self, rows: Sequence[Row]) -> Verdict:
        ours, without = together(rows, FIXED, NO_CARRY)
        outcome, test = judging.is_better_paired(ours, without, margin=CLOSE)
        return self._said(
            "carry",
            rows,
            (NO_CARRY, FIXED),
            claim=f"At a fixed depth of {MEAN_LOOPS} loops a model is better without injection",
            outcome=outcome,
            evidence=f"{judging.shown(without)} without against {judging.shown(ours)} bits per byte with it",
            test=test,
        )

    def _said(self, rule: str, rows: Sequence[Row], compared: Sequence[str], **said: Any) -> Verdict:
        """Inconclusive where one of the models compared, the first of which the verdict is about, has not learnt."""
        if not all(beats_trigrams(rows, read(rows, model)) for model in compared):
            said |= {"outcome": "inconclusive", "test": f"not judged: one is no better than trigrams ({said['test']})"}
        return self.verdict(rule, rows, compared[0], **said)

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        models = [model for model in MODELS if pick_rows(rows, model=model)]
        tables = [_table(rows, models), costs_table(rows, models, arms=TEXT_ARMS, metric="bpb", loops=READ_AT)]
        return tables, [_picture(rows, models)]


def read(rows: Sequence[Row], model: str, *, metric: str = "bpb") -> list[float]:
    """By seed, at the loops that the rules name."""
    return values(rows, model=model, metric=metric, loops=READ_AT.get(model, 0))


def together(rows: Sequence[Row], *models: str, metric: str = "bpb") -> list[list[float]]:
    """Of each model by seed, of as many seeds as all have."""
    found = [read(rows, model, metric=metric) for model in models]
    return [part[: min(map(len, found))] for part in found]


def shares(ours: Sequence[float], small: Sequence[float], big: Sequence[float]) -> Summary:
    """What is gained on `small`, by seed, as a share of what `big` gains on the mean."""
    gap = float(np.mean(small) - np.mean(big))
    return summarise(((np.asarray(small) - np.asarray(ours)) / gap).tolist())


def _table(rows: Sequence[Row], models: Sequence[str]) -> Table:
    lines = []
    for model in models:
        first = pick_rows(rows, model=model, metric="bpb")[0]
        there = [values(rows, model=model, metric="bpb", loops=at) for at in LOOPS]
        cells = [judging.shown(found) if found else "–" for found in there]
        own = read(rows, model)
        head = (TEXT_ARMS[model].title, judging.seeds(len(own)), f"{first['total']:,}", f"{first['non_embedding']:,}")
        lines.append((*head, str(first["steps"]), judging.shown(own), *cells))
    head = ("model", "n", "parameters", "non-embedding", "steps", "as judged", *(f"{at} loops" for at in LOOPS))
    trigram = values(rows, metric="trigram")
    note = "mean ± sd over seeds; judged at the mean loops of training"
    note += f"; a byte trigram model of all the training text: {trigram[0]:.3f}" if trigram else ""
    return Table(title="Bits per byte of held-out text", head=head, rows=tuple(lines), note=note)


def _picture(rows: Sequence[Row], models: Sequence[str]) -> Picture:
    lines = []
    for model in models:
        arm = TEXT_ARMS[model]
        by_seed = np.array(
            [
                values(rows, model=model, metric="bpb", loops=READ_AT.get(model, 0) if model in FLAT else at)
                for at in LOOPS
            ]
        )
        lines.append(figures.Curve(label=arm.title, x=LOOPS, mean=by_seed.mean(-1), sd=spread(by_seed), kind=arm.role))
    figure = figures.curves(
        lines,
        title="Bits per byte of held-out text",
        xlabel="loops in the test",
        ylabel="bits per byte",
        log_x=True,
        ylim=_limits(lines),
    )
    caption = "Bits per byte by loops in the test, mean ± sd over seeds; models without a loop lie flat."
    return Picture(name="bits-per-byte-by-loops", caption=caption, image=figures.png(figure))


def _limits(lines: Sequence[figures.Curve]) -> tuple[float, float]:
    """Room for what is near the best: one loop of a model that never had so few would squeeze the rest."""
    best = min(float(line.mean.min()) for line in lines)
    return best - 0.05, best + 0.6
