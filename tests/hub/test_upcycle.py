"""A plain model with its layers made into loops: the same at full rank, the nearest there is below it."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ritornello import cli
from ritornello.config import ExitRule
from ritornello.hub.converters import encoded, read_published
from ritornello.hub.moments import DAMPING, READ_BY, Moments, fit, roots, second_moments
from ritornello.hub.upcycle import MATRICES, folded, low_rank, matrix, share_kept, split, upcycle
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.hub.test_llama import gguf_file, theirs
from tests.model.builders import build, close, differ, tiny, tokens_for

F64 = torch.float64
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {},
    "wide attention, tied": {"n_heads": 4, "n_kv_heads": 1, "head_dim": 10, "tie_embeddings": True},
    "wide network": {"ffn_dim": 12, "n_kv_heads": 4, "tie_embeddings": False},
}


def plain(n_layers: int = 8, n_coda: int = 0, **changes: Any) -> RecurrentDepthTransformer:
    """Norms' weights and all others apart from 0 and 1."""
    options = {"injection": "none", "initial_state": "e", "lora_rank": 0, "loop_embedding": False, "ffn": "dense"}
    return build(tiny(layers=(n_layers - n_coda, 0, n_coda), **options | changes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("init", ["mean", "first", "last"])
@torch.no_grad()
def test_full_rank_is_the_plain_model(shape: str, init: Any) -> None:
    model = plain(n_coda=3, **SHAPES[shape])
    tokens, rank = tokens_for(model.config, 2, 9), 16
    how: dict[str, Any] = {"n_prelude": 1, "n_recurrent": 2, "n_loops": 3, "init": init}
    made = upcycle(model, **how, rank=rank)
    counts = (made.config.n_prelude_layers, made.config.n_recurrent_layers, made.config.n_coda_layers)
    assert counts == (1, 2, 1) and made.config.n_loops == 3
    close(made(tokens).logits, model(tokens).logits)
    assert share_kept(model, made) == pytest.approx(1, abs=1e-12)
    differ(made(tokens, n_loops=2).logits, model(tokens).logits)
    for target in ("q", "k", "v", "o", "ffn"):  # no delta is idle
        without = upcycle(model, **how, rank=rank)
        for name, x in without.named_parameters():
            if name.endswith("loop_B") and (f".{target}_proj." in name or (target == "ffn" and ".mlp." in name)):
                x.zero_()
        differ(without(tokens).logits, model(tokens).logits)
    shortened = upcycle(model, **how, rank=rank - 4)
    differ(shortened(tokens).logits, model(tokens).logits)
    assert share_kept(model, shortened) < 1 - 1e-4


@torch.no_grad()
def test_token_by_token_and_stopping() -> None:
    """Keys and values of a loop come from its own delta, in the cache as in one pass, for halted tokens too."""
    model = plain()
    made, tokens = upcycle(model, n_prelude=1, n_recurrent=2, n_loops=3, rank=16), tokens_for(model.config, 2, 9)
    cache = Cache(made.config, batch_size=2, max_len=9, n_loops=3, dtype=F64)
    parts = [made(part, cache=cache).logits for part in (tokens[:, :4], *tokens[:, 4:].split(1, 1))]
    close(torch.cat(parts, 1), model(tokens).logits)
    sizes = torch.stack([(b.h - a.h).norm(dim=-1) / a.h.norm(dim=-1) for a, b in _steps(made, tokens)])
    rule = ExitRule("delta", float(sizes.median()))
    used = made(tokens, exit=rule).loops_used
    assert len(used.unique()) > 1
    cache = Cache(made.config, batch_size=2, max_len=9, n_loops=3, dtype=F64)
    parts = [made(part, exit=rule, cache=cache).logits for part in tokens.split(1, 1)]
    close(torch.cat(parts, 1), made(tokens, exit=rule).logits)


def _steps(model: RecurrentDepthTransformer, tokens: torch.Tensor) -> list[Any]:
    states = model(tokens, trajectory=True).trajectory
    return list(pairwise(states))


@torch.no_grad()
def test_without_deltas_layers_of_one_are_equal() -> None:
    """Rank 0 is exact for a model whose layers repeat; norms that differ are folded, or it would not be."""
    model = plain()
    for i in (3, 5):  # as 1, but for its norms, whose share matrices take over
        twin = {name: x.clone() for name, x in model.prelude_layers[1].state_dict().items()}
        for norm, readers in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
            scale = 1 + torch.arange(16, dtype=F64) / 10
            twin[f"{norm}.weight"] *= scale
            for name in readers:
                twin[f"{'self_attn' if len(name) == 1 else 'mlp'}.{name}_proj.weight"] /= scale
        model.prelude_layers[i].load_state_dict(twin)
        model.prelude_layers[i + 1].load_state_dict(model.prelude_layers[2].state_dict())
    tokens = tokens_for(model.config, 2, 9)
    made = upcycle(model, n_prelude=1, n_recurrent=2, n_loops=3, rank=0)
    assert made.config.lora_targets == () and made.recurrent[0].self_attn.q_proj.loop_A is None
    close(made(tokens).logits, model(tokens).logits)
    model.prelude_layers[5].input_layernorm.weight.mul_(1.01)
    differ(made(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_folded_norms() -> None:
    layer = plain().prelude_layers[0]
    state, x = dict(layer.state_dict()), torch.randn(5, 16, dtype=F64)
    matrices = folded(state)
    assert set(matrices) == set(MATRICES)
    for norm, name in (("input_layernorm", "self_attn.k_proj"), ("post_attention_layernorm", "mlp.up_proj")):
        y = x / (x.square().mean(-1, keepdim=True) + layer.input_layernorm.eps).sqrt()
        expected = layer.get_submodule(name)(layer.get_submodule(norm)(x))
        close(y @ matrices[name].mT, expected)
        differ(y @ state[f"{name}.weight"].mT, expected)
    assert torch.equal(matrices["self_attn.o_proj"], state["self_attn.o_proj.weight"])


def test_deltas_are_the_nearest_of_their_rank() -> None:
    """Their distance is the singular values left out (Eckart-Young); others of that rank are farther."""
    x = torch.randn(7, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(x)
    for rank in range(1, 6):
        down, up = low_rank(x, rank)
        assert down.shape == (rank, 5) and up.shape == (7, rank)
        close((x - up @ down).square().sum(), values[rank:].square().sum())
        if rank < 5:
            other = up + 0.01 * torch.randn(up.shape, dtype=F64)
            assert (x - other @ down).norm() > (x - up @ down).norm()
    down, up = low_rank(x, 9)
    assert down.shape == (9, 5) and up.shape == (7, 9)
    close(up @ down, x)


@torch.no_grad()
def test_what_is_kept_grows_with_rank() -> None:
    model = plain()
    made = [upcycle(model, n_prelude=2, n_recurrent=3, n_loops=2, rank=rank) for rank in (0, 2, 4, 8, 16)]
    kept = [share_kept(model, m) for m in made]
    assert kept == sorted(kept) and kept[0] < 0.6 < 0.9 < kept[-2] < kept[-1]
    one = made[1].recurrent[0].self_attn.q_proj
    true = [folded(dict(model.prelude_layers[i].state_dict()))["self_attn.q_proj"] for i in (2, 5)]
    close(one.weight, (true[0] + true[1]) / 2)
    first = upcycle(model, n_prelude=2, n_recurrent=3, n_loops=2, rank=2, init="first").recurrent[0].self_attn.q_proj
    close(first.weight, true[0])
    assert first.loop_B[0].abs().max() < 1e-12


@torch.no_grad()
def test_moments_are_of_what_matrices_read() -> None:
    """Against inputs caught one by one, undamped; texts of several lengths count by their tokens."""
    model = plain(3, n_coda=1)
    texts = [tokens_for(model.config, 2, 9), tokens_for(model.config, 1, 5, seed=1)]
    found, caught = second_moments(model, texts), {}
    layers = [*model.prelude_layers, *model.coda_layers]
    for i, layer in enumerate(layers):
        for name in MATRICES:
            keep = lambda module, inputs, place=(i, name): caught.setdefault(place, []).append(inputs[0])  # noqa: E731
            layer.get_submodule(name).register_forward_pre_hook(keep)
    for tokens in texts:
        model(tokens)
    for (i, name), inputs in caught.items():
        norm = next((norm for norm, readers in READ_BY.items() if name in readers), None)
        x = torch.cat([y.flatten(0, 1) for y in inputs]) / (1 if norm is None else layers[i].get_submodule(norm).weight)
        true = x.mT @ x / 23
        close(found[i][name], true + DAMPING * true.diagonal().mean() * torch.eye(len(true), dtype=F64))
        differ(found[i][name], true)


def test_what_is_read_decides_what_is_lost() -> None:
    """Least in what matrices say: the singular values left out, and no direction leads to less."""
    draw = torch.Generator().manual_seed(0)
    x, inputs = (torch.randn(n, 5, dtype=F64, generator=draw) for n in (7, 40))
    inputs *= torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1])
    seen = inputs.mT @ inputs / 40
    lost = lambda pair: float(((x - pair[1] @ pair[0]) @ inputs.mT).square().sum() / 40)  # noqa: E731
    for rank in (1, 2, 3, 4):
        values = torch.linalg.svdvals(x @ roots(seen)[0])[rank:]
        assert lost(low_rank(x, rank, seen)) == pytest.approx(float(values.square().sum()), abs=1e-9)
        assert lost(low_rank(x, rank, seen)) < 0.99 * lost(low_rank(x, rank))
    down, up = low_rank(x, 5, seen)
    close(up @ down, x)
    several = torch.randn(3, 7, 5, dtype=F64, generator=draw)
    moments = torch.stack([seen, 2 * torch.eye(5, dtype=F64), seen @ seen])
    best = fit(several, moments)
    close(sum((best - w) @ c for w, c in zip(several, moments, strict=True)), torch.zeros(7, 5, dtype=F64))
    close(fit(several, torch.eye(5, dtype=F64).expand(3, 5, 5)), several.mean(0))


@torch.no_grad()
def test_with_moments() -> None:
    """Exact at full rank, too; below it, recurrent layers say on that text what is nearer to what tied ones said."""
    model, how = plain(), {"n_prelude": 2, "n_recurrent": 3, "n_loops": 2}
    tokens = tokens_for(model.config, 4, 32)
    moments = second_moments(model, [tokens])
    close(upcycle(model, **how, rank=16, moments=moments)(tokens).logits, model(tokens).logits)
    for rank in (0, 3):
        plainly, informed = (upcycle(model, **how, rank=rank, moments=m) for m in (None, moments))
        assert sum(_lost(model, informed, moments)) < 0.95 * sum(_lost(model, plainly, moments))
        assert share_kept(model, informed) < share_kept(model, plainly)


def _lost(model: RecurrentDepthTransformer, made: RecurrentDepthTransformer, moments: list[Moments]) -> list[float]:
    """E‖(W − W') x‖² of each tied matrix."""
    found = []
    for i in range(2, 8):
        layer, loop = made.recurrent[(i - 2) % 3], (i - 2) // 3
        for name, x in folded(dict(model.prelude_layers[i].state_dict())).items():
            y = matrix(layer, name, loop)
            found.append(float(((x - y) @ moments[i][name] @ (x - y).mT).trace()))
    return found


@torch.no_grad()
def test_bfloat16_deltas_make_up_for_the_rounded_matrix() -> None:
    model = plain(ffn_dim=64).to(torch.bfloat16)
    made = upcycle(model, n_prelude=1, n_recurrent=1, n_loops=7, rank=16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    tokens = tokens_for(model.config, 2, 9)
    exact, precise = (
        model(tokens).logits.float(),
        upcycle(plain(ffn_dim=64), n_prelude=1, n_recurrent=1, n_loops=7, rank=16),
    )
    assert (made(tokens).logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert share_kept(model.double(), made.double()) > 0.9999
    assert precise.config == made.config


@torch.no_grad()
def test_the_input_may_come_back() -> None:
    model = plain()
    tokens = tokens_for(model.config, 2, 9)
    made = upcycle(model, n_prelude=1, n_recurrent=2, n_loops=3, rank=16, injection="lti")
    assert made.injection.gain() == 0 and 0.999 < made.injection.rho() < 1
    close(made(tokens).logits, model(tokens).logits, 2e-2)
    differ(made(tokens).logits, model(tokens).logits)
    made.injection.B.fill_(0.1)
    differ(made(tokens).logits, model(tokens).logits, 2e-2)


def test_it_shares_no_memory() -> None:
    model = plain()
    made = upcycle(model, n_prelude=1, n_recurrent=2, n_loops=3, rank=2)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not mine & {p.untyped_storage().data_ptr() for p in made.parameters()}
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize(
    ("n_layers", "n_loops", "given", "expected"),
    [
        (30, 2, {}, (4, 11)),
        (30, 3, {}, (4, 7)),
        (30, 2, {"n_prelude": 6, "n_coda": 6}, (6, 9)),
        (8, 4, {}, (1, 1)),
        (8, 1, {"n_prelude": 3, "n_coda": 3}, (3, 2)),
        (32, 2, {"n_coda": 8}, (4, 10)),
    ],
)
def test_split(n_layers: int, n_loops: int, given: dict[str, int], expected: tuple[int, int]) -> None:
    assert split(n_layers, n_loops, **given) == expected


@pytest.mark.parametrize("given", [{"n_prelude": 4, "n_coda": 5}, {"n_prelude": 30}, {"n_coda": 31}], ids=str)
def test_splits_that_do_not_come_out_even(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"layers = .* of 30': must be such that what is left"):
        split(30, 2, **given)


@pytest.mark.parametrize("n_loops", [0, -1])
def test_no_split_without_loops(n_loops: int) -> None:
    with pytest.raises(ValueError, match=f"n_loops = {n_loops}: must be an integer >= 1"):
        split(30, n_loops)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"layers": (1, 1, 1)}, {}, "must be plain"),
    ({"attention": "mla", "lora_targets": ()}, {}, "must be plain, of 'pre' norms, with GQA"),
    ({"norm": "pre_post"}, {}, "norm 'pre_post'"),
    ({"qk_bias": True}, {}, "without biases"),
    ({"ffn": "dense", "activation": "relu2"}, {}, "activation = 'relu2'"),
    ({"value_embeddings": (1, 3)}, {}, "value_embeddings = "),
    ({}, {"n_loops": 4}, "at most the 8 layers"),
    ({}, {"n_recurrent": 0}, "n_recurrent = 0"),
    ({}, {"rank": 17}, r"rank = 17: must be an integer in \[0, 16\]"),
    ({}, {"init": "median"}, "init = 'median'"),
    ({}, {"injection": "add"}, "injection = 'add'"),
]


@pytest.mark.parametrize(("shape", "how", "message"), REFUSED, ids=str)
def test_what_is_refused(shape: dict[str, Any], how: dict[str, Any], message: str) -> None:
    model = build(tiny(**{"layers": (8, 0, 0)} | shape))
    with pytest.raises(ValueError, match=message):
        upcycle(model, **{"n_prelude": 1, "n_recurrent": 2, "n_loops": 3, "rank": 2} | how)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that transformers runs, and one line that says what was made."""
    theirs("tied, fewer keys", dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    convert = ["convert", "--from", "llama", str(tmp_path / "theirs")]
    loops = ["--loops", "2", "--prelude", "1", "--coda", "0"]
    assert cli.main([*convert, str(tmp_path / "same"), *loops, "--rank", "24"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'same'}\n"
    assert "1 + 1 x 2 + 0 layers, rank 24: " in said.err and "100.0% of the tied weights" in said.err
    assert cli.main([*convert, str(tmp_path / "plain")]) == 0
    ids = torch.arange(18).view(2, 9)
    same, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("same", "plain"))
    assert (same - whole).abs().max() < 3e-5
    assert cli.main([*convert, str(tmp_path / "small"), *loops, "--rank", "0", "-q"]) == 0
    assert "layers" not in capsys.readouterr().err
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (small(ids).logits - whole).abs().max() > 0.1
    (tmp_path / "text").write_text("abc def", encoding="utf-8")
    assert cli.main([*convert, str(tmp_path / "none"), *loops, "--rank", "0", "--text", str(tmp_path / "text")]) == 2
    assert "no tokenizer that transformers reads" in capsys.readouterr().err
    for alone in (["--prelude", "1"], ["--rank", "0"], ["--init", "first"], ["--injection", "none"]):
        assert cli.main([*convert, str(tmp_path / "none"), *alone]) == 2
        assert f"{alone[0]} = " in (said := capsys.readouterr().err) and "given with --loops" in said
    assert cli.main([*convert, str(tmp_path / "none"), "--loops", "4"]) == 2
    assert "multiple of n_loops (4)" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_command_line_fits_deltas_to_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "model.gguf", tmp_path / "text"
    gguf_file(path)
    text.write_text("to and fro " * 60, encoding="utf-8")
    loops = ["--loops", "2", "--prelude", "1", "--coda", "0", "--rank", "2"]
    assert cli.main(["convert", str(path), str(tmp_path / "fitted"), *loops, "--text", str(text)]) == 0
    assert f"fitted to {text}" in capsys.readouterr().err
    ids = encoded(path, text.read_text(encoding="utf-8"))
    assert 600 < len(ids) < 700
    plain, found = read_published(path), AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    rows = [row[None] for row in torch.tensor(ids).split(64)]
    expected = upcycle(plain, n_prelude=1, n_recurrent=1, n_loops=2, rank=2, moments=second_moments(plain, rows))
    unfitted = upcycle(plain, n_prelude=1, n_recurrent=1, n_loops=2, rank=2)
    tokens = torch.tensor(ids[:48])[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
        near, far = ((m(tokens).logits - plain(tokens).logits).square().mean() for m in (expected, unfitted))
    assert near < 0.5 * far
    text.write_text("", encoding="utf-8")
    assert cli.main(["convert", str(path), str(tmp_path / "none"), *loops, "--text", str(text)]) == 2
    assert "0 tokens" in capsys.readouterr().err
