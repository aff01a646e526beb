"""A sequence gives the same alone, in a batch, padded on either side, or packed with others."""

import numpy as np
import pytest
import torch

from ritornello.model.context import Capture
from ritornello.model.depth import Depth
from ritornello.ops.noise import Key
from tests.model.builders import build, close, differ, every_kind, lively, rules_for, tokens_for

T = 5
PAD = -1


@every_kind
def test_alone_in_a_batch_and_padded(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 3, T)
    documents = torch.tensor([[0] * T, [PAD, PAD, 0, 0, 0], [0, 0, 0, PAD, PAD]])
    batch = model(tokens, documents=documents, n_loops=5)
    for r, real in enumerate((slice(0, T), slice(2, T), slice(0, 3))):
        alone = model(tokens[r : r + 1, real], n_loops=5)
        close(batch.logits[r, real], alone.logits[0])
    differ(batch.logits[1, 2:], model(tokens[1:2], n_loops=5).logits[0, 2:])


@every_kind
def test_packed_documents_are_each_alone(row: dict) -> None:
    """With an exit rule too, and a budget for each document that starts late."""
    model = build(row)
    tokens = tokens_for(model.config, 1, 2 * T)
    documents = torch.tensor([[5] * 4 + [2] * 6])
    counts = np.array([[2] * 4 + [5] * 6])
    halves = (slice(0, 4), slice(4, 10))
    rule = lively(model, tokens, rules_for(model.config)[0], 5, documents=documents)
    with torch.no_grad():
        packed = model(tokens, documents=documents, n_loops=5).logits
        halted = model(tokens, documents=documents, n_loops=5, exit=rule).logits
        budgets = model(tokens, documents=documents, n_loops=torch.from_numpy(counts)).logits
        for part, n_loops in zip(halves, (2, 5), strict=True):
            close(packed[:, part], model(tokens[:, part], n_loops=5).logits)
            close(halted[:, part], model(tokens[:, part], n_loops=5, exit=rule).logits)
            close(budgets[:, part], model(tokens[:, part], n_loops=n_loops).logits)
        differ(packed[:, halves[1]], model(tokens, n_loops=5).logits[:, halves[1]])


@every_kind
def test_right_aligned_packed_documents(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 2, 6)
    documents = torch.tensor([[0] * 4 + [1] * 2, [3] * 6])
    counts = np.array([[2] * 4 + [5] * 2, [3] * 6])
    right = model(tokens, documents=documents, n_loops=Depth.right_aligned(counts))
    left = model(tokens, documents=documents, n_loops=torch.from_numpy(counts))
    close(right.logits, left.logits)
    differ(right.logits, model(tokens, documents=documents, n_loops=5).logits)
    assert right.loops_used.tolist() == counts.tolist()


def test_attention_never_crosses_documents() -> None:
    model = build({})
    x = model.embed(tokens_for(model.config, 1, 6)).detach().requires_grad_()
    out = model(inputs_embeds=x, documents=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    (grad,) = torch.autograd.grad(out.logits[:, 3:].square().sum(), x)
    assert not grad[:, :3].any() and grad[:, 3:].all(-1).any()


@pytest.mark.parametrize("kind", ["noise", "dropout"])
def test_randomness_belongs_to_the_sequence(kind: str) -> None:
    """Keyed by (seed, step, sequence id, position in the document): not by row, batch or place in a packed row."""
    model = build({"initial_state": "noise", "dropout": 0.3 if kind == "dropout" else 0.0}).train()
    tokens = tokens_for(model.config, 3, T)
    ids = torch.tensor([40, 7, 23])
    batch = model(tokens, key=Key(1, 2, ids)).logits
    flipped = model(tokens.flip(0), key=Key(1, 2, ids.flip(0))).logits
    close(flipped.flip(0), batch)
    close(model(tokens[1:2], key=Key(1, 2, ids[1:2])).logits, batch[1:2])
    padded = torch.cat((tokens[1:2, :2], tokens[1:2]), 1)
    documents = torch.tensor([[PAD] * 2 + [0] * T])
    close(model(padded, documents=documents, key=Key(1, 2, ids[1:2])).logits[:, 2:], batch[1:2])
    for other in (Key(1, 2, ids + 1), Key(1, 3, ids), Key(2, 2, ids)):
        differ(model(tokens, key=other).logits, batch)


def test_every_branch_and_loop_drops_other_channels() -> None:
    model = build({"dropout": 0.5, "layers": (0, 2, 0)}).train()
    capture = Capture(frozenset(f"{layer}.{branch}" for layer in (0, 1) for branch in ("attention", "ffn")))
    model(tokens_for(model.config, 2, T), n_loops=3, key=Key(1), capture=capture)
    masks = [(y != 0).flatten().tolist() for captured in capture.tensors.values() for _, y in captured]
    assert len({tuple(mask) for mask in masks}) == 2 * 2 * 3
    assert 0.3 < sum(map(sum, masks)) / sum(map(len, masks)) < 0.7


def test_a_row_of_padding_stays_finite() -> None:
    model = build({"initial_state": "noise", "halting": "gate"})
    tokens = tokens_for(model.config, 2, T)
    documents = torch.tensor([[PAD] * T, [0] * T])
    rule = lively(model, tokens, "kl", 5)
    out = model(tokens, documents=documents, n_loops=5, exit=rule)
    assert out.logits.isfinite().all()
    out.logits[1].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        close(model(tokens, documents=documents, n_loops=5).logits[1], model(tokens[1:], n_loops=5).logits[0])


def test_nothing_but_padding_has_finite_terms() -> None:
    model = build({"halting": "act", "read_out": "mixture"}).train()
    out = model(tokens_for(model.config, 2, T), documents=torch.full((2, T), PAD))
    assert out.aux and all(term.isfinite() for term in out.aux.values()) and out.aux["ponder"] == 0
