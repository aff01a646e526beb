"""Questions answered in so many turns, loops in silence or tokens in writing: rows of accuracy, turns, FLOPs and time,
and what they say by seed."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ritornello.config import ExitRule, ModelConfig
from ritornello.lab import arms
from ritornello.lab.cell import Trained, sizes
from ritornello.lab.experiments.accuracies import HOPS, knows
from ritornello.lab.measure import Row, pick_rows, row, values
from ritornello.lab.tasks.chains import Chains
from ritornello.lab.writing import Asked, by_turns, n_written, silent_flops, write, writing_flops
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.evaluate import hidden_by_depth

TASK = Chains()
PROMPT = TASK.n_nodes + 1  # tokens: the edges and one question
N_QUESTIONS = 128  # for each number of hops
TURNS = 32  # loops or written tokens, at most
GATE = ExitRule("hazard", 0.9)
NEVER = ExitRule("hazard", 1.0)  # the gate is read and nothing stops
TIMED, REPEATS = (2, 6, 11, 21), 15  # loops or tokens, one more than the hops that they answer
NO_GATE = "dense, no gate"  # a way to answer that is timed
LOOPED, WRITER, ONE, DEEP = "dense", "writes", "plain-one-layer", "plain-depth"
EVERY = (LOOPED, WRITER, ONE, DEEP)
TRAINING = tuple(hops for hops in HOPS if hops <= TASK.train_hops)
BEYOND = tuple(hops for hops in HOPS if hops > TASK.train_hops)
RANGES = {"training hops": TRAINING, "beyond": BEYOND}
ENOUGH = 0.9  # of accuracy: so many loops or tokens are enough for so many hops


def _facts(found: Trained) -> Row:
    return {
        **sizes(found.cell),
        "training_flops": found.flops,
        "training_seconds": round(found.seconds, 1),
        "peak_bytes": found.peak_bytes,
    }


def silent_rows(experiment: str, found: Trained, asked: Mapping[int, Asked]) -> list[Row]:
    """Accuracy by hops and loops; where a looped model's tokens stop by its gate also its loops and FLOPs, of each
    token and of all if they went on as long as the question. A plain model has one answer."""
    model, config, rows = found.model, found.cell.model, []
    plain, facts = config.is_plain, _facts(found)

    def right(hidden: torch.Tensor, some: Asked) -> float:
        chosen = model.logits(hidden[:, -1])[:, : TASK.n_nodes].argmax(-1)
        return float((chosen == some.answers).double().mean())

    for hops, some in asked.items():

        def add(metric: str, value: float, hops: int = hops, **more: Any) -> None:
            rows.append(row(experiment, found, metric=metric, value=value, n=N_QUESTIONS, hops=hops, **facts, **more))

        depths = (1,) if plain else tuple(range(1, TURNS + 1))
        for turns, hidden in zip(depths, hidden_by_depth(model, some.prompts, None, depths), strict=True):
            add("accuracy", right(hidden, some), turns=turns, rule="own" if plain else None)
        if plain:
            add("turns_used", 1.0, rule="own")
            add("flops", writing_flops(config, PROMPT, 1), rule="own")
            continue
        out = model(some.prompts, n_loops=TURNS, exit=GATE, return_logits=False)
        used, every = out.loops_used[:, -1].double().mean().item(), out.loops_used.double().sum(1).mean().item()
        add("accuracy", right(out.hidden, some), rule="own")
        add("turns_used", used, rule="own")
        add("flops", silent_flops(config, PROMPT, every), rule="own")
        add("flops", silent_flops(config, PROMPT, PROMPT * used), rule="all loop")
    return rows


def written_rows(experiment: str, found: Trained, asked: Mapping[int, Asked]) -> list[Row]:
    """Accuracy by hops and written tokens, the last of which is the answer; where the writer stops by itself also its
    tokens and FLOPs."""
    rows, facts = [], _facts(found)
    for hops, some in asked.items():
        written = write(found.model, some.prompts, TURNS)
        used = n_written(some.prompts, written)
        right = (written == some.answers[:, None]).double()
        mean = used.double().mean().item()
        own_answers = right.gather(1, used[:, None] - 1).mean().item()
        accuracies = {turns: right[:, turns - 1].mean().item() for turns in range(1, TURNS + 1)}
        where: dict[str, Any] = {"n": N_QUESTIONS, "hops": hops, **facts}
        rows += [
            row(experiment, found, metric="accuracy", value=value, turns=turns, rule=None, **where)
            for turns, value in accuracies.items()
        ]
        for metric, value in (
            ("accuracy", own_answers),
            ("turns_used", mean),
            ("flops", writing_flops(found.cell.model, PROMPT, mean)),
        ):
            rows.append(row(experiment, found, metric=metric, value=value, rule="own", **where))
    return rows


def time_rows(experiment: str, found: Trained, looped: ModelConfig) -> list[Row]:
    """Milliseconds of one answer with so many loops, or so many written tokens; what the weights are doesn't matter."""
    model = RecurrentDepthTransformer(looped).eval()
    prompt = Asked.of(TASK, 1, 1).prompts
    rows = []

    def silent(turns: int, exit: ExitRule | None) -> torch.Tensor:
        return model.logits(model(prompt, n_loops=turns, exit=exit, return_logits=False).hidden[:, -1])

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for turns in TIMED:
            ways = {
                LOOPED: partial(silent, turns, NEVER),
                NO_GATE: partial(silent, turns, None),
                WRITER: partial(write, found.model, prompt, turns),
            }
            for name, ms in by_turns(ways, REPEATS).items():
                where = {"n": REPEATS, "turns": turns, "way": name}
                rows.append(row(experiment, found, metric="milliseconds", value=ms, **where))
    torch.set_num_threads(n_threads)
    return rows


def own(rows: Sequence[Row], arm: str, metric: str, hops: Sequence[int]) -> list[float]:
    """By seed, where the model stops by itself: the mean over several numbers of hops, each of the same weight."""
    found = [values(rows, model=arm, metric=metric, hops=k, rule="own") for k in hops]
    return np.mean(found, axis=0).tolist()


def learnt(rows: Sequence[Row], arm: str) -> bool:
    """Whether it knows the training hops: a looped model at the most loops of training, not by its gate."""
    how: dict[str, Any] = {"turns": arms.MAX_LOOPS, "rule": None} if arm == LOOPED else {"rule": "own"}
    return knows(rows, TRAINING, model=arm, **how)


def flops(rows: Sequence[Row], arm: str, hops: Sequence[int]) -> list[float]:
    return own(rows, arm, "flops", hops)


def timing(rows: Sequence[Row], way: str) -> list[tuple[float, float]]:
    """By seed: milliseconds of each turn, and of what is done once, by the line through those measured."""
    found = pick_rows(rows, metric="milliseconds", way=way)
    by_seed = [pick_rows(found, seed=seed) for seed in dict.fromkeys(r["seed"] for r in found)]
    return [tuple(np.polyfit([r["turns"] for r in x], values(x), 1).tolist()) for x in by_seed]


def latency(rows: Sequence[Row], arm: str, hops: Sequence[int]) -> list[float]:
    used = own(rows, arm, "turns_used", hops)
    return [once + each * n for (each, once), n in zip(*paired(timing(rows, arm), used), strict=True)]


def paired(a: Sequence[Any], b: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Of the seeds that both have: a part of the cells is whole seeds first."""
    n = min(len(a), len(b))
    return a[:n], b[:n]


def turns_needed(rows: Sequence[Row], arm: str, seed: int) -> dict[int, int]:
    """By hops: the fewest loops or written tokens that are right in ENOUGH of the questions; hops that none is enough
    for are left out."""
    found = {}
    for hops in HOPS:
        there = pick_rows(rows, model=arm, seed=seed, hops=hops, metric="accuracy", rule=None)
        enough = [r["turns"] for r in there if r["value"] >= ENOUGH]
        found |= {hops: min(enough)} if enough else {}
    return found


def hops_a_turn(rows: Sequence[Row], arm: str) -> list[float]:
    """By seed: how many more hops one more loop or token answers, by the least-squares line; nan below three hops, or
    where more hops take no more turns."""
    found = [turns_needed(rows, arm, seed) for seed in dict.fromkeys(r["seed"] for r in pick_rows(rows, model=arm))]
    slopes = [float(np.polyfit(list(x), list(x.values()), 1)[0]) if len(x) > 2 else 0.0 for x in found]
    return [1 / slope if slope > 1e-6 else float("nan") for slope in slopes]
