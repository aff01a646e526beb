"""What a caller may get wrong: one ValueError that names field, value and what is allowed, and nothing else changes."""

from typing import Any

import numpy as np
import pytest
import torch

from ritornello.config import ExitRule, ModelConfig
from ritornello.model.cache import Cache
from ritornello.model.depth import Depth
from ritornello.ops.noise import Key
from ritornello.presets import PRESETS, preset
from tests.model.builders import build, tiny, tokens_for

MODEL = build({})
TOKENS = tokens_for(MODEL.config, 2, 3)


def refused(message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        MODEL(*args, **options)
    text = str(caught.value)
    assert text.startswith(message), text
    assert "must be" in text and "\n" not in text and len(text) < 300


@pytest.mark.parametrize("n_loops", [0, -1, 2.5, True, 10**9, "3"], ids=repr)
def test_n_loops(n_loops: Any) -> None:
    refused(f"n_loops = {n_loops!r}: must be an integer in [1, 4096]", TOKENS, n_loops=n_loops)


@pytest.mark.parametrize(
    ("n_loops", "message"),
    [
        (torch.tensor([1, 0]), "n_loops = (0, 1): must be integers in [1, 4096]"),
        (torch.tensor([1, 5000]), "n_loops = (1, 5000): must be integers in [1, 4096]"),
        (torch.tensor([1.0, 2.0]), "n_loops = (1, 2): must be integers"),
        (torch.tensor([True, False]), "n_loops = (0, 1): must be integers"),
        (torch.tensor([1, 2, 3]), "n_loops = (3,): must be of shape (B,) or (B, T) = (2, 3)"),
        (torch.ones(2, 4, dtype=torch.int64), "n_loops = (2, 4): must be of shape (B,) or (B, T) = (2, 3)"),
        (torch.tensor(3), "n_loops = (): must be of shape (B,) or (B, T) = (2, 3)"),
    ],
    ids=str,
)
def test_budgets(n_loops: torch.Tensor, message: str) -> None:
    refused(message, TOKENS, n_loops=n_loops)


@pytest.mark.parametrize("counts", [[], [0, 1], [1, -1], [1, 4097], [1.5, 2.0], [[[1]]], [True, False]], ids=repr)
def test_right_aligned_counts(counts: Any) -> None:
    with pytest.raises(ValueError, match=r"n_loops = .*: must be"):
        Depth.right_aligned(counts)


@pytest.mark.parametrize("counts", [[1, 2, 3], [[1] * 4, [2] * 4], [[1] * 3, [2] * 3, [2] * 3]], ids=repr)
def test_a_plan_for_another_batch(counts: Any) -> None:
    refused("n_loops = ", TOKENS, n_loops=Depth.right_aligned(np.array(counts)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, -1]]), "tokens = -1: must be in [0, 36]"),
        (torch.tensor([[1, 37]]), "tokens = 37: must be in [0, 36]"),
        (torch.tensor([[1, 2**40]]), f"tokens = {2**40}: must be in [0, 36]"),
        (torch.tensor([[1.0, 2.0]]), "tokens = torch.float32: must be int64 or int32"),
        (torch.tensor([[True]]), "tokens = torch.bool: must be int64 or int32"),
        (torch.zeros(1, 0, dtype=torch.int64), "tokens = (1, 0): must be of shape (B, T), not empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "tokens = (0, 3): must be of shape (B, T), not empty"),
        (torch.zeros(3, dtype=torch.int64), "tokens = (3,): must be of shape (B, T), not empty"),
        (torch.zeros(1, 3, 1, dtype=torch.int64), "tokens = (1, 3, 1): must be of shape (B, T), not empty"),
        (torch.zeros(1, 65, dtype=torch.int64), "tokens = '65 positions': must be at most max_seq_len = 64"),
    ],
    ids=str,
)
def test_tokens(tokens: Any, message: str) -> None:
    refused(message, tokens)


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"tokens = .*: must be given, or else inputs_embeds"):
        MODEL()


def test_int32_tokens_are_welcome() -> None:
    assert torch.equal(MODEL(TOKENS.int()).logits, MODEL(TOKENS).logits)


def test_token_tables() -> None:
    model = build({"n_token_tables": 2})
    with pytest.raises(ValueError, match=r"tokens = \(2, 3\): must be of shape \(B, T, 2\)"):
        model(TOKENS)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 15), (0, 3, 16), (2, 0, 16)])
def test_embeds(shape: tuple[int, ...]) -> None:
    refused(f"inputs_embeds = {shape}: must be of shape (B, T, 16), not empty", inputs_embeds=torch.zeros(shape))


def test_not_both() -> None:
    refused("tokens = ", TOKENS, inputs_embeds=torch.zeros(2, 3, 16))


def test_nan_stays_in_its_sequence() -> None:
    """Not refused, which would wait for the device; but no other sequence of the batch is touched."""
    x = MODEL.embed(TOKENS).detach()
    clean = MODEL(inputs_embeds=x).logits
    x[0, 1] = torch.nan
    dirty = MODEL(inputs_embeds=x).logits
    assert dirty[0, 1:].isnan().all()
    torch.testing.assert_close(dirty[1], clean[1])


@pytest.mark.parametrize("name", ["documents", "positions"])
def test_shapes_beside_tokens(name: str) -> None:
    refused(
        f"{name} = (3, 2): must be of shape (B, T) = (2, 3)", TOKENS, **{name: torch.zeros(3, 2, dtype=torch.int64)}
    )


@pytest.mark.parametrize("backprop_loops", [-1, 1.5, True, 5000], ids=repr)
def test_backprop_loops(backprop_loops: Any) -> None:
    refused(f"backprop_loops = {backprop_loops!r}: must be", TOKENS, backprop_loops=backprop_loops)


def test_dropout_needs_a_key() -> None:
    model = build({"dropout": 0.1}).train()
    with pytest.raises(ValueError, match="key = None: must be given in training when dropout > 0"):
        model(TOKENS)
    assert model.eval()(TOKENS).logits.isfinite().all()


def test_budgets_that_start_late_within_a_row_need_documents() -> None:
    late = Depth.right_aligned([[2, 2, 1], [2, 2, 2]])
    refused("documents = None: must be given where budgets start late within a row", TOKENS[:, :3], n_loops=late)


def cache(**changes: Any) -> Cache:
    options = {"batch_size": 2, "max_len": 5, "n_loops": 4, "dtype": torch.float64} | changes
    return Cache(options.pop("config", MODEL.config), **options)


def test_a_cache_of_another_model() -> None:
    for other in ({"attention": "mla"}, {"layers": (1, 2, 0)}, {"kv_sharing": "first"}, {"n_kv_heads": 4}):
        refused('cache = "another model\'s": must be made for this model', TOKENS, cache=cache(config=tiny(**other)))


def test_a_cache_of_another_size() -> None:
    refused("cache = 'batch size 3': must be for 2 sequences", TOKENS, cache=cache(batch_size=3))
    refused("tokens = '3 new': must be at most 2 for this cache (max_len 2)", TOKENS, cache=cache(max_len=2))
    refused("cache = '2 loops': must be > 2 loops", TOKENS, cache=cache(n_loops=2), n_loops=3)
    refused("n_loops = 'right-aligned'", TOKENS, cache=cache(), n_loops=Depth.right_aligned([1, 2]))


def test_documents_come_from_the_first_token_on() -> None:
    used = cache()
    with torch.no_grad():
        MODEL(TOKENS, cache=used)
    documents = torch.zeros(2, 1, dtype=torch.int64)
    refused(
        "documents = 'given': must be given from the first token on", TOKENS[:, :1], cache=used, documents=documents
    )


@pytest.mark.parametrize("name", ["documents", "positions"])
@pytest.mark.parametrize("bad", [[[0] * 3] * 2, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)], ids=str)
def test_ids_are_integers(name: str, bad: Any) -> None:
    refused(f"{name} = ", TOKENS, **{name: bad})


def test_embeddings_are_floats() -> None:
    refused("inputs_embeds = ", inputs_embeds=torch.zeros(2, 3, MODEL.config.dim, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"max_len": 0},
        {"max_len": 2.5},
        {"policy": "newest"},
        {"dtype": torch.int64},
        *({"n_loops": n} for n in (0, -1, 2.5, True, 10**9)),
    ],
    ids=str,
)
def test_cache_options(changes: dict) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} = .*: must be"):
        cache(**changes)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "kl", "threshold": -1.0},
        {"rule": "kl", "threshold": float("nan")},
        {"rule": "hazard", "threshold": 1.5},
        {"rule": "klx", "threshold": 1.0},
        {"rule": "kl", "threshold": 1.0, "min_loops": 0},
    ],
    ids=str,
)
def test_exit_rules(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        ExitRule(**options)


def test_an_exit_rule_is_not_a_name() -> None:
    refused("exit = 'kl': must be an ExitRule or None", TOKENS, exit="kl")


CONFIGS: list[tuple[dict, str]] = [
    ({"n_heads": 3, "n_kv_heads": 2}, "n_heads = 3: must be a multiple of n_kv_heads (2)"),
    ({"head_dim": 5}, "head_dim = 5: must be even with rotary positions"),
    ({"attention": "mla", "qk_rope_head_dim": 3}, "qk_rope_head_dim = 3: must be even"),
    ({"attention": "mla", "kv_lora_rank": 0}, "kv_lora_rank = 0: must be an integer in [1, 1048576]"),
    ({"attention": "gqq"}, "attention = 'gqq': must be one of gqa, mla; did you mean 'gqa'?"),
    ({"n_active_experts": 9}, "n_active_experts = 9: must be an integer in [1, 8]"),
    ({"n_experts": 9}, "n_expert_groups = 2: must be a divisor of n_experts (9)"),
    ({"n_active_groups": 3}, "n_active_groups = 3: must be an integer in [1, 2]"),
    ({"n_active_experts": 5, "n_active_groups": 1}, "n_active_experts = 5: must be <= the 4 experts"),
    ({"dim": 0}, "dim = 0: must be an integer in [1, 1048576]"),
    ({"dim": 16.0}, "dim = 16.0: must be an integer in [1, 1048576]"),
    ({"dim": True}, "dim = True: must be an integer in [1, 1048576]"),
    ({"dim": 2**62}, "dim = 4611686018427387904: must be an integer in [1, 1048576]"),
    ({"n_prelude_layers": 10**9}, "n_prelude_layers = 1000000000: must be an integer in [0, 1024]"),
    ({"n_token_tables": 10**6}, "n_token_tables = 1000000: must be an integer in [1, 1024]"),
    ({"n_loops": 10**9}, "n_loops = 1000000000: must be an integer in [1, 4096]"),
    ({"layers": (0, 0, 0)}, "n_recurrent_layers = 0: must be > 0"),
    ({"dropout": 1.0}, "dropout = 1.0: must be a finite number in [0, 0.99]"),
    ({"yarn_factor": 0.5}, "yarn_factor = 0.5: must be a finite number"),
    ({"yarn_slow": 0.0}, "yarn_slow = 0.0: must be a finite number"),
    ({"yarn_fast": 0.5}, "yarn_fast = 0.5: must be a finite number"),
    ({"norm_eps": float("nan")}, "norm_eps = nan: must be a finite number"),
    ({"rho_max": 1.1}, "rho_max = 1.1: must be a finite number in (0, 1]"),
    ({"decay_init": 0.999}, "decay_init = 0.999: must be in (0, rho_max = 0.996094)"),
    ({"injection": "none"}, "initial_state = 'zeros': must be 'e' when injection is 'none'"),
    ({"read_out": "mixture"}, "read_out = 'mixture': must be 'last' with halting 'none'"),
    ({"carry_streams": 2, "anchored": True}, "carry_streams = 2: must be 1 with an anchored state"),
    ({"layers": (1, 0, 0), "halting": "act"}, "halting = 'act': must be 'none' without recurrent layers"),
    ({"lora_targets": ("q", "g")}, "lora_targets = 'g': must be one of q, k, v, o, ffn"),
    ({"attention": "mla", "lora_targets": ("q", "k")}, "lora_targets = ('q', 'k'): must be of q, o and ffn with"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda x: str(x)[:60])
def test_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(**changes)
    assert str(caught.value).startswith(message), caught.value


@pytest.mark.parametrize("value", ["no", 1, None], ids=repr)
@pytest.mark.parametrize("name", ["tie_embeddings", "anchored", "loop_embedding"])
def test_switches_are_switches(name: str, value: Any) -> None:
    """`"no"` is true to Python."""
    with pytest.raises(ValueError, match=f"{name} = "):
        ModelConfig(**{name: value})


def test_lora_targets_are_a_tuple() -> None:
    with pytest.raises(ValueError, match="lora_targets = "):
        ModelConfig(lora_targets="q")  # pyrefly: ignore


def test_presets() -> None:
    with pytest.raises(ValueError, match=r"preset = '1bb': must be one of .*; did you mean '1b'\?"):
        preset("1bb")
    with pytest.raises(ValueError, match="preset override = 'n_layer': must be a field of ModelConfig"):
        preset("1b", n_layer=2)
    with pytest.raises(ValueError, match="attention = 'mlq': must be one of gqa, mla; did you mean"):
        preset("1b", attention="mlq")  # pyrefly: ignore
    assert preset("1b", attention="mla", n_loops=8).n_loops == 8 and PRESETS["1b"].n_loops == 16


@pytest.mark.parametrize("key", [{"seed": 2**63}, {"step": -1}, {"seed": 1.5}, {"sequences": torch.arange(3)}], ids=str)
def test_keys(key: dict) -> None:
    model = build({"initial_state": "noise"})
    with pytest.raises(ValueError, match=r"key\.(seed|step|sequences) = .*: must be"):
        model(TOKENS, key=Key(**key))


def test_long_values_are_cut_and_escaped() -> None:
    with pytest.raises(ValueError) as caught:
        tiny(attention="\x1b[31m" + "x" * 500)
    assert len(str(caught.value)) < 200 and "\x1b" not in str(caught.value)
