from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ritornello.config import TrainConfig
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.noise import Key
from ritornello.train import losses
from ritornello.train.context_parallel import Pieces
from ritornello.train.losses import Inputs, Shares, linear_kl, total_loss, weights
from tests.train.small import batch, model_config, train_config

COUNTS = [1, 4, 2, 3]


def inputs(train: TrainConfig, *, counts: list[int] | int = 3, probe: int = 0, **config: object) -> Inputs:
    """A float64 forward pass whose micro-batch is the whole batch."""
    torch.manual_seed(0)
    model = RecurrentDepthTransformer(model_config(**config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rows = batch()
    depth = Depth.right_aligned(counts) if isinstance(counts, list) else Depth.uniform(counts)
    labels = torch.from_numpy(rows.labels)
    out = model(torch.from_numpy(rows.tokens), n_loops=depth, trajectory=True, weigh=True, return_logits=False)
    shares = Shares(n_targets=labels.numel(), tokens=1.0, loops=1.0, probe=probe)
    return Inputs(model=model, train=train, labels=labels, documents=None, key=Key(), out=out, shares=shares)


def by_loop(x: Inputs, row: int, n: int) -> tuple[Tensor, Tensor]:
    """Losses and exit probabilities (n, T) of one sequence that runs n loops, from a run of each depth."""
    tokens = torch.from_numpy(batch().tokens)[row : row + 1]
    hidden = [x.model(tokens, n_loops=k, return_logits=False).hidden[0] for k in range(1, n + 1)]
    ce = [F.cross_entropy(x.model.logits(h), x.labels[row], reduction="none") for h in hidden]
    states = x.model(tokens, n_loops=n, trajectory=True, weigh=True).trajectory
    return torch.stack(ce), torch.stack([state.halt.weight[0] for state in states])


@pytest.mark.parametrize("halting", ("act", "gate", "state_gate"))
@pytest.mark.parametrize("prior", ("entropy", "geometric"))
def test_expected_loss_and_prior_are_sums_over_each_sequences_loops(halting, prior):
    train = train_config(halting_loss="expected", halting_prior=prior, halting_prior_rate=0.3)
    x = inputs(train, counts=COUNTS, halting=halting)
    loss = surprise = torch.zeros((), dtype=torch.float64)
    for row, n in enumerate(COUNTS):
        ce, p = by_loop(x, row, n)
        torch.testing.assert_close(p.sum(0), torch.ones(12, dtype=torch.float64))
        q = torch.tensor([0.3 * 0.7**t for t in range(n)], dtype=torch.float64)
        q = q / q.sum() if prior == "geometric" else torch.ones(n)
        loss = loss + (p * ce).sum()
        surprise = surprise + (torch.xlogy(p, p) - p * q.log()[:, None]).sum()
    torch.testing.assert_close(losses.expected(x), loss / 48)
    torch.testing.assert_close(losses.prior(x), surprise / 48, atol=1e-6, rtol=1e-6)
    assert abs(losses.expected(x) - losses.next_token(x)) > 1e-4


def test_probe_reaches_the_probe_alone():
    x = inputs(train_config(), halting="kl", counts=COUNTS)
    loss = losses.probe(x)
    loss.backward()
    assert {name.split(".")[0] for name, p in x.model.named_parameters() if p.grad is not None} == {"probe"}
    state = x.trajectory[-1]
    p = x.model.logits(x.out.hidden)[state.rows].log_softmax(-1)
    q = x.model.logits(x.model.probe(state.h)).log_softmax(-1)
    steps = [losses.probe(replace(x, key=Key(step=step))) for step in range(losses.PROBE_STRIDE)]
    torch.testing.assert_close(torch.stack(steps).mean(), (p.exp() * (p - q)).sum(-1).sum() / 48)
    assert loss > 1e-3 and abs(steps[0] - steps[1]) > 1e-3


def test_probe_state_that_a_micro_batch_does_not_have():
    assert losses.probe(inputs(train_config(), halting="kl", counts=2, probe=3)) == 0


def test_linear_kl_in_chunks(monkeypatch):
    target, hidden, weight = torch.randn(7, 5), torch.randn(7, 5, requires_grad=True), torch.randn(11, 5)
    whole = linear_kl(target, hidden, weight)
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 22)
    torch.testing.assert_close(linear_kl(target, hidden, weight), whole)
    wanted = F.kl_div(
        (hidden @ weight.T).log_softmax(-1), (target @ weight.T).log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(whole, wanted.sum(-1))
    assert (linear_kl(target, target, weight).abs() < 1e-6).all() and (whole > 0.1).all()


def test_total_is_the_weighted_sum():
    train = train_config(balance_weight=0.5, ponder_weight=0.25)
    x = inputs(train, halting="act", read_out="mixture")
    table = weights(x.model.config, train)
    assert table == {"next_token": 1.0, "balance": 0.5, "ponder": 0.25}
    x.model.train()
    total, terms = total_loss(x, table)
    torch.testing.assert_close(total.detach(), sum(w * terms[name] for name, w in table.items()))
    assert all(not term.requires_grad for term in terms.values())


def test_which_losses_a_recipe_has():
    def names(*, train: TrainConfig | None = None, **config: object) -> set[str]:
        return set(weights(model_config(**config), train or train_config()))

    expected = train_config(halting_loss="expected")
    assert names() == {"next_token"}
    assert names(halting="kl") == names(halting="entropy") == names(halting="gate") == {"next_token", "probe"}
    assert names(halting="gate", train=expected) == {"next_token", "expected", "prior", "probe"}
    assert names(halting="state_gate", train=expected) == {"next_token", "expected", "prior"}
    assert names(halting="act") == {"next_token", "expected", "ponder"}
    assert names(halting="act", read_out="mixture") == {"next_token", "ponder"}
    assert names(train=train_config(balance_weight=1.0)) == {"next_token", "balance"}
    assert names(ffn="dense", train=train_config(balance_weight=1.0)) == {"next_token"}
    assert weights(model_config(halting="act"), train_config())["next_token"] == 0
    with pytest.raises(ValueError, match="halting_loss = 'expected': must be 'frozen'"):
        names(halting="act", read_out="mixture", train=expected)
    with pytest.raises(ValueError, match="halting_loss = 'frozen': must be 'expected' with halting 'state_gate'"):
        names(halting="state_gate")


def test_every_state_counts_alike_for_the_probe():
    from ritornello.train.step import Plan

    scales = []
    for step in range(300):
        plan = Plan.of(batch(), train_config(depth="uniform"), step)
        assert 0 <= plan.probe < plan.counts.max()
        active = (plan.counts > plan.probe).mean()
        scales.append(plan.shares(slice(None), Pieces(plan.batch.tokens.shape[1]), 1).probe_scale * active)
    assert np.mean(scales) == pytest.approx(1.0, abs=0.05)
