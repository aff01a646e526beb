"""An exit threshold whose risk is stated and controlled, by Learn then Test (2110.01052), as CALM does (2207.07061).

A few sequences propose thresholds, by the depths that they would give; others test them, each by a pass of its own: a
halted token is frozen, and later tokens see it so, which no pass at full depth tells. Proposing on the sequences that
are tested would let the sample choose its hypotheses, and void their p-values.

Sequences are drawn from the text at random, so the promise is about its sequences, and about others as far as they are
like these. Each token predicts the next one of the text as it is written; what the model writes itself is not promised.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.config import DEFAULT_RULES, ExitName, ExitRule, Measure, require, require_int
from ritornello.engine.calibration import Calibration, Goal
from ritornello.engine.generate import OVERFLOWED, Loaded
from ritornello.engine.risk import n_needed, n_rejected, p_values
from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.halting import EXIT_TESTS, LEARNED_RULES, Signals, check_exit
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.model.state import LoopState
from ritornello.ops.loss import linear_cross_entropy
from ritornello.train import checkpoint, held_out
from ritornello.train.data import NO_LABEL, Batch, Rows, shuffled
from ritornello.train.evaluate import evaluating
from ritornello.train.shards import Progress
from ritornello.train.step import to_device

N_SEQUENCES = 512  # that are tested, if there are so many
N_PROPOSING = 16  # others, at most
N_THRESHOLDS = 16
SEED = 0  # of the draw: one draw, so that nobody looks for a lucky one
Array = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Tested:
    """A threshold: mean loops and mean risk of the sequences tested, the p-value of a risk above the goal's, and
    whether it holds: it and all before it were shown not to be above."""

    threshold: float
    mean_loops: float
    mean_risk: float
    p_value: float
    holds: bool


@dataclass(frozen=True)
class Outcome:
    """Every threshold, the most careful first; `calibration` is of the last that holds, None if none does."""

    goal: Goal
    tested: tuple[Tested, ...]
    n_sequences: int
    seq_len: int
    calibration: Calibration | None = None

    def shortfall(self) -> str:
        """Why none holds, and what would help."""
        goal, first = self.goal, self.tested[0]
        what = f"{goal.condition(first.threshold)}, the most careful threshold,"
        if (n := n_needed(first.mean_risk, goal.risk, goal.level)) is None:
            return f"none holds: use full depth; {what} has a risk of {goal.shown(first.mean_risk)}: allow more"
        n = max(2 * n, n + 64)  # its risk may turn out higher next time
        enough = f"{what} would need about {n} sequences, {self.n_sequences} were tested"
        return f"none holds: use full depth; {enough}: --tokens {n * self.seq_len}, of text that has so many"


def calibrate(
    loaded: Loaded,
    *,
    risk: float = 0.05,
    confidence: float = 0.95,
    rule: ExitName | None = None,
    measure: Measure = "disagreement",
    n_loops: int | None = None,
    min_loops: int = 1,
    data: str | Path | None = None,
    tokens: int | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Find the threshold with the fewest loops whose mean risk over sequences is at most `risk`, but for a chance of
    1 - `confidence` that it is not. What is risked: see `Goal`. `save` keeps what is found, `calibrated` uses it.

    Args:
        rule: None: the one that the model was made for, `delta` without one. Choosing among several calibrations voids
            what each promises, unless each had its share of 1 - confidence.
        n_loops: full depth, None: the model's own; min_loops: no token stops before.
        data: a file or folder of text that the model has not learnt from; None: the run's validation split.
        tokens: so many are tested; None: 512 sequences of the length of training, if there are so many.
        cache_dir: where tokenised data is kept; default ~/.cache/ritornello.

    Raises:
        ValueError: an argument out of range, a rule that the model can't follow, or no such text.
    """
    model, about, recipe = loaded.model, loaded.manifest, loaded.recipe
    goal = Goal(
        rule=rule or DEFAULT_RULES.get(model.config.halting, "delta"),
        n_loops=model.config.n_loops if n_loops is None else n_loops,
        min_loops=min_loops,
        measure=measure,
        risk=risk,
        confidence=confidence,
    )
    check_exit(model.config, goal.exit(1.0))
    require(about is not None, "loaded", "weights other than saved", "the exact weights of a run")
    assert about is not None
    if data is None:
        where: Any = {"cache_dir": cache_dir, "offline": offline, "progress": progress}
        text = held_out.of_run(recipe.data, about.fingerprint, **where)
    else:
        text = held_out.of_files(data, recipe.data, loaded.tokenizer)
    drawn, size = draw(text.rows, tokens), recipe.train.batch_size // recipe.train.accumulation
    proposing, testing = ([text.rows.read(part) for part in _parts(ids, size)] for ids in drawn)
    tested = _tested(loaded, goal, proposing, testing, progress)
    outcome = Outcome(goal, tested, len(drawn[1]), recipe.data.seq_len)
    return replace(outcome, calibration=_found(outcome, about, text.fingerprint))


def _found(outcome: Outcome, about: checkpoint.Manifest, fingerprint: str) -> Calibration | None:
    last = next((one for one in reversed(outcome.tested) if one.holds), None)
    if last is None:
        return None
    return Calibration(
        goal=outcome.goal,
        threshold=last.threshold,
        mean_loops=last.mean_loops,
        mean_risk=last.mean_risk,
        p_value=last.p_value,
        n_sequences=outcome.n_sequences,
        seq_len=outcome.seq_len,
        step=about.step,
        weights_sha256=about.weights_sha256,
        data_fingerprint=fingerprint,
    )


def draw(rows: Rows, tokens: int | None) -> tuple[Ids, Ids]:
    """Rows that propose thresholds and others that test them, at random, none twice."""
    n_proposing = max(1, min(N_PROPOSING, len(rows) // 8))
    most = len(rows) - n_proposing
    require(most > 0, "held-out text", f"{len(rows)} sequences", "at least 2 sequences", "give more text")
    if tokens is None:
        n = min(N_SEQUENCES, most)
    else:
        require_int("tokens", tokens, rows.seq_len, most * rows.seq_len)
        n = tokens // rows.seq_len
    drawn = shuffled(np.arange(n_proposing + n), n=len(rows), seed=SEED)
    return drawn[:n_proposing], drawn[n_proposing:]


def propose(values: Array, goal: Goal, n: int = N_THRESHOLDS) -> list[float]:
    """Up to `n` thresholds, the most careful first, that spread mean depths evenly from full depth to `min_loops`.

    values: (n_loops - 1, N), what the rule compares with its threshold, of N tokens after each loop but the last.
    """
    sign = 1.0 if goal.rule in LEARNED_RULES else -1.0  # a token leaves where sign · value reaches sign · threshold
    reached = np.sort(np.maximum.accumulate(sign * values[goal.min_loops - 1 :], axis=0), axis=1)
    candidates = np.unique(np.quantile(reached, np.linspace(0, 1, 1025), method="nearest"))[::-1]
    loops = goal.min_loops + sum(np.searchsorted(row, candidates) for row in reached) / reached.shape[1]
    wanted = np.linspace(goal.n_loops, goal.min_loops, n + 1)[1:]
    nearest = np.abs(loops - wanted[:, None]).argmin(1)
    highest = 1.0 if goal.rule in LEARNED_RULES else np.inf
    chosen = (sign * candidates[nearest]).clip(0, highest)
    return list(dict.fromkeys(float(f"{x:.6g}") for x in chosen))


def judge(goal: Goal, thresholds: Sequence[float], loops: Array, risks: Array) -> tuple[Tested, ...]:
    """loops, risks: (G, n), of each sequence under each threshold, the most careful first."""
    p = p_values(risks, goal.risk)
    n_holding = n_rejected(p, goal.level)
    return tuple(
        Tested(x, float(loops[i].mean()), float(risks[i].mean()), float(p[i]), i < n_holding)
        for i, x in enumerate(thresholds)
    )


def _tested(
    loaded: Loaded, goal: Goal, proposing: Sequence[Batch], testing: Sequence[Batch], progress: Progress | None
) -> tuple[Tested, ...]:
    model, found = loaded.model, []
    with evaluating(model):
        values = np.concatenate([signals(model, batch, goal) for batch in proposing], axis=1)
        require(values.size > 0, "held-out text", "no token to predict", "longer")
        thresholds = propose(values, goal)
        rules = [goal.exit(x) for x in thresholds]
        for i, batch in enumerate(testing):
            if progress:
                progress("test thresholds", i, len(testing))
            found.append(compare(model, batch, rules, goal, vocab_size=loaded.tokenizer.vocab_size))
    loops, risks = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return judge(goal, thresholds, loops, risks)


@torch.no_grad()
def signals(model: RecurrentDepthTransformer, batch: Batch, goal: Goal) -> Array:
    """(n_loops - 1, N): what the rule compares with its threshold, of the batch's N tokens that predict something."""
    tokens, documents = _inputs(model, batch)
    never = ExitRule(goal.rule, 1.0, min_loops=goal.n_loops)
    run = Run(Depth.uniform(goal.n_loops), exit=never)
    x = model.embed(tokens)
    context = model.context(x, tokens=tokens, documents=documents)
    e = model.prelude(x, context, Passing())
    before, found = model.start(e, context, torch.arange(len(x), device=x.device), run), []
    for now in model.iterate(e, context, run):
        found.append(_signal(model, goal.rule, before, now).cpu().double().numpy())
        before = now
    asked = np.stack(found[:-1])[:, batch.labels != NO_LABEL]
    if not np.isfinite(asked).all():
        raise ArithmeticError(OVERFLOWED)
    return asked


def _signal(model: RecurrentDepthTransformer, rule: ExitName, before: LoopState, now: LoopState) -> Tensor:
    """(B, T), after the loop that led from one state to the next."""
    assert before.halt is not None and now.halt is not None
    if rule == "cumulative":
        return 1 - now.halt.survival
    if rule == "hazard":
        left = before.halt.survival
        return torch.where(left > 0, now.halt.weight / left, 1.0)
    h, old = model.carry.mean(now.h), model.carry.mean(before.h)
    return EXIT_TESTS[rule](Signals(h, old, now.halt.log_probs, before.halt.log_probs))


@torch.no_grad()
def compare(
    model: RecurrentDepthTransformer, batch: Batch, rules: Sequence[ExitRule], goal: Goal, *, vocab_size: int
) -> tuple[Array, Array]:
    """(G, B) each: the mean loops of a sequence's tokens under each rule, and its risk. A sequence without a token that
    predicts something risks nothing."""
    tokens, documents = _inputs(model, batch)
    labels, asked = to_device(batch.labels, tokens.device), torch.from_numpy(batch.labels != NO_LABEL)
    score, cost = MEASURES[goal.measure]

    def run(rule: ExitRule | None) -> tuple[Tensor, Tensor]:
        out = model(tokens, n_loops=goal.n_loops, exit=rule, documents=documents, return_logits=False)
        if not bool(out.hidden.isfinite().all()):
            raise ArithmeticError(OVERFLOWED)
        return out.loops_used, score(model, out.hidden, labels, vocab_size)

    def mean(of_tokens: Tensor) -> Array:
        return ((of_tokens.cpu().double() * asked).sum(1) / asked.sum(1).clamp(min=1)).numpy()

    _, full = run(None)
    loops, risks = [], []
    for rule in rules:
        used, early = run(rule)
        loops.append(mean(used))
        risks.append(mean(cost(full, early)).clip(0, 1))
    return np.stack(loops), np.stack(risks)


def _answers(model: RecurrentDepthTransformer, hidden: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """(B, T): the likeliest token, row by row, since the logits of all rows may not fit."""
    return torch.stack([model.logits(row)[:, :vocab_size].argmax(-1) for row in hidden])


def _losses(model: RecurrentDepthTransformer, hidden: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """(B, T), in nats."""
    losses = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, labels.flatten(), reduction="none")
    return losses.view(labels.shape)


# what is read of a pass, and what a token's second reading costs against the first
MEASURES: dict[Measure, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "disagreement": (_answers, torch.ne),
    "loss": (_losses, lambda full, early: early - full),
}


def _parts(ids: Ids, size: int) -> Iterator[Ids]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _inputs(model: RecurrentDepthTransformer, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Tokens, and documents where a row has more than one, or padding."""
    device = model.norm.weight.device
    packed = (batch.documents != batch.documents[:, :1]).any()
    return to_device(batch.tokens, device), to_device(batch.documents, device) if packed else None
