"""transformers' Trainer trains what this package's own trainer does."""

from dataclasses import replace

import pytest
import torch
from torch.optim import SGD
from transformers import Trainer, TrainingArguments, default_data_collator

from ritornello.config import TrainConfig
from ritornello.hub.callbacks import RouterBias
from ritornello.hub.collators import RandomDepth
from ritornello.ops.noise import Key
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.losses import Inputs, Shares, next_token
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step
from tests.hub.kinds import SHAPE, model

KINDS = ("dense", "moe", "mla")
DEPTHS = TrainConfig(depth="uniform", min_loops=1, mean_loops=2.5, max_loops=4)
TEXT = torch.tensor([byte % 99 for byte in b"the cat sat on the mat and the dog sat on the log. " * 64])
ROWS = [{"input_ids": row, "labels": row} for row in TEXT[: len(TEXT) // 16 * 16].view(-1, 16)]


def trainer(found, folder, *, rows=ROWS, collate=None, callbacks=(), **options):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(folder), **defaults | options)
    collate = default_data_collator if collate is None else collate
    return Trainer(found.train(), args, collate, rows, ROWS[:8], callbacks=list(callbacks))


def losses(ran):
    return [entry["loss"] for entry in ran.state.log_history if "loss" in entry]


def biases(found):
    return torch.stack([layer.mlp.router.e_score_correction_bias for layer in found.native.recurrent])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_give_the_loss_of_our_own_training(kind):
    found, x = model(kind).double(), torch.stack([row["input_ids"] for row in ROWS[:3]])
    x[0, :5] = 0
    labels = torch.where(x == 0, NO_LABEL, x)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
    out = found.native(x, return_logits=False)
    n = int((shifted != NO_LABEL).sum())
    for n_targets, given in ((n, {}), (50, {"num_items_in_batch": 50})):
        shares = Shares(n_targets=n_targets, tokens=1.0, loops=1.0)
        own = next_token(
            Inputs(model=found.native, train=DEPTHS, labels=shifted, documents=None, key=Key(), out=out, shares=shares)
        )
        assert found(x, labels=labels, **given).loss.item() == pytest.approx(own.item(), rel=1e-6)  # theirs is float32
    assert found(x, labels=x).loss.item() != pytest.approx(own.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_at_drawn_depths_evaluates_and_predicts(kind, tmp_path):
    ran = trainer(model(kind), tmp_path, collate=RandomDepth(default_data_collator, DEPTHS), max_steps=12)
    before = ran.evaluate()["eval_loss"]
    ran.train()
    after = ran.evaluate()
    assert after["eval_loss"] < 0.7 * before and ran.evaluate()["eval_loss"] == after["eval_loss"]
    assert losses(ran)[-1] < 0.7 * losses(ran)[0]
    found = ran.predict(ROWS[:3])
    assert found.predictions.shape == (3, 16, SHAPE["vocab_size"])
    depths = RandomDepth(default_data_collator, DEPTHS)(ROWS[:3])["n_loops"]
    own = ran.model(torch.stack([row["input_ids"] for row in ROWS[:3]]), n_loops=depths).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), own, rtol=0, atol=2e-5)


def test_micro_batches_add_up_to_one_batch(tmp_path):
    """Rows with unlike numbers of labels; of the balance loss, a share each."""
    keep = [torch.arange(16) >= first for first in (0, 12, 0, 12)]
    rows = [{**row, "labels": row["labels"].where(some, NO_LABEL)} for row, some in zip(ROWS, keep, strict=False)]

    def step(size, balance):
        found = model("moe", balance_weight=balance)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        ran = trainer(found, tmp_path, rows=rows, max_grad_norm=0.0, **options)
        ran.optimizer = SGD(found.parameters(), 1.0)
        ran.train()
        return torch.cat([p.detach().flatten() for p in found.parameters()])

    whole, balanced = step(4, 0.0), step(4, 0.5)
    torch.testing.assert_close(step(1, 0.0), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(step(2, 0.5), balanced, rtol=0, atol=2e-6)
    assert not torch.allclose(balanced, whole, rtol=0, atol=1e-3)


def test_goes_on_bit_for_bit(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(seed, folder, **given):
        found = model("moe", seed=seed, dropout=0.1)
        with_all = {"collate": RandomDepth(default_data_collator, DEPTHS), "callbacks": [RouterBias()]}
        ran = trainer(found, folder, **with_all, **options)
        ran.train(**given)
        return losses(ran), found.state_dict()

    whole, weights = run(0, tmp_path)
    again, resumed = run(1, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again == whole and all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert run(1, tmp_path / "other")[0] != whole


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"bf16": True}])
def test_recomputed_or_in_bfloat16(options, tmp_path):
    runs = {}
    for name, given in (("plain", {}), ("other", options)):
        ran = trainer(model("mla"), tmp_path, **given)
        ran.train()
        runs[name] = losses(ran)
    if "bf16" in options:
        assert runs["other"] == pytest.approx(runs["plain"], rel=0.03) and runs["other"] != runs["plain"]
    else:
        assert ran.model.model.gradient_checkpointing and runs["other"] == pytest.approx(runs["plain"], abs=1e-6)


@pytest.mark.parametrize("per_loop", [False, True])
def test_the_routers_bias_moves_as_in_our_own_training(per_loop, tmp_path):
    """One step of the same batch, there in two micro-batches."""
    train = TrainConfig(steps=1, depth="fixed", mean_loops=3, max_loops=3, router_bias_min_tokens=0)
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 1e-9,
    }
    theirs, own = (model("moe", router_bias_per_loop=per_loop) for _ in range(2))
    ran = trainer(theirs, tmp_path, rows=ROWS[:8], callbacks=[RouterBias(train)], **options)
    ran.evaluate()
    ran.train()
    x = torch.stack([row["input_ids"] for row in ROWS[:8]]).numpy()
    native = Batch(x, x, x * 0, x[:, 0] * 0, (x >= 0).sum(1))
    train_step(own.native.train(), build_optimizers(own.native, train), native, train=train, step=0)
    assert biases(own).abs().max() > 0 and torch.equal(biases(theirs), biases(own))
    without = model("moe", router_bias_per_loop=per_loop)
    trainer(without, tmp_path, rows=ROWS[:8], **options).train()
    assert not biases(without).any()


def test_the_routers_bias_rests_at_the_end_and_needs_trained_routers(tmp_path):
    train = TrainConfig(router_bias_cooldown=0.5)
    found = model("moe")
    ran = trainer(found, tmp_path, callbacks=[RouterBias(train)], max_steps=2)
    ran.train()
    assert 0 < biases(found).abs().max() <= train.router_bias_rate
    assert not found.native._forward_hooks
    with pytest.raises(ValueError, match="one with experts"):
        trainer(model("dense"), tmp_path, callbacks=[RouterBias()]).train()
    frozen = model("moe")
    frozen.native.recurrent.requires_grad_(False)
    with pytest.raises(ValueError, match="leave RouterBias out"):
        trainer(frozen, tmp_path, callbacks=[RouterBias()]).train()


def test_drawn_depths_hang_on_seed_and_batch():
    draw = RandomDepth(default_data_collator, DEPTHS)
    drawn = [draw(ROWS[i : i + 8])["n_loops"] for i in range(20)]
    assert all(torch.equal(counts, draw(ROWS[i : i + 8])["n_loops"]) for i, counts in enumerate(drawn))
    assert len({tuple(counts.tolist()) for counts in drawn}) > 10
    assert set(torch.cat(drawn).tolist()) == {1, 2, 3, 4}
    other = RandomDepth(default_data_collator, replace(DEPTHS, seed=1))
    assert any(not torch.equal(counts, other(ROWS[i : i + 8])["n_loops"]) for i, counts in enumerate(drawn))
    with pytest.raises(ValueError, match="depth_ramp_steps"):
        RandomDepth(default_data_collator, replace(DEPTHS, depth_ramp_steps=3))
