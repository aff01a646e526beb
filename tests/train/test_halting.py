import pytest
import torch

from ritornello.config import ExitRule
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.evaluate import evaluate
from ritornello.train.halting import fit_gate
from tests.train.small import batch, model_config


def test_the_gate_learns_and_the_trunk_stays():
    model = RecurrentDepthTransformer(model_config(halting="gate", decay_init=0.2))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batches = [batch(seed=i, packed=True) for i in range(4)]
    untrained = fit_gate(model, batches, n_loops=8, steps=1)
    fitted = fit_gate(model, batches, n_loops=8)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(name.startswith("halting.") for name in changed)
    share = fitted["gate_agreement"]
    assert 0.1 < share < 1
    constant = -share * torch.tensor(share).log() - (1 - share) * torch.tensor(1 - share).log()
    assert fitted["gate_loss"] < constant < untrained["gate_loss"]
    loops = evaluate(model, [batch(seed=9)], loops=(8,), exit=ExitRule("hazard", 0.9)).exit_loops
    assert loops is not None and loops < 8


def test_a_model_without_a_gate_has_none_to_fit():
    for halting in ("none", "act"):
        with pytest.raises(ValueError, match=f"halting = '{halting}': must be 'gate'"):
            fit_gate(RecurrentDepthTransformer(model_config(halting=halting)), [batch()], n_loops=4)
