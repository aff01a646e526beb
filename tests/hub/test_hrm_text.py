"""HRM-Text in our loop says what transformers' own `HrmTextForCausalLM` says."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import HrmTextConfig, HrmTextForCausalLM
from transformers.models.hrm_text import modeling_hrm_text

from benchmarks.originals import Float64Torch
from ritornello import cli
from ritornello.engine.engine import Engine
from ritornello.engine.request import Draft, Event, Request
from ritornello.engine.sampling import Sampling, sample
from ritornello.hub.converters import read_published
from ritornello.hub.hrm_text import HrmText, config_from, from_theirs, to_theirs
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.model.cache import Cache
from tests.engine.kinds import answers, is_empty, ruled
from tests.model.builders import build, close, differ

F64 = torch.float64
SHAPE: dict[str, Any] = {"vocab_size": 23, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
SHAPE |= {"num_hidden_layers": 2, "head_dim": 6, "max_position_embeddings": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "cycles as published": SHAPE,
    "tied, one high cycle, odd scale": SHAPE
    | {"H_cycles": 1, "L_cycles": 2, "tie_word_embeddings": True, "embedding_scale": 3.7},
    "one low cycle, wide heads, steep angles": SHAPE
    | {"H_cycles": 3, "L_cycles": 1, "num_hidden_layers": 1, "head_dim": 10, "num_attention_heads": 3}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rms_norm_eps": 1e-3}
    | {"initializer_range": 0.25, "prefix_lm": False},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def theirs(setting: str, dtype: torch.dtype = F64) -> HrmTextForCausalLM:
    """Their model with weights by number, z_L_init among them."""
    model = HrmTextForCausalLM(HrmTextConfig(**SETTINGS[setting])).to(dtype).eval()
    weights = drawn(model.state_dict(), dtype)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    if dtype == F64:
        dim, theta = model.config.head_dim, model.config.rope_parameters["rope_theta"]
        model.model.rotary_emb.inv_freq = theta ** -(torch.arange(0, dim, 2, dtype=dtype) / dim)
    return model


def drawn(described: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Normal weights; branches write so much that a text does not go on as its last token says alone."""
    dice, found = torch.Generator().manual_seed(1), {}
    for name, like in sorted(described.items()):
        size = 3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        x = torch.randn(like.shape, generator=dice, dtype=F64)
        found[name] = (x * size * (like.shape[-1] ** -0.5 if like.ndim > 1 else 1)).to(dtype)
    return found


@contextmanager
def precisely(dtype: torch.dtype) -> Iterator[None]:
    """float64: what the code forces to float32, norms and angles, is float64 too."""
    if dtype != F64:
        yield
        return
    with patch.object(modeling_hrm_text, "torch", Float64Torch()), patch.object(Tensor, "float", Tensor.double):
        yield


def ours(setting: str, dtype: torch.dtype = F64) -> HrmText:
    """The same by its tensors."""
    config = config_from(HrmTextConfig(**SETTINGS[setting]).to_dict())
    with torch.device("meta"):
        model = HrmText(config)
    model.load_state_dict(from_theirs(stored(setting, dtype), config), assign=True)
    return model.eval()


def stored(setting: str, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Their tensors as their files name them, put together here."""
    state, found = theirs(setting, dtype).state_dict(), {}
    for name, x in state.items():
        stem = name.replace("self_attn", "attn").removesuffix(".weight")
        if stem.endswith("mlp.gate_proj"):
            up = state[name.replace("gate_proj", "up_proj")]
            found[stem.replace("gate_proj", "gate_up_proj") + ".weight"] = torch.cat((x, up))
        elif stem.endswith("attn.gate_proj"):
            parts = [state[name.replace("gate_proj", f"{part}_proj")] for part in ("gate", "q", "k", "v")]
            found[stem.replace("gate_proj", "gqkv_proj") + ".weight"] = torch.cat(parts)
        elif not stem.endswith(("up_proj", "q_proj", "k_proj", "v_proj")):
            found[name.replace("self_attn", "attn")] = x
    if SETTINGS[setting].get("tie_word_embeddings"):
        del found["lm_head.weight"]
    return found


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.arange(batch * length).mul(7).add(3).remainder(23).view(batch, length)


@torch.no_grad()
def said(model: HrmTextForCausalLM, ids: Tensor, n_loops: int | None = None, **options: Any) -> Tensor:
    """Their logits with so many high cycles."""
    model.config.H_cycles = n_loops or model.config.H_cycles
    with precisely(model.dtype):
        return model(ids, use_cache=False, **options).logits


@every_setting
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 3e-5)], ids=["f64", "f32"])
@torch.no_grad()
def test_the_same_logits(setting: str, dtype: torch.dtype, tolerance: float) -> None:
    code, model = theirs(setting, dtype), ours(setting, dtype)
    close(model(tokens()).logits, said(code, tokens()), tolerance)
    for n in (1, 2, 4):
        expected = said(code, tokens(), n)
        assert expected.dtype == dtype
        close(model(tokens(), n_loops=n).logits, expected, tolerance)
        differ(model(tokens(), n_loops=n + 1).logits, expected, 1e-2)


@every_setting
@torch.no_grad()
def test_control_every_weight_counts(setting: str) -> None:
    model = ours(setting)
    expected = model(tokens()).logits
    for weight in model.state_dict().values():
        before = weight.clone()
        weight += 0.1 * weight.abs().max() * (torch.arange(weight.numel()) % 3 - 0.9).view(weight.shape)
        differ(model(tokens()).logits, expected, 1e-6)
        weight.copy_(before)
    close(model(tokens()).logits, expected, 0)


@every_setting
def test_tensors_go_both_ways(setting: str) -> None:
    model, given = ours(setting, torch.bfloat16), stored(setting, torch.bfloat16)
    back = to_theirs(model.state_dict(), model.config)
    assert back.keys() == given.keys() and all(torch.equal(back[key], given[key]) for key in given)
    again = from_theirs(back, model.config)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], x) for key, x in model.state_dict().items())
    storages = {x.untyped_storage().data_ptr() for x in again.values()}
    assert len(storages) == len(again), "parts of a joined matrix would hold all of it"
    code = theirs(setting)
    assert sum(x.numel() for x in model.state_dict().values()) == sum(x.numel() for x in code.parameters())


@every_setting
@torch.no_grad()
def test_token_by_token(setting: str) -> None:
    """From a cache, at the depth of its own and deeper, with and without tokens that leave early."""
    model, ids = ours(setting), tokens()
    for n, rule in ((model.config.n_loops, None), (4, None), (4, ruled(model, "delta"))):
        out = model(ids, n_loops=n, exit=rule)
        assert (len(out.loops_used.unique()) > 1) == (rule is not None)
        cache = Cache(model.config, batch_size=2, max_len=9, n_loops=n, dtype=F64)
        pieces = (ids[:, :4], *ids[:, 4:].split(1, 1))
        parts = [model(part, n_loops=n, exit=rule, cache=cache).logits for part in pieces]
        close(torch.cat(parts, 1), out.logits, 1e-12)


@torch.no_grad()
def test_a_budget_of_some_loops_is_a_model_of_so_many_high_cycles() -> None:
    model, code, ids = ours("cycles as published"), theirs("cycles as published"), tokens(4, 7)
    budgets = torch.tensor([1, 4, 2, 3])
    expected = torch.cat([said(code, row[None], int(n)) for row, n in zip(ids, budgets, strict=True)])
    close(model(ids, n_loops=budgets).logits, expected, 1e-12)
    close(model(ids, n_loops=budgets[:, None].expand(4, 7)).logits, expected, 1e-12)


@pytest.mark.parametrize("setting", [name for name, row in SETTINGS.items() if row.get("prefix_lm", True)])
@torch.no_grad()
def test_a_prefix_sees_itself_both_ways(setting: str) -> None:
    model, code, ids = ours(setting), theirs(setting), tokens()
    kinds = (torch.arange(9) < torch.tensor([[5], [9]])).long()
    expected = said(code, ids, token_type_ids=kinds)
    close(model(ids, token_type_ids=kinds).logits, expected, 1e-12)
    differ(model(ids).logits, expected, 1e-2)
    cache = Cache(model.config, batch_size=2, max_len=9, dtype=F64)
    parts = [model(ids[:, :5], cache=cache, token_type_ids=kinds[:, :5]).logits]
    parts += [model(x, cache=cache).logits for x in ids[:, 5:].split(1, 1)]
    close(torch.cat(parts, 1)[:1], expected[:1], 1e-12)
    with pytest.raises(ValueError, match="beside cached tokens"):
        model(ids[:, :1], cache=cache, token_type_ids=kinds[:, :1])
    with pytest.raises(ValueError, match=r"token_type_ids = \(2, 5\): must be \(B, T\) = \(2, 9\)"):
        model(ids, token_type_ids=kinds[:, :5])
    padded = torch.cat((torch.zeros_like(ids[:, :2]), ids), 1)
    real = (torch.arange(11) >= 2).long().expand(2, -1) - 1
    found = model(padded, documents=real, token_type_ids=torch.nn.functional.pad(kinds, (2, 0), value=1)).logits
    close(found[:, 2:], expected, 1e-12)


@every_setting
def test_the_engine_writes_what_their_generate_does(setting: str) -> None:
    code, model = theirs(setting), ours(setting)
    prompts = [tokens(1, n)[0].tolist() for n in (3, 7, 5)]
    engine = Engine(model, chunk=4, tick_tokens=16)
    numbers = [engine.submit(Request(prompt=p, max_tokens=8, sampling=Sampling(temperature=0))) for p in prompts]
    found = answers(engine, numbers)
    for number, prompt in zip(numbers, prompts, strict=True):
        with precisely(F64):
            text = code.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert found[number][0] == text[0, len(prompt) :].tolist()
    assert len({tuple(found[number][0]) for number in numbers}) == 3 and is_empty(engine)


def told(engine: Engine, requests: list[Request]) -> list[list[Event]]:
    """What each is told, all of them at once."""
    numbers, events = [engine.submit(request) for request in requests], list(engine.run())
    assert is_empty(engine)
    return [[event for event in events if event.number == number] for number in numbers]


def is_said(model: HrmText, request: Request, events: list[Event]) -> bool:
    """Whether one pass over prompt and text gives these loops and, of these tokens, these probabilities."""
    n, text = len(request.prompt), [event.token for event in events]
    ids = torch.tensor([[*request.prompt, *text]])
    kinds = (torch.arange(ids.shape[1]) < n).long()[None] if request.prefix else None
    out = model(ids, token_type_ids=kinds, n_loops=request.n_loops, exit=request.exit)
    shares = out.logits[0, n - 1 : -1].log_softmax(-1)[range(len(text)), text]
    found = torch.tensor([event.logprob for event in events], dtype=F64)
    same = out.loops_used[0, n - 1 : -1].tolist() == [event.loops for event in events]
    return len(text) == request.max_tokens and same and bool((shares - found).abs().max() < 1e-10)


@every_setting
@torch.no_grad()
def test_tokens_leave_the_loop_in_the_engine(setting: str) -> None:
    """Requests of other depths and rules, side by side: each as the model's own forward has it."""
    model = ours(setting)
    rule = ruled(model, "delta")
    requests = [
        Request(
            prompt=row[: 2 + i],
            max_tokens=8,
            exit=(None, rule)[i % 2],
            n_loops=5 - i // 2,
            n_logprobs=0,
            sampling=Sampling(seed=i),
        )
        for i, row in enumerate(tokens(6).tolist())
    ]
    found = told(Engine(model, n_loops=5, chunk=3, tick_tokens=8), requests)
    assert all(is_said(model, request, events) for request, events in zip(requests, found, strict=True))
    assert len({event.loops for events in found[1::2] for event in events}) > 1
    assert not is_said(model, replace(requests[1], exit=None), found[1])


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@torch.no_grad()
def test_prefixes_in_the_engine(exact: bool) -> None:
    """Beside causal prompts, with tokens that leave early and budgets, and prompts that begin alike."""
    model, long = ours("cycles as published"), tokens(1, 21)[0].tolist()
    rule = ruled(model, "delta")
    prompts = [long, long[:7], long, [*long[:18], 1, 2, 3], long[:3], [4]]
    requests = [Request(prompt=p, max_tokens=5, prefix=True, n_logprobs=0) for p in prompts]
    requests += [replace(r, exit=rule, n_loops=4, sampling=Sampling(seed=1)) for r in requests[1:4]]
    requests += [replace(r, prefix=False) for r in requests[:2]]
    found = told(Engine(model, n_loops=4, chunk=4, tick_tokens=32, exact=exact), requests)
    assert all(is_said(model, request, events) for request, events in zip(requests, found, strict=True))
    assert len({event.loops for events in found[6:9] for event in events}) > 1
    for request, events in zip(requests[:4], found, strict=False):
        assert not is_said(model, replace(request, prefix=False), events)


@torch.no_grad()
def test_a_prefix_in_their_generate() -> None:
    code, engine = theirs("cycles as published"), Engine(ours("cycles as published"), chunk=4, tick_tokens=32)
    prompts = [tokens(1, n) for n in (3, 7, 21)]
    how: Any = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    requests = [
        Request(prompt=p[0].tolist(), max_tokens=8, sampling=Sampling(temperature=0), prefix=True) for p in prompts
    ]
    for prompt, events in zip(prompts, told(engine, requests), strict=True):
        with precisely(F64):
            both, causal = (code.generate(prompt, token_type_ids=torch.full_like(prompt, n), **how) for n in (1, 0))
        assert [event.token for event in events] == both[0, prompt.shape[1] :].tolist()
        assert not torch.equal(both, causal)


@torch.no_grad()
def test_a_prefix_that_starts_over() -> None:
    """Where memory runs out: what was written follows the prompt, and is no part of the prefix."""
    model, long = ours("cycles as published"), tokens(1, 21)[0].tolist()
    requests = [Request(prompt=long[:n], max_tokens=16, n_logprobs=0, prefix=True) for n in (9, 5, 7)]
    engine = Engine(model, chunk=4, tick_tokens=16, n_rows=model.config.n_layers * 2 * 28)
    found = told(engine, requests)
    assert engine.n_preempted > 0
    assert all(is_said(model, request, events) for request, events in zip(requests, found, strict=True))


@torch.no_grad()
def test_a_prefix_with_a_budget_or_a_draft() -> None:
    model, long = ours("cycles as published"), tokens(1, 21)[0].tolist()
    plain = Request(prompt=long, max_tokens=6, n_loops=4, prefix=True, sampling=Sampling(seed=3))
    requests = [plain, replace(plain, draft=Draft(n_loops=1, n_tokens=3)), replace(plain, loop_budget=2.0)]
    engine = Engine(model, n_loops=4, chunk=8, tick_tokens=32)
    whole, drafted, saved = told(engine, requests)
    assert whole == [replace(event, number=0) for event in drafted] and engine.n_drafted > 0
    text, loops = [event.token for event in saved], [event.loops for event in saved]
    budgets = torch.tensor([[4] * 20 + loops])
    out = model(
        torch.tensor([[*long, *text[:-1]]]), n_loops=budgets, token_type_ids=(torch.arange(26) < 21)[None].long()
    )
    for i, token in enumerate(text):
        assert sample(out.logits[:, 20 + i], plain.sampling, index=i).item() == token
    assert loops == [2] * 6


def test_a_known_prefix_is_not_computed_again() -> None:
    """The same prompt shares what it left; one that only begins alike saw something else."""
    model, long = ours("cycles as published"), tokens(1, 21)[0].tolist()
    engine, used = Engine(model, chunk=4, tick_tokens=32), []
    for prompt in (long, long, [*long[:20], 1]):
        before = engine.n_token_loops
        engine.submit(Request(prompt=prompt, max_tokens=1, prefix=True))
        list(engine.run())
        used.append((engine.n_token_loops - before) // 2)
    assert used == [21, 5, 21]


def test_nobody_overtakes_a_prefix_that_waits_for_room() -> None:
    engine = Engine(ours("cycles as published"), chunk=4, tick_tokens=16)
    for n, prefix in ((3, False), (16, True), (3, False)):
        engine.submit(Request(prompt=tokens(1, n)[0].tolist(), max_tokens=3, prefix=prefix))
    assert [event.number for event in engine.run()] == [0] * 3 + [1, 1, 2, 1, 2, 2]


def test_prefixes_that_cannot_be() -> None:
    engine = Engine(ours("cycles as published"), chunk=4, tick_tokens=16)
    with pytest.raises(ValueError, match=r"prompt = '17 tokens': must be at most tick_tokens \(16\) with prefix"):
        engine.submit(Request(prompt=[1] * 17, prefix=True))
    with pytest.raises(ValueError, match="prefix = True: must be False, or True without scores_prompt"):
        Request(prompt=[1], prefix=True, scores_prompt=True, n_logprobs=1)
    with pytest.raises(ValueError, match="prefix = True: must be False with n_coda_layers = 1"):
        Engine(build({}), chunk=4).submit(Request(prompt=[1], prefix=True))


def written(folder: Path, setting: str, **changes: Any) -> Path:
    """As their code saves it."""
    theirs(setting, torch.float32).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


@every_setting
@torch.no_grad()
def test_a_published_folder(setting: str, tmp_path: Path) -> None:
    read, made = read_published(written(tmp_path, setting)), ours(setting, torch.float32)
    assert isinstance(read, HrmText) and read.config == made.config and not read.training
    assert torch.equal(read(tokens()).logits, made(tokens()).logits)
    legacy = {"num_layers_per_stack": None, "num_hidden_layers": made.config.n_stack_layers}
    assert read_published(written(tmp_path, setting, **legacy)).config == made.config


REFUSED: list[tuple[str, Any, str]] = [
    ("hidden_act", "gelu", "hidden_act = 'gelu': must be 'silu'"),
    ("attention_bias", True, "attention_bias = True: must be False"),
    ("rope_parameters", {"rope_type": "yarn"}, "rope_scaling = 'yarn': must be 'default'"),
    ("L_cycles", 0, "L_cycles = 0: must be an integer > 0"),
    ("H_cycles", 0, "n_loops = 0"),
    ("initializer_range", "x", "initializer_range = 'x': must be a number > 0"),
    ("num_layers_per_stack", 3, "missing"),
    ("num_layers_per_stack", 1, "not in this model"),
    ("vocab_size", 24, "wrong shape"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=str)
def test_what_is_refused(field: str, value: Any, message: str, tmp_path: Path) -> None:
    changes = {"embedding_scale": None} if field == "initializer_range" else {}
    with pytest.raises(ValueError, match=r"config\.json|safetensors") as error:
        read_published(written(tmp_path, "cycles as published", **changes, **{field: value}))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_the_default_shape_has_as_many_parameters() -> None:
    with torch.device("meta"):
        code = HrmTextForCausalLM(HrmTextConfig())
        model = HrmText(config_from(code.config.to_dict()))
    n = sum(x.numel() for x in code.parameters())
    assert sum(x.numel() for x in model.state_dict().values()) == n == 1_447_822_848


def test_not_as_a_folder_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither our configuration nor our code would tell of this loop; transformers reads theirs as it is."""
    published = written(tmp_path / "published", "cycles as published")
    assert cli.main(["convert", str(published), str(tmp_path / "converted")]) == 2
    assert "model = 'HrmText': must be" in capsys.readouterr().err and not (tmp_path / "converted").exists()


@torch.no_grad()
def test_behind_transformers_interface() -> None:
    """Not saved, but there: its caches and its generate."""
    model, code = ours("cycles as published"), theirs("cycles as published")
    wrapped = RitornelloForCausalLM.of(model)
    text = wrapped.generate(tokens(1, 5), max_new_tokens=6, do_sample=False, eos_token_id=None)
    with precisely(F64):
        assert torch.equal(text, code.generate(tokens(1, 5), max_new_tokens=6, do_sample=False, eos_token_id=None))


def test_a_new_one_trains_and_is_bounded() -> None:
    """Gradients reach every parameter; each state stays as long as its norm makes it."""
    model = HrmText(config_from(HrmTextConfig(**SETTINGS["cycles as published"]).to_dict()), seed=1)
    out = model(tokens(), n_loops=3)
    out.logits.square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in model.parameters())
    with torch.no_grad():
        states = model(tokens(), n_loops=3, trajectory=True).trajectory
    longest = max(float(state.h.norm(dim=-1).max()) for state in states)
    assert 0.99 * model.state_bound(3) < longest <= model.state_bound(3) * (1 + 1e-6)
    assert not model.carry.start.any() and not any("norm" in name for name in model.state_dict())
