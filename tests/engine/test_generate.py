"""From a prompt to a text: with and without a cache, in company, piece by piece, and where it ends."""

import codecs
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ritornello import config as settings
from ritornello.config import DataConfig, ExitRule, Recipe
from ritornello.engine import generate as engine
from ritornello.engine.generate import Generation, Loaded, decode, generate, load, stream
from ritornello.engine.sampling import Sampling
from ritornello.engine.text import Text
from ritornello.model.cache import Cache
from ritornello.model.halting import EXIT_TESTS, Signals
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint
from ritornello.train.tokenizer import ByteTokenizer, OwnTokenizer, Tokenizer, train_bpe
from tests.model.builders import build, rules_for, tiny

BYTES = ByteTokenizer()
VOCAB = 264  # a padded embedding: more ids than the tokenizer's 257
LIMIT = 24
PROMPTS = [list(prompt) for prompt in (b"hello w", b"\xff", b"abc", b"RDT?", b"\0\0", b"{ 12 }")]


def small(**changes: Any) -> Loaded:
    """A float64 model for bytes. Untied, so that it does not just repeat itself."""
    options = {"vocab_size": VOCAB, "max_seq_len": LIMIT, "ffn": "dense", "tie_embeddings": False, "n_loops": 3}
    return Loaded(build(options | changes), BYTES, Recipe())


def rolled(model: RecurrentDepthTransformer, **options: Any) -> tuple[list, list]:
    """Tokens and loops of 3 steps from PROMPTS, each (3, 6)."""
    pairs = list(decode(model, PROMPTS, n_new=3, vocab_size=257, **options))
    return [tokens.tolist() for tokens, _ in pairs], [loops.tolist() for _, loops in pairs]


GREEDY = Sampling(temperature=0)
HALTINGS = [(kind, "last") for kind in get_args(settings.Halting)] + [("act", "mixture")]


class Forgetful(Cache):
    """Finds the entries of past tokens changed: the control of every claim about the cache."""

    def put(self, *arguments: Any) -> Tensor:
        entries = super().put(*arguments).clone()
        entries[:, : self.length] *= -1
        return entries


@torch.no_grad()
def divisive(model: RecurrentDepthTransformer, name: str) -> ExitRule:
    """The rule with the threshold that half of some tokens pass in their second loop."""
    tokens = torch.randint(257, (6, 8), generator=torch.Generator().manual_seed(1))
    states = model(tokens, n_loops=3, trajectory=True, weigh=True).trajectory
    first, second = states[:2]
    if name == "hazard":
        values = second.halt.weight / first.halt.survival
    elif name == "cumulative":
        values = 1 - second.halt.survival
    else:
        predict = lambda h: model.logits(model.probe(h)).log_softmax(-1) if model.probe is not None else None  # noqa: E731
        values = EXIT_TESTS[name](Signals(second.h, first.h, predict(second.h), predict(first.h)))
    return ExitRule(name, float(values.median()), min_loops=2)


@pytest.mark.parametrize("initial_state", get_args(settings.InitialState))
@pytest.mark.parametrize(("halting", "read_out"), HALTINGS)
@pytest.mark.parametrize("attention", get_args(settings.Attention))
def test_a_cache_changes_nothing(
    attention: str, halting: str, read_out: str, initial_state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither tokens nor the loops they take, forced or under every exit rule, for prompts of different lengths."""
    kinds = {"attention": attention, "halting": halting, "read_out": read_out, "initial_state": initial_state}
    model = small(**kinds, lora_rank=0).model
    for name in (None, *rules_for(model.config)):
        how = {"n_loops": 3, "exit": name and divisive(model, name), "sampling": GREEDY}
        tokens, loops = rolled(model, **how)
        assert (tokens, loops) == rolled(model, **how, use_cache=False), name
        assert (len(set(itertools.chain(*loops))) > 1) == (name is not None), f"{name}: loops are {loops}"
    monkeypatch.setattr(engine, "Cache", Forgetful)
    assert rolled(model, **how) != (tokens, loops)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(temperature: float) -> None:
    loaded = small()
    assert generate(loaded, "abc", temperature=temperature, max_tokens=2).tokens
    with torch.no_grad():
        loaded.model.norm.weight.fill_(torch.nan)
    for call in (generate, lambda *args, **how: list(stream(*args, **how))):
        with pytest.raises(ArithmeticError, match=r"logits that are not numbers: .* n_loops"):
            call(loaded, "abc", temperature=temperature)


TEXTS = ["The quick", "", "naïve", "RDT"]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", get_args(settings.Attention))
def test_a_text_in_a_batch_is_the_one_alone(attention: str, use_cache: bool) -> None:
    """Row i with seed + i, whatever else is in the batch; noise states and an exit rule included."""
    loaded = small(attention=attention, halting="gate", initial_state="noise")
    greedy = {"temperature": 0.0, "max_tokens": 4, "use_cache": use_cache}
    assert generate(loaded, TEXTS, **greedy) == [generate(loaded, text, **greedy) for text in TEXTS]
    how = {"top_p": 0.9, "max_tokens": 4, "exit": divisive(loaded.model, "hazard"), "use_cache": use_cache}
    batch = generate(loaded, TEXTS, seed=40, **how)
    assert batch == [generate(loaded, text, seed=40 + i, **how) for i, text in enumerate(TEXTS)]
    assert generate(loaded, TEXTS[2:], seed=42, **how) == batch[2:]
    assert generate(loaded, TEXTS[:2] * 2, seed=40, **how)[:2] == batch[:2]
    assert batch[1] != generate(loaded, TEXTS[1], seed=40, **how)
    assert len({text.text for text in batch}) == len(TEXTS)


def test_a_batch_leaves_each_text_its_room() -> None:
    """Padding counts as length in the model: a long neighbour would end the short text early."""
    loaded = small()
    prompts = ["x" * LIMIT, "x" * (LIMIT - 2), "xy"]
    batch = generate(loaded, prompts, seed=7, max_tokens=9)
    assert [len(text.tokens) for text in batch] == [0, 2, 9]
    assert batch == [generate(loaded, prompt, seed=7 + i, max_tokens=9) for i, prompt in enumerate(prompts)]
    ids = [BYTES.encode(prompt) for prompt in prompts]
    assert len(list(decode(loaded.model, ids, n_new=9))) == 0  # control: all together


@pytest.mark.parametrize("use_cache", [True, False])
def test_max_seq_len_ends_a_text(use_cache: bool) -> None:
    loaded = small()
    for n in (1, LIMIT - 1, LIMIT):
        found = generate(loaded, "x" * n, temperature=0, max_tokens=2**20, use_cache=use_cache)
        assert (found.reason, len(found.tokens)) == ("length", LIMIT - n)
        assert found.text == BYTES.decode(found.tokens)
    assert len(generate(loaded, "x", max_tokens=3, use_cache=use_cache).tokens) == 3


def test_an_empty_prompt_starts_a_document() -> None:
    loaded = small()
    found = generate(loaded, "", max_tokens=5, temperature=0)
    for start, equal in (([BYTES.eos_id], True), ([0], False)):
        steps = decode(loaded.model, [start], n_new=5, vocab_size=257, sampling=GREEDY)
        assert (found.tokens == [int(token) for token, _ in steps]) == equal
    assert list(stream(loaded, "", max_tokens=5, temperature=0))


def test_ids_beyond_the_tokenizer_are_never_chosen() -> None:
    loaded = small()
    with torch.no_grad():
        loaded.model.head_weight[257:] *= 30  # one of them is the likeliest, mostly
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 100.0}, {"top_k": 3}, {"top_p": 0.5}):
        for found in generate(loaded, TEXTS, max_tokens=9, **options):
            assert all(token < 256 for token in found.tokens)
    free = decode(loaded.model, PROMPTS, n_new=9, sampling=GREEDY)
    assert any(int(token) > 256 for tokens, _ in free for token in tokens)


def test_depth_and_exit_reach_the_model() -> None:
    loaded = small(halting="delta")
    shallow, deep, beyond = (generate(loaded, "abc", temperature=0, n_loops=n, max_tokens=8) for n in (1, 3, 9))
    assert (set(shallow.loops), set(deep.loops), set(beyond.loops)) == ({1}, {3}, {9})
    assert generate(loaded, "abc", temperature=0, max_tokens=8) == deep
    assert shallow.text != deep.text
    always = generate(loaded, "abc", temperature=0, exit=ExitRule("delta", 1e9), max_tokens=8)
    assert (always.tokens, always.loops) == (shallow.tokens, shallow.loops)
    plain = small(layers=(1, 0, 1))
    assert set(generate(plain, "abc", max_tokens=8).loops) == {0}


def test_streaming_computes_no_token_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, calls = small(), []
    loaded.model.norm.register_forward_hook(lambda *_: calls.append(torch.is_inference_mode_enabled()))
    pieces = stream(loaded, "abc", temperature=0, max_tokens=5)
    assert calls == []
    first = next(pieces)
    assert first and len(calls) <= 4
    assert all(calls) and not torch.is_inference_mode_enabled(), "the mode ends where the caller goes on"
    assert first + "".join(pieces) == generate(loaded, "abc", temperature=0, max_tokens=5).text


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"seed": 3, "stop": ["e", "q"]}])
def test_pieces_joined_are_the_text(options: dict[str, Any]) -> None:
    loaded = small()
    for prompt in TEXTS[:2]:
        whole = generate(loaded, prompt, max_tokens=8, **options)
        assert "".join(stream(loaded, prompt, max_tokens=8, **options)) == whole.text
    assert whole.text != "".join(stream(loaded, prompt, max_tokens=8, seed=99))


class Pieces(OwnTokenizer):
    """Ids for text and for parts of a character: € is e2 82 ac, and é is c3 a9."""

    def __init__(self) -> None:
        text, parts = b"a b ab ba baab \xc3\xa9", b"\xe2 \x82 \xac \xe2\x82 \xacb"
        super().__init__([*text.split(), *parts.split()])

    def encode_batch(self, texts: Sequence[bytes]) -> list:
        raise NotImplementedError

    def to_json(self) -> str:
        raise NotImplementedError


def scripted(monkeypatch: pytest.MonkeyPatch, *scripts: list[int], tokenizer: Tokenizer = BYTES) -> Loaded:
    """A model that writes these tokens, one row for each prompt."""
    n = max(map(len, scripts))
    rows = torch.tensor([script + [BYTES.eos_id] * (n - len(script)) for script in scripts])

    monkeypatch.setattr("ritornello.engine.engine.draw", lambda logits, how, seeds, index: rows[seeds, index])
    monkeypatch.setattr(engine, "sample", lambda logits, how, *, index: rows[how.seed : how.seed + 1, index])
    return Loaded(build(tiny(vocab_size=VOCAB)), tokenizer, Recipe())


def told(monkeypatch: pytest.MonkeyPatch, script: bytes, **options: Any) -> tuple[list[str], Generation]:
    """The pieces and the whole of a model that writes these bytes, one a token."""
    loaded = scripted(monkeypatch, list(script))
    options.setdefault("max_tokens", len(script))
    return list(stream(loaded, "x", **options)), generate(loaded, "x", **options)


def test_a_character_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, whole = told(monkeypatch, "é🙂x".encode())
    assert pieces == ["é", "🙂", "x"] and whole.text == "é🙂x" and whole.reason == "length"
    pieces, whole = told(monkeypatch, "é🙂".encode()[:-1])
    assert pieces == ["é", "\N{REPLACEMENT CHARACTER}"] and whole.text == "".join(pieces)
    pieces, whole = told(monkeypatch, b"\xc3\xc3\xa9")
    assert whole.text == "\N{REPLACEMENT CHARACTER}é"


STOPS: list[tuple[str, Any, list[str], str]] = [
    ("abcde!", ["cd"], ["a", "b"], "stop"),
    ("abcde!", "cd", ["a", "b"], "stop"),
    ("abcde!", ["de!", "c"], ["a", "b"], "stop"),
    ("abcde!", ["abcde!"], [], "stop"),
    ("xabcdy", ["abcde"], ["x", "abcdy"], "length"),  # held back, then released
    ("xabcd", ["abcde"], ["x", "abcd"], "length"),  # released at the end
    ("aab", ["ab"], ["a"], "stop"),  # the beginning of a stop within another
    ("abababc", ["ababc"], ["ab"], "stop"),
    ("aaaa", ["aab", "ba"], ["a", "a", "aa"], "length"),
    ("abcd", ["abcd", "bc"], ["a"], "stop"),  # the one complete first, not the one begun first
    ("abc", ["bc", "abc"], [], "stop"),  # of two complete at once the longer
    ("prix: 5 €!", ["€"], list("prix: 5 "), "stop"),
    ("prix: 5 €!", ["5 €"], list("prix: "), "stop"),
    ("prix: 5 ¢!", ["5 €"], [*"prix: ", "5 ¢", "!"], "length"),
    ("a\nb\n\nc", ["\n\n"], ["a", "\nb"], "stop"),
    ("abc", [], ["a", "b", "c"], "length"),
]


@pytest.mark.parametrize(("script", "stop", "expected", "reason"), STOPS)
def test_stop_strings(
    script: str, stop: Any, expected: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, whole = told(monkeypatch, script.encode(), stop=stop)
    assert (pieces, whole.text, whole.reason) == (expected, "".join(expected), reason)


def test_a_stop_that_only_the_end_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a character becomes a replacement character when nothing can follow."""
    pieces, whole = told(monkeypatch, b"ab\xc3", stop=["b\N{REPLACEMENT CHARACTER}"])
    assert (pieces, whole.text, whole.reason) == (["a"], "a", "stop")


def unfinished(data: bytes, *, final: bool) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)


def certain(text: str, stops: list[str]) -> int:
    """How much of the text cannot be the beginning of a stop string, by trying every prefix of every one."""
    return len(text) - max([0, *(n for s in stops for n in range(1, len(s)) if text.endswith(s[:n]))])


def reference(ids: list[int], stops: list[str], pieces: Pieces) -> tuple[list[str], str]:
    """The text that is out after each token and at the end, and the reason: all anew from the bytes each time."""
    out, data = [], b""
    for token in [*ids, None]:
        ended = token in (pieces.eos_id, None)
        data += b"" if token is None else pieces.token_bytes[token]
        text = unfinished(data, final=ended)
        ends = [(end, -len(s)) for s in stops for end in range(len(text) + 1) if text[:end].endswith(s)]
        if ends:
            end, length = min(ends)
            return [*out, text[: end + length]], "stop"
        out.append(text if ended else text[: certain(text, stops)])
        if ended:
            break
    return out, "length" if token is None else "end"


PIECES = Pieces()
some_ids = st.lists(st.integers(0, PIECES.eos_id - 1) | st.integers(0, PIECES.eos_id), min_size=1, max_size=12)
some_stops = st.lists(st.text("ab€é\N{REPLACEMENT CHARACTER}", min_size=1, max_size=6), max_size=3)


@example(ids=[4, 0], stops=["baab", "aa"])  # both within one token: the one complete first
@given(ids=some_ids, stops=some_stops)
def test_any_tokens_and_stops(ids: list[int], stops: list[str]) -> None:
    """Against a reference that forgets everything between tokens: held back as long as needed, and no longer."""
    text, out = Text(PIECES, stops), [""]
    for token in ids:
        out.append(out[-1] + text.push(token, 1))
        if text.reason:
            break
    else:
        out.append(out[-1] + text.finish("length"))
    expected, reason = reference(ids, stops, PIECES)
    assert (out[1:], text.reason) == (expected, reason)
    assert text.text == out[-1] and len(text.loops) == len(text.tokens)
    assert text.tokens == [token for token in ids[: len(out) - 1] if token != PIECES.eos_id]


def test_the_end_of_a_document_ends_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row by itself: the others go on."""
    end = BYTES.eos_id
    loaded = scripted(monkeypatch, [*b"ab", end, *b"cd"], [*b"vwxyz"], [end, *b"wxyz"], [97, 0xC3, end, 98, 99])
    found = generate(loaded, ["x"] * 4, max_tokens=5, stop=["bc"])
    assert [(text.text, text.reason) for text in found] == [
        ("ab", "end"),  # a possible beginning of the stop is released
        ("vwxyz", "length"),
        ("", "end"),
        ("a\N{REPLACEMENT CHARACTER}", "end"),
    ]
    assert [text.tokens for text in found] == [[97, 98], [*b"vwxyz"], [], [97, 0xC3]]
    loaded = scripted(monkeypatch, [*b"ab", end, *b"cd"])
    assert list(stream(loaded, "x", max_tokens=5, stop=["bc"])) == ["a", "b"]


def test_the_model_runs_no_further_than_the_last_text() -> None:
    """A stop or an end that comes early saves the rest."""
    loaded, calls = small(), []
    loaded.model.norm.register_forward_hook(lambda *_: calls.append(1))
    whole = generate(loaded, "abc", temperature=0, max_tokens=12)
    assert len(calls) == 12
    calls.clear()
    first = next(character for character in whole.text if character != "\N{REPLACEMENT CHARACTER}")
    stopped = generate(loaded, "abc", temperature=0, max_tokens=12, stop=first)
    assert stopped.reason == "stop" and len(calls) == len(stopped.tokens) < 12
    assert stopped.text == whole.text[: whole.text.index(first)]


def recipe(**changes: Any) -> Recipe:
    return Recipe(model=tiny(vocab_size=VOCAB, halting="gate", **changes), data=DataConfig(seq_len=16))


def trained(seed: int) -> RecurrentDepthTransformer:
    return build(recipe().model, seed=seed, dtype=torch.float32)


def saved(folder: Path, *, claimed: Recipe | None = None, tokenizer: Tokenizer = BYTES) -> Path:
    """A run with one checkpoint of `trained(3)`, which claims to be of this recipe."""
    checkpoint.save(
        folder,
        step=2,
        model_state=trained(3).state_dict(),
        recipe=claimed or recipe(),
        tokenizer_json=tokenizer.to_json(),
        optimizer_state={},
        trainer_state={},
        fingerprint="f" * 64,
    )
    return folder


@pytest.fixture
def no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("no_real_syncs")
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    run = saved(tmp_path)
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original, other = (trained(seed)(tokens, n_loops=5).logits for seed in (3, 4))
        for path in (run, str(run), run / "checkpoints" / "step_000002"):
            loaded = load(path, device="cpu")
            assert torch.equal(loaded.model(tokens, n_loops=5).logits, original)
            assert not torch.equal(loaded.model(tokens, n_loops=5).logits, other)
    assert not loaded.model.training
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert loaded.recipe == recipe() and loaded.tokenizer.to_json() == BYTES.to_json()
    same = Loaded(trained(3), BYTES, recipe())
    assert generate(loaded, TEXTS, max_tokens=6) == generate(same, TEXTS, max_tokens=6)


@pytest.mark.usefixtures("no_real_syncs")
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Its manifest is right: the files are whole, but belong to different models."""
    wider, headless = recipe(ffn_dim=32), recipe(loop_embedding=False)
    large = train_bpe(["the cat sat on the mat, naïve and hungry as ever"] * 3, 300)
    strangers: list[tuple[dict[str, Any], str]] = [
        ({"claimed": wider}, r"model\.safetensors: wrong shape 'prelude_layers\.0\.mlp\..* instead of"),
        ({"claimed": headless}, r"model\.safetensors: not in this model 'loop_embedding"),
        ({"tokenizer": large}, r"tokenizer\.json vocab_size = \d+: must be at most the model's 264"),
    ]
    assert load(saved(tmp_path / "run"), device="cpu")
    for i, (change, message) in enumerate(strangers):
        with pytest.raises(ValueError, match=message):
            load(saved(tmp_path / str(i), **change), device="cpu")
    with pytest.raises(ValueError, match="no such run"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match="device = 'abacus'"):
        load(tmp_path / "absent", device="abacus")


BAD: list[tuple[str, dict[str, Any]]] = [
    *[("temperature", {"temperature": value}) for value in (-1, math.nan, math.inf)],
    *[("top_p", {"top_p": value}) for value in (0, 1.1)],
    ("top_k", {"top_k": 0}),
    ("min_p", {"min_p": 2}),
    *[("n_loops", {"n_loops": value}) for value in (0, -1, 2.5, True, 10**9)],
    *[("max_tokens", {"max_tokens": value}) for value in (0, -1, 1.5, True)],
    *[("seed", {"seed": value}) for value in (-1, 2**63, "5")],
    *[("stop", {"stop": value}) for value in ("", ["a", ""])],
    ("exit", {"exit": ExitRule("hazard", 0.5)}),
    ("exit", {"exit": ExitRule("cumulative", 0.5)}),
    ("exit", {"exit": ExitRule("kl", 0.5)}),
    ("exit", {"exit": ExitRule("entropy", 0.5)}),
]


def unused(**changes: Any) -> Loaded:
    """A model that must not run."""
    loaded = small(**changes)

    def refuse(*_: object) -> None:
        raise AssertionError("something was computed")

    loaded.model.embed_tokens[0].register_forward_pre_hook(refuse)
    return loaded


def refused(loaded: Loaded, prompt: Any, field: str, **options: Any) -> None:
    """By the call itself, whichever it is; a stream says so before it is read."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    calls = [lambda: generate(loaded, prompts, **options)]
    if prompts == [prompt]:
        calls += [lambda: generate(loaded, prompt, **options), lambda: stream(loaded, prompt, **options)]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{field} = .*: must be"):
            call()


@pytest.mark.parametrize(("field", "options"), BAD, ids=str)
def test_bad_options_are_refused_first(field: str, options: dict[str, Any]) -> None:
    refused(unused(), "abc", field, **options)


def test_bad_prompts_are_refused_first() -> None:
    loaded = unused()
    refused(loaded, "x" * (LIMIT + 1), "prompt")
    refused(loaded, ["abc", "x" * (LIMIT + 1)], "prompt")
    refused(loaded, "ab\ud800", "text")
    refused(loaded, ["abc", "\udfff"], "text")
    refused(loaded, [], "prompts")
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match=r"^prompts = "):
            decode(loaded.model, prompts, n_new=1)
    with pytest.raises(AssertionError, match="something was computed"):
        generate(loaded, "abc")  # control


def test_rules_that_a_model_cannot_follow_are_refused_first() -> None:
    kinds = [
        ({"layers": (1, 0, 1)}, "delta"),
        ({"halting": "delta"}, "kl"),
        ({"halting": "act"}, "entropy"),
        ({"halting": "act", "read_out": "mixture"}, "delta"),
        ({"halting": "kl"}, "hazard"),
        ({"halting": "entropy"}, "cumulative"),
    ]
    for changes, rule in kinds:
        refused(unused(**changes), "abc", "exit", exit=ExitRule(rule, 0.5))
    assert generate(small(halting="delta"), "abc", max_tokens=2, exit=ExitRule("delta", 0.5)).reason == "length"


def test_options_that_are_fine() -> None:
    loaded = small()
    edges = {"temperature": (0, 1e-300, 100), "top_k": (1, 10**6), "top_p": (1e-9, 1), "min_p": (0, 1)}
    for name, values in {**edges, "n_loops": (1, 40), "seed": (2**63 - 1,), "stop": ((), "no such text")}.items():
        for value in values:
            assert len(generate(loaded, "abc", max_tokens=2, **{name: value}).tokens) == 2


def test_one_way_to_write_a_text_is_the_other() -> None:
    """The engine, and all texts in lockstep; penalties are the engine's alone."""
    loaded = small(halting="gate")
    rule = divisive(loaded.model, "hazard")
    how = {"max_tokens": 6, "exit": rule, "seed": 5, "n_loops": 3}
    texts = generate(loaded, TEXTS, **how)
    assert texts == generate(loaded, TEXTS, **how, use_cache=False)
    assert len({loops for text in texts for loops in text.loops}) > 1
    changed = generate(loaded, TEXTS, **how, frequency_penalty=5.0)
    assert [text.text for text in changed] != [text.text for text in texts]
    with pytest.raises(ValueError, match=r"model = .*: must be as load gives it, for penalties"):
        generate(loaded, TEXTS, **how, frequency_penalty=5.0, use_cache=False)
