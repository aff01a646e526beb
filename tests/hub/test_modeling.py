"""Behind transformers' interface the model is the same: whole, from a cache, padded, at any depth."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from ritornello.config import ExitRule
from ritornello.hub import RitornelloConfig, RitornelloForCausalLM, RitornelloModel
from ritornello.train.evaluate import evaluating
from tests.hub.kinds import KINDS, config, model, tokens

EXIT = {"gate": ExitRule("hazard", 0.06), "act": ExitRule("cumulative", 0.6), "moe": ExitRule("delta", 0.4)}
CLOSE = {"rtol": 0, "atol": 1e-12}
ROUNDED = {"rtol": 0, "atol": 2e-6}  # in float32


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_own(kind):
    found = model(kind)
    x = tokens()
    own = found.native(x)
    out = found(x)
    assert torch.equal(out.logits, own.logits) and torch.equal(out.loops_used, own.loops_used)
    deeper = found(x, n_loops=5)
    assert torch.equal(deeper.logits, found.native(x, n_loops=5).logits)
    assert kind == "plain" or not torch.equal(deeper.logits, out.logits)
    embedded = found.get_input_embeddings()(x)
    if kind == "values":
        with pytest.raises(ValueError, match="tokens = None: must be given, and not inputs_embeds"):
            found(inputs_embeds=embedded)
    else:
        assert torch.equal(found(inputs_embeds=embedded).logits, out.logits)
    torch.testing.assert_close(found(x, logits_to_keep=2).logits, out.logits[:, -2:], **ROUNDED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [1, 5])
@pytest.mark.parametrize("fixed", [False, True])
def test_from_a_cache_as_whole(kind, split, fixed):
    """Prefill and decoding, padded on the left, in a cache that grows or one of fixed size."""
    found, x = model(kind).double(), tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    exit = EXIT.get(kind)
    whole = found(x, attention_mask=mask, exit=exit, use_cache=False)
    assert exit is None or len(whole.loops_used.unique()) > 1, "tokens stop apart"
    cache = StaticCache(found.config, max_cache_len=16) if fixed else DynamicCache()
    first = found(x[:, :split], attention_mask=mask[:, :split], exit=exit, past_key_values=cache, use_cache=True)
    parts = [first.logits]
    for i in range(split, x.shape[1]):
        seen = mask[:, : i + 1]
        parts.append(
            found(x[:, i : i + 1], attention_mask=seen, exit=exit, past_key_values=cache, use_cache=True).logits
        )
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole.logits[real], **CLOSE)
    alone = found(x[:1, 3:], exit=exit)
    torch.testing.assert_close(whole.logits[:1, 3:], alone.logits, **CLOSE)
    unmasked = found(x, exit=exit)
    assert not torch.allclose(unmasked.logits[0, 3:], whole.logits[0, 3:], atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
@pytest.mark.parametrize("depths", [(2, 5, 3), (5, 2, 4)])
def test_each_call_at_its_own_depth(kind, depths):
    """Tokens read those before them at the loops that these have run: a budget for each token says the same."""
    found, x = model(kind).double(), tokens()
    cache, parts, budgets, at = DynamicCache(), [], [], 0
    for n, length in zip(depths, (4, 3, 2), strict=True):
        out = found(x[:, at : at + length], n_loops=n, past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        budgets += [n] * length
        at += length
    whole = found(x, n_loops=torch.tensor(budgets).expand(2, -1))
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **CLOSE)
    assert not torch.allclose(found(x, n_loops=5).logits, whole.logits, rtol=0, atol=1e-9)


def test_what_is_packed_into_a_row_sees_itself_only():
    found, x = model().double(), tokens(batch=1)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    out = found(x, position_ids=packed)
    torch.testing.assert_close(out.logits[:, 4:], found(x[:, 4:]).logits, **CLOSE)
    assert not torch.allclose(out.logits[:, 4:], found(x).logits[:, 4:], atol=1e-6)
    assert out.past_key_values is None and found(x).past_key_values is not None  # what follows would see all
    with pytest.raises(ValueError, match="use_cache"):
        found(x, position_ids=packed, use_cache=True)


def test_an_exit_rule_may_be_named():
    found, x = model("gate").double(), tokens()
    rule = ExitRule("hazard", 0.06, 3)
    expected = found(x, exit=rule)
    elsewhere = SimpleNamespace(rule="hazard", threshold=0.06, min_loops=3)  # of a folder's own code, say
    for given in (("hazard", 0.06, 3), elsewhere):
        assert torch.equal(found(x, exit=given).logits, expected.logits)
    assert torch.equal(found(x, exit="hazard").logits, found(x, exit=ExitRule("hazard", 0.9)).logits)
    assert not torch.equal(found(x, exit=("hazard", 0.06, 1)).logits, expected.logits)
    with pytest.raises(ValueError, match="exit"):
        found(x, exit=3)


@pytest.mark.parametrize("options", [{"n_loop": 2}, {"n_lops": 2}, {"logit_to_keep": 1}])
def test_what_is_nearly_an_option_is_a_mistake(options):
    with pytest.raises(ValueError, match="did you mean"):
        model()(tokens(), **options)
    with pytest.raises(ValueError, match="did you mean"):
        model().model(tokens(), **options)


def test_a_mask_has_the_length_of_what_is_seen():
    found, x = model(), tokens()
    cache = found(x[:, :5]).past_key_values
    for mask in (torch.ones(2, 9), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="attention_mask"):
            found(x[:, 5:6], attention_mask=mask, past_key_values=cache)
    found(x[:, 5:6], attention_mask=torch.ones(2, 6), past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_in_parts_and_loaded(kind, tmp_path):
    found, x = model(kind), tokens()
    found.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = RitornelloForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded(x).logits, found(x).logits, **ROUNDED)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", default_loops=2)
    assert isinstance(by_name, RitornelloForCausalLM)
    torch.testing.assert_close(by_name(x).logits, found(x, n_loops=2).logits, **ROUNDED)
    base = RitornelloModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(x).last_hidden_state, found.model(x).last_hidden_state, **ROUNDED)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == loaded.config.tie_word_embeddings == (kind != "dense")


def test_in_bfloat16_what_must_stays_float32(tmp_path):
    model().save_pretrained(tmp_path)
    found = RitornelloForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    precise = {name for name, p in found.named_parameters() if p.dtype == torch.float32}
    assert precise and all("injection" in name or "router" in name for name in precise)
    assert found(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["moe", "gate", "plain", "values"])
def test_hidden_states_are_those_of_each_loop(kind):
    found, x = model(kind), tokens()
    out = found(x, output_hidden_states=True)
    assert torch.equal(out.logits, found(x).logits)
    n = 0 if kind == "plain" else 1 + found.config.n_loops
    assert len(out.hidden_states) == 2 + n and torch.equal(out.hidden_states[0], found.native.embed(x))
    assert torch.equal(found.native.logits(out.hidden_states[-1]), out.logits)
    if kind != "plain":
        own = found.native(x, trajectory=True)
        assert all(map(torch.equal, out.hidden_states[2:-1], [state.h for state in own.trajectory]))


@pytest.mark.parametrize("kind", ["moe", "mla", "act", "streams"])
def test_recomputed_gradients_are_the_same(kind):
    found, x = model(kind, dropout=0.1).double().train(), tokens()
    results = []
    for recompute in (False, True):
        if recompute:
            found.activation_checkpointing_enable()
        found.zero_grad()
        torch.manual_seed(3)
        out = found(x, labels=x)
        out.loss.backward()
        results.append((out.loss.detach(), {name: p.grad for name, p in found.named_parameters()}))
    (loss, gradients), (again, recomputed) = results
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, **CLOSE)
    torch.manual_seed(4)
    assert not torch.equal(found(x, labels=x).loss, loss)


def test_loss_is_the_next_tokens_and_what_was_asked_beside():
    found, x = model("moe").double(), tokens()
    labels = x.clone()
    labels[:, :4] = -100
    out = found(x, labels=labels)
    own = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), x[:, 4:].flatten())
    torch.testing.assert_close(out.loss, own.float(), **ROUNDED)
    found.config.balance_weight = 0.5
    found.train()
    torch.testing.assert_close((out := found(x, labels=labels)).loss, own.float() + 0.5 * out.balance_loss, **ROUNDED)
    act = model("act", ponder_weight=0.25).double().train()
    plain = act(x).logits
    ponder = act(x, labels=x)
    own = torch.nn.functional.cross_entropy(plain[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(ponder.loss, own.float() + 0.25 * ponder.ponder_loss, **ROUNDED)


def test_configuration_is_the_shape_and_says_what_is_wrong():
    given = config(default_loops=5, exit_rule="delta", exit_threshold=0.1)
    again = RitornelloConfig.from_dict(given.to_dict())
    assert again.shape() == given.shape() and again.depth == 5 and again.exit == ExitRule("delta", 0.1)
    assert given.hidden_size == given.dim == 32 and given.num_hidden_layers == 2 + 2 * 5
    found = model(default_loops=5)
    assert torch.equal(found(tokens()).logits, found.native(tokens(), n_loops=5).logits)
    with pytest.raises(ValueError, match="n_active_experts"):
        RitornelloConfig(n_experts=4, n_active_experts=5)
    with pytest.raises(ValueError, match="did you mean"):
        RitornelloConfig(n_recurent_layers=4)
    with pytest.raises(ValueError, match="attention_mask"):
        found(tokens(), attention_mask=torch.ones(2, 1, 9, 9))


def test_a_vocabulary_grows():
    for kind in ("moe", "dense"):
        found, x = model(kind), tokens()
        before = found(x).logits
        found.resize_token_embeddings(120)
        after = found(x).logits
        assert after.shape[-1] == 120 and torch.equal(after[..., :99], before)
        assert found(torch.full((1, 2), 119)).logits.isfinite().all()


def test_a_vocabulary_that_layers_read_too_does_not():
    with pytest.raises(ValueError, match="vocab_size = 120: must be 99 with value_embeddings"):
        model("values").resize_token_embeddings(120)


def test_what_is_missing_is_drawn_and_nothing_else(tmp_path):
    found = model()
    state = {name: x for name, x in found.state_dict().items() if "coda" not in name}
    found.save_pretrained(tmp_path, state_dict=dict(state))
    torch.manual_seed(5)
    loaded = RitornelloForCausalLM.from_pretrained(tmp_path)
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, found.state_dict()[name]) == (name in state or name.endswith("norm.weight"))
        assert x.isfinite().all()


def test_a_model_is_wrapped_without_a_copy():
    inner = model().native
    before = {name: x.shape for name, x in inner.state_dict().items()}
    parameters = list(inner.parameters())
    found = RitornelloForCausalLM.of(inner, default_loops=2)
    assert found.config.shape() == inner.config
    with evaluating(found):
        assert torch.equal(found(tokens()).logits, inner(tokens(), n_loops=2).logits)
    assert {name: x.shape for name, x in inner.state_dict().items()} == before
    assert all(a is b for a, b in zip(inner.parameters(), parameters, strict=True))
    with torch.no_grad():
        inner.loop_embedding_scale.fill_(0.7)
    assert found.native.loop_embedding_scale.item() == inner.loop_embedding_scale.item()
