"""What a model knows on the way: after the embedding, the prelude, each loop, the coda."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ritornello.lab.cell import TEST_SEED
from ritornello.lab.measure import STREAM, Questions
from ritornello.lab.tasks import Split, Task
from ritornello.lab.tasks.graphs import read_parents, walk
from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.train import depth
from ritornello.train.data import NO_LABEL
from ritornello.train.evaluate import evaluating

RIDGE = 1e-3  # of a probe, as a share of its inputs' mean square


def states(model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int) -> dict[str, Tensor]:
    """(B, T, D) by stage: `embedding`, `prelude`, `loop 1` to `loop n`, `coda`."""
    x = model.embed(tokens)
    context = model.context(x, tokens=tokens)
    e = model.prelude(x, context, Passing())
    found = {"embedding": x, "prelude": e}
    for i, state in enumerate(model.iterate(e, context, Run(Depth.uniform(n_loops))), start=1):
        found[f"loop {i}"] = model.read_out(state)
    return found | {"coda": model.coda(found[f"loop {n_loops}"], context, Passing())}


@torch.no_grad()
def skipping(model: RecurrentDepthTransformer, questions: Questions, n_loops: int) -> dict[str, dict[int, float]]:
    """Accuracy by hops where a part is left out: `loop` (the coda reads the prelude's output), `loop and coda` (the
    head does: a logit lens), `coda` (the head reads the state after n_loops)."""
    found: dict[str, dict[int, float]] = {"loop": {}, "loop and coda": {}, "coda": {}}
    with evaluating(model):
        for k, tokens, labels, asked in questions.tensors():
            there = states(model, tokens, n_loops)
            e, h = there["prelude"], there[f"loop {n_loops}"]
            hidden = {
                "loop": model.coda(e, model.context(e, tokens=tokens), Passing()),
                "loop and coda": model.norm(e),
                "coda": model.norm(h),
            }
            for name, x in hidden.items():
                found[name][k] = float((model.logits(x[asked]).argmax(-1) == labels[asked]).double().mean())
    return found


@torch.no_grad()
def reached(
    model: RecurrentDepthTransformer, task: Task, *, hops: int, n_loops: int, n_ahead: int, n_problems: int
) -> Mapping[str, list[float]]:
    """By stage, for k = 0 to n_ahead: how often a linear map of a question's state names the node k hops on.

    Fitted on `n_problems` training problems of depth `hops`, tried on as many test problems, on questions of at least
    n_ahead hops, whose nodes all differ. The task is one on graphs.
    """
    with evaluating(model):
        (x, y), (x_test, y_test) = (
            _asked(model, task, hops, n_loops, n_ahead, n_problems, s) for s in ("train", "test")
        )
    return {
        stage: [_probe(x[stage], y[k], x_test[stage], y_test[k], task.vocab_size) for k in range(n_ahead + 1)]
        for stage in x
    }


def _asked(
    model: RecurrentDepthTransformer, task: Task, hops: int, n_loops: int, n_ahead: int, n_problems: int, split: Split
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The states (N, D) of the questions by stage, and the nodes (N,) by hops on."""
    found = task.sample(depth.generator(TEST_SEED, hops, STREAM), np.full(n_problems, hops), split=split)
    kept = torch.from_numpy((found.answers != NO_LABEL) & (found.hops >= n_ahead))
    parents = read_parents(found.tokens)
    nodes = [torch.from_numpy(walk(parents, np.full(n_problems, k))) for k in range(n_ahead + 1)]
    there = states(model, torch.from_numpy(found.tokens), n_loops)
    asked = kept[:, kept.shape[1] // 2 :]
    return {stage: x[kept] for stage, x in there.items()}, [of[asked] for of in nodes]


def _probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, n_classes: int) -> float:
    """Accuracy on the test of the least-squares map, with an intercept, from x (N, D) to one of n_classes y (N,)."""
    scale = x.square().mean().sqrt().clamp(min=1e-12)
    a, b = (torch.cat((z / scale, torch.ones(len(z), 1)), 1).double() for z in (x, x_test))
    wanted = torch.nn.functional.one_hot(y, n_classes).double()
    weights = torch.linalg.solve(a.T @ a + RIDGE * len(a) * torch.eye(a.shape[1]).double(), a.T @ wanted)
    return float(((b @ weights).argmax(-1) == y_test).double().mean())
