"""Decoding with a cache is the full forward pass, cut anywhere."""

import pytest
import torch

from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.latent import absorbed, absorbs, expanded
from tests.model.builders import build, close, differ, every_kind, lively, rules_for, tokens_for

T = 5


def new_cache(model: RecurrentDepthTransformer, batch: int, **options) -> Cache:
    return Cache(model.config, batch_size=batch, max_len=T, n_loops=6, dtype=torch.float64, **options)


@torch.no_grad()
def decoded(model: RecurrentDepthTransformer, tokens: torch.Tensor, cuts: list[int], **options) -> torch.Tensor:
    """Logits (B, T, V), the tokens passed in pieces that end at `cuts`. (B, T) options are cut alike."""
    cache, parts = new_cache(model, len(tokens)), []
    for start, end in zip([0, *cuts], [*cuts, T], strict=True):
        piece = {k: v[:, start:end] if getattr(v, "ndim", 0) == 2 else v for k, v in options.items()}
        parts.append(model(tokens[:, start:end], cache=cache, **piece).logits)
    return torch.cat(parts, 1)


@every_kind
def test_prefill_and_decode_at_every_split(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    budgets = torch.tensor([[2, 5, 1, 3, 6], [6, 1, 4, 2, 2]])
    ones = list(range(1, T))
    for n_loops, cuts in (
        (2, [[cut] for cut in ones]),
        (5, [[1, 3]]),
        (torch.tensor([2, 5]), [[2]]),
        (budgets, [ones]),
    ):
        with torch.no_grad():
            whole = model(tokens, n_loops=n_loops).logits
        for cut in cuts:
            close(decoded(model, tokens, cut, n_loops=n_loops), whole)
    differ(decoded(model, tokens, [3], n_loops=6), whole)


@every_kind
def test_prefill_and_decode_with_exits(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    for name in {rules_for(model.config)[0], rules_for(model.config)[-1]}:
        rule = lively(model, tokens, name, 6)
        with torch.no_grad():
            whole = model(tokens, n_loops=6, exit=rule).logits
        for cuts in ([1], [2, 3], [1, 2, 3, 4]):
            close(decoded(model, tokens, cuts, n_loops=6, exit=rule), whole)
        differ(decoded(model, tokens, [2, 3], n_loops=6), whole)


@every_kind
def test_decoding_deeper_than_the_prefill(row: dict) -> None:
    """As per-token budgets in one pass."""
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    budgets = torch.tensor([[2, 2, 6, 6, 4]] * 2)
    cache, parts = new_cache(model, 2), []
    with torch.no_grad():
        for part, n_loops in ((slice(0, 2), 2), (slice(2, 4), 6), (slice(4, 5), 4)):
            parts.append(model(tokens[:, part], n_loops=n_loops, cache=cache).logits)
        whole = model(tokens, n_loops=budgets).logits
    close(torch.cat(parts, 1), whole)
    differ(torch.cat(parts, 1), model(tokens, n_loops=6).logits)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_first_is_exact_for_a_model_that_shares(attention: str) -> None:
    model = build({"attention": attention, "kv_sharing": "first"})
    tokens = tokens_for(model.config, 2, T)
    assert new_cache(model, 2).slots[1].shape[0] == 1
    close(decoded(model, tokens, [1, 4], n_loops=6), model(tokens, n_loops=6).logits)
    other = build({"attention": attention})
    cache = new_cache(other, 2, policy="first")
    differ(other(tokens, n_loops=6, cache=cache).logits, other(tokens, n_loops=6).logits)


def test_last_keeps_one_slot_and_is_exact_within_a_pass() -> None:
    model = build({})
    tokens = tokens_for(model.config, 2, T)
    cache = new_cache(model, 2, policy="last")
    assert cache.slots[1].shape[0] == 1
    with torch.no_grad():
        close(model(tokens[:, :4], n_loops=6, cache=cache).logits, model(tokens[:, :4], n_loops=6).logits)
        differ(model(tokens[:, 4:], n_loops=6, cache=cache).logits, model(tokens, n_loops=6).logits[:, 4:])


def test_mla_decodes_absorbed_what_it_prefilled_expanded() -> None:
    model = build({"attention": "mla"})
    attention = model.recurrent[0].self_attn
    widths, weight, how = attention.widths, attention.kv_b_proj.weight, {"mask": None, "scale": attention.scale}
    assert not absorbs(64, 64, widths) and absorbs(1, 64, widths)
    nope, rotary = torch.randn(2, 4, 3, 6, dtype=torch.float64), torch.randn(2, 4, 3, 4, dtype=torch.float64)
    entries = torch.randn(2, 3, 14, dtype=torch.float64)
    y = absorbed(nope, rotary, entries, weight, widths, **how)
    close(y, expanded(nope, rotary, entries, entries[..., :10] @ weight.T, widths, **how))
    differ(y, expanded(nope, rotary, entries, (entries[..., :10] + 1e-3) @ weight.T, widths, **how))


def test_widths_hold_no_more_than_they_must() -> None:
    assert new_cache(build({"attention": "mla"}), 1).slots[1].shape[-1] == 10 + 4
    assert new_cache(build({}), 1).slots[1].shape[-1] == 2 * 2 * 6


def test_packed_documents_in_chunks() -> None:
    """Positions restart with a document, also one that starts in a later chunk and goes on in the next."""
    model = build({"initial_state": "noise"})
    tokens = tokens_for(model.config, 2, T)
    documents = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 5, 5]])
    whole = model(tokens, documents=documents).logits
    close(decoded(model, tokens, [1], documents=documents)[:, :2], whole[:, :2])
    for cuts in ([2, 3], [1, 3, 4], list(range(1, T))):
        close(decoded(model, tokens, cuts, documents=documents), whole)


def test_a_refused_pass_leaves_the_cache_as_it_was() -> None:
    model = build({})
    tokens = tokens_for(model.config, 2, T)
    whole = model(tokens, n_loops=6).logits
    cache = new_cache(model, 2)
    with torch.no_grad():
        first = model(tokens[:, :3], n_loops=6, cache=cache).logits
        for mistake in ({"n_loops": 7}, {"n_loops": 0}, {"documents": torch.zeros(2, 2, dtype=torch.int64)}):
            with pytest.raises(ValueError, match=r"(cache|n_loops|documents) = "):
                model(tokens[:, 3:], cache=cache, **mistake)
        second = model(tokens[:, 3:], n_loops=6, cache=cache).logits
    close(torch.cat((first, second), 1), whole)


def test_left_padded_prompts_decode_alike() -> None:
    model = build({"initial_state": "noise"})
    tokens = tokens_for(model.config, 2, T)
    documents = torch.tensor([[0] * 5, [-1, -1, 0, 0, 0]])
    batch = decoded(model, tokens, [3, 4], documents=documents)
    close(batch[0], model(tokens[:1]).logits[0])
    close(batch[1, 2:], model(tokens[1:, 2:]).logits[0])
    differ(batch[1, 2:], model(tokens[1:]).logits[0, 2:])


def test_right_padded_prompts_decode_alike() -> None:
    """The new tokens say which document they continue; padding between leaves no gap."""
    model = build({"initial_state": "noise"})
    tokens = tokens_for(model.config, 1, T)
    documents = torch.tensor([[0, 0, -1, 0, 0]])
    kept = torch.tensor([0, 1, 3, 4])
    close(decoded(model, tokens, [3, 4], documents=documents)[:, kept], model(tokens[:, kept]).logits)
