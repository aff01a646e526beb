import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ritornello.config import ExitRule
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import Batch
from ritornello.train.evaluate import evaluate, gap
from tests.train.small import batch, model_config

KINDS = {
    "lti": {},
    "act mixture": {"halting": "act", "read_out": "mixture"},
    "streams": {"carry_streams": 2, "dropout": 0.2},
    "plain": {"n_recurrent_layers": 0},
}


def direct(model: RecurrentDepthTransformer, rows: Batch, n: int | None) -> np.ndarray:
    """Nats of each window from the model's own logits."""
    documents = torch.from_numpy(rows.documents)
    logits = model(torch.from_numpy(rows.tokens), n_loops=n, documents=documents).logits
    labels = torch.from_numpy(rows.labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1).numpy()


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_a_run_at_each_depth(kind, packed):
    model = RecurrentDepthTransformer(model_config(**KINDS[kind])).train()
    batches = [batch(packed=packed), batch(n=2, packed=packed, seed=1)]
    found = evaluate(model, batches, loops=(4, 1, 2))
    assert model.training and list(found.nats) == [1, 2, 4]
    model.eval()
    with torch.no_grad():
        for n, nats in found.nats.items():
            wanted = np.concatenate([direct(model, rows, None if kind == "plain" else n) for rows in batches])
            np.testing.assert_allclose(nats, wanted, rtol=1e-5)
    assert found.metrics()["val_bpb_2"] == pytest.approx(found.nats[2].sum() / found.n_bytes.sum() / math.log(2))
    assert (found.nats[1] != found.nats[4]).all() or kind == "plain"


def test_exit_row_reports_its_loops():
    model = RecurrentDepthTransformer(model_config())
    never, always = (
        evaluate(model, [batch()], loops=(1, 4), exit=ExitRule("delta", threshold)).metrics() for threshold in (0, 1e9)
    )
    assert (never["val_loops_exit"], always["val_loops_exit"]) == (4.0, 1.0)
    assert never["val_bpb_exit"] == pytest.approx(never["val_bpb_4"])
    assert always["val_bpb_exit"] == pytest.approx(always["val_bpb_1"])
    assert never["val_bpb_exit"] != always["val_bpb_exit"]


def test_standard_error_is_that_of_many_repetitions():
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n_bytes = rng.integers(50, 150, 400)
        shared = rng.normal(2.0, 0.5, 400) * n_bytes
        return shared + 0.1 * n_bytes + rng.normal(0, 3, 400), shared, n_bytes

    found = np.array([gap(*draw()) for _ in range(400)])
    assert found[:, 0].mean() == pytest.approx(0.1 / math.log(2), rel=0.02)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.15)
    unpaired = [gap(draw()[0], draw()[1], draw()[2])[1] for _ in range(20)]
    assert np.mean(unpaired) > 10 * found[:, 1].mean()


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="batches = 0"):
        evaluate(RecurrentDepthTransformer(model_config()), [])
