"""From logits to tokens: definitions against plain Python, frequencies, and whose randomness it is."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ritornello.engine import sampling
from ritornello.engine.sampling import Sampling, probabilities, sample
from ritornello.ops.noise import fold, uniform

CHI_SQUARE_999 = {9: 27.88, 15: 37.70}  # degrees of freedom: exceeded once in a thousand


def normalized(shares: list[float]) -> list[float]:
    total = sum(shares)
    return [share / total for share in shares]


def reference(logits: list[float], how: Sampling) -> list[float]:
    """One filter after the other, each on the probabilities that the one before left."""
    top = max(logits)
    shares = normalized([math.exp((x - top) / how.temperature) for x in logits])
    ranked = sorted(range(len(shares)), key=lambda i: -shares[i])
    if how.top_k is not None:
        least = shares[ranked[min(how.top_k, len(ranked)) - 1]]
        shares = normalized([share if share >= least else 0.0 for share in shares])
    if how.top_p is not None:
        kept, total = set(), 0.0
        for i in ranked:
            if total >= how.top_p:
                break
            kept.add(i)
            total += shares[i]
        shares = normalized([share if i in kept else 0.0 for i, share in enumerate(shares)])
    if how.min_p is not None:
        least = how.min_p * max(shares)
        shares = normalized([share if share >= least else 0.0 for share in shares])
    return shares


def drawn(rows: int, size: int, *, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(actual: Tensor, expected: list[list[float]]) -> bool:
    return torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


TEMPERATURES, TOP_KS = (0.3, 1.0, 2.5), (None, 1, 4, 11, 99)
TOP_PS, MIN_PS = (None, 0.05, 0.6, 0.95, 1.0), (None, 0.0, 0.2, 1.0)


def test_definitions() -> None:
    """Every combination of the filters; the control shifts one of them."""
    logits = drawn(4, 11)
    for temperature, top_k, top_p, min_p in itertools.product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS):
        how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        found = probabilities(logits, how)
        assert same(found, [reference(row, how) for row in logits.tolist()]), how
        assert found.shape == logits.shape and (found.sum(-1) - 1).abs().max() < 1e-12
    for change in ({"temperature": 1.01}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}):
        options: dict[str, Any] = {"temperature": 1.0, "top_k": 4, "top_p": 0.9, "min_p": 0.02}
        found = probabilities(logits, Sampling(**options))
        assert not same(found, [reference(row, Sampling(**options | change)) for row in logits.tolist()]), change


def test_ties() -> None:
    """What ties with the k-th is kept, so that the order of ids decides nothing; a nucleus takes the first ids."""
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    for how in (Sampling(top_k=1), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(top_p=0.7), Sampling(min_p=1.0)):
        kept = (probabilities(logits, how)[0] > 0).tolist()
        assert kept == [share > 0 for share in reference(logits[0].tolist(), how)]
    assert (probabilities(logits, Sampling(top_k=3)) > 0).sum() == 5
    assert (probabilities(logits, Sampling(top_p=0.5))[0] > 0).nonzero().flatten().tolist() == [1, 3]


def test_no_limit_is_no_limit() -> None:
    """In float32 the sum of the first shares rounds to 1 before the last is reached."""
    logits = torch.cat((torch.zeros(1, 3), torch.full((1, 4), -17.0)), 1)
    plain = probabilities(logits, Sampling())
    assert (plain > 0).all()
    for how in (Sampling(top_p=1.0), Sampling(min_p=0.0), Sampling(top_k=7), Sampling(top_k=2**20)):
        assert torch.equal(probabilities(logits, how), plain)
    assert not torch.equal(probabilities(logits, Sampling(top_p=0.9999)), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-3, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extremes_stay_finite(dtype: torch.dtype, temperature: float, scale: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]]).mul(scale).to(dtype)
    found = probabilities(logits, Sampling(temperature=temperature))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.isfinite().all() and found[0, 3] == 0 and abs(found.sum() - 1) < 1e-6
    if temperature < 1:
        assert found[0, 1] == 1, "a temperature near 0 is greedy"
    elif scale == 1:
        assert torch.allclose(found[0, :3], found.new_tensor(1 / 3), atol=0.01)


def chi_square(tokens: Tensor, expected: Tensor) -> float:
    counts = torch.bincount(tokens.flatten(), minlength=len(expected)).double()
    wanted = expected.double() * tokens.numel()
    return float(((counts - wanted).square() / wanted).sum())


def test_frequencies_are_the_probabilities() -> None:
    """Over many seeds, and over the tokens of one text; the control expects a slightly other temperature."""
    logits, how = drawn(1, 10, seed=1, spread=1.0).float(), Sampling(seed=5)
    shares, others = (probabilities(logits, Sampling(temperature=t))[0] for t in (1.0, 1.1))
    n = 20_000
    over_seeds = sample(logits.expand(n, -1), how, index=3)
    along_text = torch.cat([sample(logits, how, index=i) for i in range(1000)])
    for tokens in (over_seeds, along_text):
        assert chi_square(tokens, shares) < CHI_SQUARE_999[9]
    assert chi_square(over_seeds, others) > CHI_SQUARE_999[9]


def test_neighbours_are_independent() -> None:
    """Of seeds, and of places in the text."""
    logits = torch.zeros(20_000, 4)
    here, next_place = (sample(logits, Sampling(seed=7), index=i) for i in (0, 1))
    uniform_pairs = torch.full((16,), 1 / 16)
    for other in (next_place, here.roll(1)):
        assert chi_square(here * 4 + other, uniform_pairs) < CHI_SQUARE_999[15]
    assert chi_square(here * 4 + here, uniform_pairs) > CHI_SQUARE_999[15]


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    logits, seeds = drawn(50, 8), range(30, 80)
    tokens = sample(logits, Sampling(seed=30), index=4)
    draws = [float(uniform(fold(fold(torch.tensor(seed), 0), 4))) for seed in seeds]
    expected = [
        next(i for i, total in enumerate(itertools.accumulate(reference(row, Sampling()))) if total > draw)
        for row, draw in zip(logits.tolist(), draws, strict=True)
    ]
    assert tokens.tolist() == expected
    assert tokens.tolist() != sample(logits, Sampling(seed=30), index=5).tolist()


def test_a_row_draws_as_if_alone() -> None:
    logits = drawn(40, 30)
    tokens = sample(logits, Sampling(seed=9), index=2)
    alone = [int(sample(logits[i : i + 1], Sampling(seed=9 + i), index=2)) for i in range(40)]
    assert tokens.tolist() == alone
    assert tokens.tolist() != [int(sample(logits[i : i + 1], Sampling(seed=9), index=2)) for i in range(40)]


@pytest.mark.parametrize("draw", [2**-25, 0.5, 1 - 2**-24, 1.0])
def test_what_is_left_out_is_never_drawn(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the draw, 1 included, to which float32 may round. The control is left in, and drawn."""
    monkeypatch.setattr(sampling, "uniform", lambda key: torch.full(key.shape, draw))
    logits = drawn(300, 50).float()
    logits[:, [0, -1]] = -torch.inf
    for how in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.7), Sampling(min_p=0.5)):
        tokens = sample(logits, how, index=0)
        assert (probabilities(logits, how).gather(1, tokens[:, None]) > 0).all()
    logits[:, [0, -1]] = 1e3
    ends = {2**-25: 0, 0.5: 0, 1 - 2**-24: 49, 1.0: 49}
    assert (sample(logits, Sampling(), index=0) == ends[draw]).all()


def test_rounding_lets_nothing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parallel scan adds in another order for each place: where nothing is added, its sum may still grow."""
    cumsum = Tensor.cumsum
    monkeypatch.setattr(Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + 0.01 * (torch.arange(x.shape[-1]) % 2))
    logits = torch.zeros(2000, 20)
    logits[:, 1::2] = -torch.inf
    tokens = sample(logits, Sampling(), index=0)
    assert (tokens % 2 == 0).all() and len(tokens.unique()) == 10


def test_temperature_0_is_greedy() -> None:
    logits = drawn(20, 30)
    for options in ({}, {"seed": 3}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}):
        assert torch.equal(sample(logits, Sampling(temperature=0, **options), index=1), logits.argmax(-1))
    assert torch.equal(sample(logits, Sampling(top_k=1), index=1), logits.argmax(-1))
    assert not torch.equal(sample(logits, Sampling(), index=1), logits.argmax(-1))
    tied = torch.zeros(20, 5)
    assert len(sample(tied, Sampling(temperature=0), index=0).unique()) == 1, "no seed decides"
    assert len(sample(tied, Sampling(top_k=1), index=0).unique()) > 1


BAD = [
    *[("temperature", value) for value in (-1, -1e-300, math.nan, math.inf, True, "1", None)],
    *[("top_k", value) for value in (0, -1, 2.5, True, "3")],
    *[("top_p", value) for value in (0, 0.0, 1.1, -0.5, math.nan, True)],
    *[("min_p", value) for value in (2, -0.1, 1.0001, math.nan, True)],
    *[("seed", value) for value in (-1, 2**63, 1.5, "5", True, None)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_values_are_named(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"^{name} = .*: must be"):
        Sampling(**options)


def test_bounds_are_allowed() -> None:
    Sampling(temperature=0, top_k=1, top_p=1, min_p=0, seed=0)
    Sampling(temperature=100, top_k=2**20, top_p=5e-324, min_p=1, seed=2**63 - 1)


def test_penalties_and_biases() -> None:
    """Against plain Python; no change gives back the logits themselves."""
    logits, prompt, text = drawn(1, 8)[0], [0, 3], [3, 5, 5]
    how = Sampling(
        repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.5, logit_bias=((5, 2.0), (7, -9.0))
    )
    expected = logits.tolist()
    for token in {*prompt, *text}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, n in ((3, 1), (5, 2)):
        expected[token] -= 0.25 * n + 0.5
    expected[5] += 2.0
    expected[7] -= 9.0
    before = logits.clone()
    assert sampling.adjusted(logits, how, prompt, text).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(logits, before) and sampling.adjusted(logits, Sampling(), prompt, text) is logits
    assert sampling.adjusted(logits, how, prompt, []).tolist() != pytest.approx(expected, abs=1e-3)


def test_each_row_has_its_own_seed_and_index() -> None:
    logits = drawn(1, 50).expand(40, -1)
    seeds, index = torch.arange(40) % 8, torch.arange(40) // 8
    found = sampling.draw(logits, Sampling(), seeds, index).tolist()
    for row in range(40):
        assert found[row] == int(sample(logits[:1], Sampling(seed=row % 8), index=row // 8))
    assert len(set(found)) > 5


@pytest.mark.parametrize(
    "bad",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"presence_penalty": "1"},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, math.nan),)},
    ],
    ids=str,
)
def test_penalties_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*: must be"):
        Sampling(**bad)
