"""Layouts, what they send, and what the search makes of them."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ritornello import recipes
from ritornello.accounting import flops_per_token
from ritornello.commands.plan import Plan as Command
from ritornello.config import Recipe
from ritornello.planning import roofline
from ritornello.planning.activations import Keeps, kept
from ritornello.planning.hardware import GPUS
from ritornello.planning.layout import Layout, layouts, refused
from ritornello.planning.plan import Asked, candidates, missing, plan
from ritornello.planning.report import facts
from ritornello.presets import PRESETS, preset

ROOT = Path(__file__).parent.parent.parent
SEVEN = ("1b", "3b", "10b", "50b", "100b", "500b", "1t")


def recipe(name: str = "1b", **train: Any) -> Recipe:
    how = {"precision": "bf16", "batch_size": 64, "mean_loops": 8.0, "backprop_loops": 4} | train
    return recipes.from_mapping({"model": {"preset": name}, "data": {"seq_len": 2048}, "train": how})


def asked(name: str, n_gpus: int, gpu: str = "h100", **train: Any) -> Asked:
    return Asked(recipe(name, **train), GPUS[gpu], n_gpus)


def test_every_layout_has_all_processes_and_is_allowed() -> None:
    config, seen = preset("1b"), set()
    for layout in layouts(config, 16, seq_len=4096, per_node=8):
        assert layout.n_processes == layout.replicate * layout.shard * layout.context * layout.tensor == 16
        assert layout.n_shards % layout.expert == 0 and config.n_kv_heads % layout.tensor == 0 and layout.tensor <= 8
        assert layout not in seen
        seen.add(layout)
    assert Layout(shard=16) in seen and Layout(shard=4, expert=2, context=2, tensor=2) in seen
    assert Layout(replicate=2, tensor=8) not in seen  # of 4 key-value heads


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tensor=16), "tensor 16: a node has 8"),
        (Layout(tensor=8), r"does not divide n_kv_heads \(4\)"),
        (Layout(shard=5, expert=5), "expert 5: does not divide the routed experts"),
        (Layout(context=3), "context 3: 8 x it does not divide 64 tokens"),
    ],
)
def test_a_layout_that_the_model_does_not_allow(layout: Layout, said: str) -> None:
    assert re.search(said, refused(preset("1b"), layout, seq_len=64, per_node=8))
    assert refused(preset("1b"), Layout(shard=8, expert=8, tensor=2), seq_len=64, per_node=8) == ""


def test_experts_divide_shard() -> None:
    with pytest.raises(ValueError, match=r"layout.expert = 4: must be a divisor of shard x context \(6\)"):
        Layout(shard=6, expert=4)


def test_flops_are_those_of_accounting() -> None:
    r = recipe()
    how: Any = {"seq_len": 2048, "n_loops": 8, "convention": "causal"}
    assert roofline.flops(r) == (flops_per_token(r.model, training=True, backprop_loops=4, **how), 0)
    half = roofline.flops(recipe(mean_loops=8.5))[0]
    more = flops_per_token(r.model, training=True, backprop_loops=4, **how | {"n_loops": 9})
    assert half == pytest.approx((roofline.flops(r)[0] + more) / 2)
    again = roofline.flops(recipe(checkpoint_activations=True))[1]
    loop = flops_per_token(r.model, training=False, **how) - flops_per_token(
        r.model, training=False, **how | {"n_loops": 7}
    )
    assert again == 4 * loop


def test_what_is_sent_by_hand() -> None:
    r = recipe(microbatch_size=16)  # four micro-batches
    n_tokens, c = 64 * 2048, r.model
    alone = roofline.sent(r, Layout())
    assert alone == {}
    tensor = roofline.sent(r, Layout(tensor=2))
    assert list(tensor) == ["tensor"]
    passes = 2 * 4 + 2 * (8 + 4)  # layers outside the loop, forward and back; two looped ones
    assert tensor["tensor"].n_bytes == passes * 2 * n_tokens * c.dim * 2  # two sums, of which each sends 2 · 1/2
    experts = roofline.sent(r, Layout(shard=4, expert=4))["experts"]
    assert experts.n_bytes == 2 * (8 + 4) * 2 * (3 / 4) * (n_tokens / 4) * 8 * c.dim * 2 and experts.span == 4
    context = roofline.sent(r, Layout(context=2))["context"]
    assert context.n_bytes == passes * (n_tokens / 2) * c.kv_width * 2
    once, every = (roofline.sent(r, Layout(shard=8, gather=gather))["weights"] for gather in ("step", "loop"))
    assert every.n_bytes > 15 * once.n_bytes  # 16 loops at most forward, 4 back
    shared = roofline.sent(r, Layout(shard=8, expert=8))["weights"]
    assert shared.n_bytes < 0.2 * once.n_bytes  # experts stay where they are
    replicas = roofline.sent(r, Layout(replicate=2))
    assert list(replicas) == ["sums over replicas"] and replicas["sums over replicas"].span == 2


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_who_shares_a_sequence_keeps_all_its_keys_and_values(attention: str) -> None:
    c = preset("1b", attention=attention)  # type: ignore[arg-type]
    alone, shared = (kept(c, Keeps(2, context=n)).loop for n in (1, 3))
    each = c.kv_width
    if attention == "mla":  # and those of every head
        each += c.n_heads * (2 * c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    assert shared - alone == 2 * 2 * c.n_recurrent_layers * each


def test_links_are_faster_than_the_network() -> None:
    times = [roofline.time(recipe(), Layout(shard=n), GPUS["h100"]).sent["weights"] for n in (8, 16)]
    assert times[1] > 8 * times[0]


def test_the_best_fits_and_none_that_fits_is_much_faster() -> None:
    found = plan(asked("1b", 4))
    fit = [x for x in candidates(found.asked) if x.fits]
    assert found.best.fits
    assert found.best.time.step <= 1.02 * min(x.time.step for x in fit)
    assert len({x.layout for x in fit}) > 3 and all(x.time.step > 0 for x in found.next_best)
    assert set(found.reasons) == {axis for axis in ("shard", "expert", "tensor", "context", "replicate")
                                  if getattr(found.best.layout, axis) > 1}  # fmt: skip


def test_settings_that_are_given_are_kept() -> None:
    given = replace(asked("1b", 2, checkpoint_activations=True, microbatch_size=4), free=frozenset())
    best = plan(given).best.recipe.train
    assert (best.checkpoint_activations, best.microbatch_size, best.batch_size) == (True, 4, 64)


@pytest.mark.parametrize("name", SEVEN)
def test_each_preset_fits_or_says_what_is_missing(name: str) -> None:
    try:
        best = plan(asked(name, 8)).best
    except ValueError as error:
        said = re.fullmatch(r"--gpus = 8: must be enough for ([\d,.]+) GB a GPU \(.*\), which has 72 .*", str(error))
        assert said and float(said[1].replace(",", "")) > 72 and "at least" in str(error)
        n = int(re.search(r"at least (\d+) GPUs", str(error))[1])  # type: ignore[index]
        assert any(x.fits for x in candidates(asked(name, n)))
    else:
        assert best.memory.total <= GPUS["h100"].usable


def test_what_is_missing_names_the_largest_part() -> None:
    assert plan(asked("1b", 8)).best.fits
    a = asked("50b", 8)
    assert "most of it gradients" in missing(a, list(candidates(a)))


def test_a_batch_is_rounded_up_so_that_all_get_as_much() -> None:
    uneven = asked("1b", 3, batch_size=64)
    assert uneven.batched.train.batch_size == 66
    kept = replace(uneven, rounds=False)
    assert kept.batched.train.batch_size == 64
    layouts_of_kept = {x.layout for x in candidates(kept)}
    assert all(64 % layout.n_readers == 0 for layout in layouts_of_kept)


def test_facts_are_plain_and_add_up() -> None:
    found = facts(plan(asked("1b", 4)), tokens=1e9)
    memory = dict(found["memory_bytes"])
    total, _, _ = memory.pop("total"), memory.pop("usable"), memory.pop("needed_when")
    assert sum(memory.values()) == pytest.approx(total)
    assert found["budget"]["gpu_hours"] == pytest.approx(1e9 / found["step"]["tokens_per_second"] / 3600 * 4)
    step = found["step"]
    slower = max(step["seconds_of_products"], step["seconds_of_memory"])
    assert step["seconds"] == pytest.approx(slower + sum(step["seconds_sending"].values()))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read(name: str) -> None:
    found, settled = Command(name=name).recipe()
    assert found.train.precision == "bf16" and not settled


def plan_table() -> Any:
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "scripts" / "plan_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_docs_is_what_the_command_says() -> None:
    script = plan_table()
    assert script.START + script.table() + script.END in script.PAGE.read_text(encoding="utf-8")
    assert set(SEVEN) == set(script.COUNTS)
