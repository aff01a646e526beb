"""A model starts with a state about as large as its input at any depth, from its seed alone."""

import pytest
import torch

from ritornello.config import ModelConfig
from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from tests.model.builders import every_kind, tiny, tokens_for

MIDDLE = {
    "dim": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "ffn_dim": 512,
    "n_experts": 16,
    "expert_dim": 64,
    "n_loops": 16,
}


@torch.no_grad()
def ratios(config: ModelConfig, *, n_loops: int = 64) -> list[float]:
    """RMS(h) / RMS(e) after each loop."""
    model = RecurrentDepthTransformer(config, seed=1).eval()
    x = model.embed(tokens_for(config, 1, 8))
    context = model.context(x)
    e = model.prelude(x, context, Passing())
    states = model.iterate(e, context, Run(Depth.uniform(n_loops)))
    return [float(state.h.square().mean().sqrt() / e.square().mean().sqrt()) for state in states]


@pytest.mark.parametrize("output_init", ["effective_depth", "zero"])
@pytest.mark.parametrize("initial_state", ["zeros", "e", "noise"])
@pytest.mark.parametrize("size", ["tiny", "middle"])
def test_state_is_as_large_as_its_input(size: str, initial_state: str, output_init: str) -> None:
    config = tiny(initial_state=initial_state, output_init=output_init, **(MIDDLE if size == "middle" else {}))
    found = ratios(config, n_loops=64 if size == "tiny" else 24)
    assert min(found) >= 0.5 and max(found) <= 2
    assert abs(found[-1] - found[-2]) < 0.01, "settled: deeper changes nothing"


def test_control_without_forgetting() -> None:
    assert ratios(tiny(injection="add"))[-1] > 10


@every_kind
def test_weights_follow_from_the_seed(row: dict) -> None:
    """Every parameter is drawn: also of a model built on the meta device and given memory full of nonsense."""
    config = tiny(**row)
    model, same, other = (RecurrentDepthTransformer(config, seed=seed) for seed in (5, 5, 6))
    with torch.device("meta"):
        late = RecurrentDepthTransformer(config)
    late = late.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*late.parameters(), *(b for n, b in late.named_buffers() if "correction" not in n)):
            tensor.fill_(float("nan"))
        for name, buffer in late.named_buffers():
            if "correction" in name:
                buffer.zero_()
    late.init_weights(5)
    states = [m.state_dict() for m in (model, same, late, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    drawn = [n for n, p in model.named_parameters() if p.ndim > 1 and not torch.equal(states[0][n], states[3][n])]
    constant = ("loop_B", "injection.B", "injection.weight", "mixing", "head.linear.weight", "translator.weight")
    left = {n for n, p in model.named_parameters() if p.ndim > 1} - set(drawn)
    assert all(name.endswith(constant) for name in left), left


def test_output_projections_are_small_or_zero() -> None:
    deep = RecurrentDepthTransformer(tiny(n_loops=64, injection="add", dim=64, ffn_dim=64))
    shallow = RecurrentDepthTransformer(tiny(n_loops=1, injection="add", dim=64, ffn_dim=64))
    zero = RecurrentDepthTransformer(tiny(output_init="zero"))
    for name in ("self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"):
        small, large = (m.recurrent[0].get_parameter(name).std().item() for m in (deep, shallow))
        assert small < large / 20  # √(2 + 64²) against √(2 + 1)
        assert not zero.recurrent[0].get_parameter(name).any()


def test_matrices_have_the_variance_of_small_init() -> None:
    model = RecurrentDepthTransformer(tiny(dim=64, ffn_dim=256))
    for weight in (model.embed_tokens[0].weight, model.recurrent[0].self_attn.q_proj.weight):
        assert weight.std().item() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.06)
        assert weight.abs().max().item() <= 3 * (2 / (5 * 64)) ** 0.5


def test_low_rank_deltas_and_loop_embedding_start_silent() -> None:
    model = RecurrentDepthTransformer(tiny()).double().eval()
    plain = RecurrentDepthTransformer(tiny(lora_rank=0, loop_embedding=False)).double().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    tokens = tokens_for(model.config, 1, 4)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-12, atol=1e-12)


def test_unit_embeddings_are_of_unit_size_and_the_rest_is_as_before() -> None:
    small, unit = (RecurrentDepthTransformer(tiny(embedding_init=kind, dim=256), seed=1) for kind in ("small", "unit"))
    assert unit.embed_tokens[0].weight.std().item() == pytest.approx(1, rel=0.05)
    assert small.embed_tokens[0].weight.std().item() == pytest.approx((2 / 5 / 256) ** 0.5, rel=0.05)
    stds = [
        {name: w.std() for name, w in m.named_parameters() if w.ndim > 1 and "embed_tokens" not in name}
        for m in (small, unit)
    ]
    assert all(stds[0][name].item() == pytest.approx(stds[1][name].item(), rel=0.2) for name in stds[0])
