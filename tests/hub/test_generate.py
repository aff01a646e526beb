"""transformers' generate() over the model: every way of choosing tokens, with its caches, at any depth."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer, pipeline, set_seed
from transformers.generation.logits_process import LogitsProcessorList, MinPLogitsWarper

from ritornello.config import ExitRule
from ritornello.engine.generate import decode
from ritornello.engine.sampling import Sampling
from ritornello.hub.tokenizer import to_transformers
from ritornello.train.tokenizer import ByteTokenizer
from tests.hub.kinds import model, tokens

GREEDY = Sampling(temperature=0)
NEW = {"max_new_tokens": 8, "pad_token_id": 0}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def written(found, x, **options):
    set_seed(7)
    return found.generate(x, **NEW | options)


@pytest.mark.parametrize("kind", ["moe", "mla", "gate", "shared keys"])
@pytest.mark.parametrize("way", WAYS)
def test_from_a_cache_what_is_written_without(kind, way):
    found, x = model(kind).double(), tokens()
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    options = WAYS[way] | {"attention_mask": mask}
    whole = written(found, x, use_cache=False, **options)
    for cache in ({}, {"past_key_values": DynamicCache()}, {"cache_implementation": "static"}):
        assert torch.equal(written(found, x, **options, **cache), whole)
    assert not torch.equal(written(found, x, **WAYS[way]), whole)


def test_greedy_is_what_this_package_writes():
    found, x = model(), tokens()
    own = torch.stack(
        [chosen for chosen, _ in decode(found.native, x.tolist(), n_new=8, n_loops=5, sampling=GREEDY)], 1
    )
    assert torch.equal(written(found, x, do_sample=False, n_loops=5)[:, 9:], own)
    assert not torch.equal(written(found, x, do_sample=False, n_loops=1)[:, 9:], own)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_at_any_depth_and_with_an_exit_rule(cache):
    found, x = model("gate").double(), tokens()
    for options in ({"n_loops": 7}, {"n_loops": torch.tensor([2, 5])}, {"exit": ExitRule("hazard", 0.06)}):
        whole = written(found, x, do_sample=False, use_cache=False, **options)
        assert torch.equal(written(found, x, do_sample=False, cache_implementation=cache, **options), whole)


def test_guessed_by_another_model_and_checked():
    """Assisted decoding crops from the cache what was guessed wrong; a shallower call of the same model may guess."""
    found, x = model().double(), tokens(batch=1)
    plain = written(found, x, do_sample=False)
    calls = {}
    for name, guesser in {"other": model(seed=3), "shallow": model(default_loops=1), "same": model()}.items():
        lengths = []
        hook = found.native.register_forward_hook(
            lambda _, __, out, lengths=lengths: lengths.append(out.hidden.shape[1])
        )
        assert torch.equal(written(found, x, do_sample=False, assistant_model=guesser.double()), plain)
        hook.remove()
        calls[name] = len(lengths)
    assert calls["same"] < calls["other"] <= 8  # guesses stood, and guesses were taken back
    assert torch.equal(written(found, x, do_sample=False, prompt_lookup_num_tokens=2), plain)


def test_a_conversation_goes_on_in_its_cache():
    """At another depth: as with a budget for each token and no cache."""
    found, x = model().double(), tokens(batch=1)
    cache = DynamicCache()
    first = written(found, x, do_sample=False, past_key_values=cache, n_loops=2)
    longer = torch.cat((first, tokens(batch=1, length=3, seed=8)), 1)
    second = written(found, longer, do_sample=False, past_key_values=cache, n_loops=4)
    ids, n_shallow = longer, first.shape[1] - 1  # the last token was written, and not read yet
    for _ in range(8):
        budgets = torch.tensor([[2] * n_shallow + [4] * (ids.shape[1] - n_shallow)])
        ids = torch.cat((ids, found(ids, n_loops=budgets, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(second, ids)
    assert not torch.equal(second, written(found, longer, do_sample=False, n_loops=2))


def test_scores_states_processors_and_streaming():
    found, x = model(), tokens(batch=1)
    out = written(
        found, x, do_sample=False, output_scores=True, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(out.scores) == 8 and len(out.hidden_states[0]) == 3 + 3
    processors = LogitsProcessorList([MinPLogitsWarper(0.5)])
    config = GenerationConfig(do_sample=True, **NEW)
    set_seed(0)
    assert found.generate(x, generation_config=config, logits_processor=processors).shape == (1, 17)
    streamer = TextIteratorStreamer(to_transformers(ByteTokenizer(), max_length=64), skip_prompt=True)
    found.generate(x, streamer=streamer, do_sample=False, **NEW)
    text = "".join(streamer)
    assert text == to_transformers(ByteTokenizer(), max_length=64).decode(out.sequences[0, 9:])


def test_in_a_pipeline():
    tokenizer = to_transformers(ByteTokenizer(), max_length=64)
    found = model(vocab_size=264, eos_token_id=256)
    write = pipeline("text-generation", model=found, tokenizer=tokenizer)
    texts = ["Once", "Once upon a time"]
    together = write(texts, batch_size=2, do_sample=False, n_loops=2, max_new_tokens=8)
    alone = [write(text, do_sample=False, n_loops=2, max_new_tokens=8) for text in texts]
    assert together == alone and all(
        found[0]["generated_text"].startswith(text) for found, text in zip(alone, texts, strict=True)
    )
    features = pipeline("feature-extraction", model=found.model, tokenizer=tokenizer)
    assert torch.tensor(features("Once")).shape == (1, 4, 32)
