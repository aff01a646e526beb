"""Fitting the halting gate once the rest is trained: its three features are cheap, its trunk stays as it is."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ritornello.config import require
from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.halting import GateHead, Signals
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.ops.loss import CHUNK_NUMBERS
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.evaluate import evaluating
from ritornello.train.step import to_device

MAX_EXAMPLES = 2**15  # (token, loop) pairs: plenty for 161 parameters


def fit_gate(
    model: RecurrentDepthTransformer,
    batches: Iterable[Batch],
    *,
    n_loops: int,
    steps: int = 300,
    lr: float = 1e-2,
    seed: int = 0,
) -> dict[str, float]:
    """Train the gate alone to tell, after each loop, whether stopping now would keep the prediction that n_loops give.

    Binary cross entropy on a frozen trunk; the target at a loop: its top-1 prediction, through the coda, is the deepest
    loop's. Returns `gate_loss` (nats) and `gate_agreement`, the share of positive targets.

    Raises:
        ValueError: the model has no gate, or there is no batch.
    """
    head = model.halting.head if not model.config.is_plain else None
    require(isinstance(head, GateHead), "halting", model.config.halting, "'gate'")
    assert isinstance(head, GateHead)
    with torch.no_grad(), evaluating(model):
        found = [_examples(model, batch, n_loops) for batch in batches]
    require(bool(found), "batches", 0, ">= 1")
    features, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(features), generator=generator)[:MAX_EXAMPLES].to(features.device)
    features, targets = features[chosen], targets[chosen]
    head.reset(torch.Generator(features.device).manual_seed(seed))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    loss = features.new_zeros(())
    with torch.enable_grad():
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(head.logits(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return {"gate_loss": loss.item(), "gate_agreement": targets.mean().item()}


def _examples(model: RecurrentDepthTransformer, batch: Batch, n_loops: int) -> tuple[Tensor, Tensor]:
    """Features (N, 3) and targets (N,) of every token with a label at every loop."""
    device = model.norm.weight.device
    documents = to_device(batch.documents, device)
    tokens = to_device(batch.tokens, device)
    x = model.embed(tokens)
    context = model.context(x, tokens=tokens, documents=documents)
    e = model.prelude(x, context, Passing())
    counted = to_device(batch.labels, device) != NO_LABEL
    run = Run(Depth.uniform(n_loops), weigh=True)
    before = model.start(e, context, torch.arange(len(e), device=device), run)
    features, answers = [], []
    for state in model.iterate(e, context, run):
        assert before.halt is not None and state.halt is not None
        h, h_before = model.carry.mean(state.h), model.carry.mean(before.h)
        features.append(Signals(h, h_before, state.halt.log_probs, before.halt.log_probs).features()[counted])
        answers.append(_top(model, model.coda(h, context, Passing())[counted]))
        before = state
    targets = [(answer == answers[-1]).to(features[0].dtype) for answer in answers]
    return torch.cat(features), torch.cat(targets)


def _top(model: RecurrentDepthTransformer, hidden: Tensor) -> Tensor:
    """(N,) the most likely token of hidden (N, D)."""
    size = max(1, CHUNK_NUMBERS // model.config.vocab_size)
    return torch.cat([model.logits(part).argmax(-1) for part in hidden.split(size)])
