"""What is measured of a trained model: accuracy by hops and loops, with and without stopping, and what it costs."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ritornello.accounting import at_mean_loops, kv_bytes_per_token
from ritornello.config import ExitRule
from ritornello.lab.cell import TEST_SEED, Trained, sizes, to_batch
from ritornello.lab.statistics import rank_correlation
from ritornello.lab.tasks import Material, Problems
from ritornello.lab.tasks.base import Ids
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import depth
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.evaluate import evaluating, hidden_by_depth

N_QUESTIONS = 128  # for each number of hops; the same ones for every arm and seed
STREAM = 3  # of the host's random numbers
Row = dict[str, Any]


def problems(task: Material, hops: int, *, told: bool, n: int = 0) -> Batch:
    """Test problems that ask `n` questions of `hops` hops and no others; n = 0: N_QUESTIONS.

    The problems are as deep as training's, or as `hops` where that is more: a question of few hops comes in the kind
    of problem that training asked it in.
    """
    n = n or N_QUESTIONS
    rng = depth.generator(TEST_SEED, hops, STREAM)
    deepest = hops if task.loops_say_hops else max(hops, task.train_hops)
    found = task.sample(rng, np.full(n, deepest), split="test")
    wanted = found.hops == hops
    count = wanted.cumsum().reshape(wanted.shape)
    assert count[-1, -1] >= n, f"{count[-1, -1]} questions of {hops} hops in {n} problems"
    rows = slice(int(np.searchsorted(count[:, -1], n)) + 1)
    batch = to_batch(task, Problems(found.tokens[rows], found.answers[rows], found.hops[rows]), told=told)
    batch.labels[:] = np.where((wanted & (count <= n))[rows], batch.labels, NO_LABEL)
    return batch


def all_questions(task: Material, hops: int, *, n: int) -> tuple[Batch, Ids]:
    """`n` test problems of depth `hops` with all their questions of at least one hop, and each question's hops."""
    found = task.sample(depth.generator(TEST_SEED, hops, STREAM), np.full(n, hops), split="test")
    batch = to_batch(task, found, told=False)
    batch.labels[:] = np.where(found.hops > 0, batch.labels, NO_LABEL)
    return batch, found.hops[batch.labels != NO_LABEL]


@dataclass(frozen=True)
class Questions:
    """The same questions of each number of hops, for a model that is told it or not."""

    asked: Mapping[int, Batch]

    @staticmethod
    def of(model: RecurrentDepthTransformer, task: Material, hops: Sequence[int], n: int = 0) -> "Questions":
        told = model.config.is_plain
        return Questions({k: problems(task, k, told=told, n=n) for k in hops})

    def tensors(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """hops, tokens, labels and where there is one"""
        for k, batch in self.asked.items():
            labels = torch.from_numpy(batch.labels)
            yield k, torch.from_numpy(batch.tokens), labels, labels != NO_LABEL


def accuracy(
    model: RecurrentDepthTransformer, questions: Questions, loops: Sequence[int]
) -> dict[int, dict[int, float]]:
    """{loops: {hops: share of right answers}}; a plain model's one prediction stands under every number of loops."""
    return _scores(model, questions, loops, lambda logits, labels: (logits.argmax(-1) == labels).double().mean())


def nats(model: RecurrentDepthTransformer, questions: Questions, loops: Sequence[int]) -> dict[int, dict[int, float]]:
    """{loops: {hops: cross entropy of an answer}}"""
    return _scores(model, questions, loops, lambda logits, labels: F.cross_entropy(logits.double(), labels))


@torch.no_grad()
def _scores(
    model: RecurrentDepthTransformer,
    questions: Questions,
    loops: Sequence[int],
    score: Callable[[Tensor, Tensor], Tensor],
) -> dict[int, dict[int, float]]:
    depths = sorted(set(loops))
    found: dict[int, dict[int, float]] = {at: {} for at in depths}
    with evaluating(model):
        for k, tokens, labels, asked in questions.tensors():
            for at, hidden in zip(depths, hidden_by_depth(model, tokens, None, depths), strict=True):
                found[at][k] = float(score(model.logits(hidden[asked]), labels[asked]))
    return found


@torch.no_grad()
def stopping(
    model: RecurrentDepthTransformer, questions: Questions, rule: ExitRule, *, max_loops: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each number of hops: whether each question was answered right, and its loops, where `rule` ends them."""
    with evaluating(model):
        for k, tokens, labels, asked in questions.tensors():
            out = model(tokens, n_loops=max_loops, exit=rule, return_logits=False)
            right = model.logits(out.hidden[asked]).argmax(-1) == labels[asked]
            yield k, right.numpy(), out.loops_used[asked].numpy()


@torch.no_grad()
def latency(model: RecurrentDepthTransformer, task: Material, *, repeats: int = 9) -> tuple[float, float]:
    """Milliseconds for one problem: of what runs once, and of each loop. The fastest of `repeats`, one at a time, since
    whatever else the machine does can only add."""
    tokens = torch.from_numpy(problems(task, 1, told=model.config.is_plain, n=1).tokens)
    with evaluating(model):
        one, nine = (_fastest_ms(model, tokens, n_loops, repeats) for n_loops in (1, 9))
    per_loop = 0.0 if model.config.is_plain else max(0.0, (nine - one) / 8)
    return one - per_loop, per_loop


def _fastest_ms(model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        model(tokens, n_loops=n_loops)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


class Costs:
    """What every row of a trained model states beside its result; latency and cache at the row's number of loops."""

    def __init__(self, found: Trained, task: Material) -> None:
        self.found, self.plain = found, found.cell.model.is_plain
        self.once_ms, self.loop_ms = latency(found.model, task)

    def at(self, loops: float) -> Row:
        """loops: those used, a mean where tokens stop by themselves; 0 for a plain model."""
        how: Any = {"policy": "per_loop", "bytes_per_number": 4}
        kv_bytes = at_mean_loops(lambda n: kv_bytes_per_token(self.found.cell.model, n_loops=n, **how), loops)
        return {
            **sizes(self.found.cell),
            "training_flops": self.found.flops,
            "training_seconds": round(self.found.seconds, 1),
            "peak_bytes": self.found.peak_bytes,
            "latency_ms": round(self.once_ms + loops * self.loop_ms, 3),
            "kv_bytes": round(kv_bytes),
        }


def row(experiment: str, found: Trained, *, metric: str, value: float | None, n: int, **where: Any) -> Row:
    """One line of results.jsonl; `where` gives hops, loops and costs. `n`: the questions behind `value`, which is None
    if not finite. steps: of training; diverged: the step at which its loss or gradient was not finite, or None."""
    cell = found.cell
    names = {"experiment": experiment, "task": cell.task, "role": cell.role, "model": cell.arm, "seed": cell.seed}
    value = None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
    place = {"hops": None, "loops": None, "metric": metric, "value": value, "n": n}
    more = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in where.items()}
    return names | place | {"steps": found.steps, "diverged": found.diverged} | more


def pick_rows(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows that have all these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Sequence[Row], **wanted: Any) -> list[float]:
    """Of the rows that have all these values, what was measured; what was not finite is left out."""
    return [row["value"] for row in pick_rows(rows, **wanted) if row["value"] is not None]


def accuracy_rows(
    experiment: str,
    found: Trained,
    *,
    hops: Sequence[int],
    loops: Sequence[int],
    n: int = 0,
    task: Material | None = None,
    **more: Any,
) -> list[Row]:
    """The map of accuracies. A plain model has one column, loops = 0. task: another test than that of training, which
    `more` names."""
    task = task or found.cell.build_material()
    costs, questions = Costs(found, task), Questions.of(found.model, task, hops, n)
    rows = []
    for at, by_hops in accuracy(found.model, questions, (1,) if costs.plain else loops).items():
        at = 0 if costs.plain else at
        for k, value in by_hops.items():
            where = {"hops": k, "loops": at, **costs.at(at), **more}
            rows.append(row(experiment, found, metric="accuracy", value=value, n=n or N_QUESTIONS, **where))
    return rows


def stopping_rows(
    experiment: str,
    found: Trained,
    rules: Mapping[str, ExitRule],
    *,
    hops: Sequence[int],
    max_loops: int,
    n: int = 0,
) -> list[Row]:
    """Accuracy and mean loops by hops where tokens stop by each of `rules`."""
    task, rows = found.cell.build_task(), []
    costs, questions = Costs(found, task), Questions.of(found.model, task, hops, n)
    for name, rule in rules.items():
        for k, right, used in stopping(found.model, questions, rule, max_loops=max_loops):
            where = {"hops": k, "loops": max_loops, "rule": name, **costs.at(float(used.mean()))}
            for metric, value in (("accuracy", right.mean()), ("loops_used", used.mean())):
                rows.append(row(experiment, found, metric=metric, value=float(value), n=len(used), **where))
    return rows


def correlation_rows(
    experiment: str, found: Trained, rules: Mapping[str, ExitRule], *, hops: int, max_loops: int, n: int
) -> list[Row]:
    """How well loops follow hops: Spearman's ρ between what a question needs and the loops that it took.

    All questions stand in problems of the same depth, so that the depth of the problem cannot tell what that of the
    question is. ρ is 0 where every question took as many loops.
    """
    task, rows = found.cell.build_task(), []
    costs, (asked, needed) = Costs(found, task), all_questions(task, hops, n=n)
    for name, rule in rules.items():
        ((_, _, used),) = stopping(found.model, Questions({hops: asked}), rule, max_loops=max_loops)
        rho = rank_correlation(needed, used)
        where = {"hops": hops, "loops": max_loops, "rule": name, **costs.at(float(used.mean()))}
        value = rho if math.isfinite(rho) else 0.0
        rows.append(row(experiment, found, metric="rank_correlation", value=value, n=len(used), **where))
    return rows
