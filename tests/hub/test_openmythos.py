"""OpenMythos 0.5.0's models in our loop, against what its own code computed (scripts/openmythos_fixtures.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ritornello.config import ExitRule
from ritornello.engine.engine import Engine
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.hub.openmythos import OpenMythos, config_from, from_theirs, load, to_theirs
from ritornello.model.cache import Cache
from tests.engine.kinds import alone, answers
from tests.hub.mythos_weights import drawn
from tests.model.builders import close, differ
from tests.model.test_parity import compare

FROZEN = json.loads((Path(__file__).parent / "openmythos.json").read_text())
ROWS: dict[str, dict[str, Any]] = FROZEN["rows"]
NAMES = list(ROWS)
RULE = ExitRule("cumulative", 0.99)


def theirs(row: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The weights that their code had, by their names: shapes are those of a model of ours, the other way around."""
    setting, config = row["setting"], config_from(row["config"])
    how = {name: row["config"][name] for name in ("act_threshold", "lora_rank")}
    _, shapes = to_theirs(OpenMythos(config, **how))
    shapes["recurrent.injection.log_dt"] = torch.zeros(1)
    state = {name: drawn(name, x.shape, setting["bias"]) for name, x in shapes.items()}
    state["recurrent.act.halt.weight"] *= setting.get("halt", 1.0)
    state["recurrent.injection.log_A"] *= setting.get("decay", 1.0)
    return {name: x.to(dtype) for name, x in state.items()}


def converted(name: str, dtype: torch.dtype = torch.float64) -> tuple[OpenMythos, Tensor, Tensor, int | None]:
    """A model of ours; the tokens, their logits, and the loops they were made with."""
    row = ROWS[name]
    model = from_theirs(row["config"], theirs(row, dtype))
    tokens = torch.tensor(row["tokens"])
    expected = torch.tensor(row[str(dtype).removeprefix("torch.")], dtype=dtype).view(*tokens.shape, -1)
    return model, tokens, expected, row["setting"].get("n_loops")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_same_logits(name: str) -> None:
    model, tokens, expected, n_loops = converted(name)
    close(model(tokens, n_loops=n_loops).logits, expected, 1e-11)
    model, tokens, expected, n_loops = converted(name, torch.float32)
    close(model(tokens, n_loops=n_loops).logits, expected, 2e-5)


@pytest.mark.parametrize("name", NAMES[:2])
@torch.no_grad()
def test_control_every_weight_counts(name: str) -> None:
    model, tokens, expected, _ = converted(name)
    model.embed_tokens[0].weight[0] = model.embed_tokens[0].weight[tokens[0, 0]]
    tokens = torch.where(tokens == tokens[0, 0], 0, tokens)  # the one whose embedding the control moves is among them
    expected = model(tokens).logits
    compare(lambda: model(tokens).logits, expected, model)
    model.recurrent[0].mlp.router.e_score_correction_bias.add_(torch.linspace(0, 3, 6))
    differ(model(tokens).logits, expected, 1e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_from_the_cache_and_with_budgets(name: str) -> None:
    """What is published and what is ours, token by token as in one pass; a budget of n loops as n loops."""
    model, tokens, _, n_loops = converted(name)
    for exit in (None, RULE):
        whole = model(tokens, n_loops=n_loops, exit=exit).logits
        cache = Cache(model.config, batch_size=2, max_len=8, n_loops=n_loops or 4, dtype=torch.float64)
        pieces = (tokens[:, :3], *tokens[:, 3:].split(1, 1))
        parts = [model(x, n_loops=n_loops, exit=exit, cache=cache).logits for x in pieces]
        close(torch.cat(parts, 1), whole, 1e-11)
    alone = model(tokens, n_loops=2, exit=RULE).logits
    close(model(tokens, n_loops=torch.full_like(tokens, 2), exit=RULE).logits, alone, 1e-11)


@pytest.mark.parametrize("name", NAMES[:2])
def test_in_the_engine(name: str) -> None:
    """Depth-wise batching: each request as alone, as published or with tokens that leave the loop."""
    model, tokens, *_ = converted(name)
    requests = [
        Request(prompt=row[: 2 + i], max_tokens=4, exit=(None, RULE)[i % 2], n_loops=6 - i, sampling=Sampling(seed=i))
        for i, row in enumerate(tokens.tolist() * 2)
    ]
    engine = Engine(model, n_loops=6, chunk=3, tick_tokens=8)
    numbers = [engine.submit(request) for request in requests]
    found = answers(engine, numbers)
    assert all(found[number] == alone(model, request) for number, request in zip(numbers, requests, strict=True))
    used = [loops for i in (1, 3) for loops in found[numbers[i]][1]]
    assert len(set(used)) > 1, used


@torch.no_grad()
def test_where_all_halt_at_once_our_halting_is_theirs() -> None:
    """Their weights sum to 1 there, and no halted token was needed by another: elsewhere the two differ."""
    for name in NAMES:
        model, tokens, expected, n_loops = converted(name)
        found = model(tokens, n_loops=n_loops, exit=ExitRule("cumulative", model.halting.published.threshold)).logits
        (close if "all halt" in name else differ)(found, expected, 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_and_back(name: str) -> None:
    """Every tensor is the one it was, but for the injection's two, which are worth the same."""
    before = theirs(ROWS[name])
    model = from_theirs(ROWS[name]["config"], before)
    config, after = to_theirs(model)
    assert config == ROWS[name]["config"] and after.keys() == before.keys()
    moved = {f"recurrent.injection.{x}" for x in ("log_A", "log_dt", "B")}
    assert all(torch.equal(after[x], before[x]) for x in before if x not in moved)
    again = from_theirs(config, after)
    close(again.injection.decay(), model.injection.decay(), 1e-15)
    close(again.injection.input_matrix(), before["recurrent.injection.B"], 1e-15)


@pytest.mark.parametrize("name", FROZEN["variants"])
def test_a_variant_is_as_large(name: str) -> None:
    said = FROZEN["variants"][name]
    with torch.device("meta"):
        how = {key: said["config"][key] for key in ("act_threshold", "lora_rank")}
        model = OpenMythos(config_from(said["config"]), **how)
    own = sum(x.numel() for x in model.parameters())
    assert own == said["n_parameters"] + model.config.dim - 1  # dt is a vector here, one number there


def test_from_a_folder(tmp_path: Path) -> None:
    row = ROWS[NAMES[0]]
    (tmp_path / "config.json").write_text(json.dumps(row["config"]))
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match=r"model.safetensors: not a safetensors file; pickles are never loaded"):
        load(tmp_path)
    save_file(theirs(row, torch.float32), tmp_path / "model.safetensors")
    tokens = torch.tensor(row["tokens"])
    assert torch.equal(load(tmp_path)(tokens).logits, converted(NAMES[0], torch.float32)[0](tokens).logits)


def test_a_new_one_trains() -> None:
    """Gradients reach every parameter, unless an expert is idle."""
    model = OpenMythos(config_from(ROWS[NAMES[1]]["config"]), act_threshold=0.99, lora_rank=3, seed=1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.startswith("halting"):
                x.add_(0.1)
    out = model(torch.tensor(ROWS[NAMES[1]]["tokens"]))
    assert out.logits is not None
    out.logits.square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in model.parameters())
    with pytest.raises(ValueError, match="state_bound"):
        model.state_bound(4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n_expert": 4}, r"MythosConfig = 'n_expert': .*did you mean 'n_experts'"),
    ({"dim": None}, r"dim = None: must be an integer >= 1"),
    ({"attn_type": "mha"}, r"attention"),
    ({"act_threshold": 2.0}, r"act_threshold = 2.0: must be a finite number in \[0, 1\]"),
    ({"lora_rank": 0}, r"lora_rank = 0"),
    ({"n_experts": 7}, r"state_dict: missing 'recurrent.block.ffn.routed_experts.6.gate.weight'"),
    ({"n_experts": 5}, r"state_dict: not of OpenMythos 0.5.0 'recurrent.block.ffn.routed_experts.5"),
    ({"vocab_size": 20}, r"state_dict: wrong shape 'embed_tokens.0.weight \(19, 24\) instead of \(20, 24\)"),
    ({"n_heads": 3}, r"n_heads = 3: must be a multiple of n_kv_heads"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    row = ROWS[NAMES[0]]
    with pytest.raises(ValueError, match=message):
        from_theirs(row["config"] | changes, theirs(row))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("recurrent.lora.B", torch.zeros(3), r"not of its rank 'recurrent.lora.B'"),
        ("recurrent.block.attn.wq.weight", torch.zeros(23, 24), r"of another shape than the configuration says"),
        ("norm.weight", torch.full((24,), torch.nan), r"NaN or infinite values in 'norm.weight'"),
        ("extra", torch.zeros(2), r"not of OpenMythos 0.5.0 'extra'"),
    ],
)
def test_a_tensor_that_does_not_fit(name: str, tensor: Tensor, message: str) -> None:
    row = ROWS[NAMES[0]]
    with pytest.raises(ValueError, match=message):
        from_theirs(row["config"], theirs(row) | {name: tensor})


def test_what_it_makes_itself_is_passed_over() -> None:
    row = ROWS[NAMES[0]]
    state = theirs(row)
    tables = {"freqs_cis": torch.zeros(4, 3, dtype=torch.complex64), "head.weight": state["embed.weight"]}
    found, expected = (from_theirs(row["config"], x).state_dict() for x in (state | tables, state))
    assert found.keys() == expected.keys()
