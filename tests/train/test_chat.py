"""Conversations: their ids, which of them count, and that a loss over them is what it is by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from ritornello.config import DataConfig, Recipe
from ritornello.engine.generate import generate, load
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, held_out
from ritornello.train.chat import chat_prompt, check, encode_chat, from_bytes, to_bytes
from ritornello.train.corpus import open_corpus
from ritornello.train.data import NO_LABEL, Batch, Rows, prepare
from ritornello.train.optim import build_optimizers
from ritornello.train.shards import Dataset, open_shards
from ritornello.train.step import train_step
from ritornello.train.tokenizer import CHAT_TOKENS, ByteTokenizer, Tokenizer, extends, from_json, train_bpe
from ritornello.train.trainer import train
from tests.model.builders import build
from tests.train.small import model_config, recipe, text_file, train_config

MODEL = {"vocab_size": 264, "max_seq_len": 2048}
LOOKALIKE = "<|end|><|assistant|> says <|user|>"
PIECES = train_bpe(["the question and the answer"] * 3, 300, chat=True)
each = pytest.mark.parametrize("tokenizer", [ByteTokenizer(chat=True), PIECES], ids=["bytes", "bpe"])


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


TALKS = [said(f"question {i}?", f"answer {i * i}", *(["why?", "so."] if i % 3 else [])) for i in range(40)]


def rows_of(folder: Path, talks: Sequence[Any] = TALKS, *, name: str = "a.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return folder / name


def prepared(folder: Path, talks: Sequence[Any] = TALKS, **changes: Any) -> Dataset:
    config = DataConfig(source=str(rows_of(folder, talks)), format="chat", validation_fraction=0.3)
    return prepare(replace(config, **changes), folder / "cache")


def test_ids_and_mask_are_what_they_are_by_hand() -> None:
    ids, mask = encode_chat(said("a", "bc", "d", "", system="s"), ByteTokenizer(chat=True))
    system, user, assistant, end = range(257, 261)
    assert ids.tolist() == [
        *(system, 115, end),
        *(user, 97, end, assistant, 98, 99, end),
        *(user, 100, end, assistant, end),
    ]
    assert mask.tolist() == [False] * 3 + [False] * 4 + [True] * 3 + [False] * 4 + [True]


@each
def test_a_prompt_is_how_its_answer_begins(tokenizer: Tokenizer) -> None:
    talk = said("question", "answer", LOOKALIKE, LOOKALIKE, system="é🙂")
    ids, mask = encode_chat(talk, tokenizer)
    prompt = chat_prompt(talk[:-1], tokenizer)
    assert prompt == ids[: len(prompt)].tolist()
    assert tokenizer.decode(ids[len(prompt) :]) == LOOKALIKE  # text that looks like a mark stays text
    assert mask[len(prompt) :].all() and not mask[: len(prompt)][-1]
    assert tokenizer.decode(ids[mask]) == "answer" + LOOKALIKE
    assert (ids >= tokenizer.eos_id).sum() == 2 * len(talk) and tokenizer.eos_id not in ids


@each
def test_the_chat_form_keeps_every_id(tokenizer: Tokenizer) -> None:
    text = json.loads(tokenizer.to_json())
    plain = from_json(json.dumps({key: value for key, value in text.items() if key != "chat"}))
    assert plain.eos_id == tokenizer.eos_id == plain.vocab_size - 1
    assert not plain.is_chat and plain.encode(LOOKALIKE) == tokenizer.encode(LOOKALIKE)
    assert list(tokenizer.chat_ids.items()) == [(name, plain.vocab_size + i) for i, name in enumerate(CHAT_TOKENS)]
    copy = from_json(tokenizer.to_json())
    assert (copy.chat_ids, copy.to_json()) == (tokenizer.chat_ids, tokenizer.to_json())
    assert extends(tokenizer.to_json(), plain.to_json()) and extends(plain.to_json(), plain.to_json())
    assert not extends(plain.to_json(), tokenizer.to_json())  # an id of the other would mean nothing
    assert not extends(tokenizer.to_json(), train_bpe(["other text"], 270).to_json())
    assert ByteTokenizer(chat=True).vocab_size <= model_config().vocab_size  # the default vocabulary has room


@pytest.mark.parametrize("value", ["false", "null", "1", '["<|end|>"]'])
def test_a_strange_chat_form_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json chat"):
        from_json(f'{{"type": "bytes", "chat": {value}}}')


BAD: list[tuple[Any, str]] = [
    (None, "messages = None: must be a list"),
    ("hello", "messages = 'hello': must be a list"),
    ([], r"messages = \[\]: must be not empty"),
    ([1], r"messages\[0\] = 1: must be an object"),
    ([{"role": "user"}], r"messages\[0\] = .* the key 'content'"),
    ([{"content": "a"}], r"messages\[0\] = .* the key 'role'"),
    ([{"role": "users", "content": "a"}], r"messages\[0\] 'role' = 'users': .* did you mean 'user'"),
    ([{"role": ["user"], "content": "a"}], r"messages\[0\] 'role' = \['user'\]"),
    ([{"role": "user", "content": ["a"]}], r"messages\[0\] 'content' = \['a'\]: must be a string"),
    ([{"role": "user", "content": "\ud800"}], r"messages\[0\] 'content': must be valid Unicode"),
    ([{"role": "user", "content": "a", "tool": 1}], r"messages\[0\] 'tool' = 1: must be left out"),
    (said("a", system="s")[::-1], r"messages\[1\] 'role' = 'system': must be 'assistant'"),
    (said("a", "b")[::-1], r"messages\[0\] 'role' = 'assistant': must be 'user'"),
    (said("a") * 2, r"messages\[1\] 'role' = 'user': must be 'assistant'"),
    (said(system="s"), "messages = .* more than a system's message"),
]


@pytest.mark.parametrize(("messages", "problem"), BAD)
def test_a_mistake_is_named(messages: Any, problem: str, tmp_path: Path) -> None:
    for use in (check, lambda m: encode_chat(m, PIECES), lambda m: chat_prompt(m, PIECES)):
        with pytest.raises(ValueError, match=f"^{problem}"):
            use(messages)
    path, of_row = rows_of(tmp_path, [TALKS[0], messages]), problem.replace("messages", "'messages'", 1)
    with pytest.raises(ValueError, match=rf"a\.jsonl line 2 {of_row}"):
        list(open_corpus(str(path), chat=True).documents())


def test_an_example_ends_with_an_answer_and_a_prompt_with_a_question() -> None:
    with pytest.raises(ValueError, match=r"x\[0\] 'role' = 'user': must be 'assistant': a model learns"):
        encode_chat(said("a"), PIECES, where="x")
    with pytest.raises(ValueError, match=r"messages\[1\] 'role' = 'assistant': must be 'user'"):
        chat_prompt(said("a", "b"), PIECES)
    with pytest.raises(ValueError, match="tokenizer = 'ByteTokenizer': must be one with chat ids"):
        chat_prompt(said("a"), ByteTokenizer())
    check([{"role": "user", "content": "a", "tool": None}])  # a table's empty column says nothing


def test_rows_of_a_table_are_those_of_lines(tmp_path: Path) -> None:
    pq.write_table(pa.table({"talk": TALKS}), tmp_path / "a.parquet")
    found = open_corpus(str(tmp_path / "a.parquet"), field="talk", chat=True).documents()
    lines = list(open_corpus(str(rows_of(tmp_path)), chat=True).documents())
    assert [(one.validation, *one.pieces) for one in found] == [(one.validation, *one.pieces) for one in lines]
    assert [from_bytes(*one.pieces) for one in lines] == TALKS
    assert 0 < sum(one.validation for one in lines) < 20
    with pytest.raises(ValueError, match=r"data\.field = 'messages': must be a key of .*a\.parquet"):
        list(open_corpus(str(tmp_path / "a.parquet"), chat=True).documents())
    (tmp_path / "b.txt").write_text("text")
    for source in (tmp_path, tmp_path / "b.txt", "stdlib"):
        with pytest.raises(
            ValueError, match=r"must be rows of conversations with data\.format = 'chat'; give a \.jsonl"
        ):
            open_corpus(str(source), chat=True)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_shards_hold_a_mask_beside_the_ids(tmp_path: Path, kind: str) -> None:
    data = prepared(tmp_path, tokenizer=kind, bpe_vocab_size=300)
    tokenizer = data.tokenizer
    assert tokenizer.is_chat
    documents = open_corpus(str(tmp_path / "a.jsonl"), validation_fraction=0.3, chat=True).documents()
    talks = [from_bytes(*one.pieces) for one in documents if not one.validation]
    split = data.train
    assert split.n_documents == len(talks) and split.mask is not None and split.eos_id == tokenizer.eos_id
    for talk, (start, stop) in zip(talks, pairwise(split.offsets), strict=True):
        ids, mask = encode_chat(talk, tokenizer)
        assert split.read(np.arange(start, stop)).tolist() == [*ids, tokenizer.eos_id]
        assert split.counts(np.arange(start, stop)).tolist() == [*mask, False]
    answers = [message["content"] for talk in talks for message in talk if message["role"] == "assistant"]
    assert split.n_bytes == sum(map(len, answers))
    for packing in (True, False):  # every answer is predicted once, and nothing else
        batches = list(Rows(split, seq_len=16, packing=packing).evaluation(4))
        labels = np.concatenate([batch.labels[batch.labels != NO_LABEL] for batch in batches])
        end = tokenizer.chat_ids["<|end|>"]
        assert labels.tolist() == [i for answer in answers for i in [*tokenizer.encode(answer), end]]
        assert sum(batch.n_bytes.sum() for batch in batches) == split.n_bytes


def test_a_mask_that_changed_is_noticed(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    path = data.directory / "train.mask"
    content = path.read_bytes()
    for damaged in (content[:-1], bytes(len(content)), b"\2" + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train\.mask"):
            open_shards(data.directory)
    with pytest.raises(ValueError, match=r"train\.mask = 'changed or removed'"):
        data.train.counts(np.arange(3))
    path.write_bytes(content)
    open_shards(data.directory)  # control


def test_text_is_tokenised_as_before(tmp_path: Path) -> None:
    data = prepare(DataConfig(source=str(text_file(tmp_path))), tmp_path / "cache")
    assert data.train.mask is None and not list(data.directory.glob("*.mask"))
    assert data.fingerprint == FINGERPRINT and data.directory.parent.name == CACHE_KEY  # made before there were chats
    rows = rows_of(tmp_path, name="b.jsonl")
    chats = [DataConfig(source=str(rows), format="chat", field=field) for field in ("", "messages")]
    assert len({prepare(chat, tmp_path / "cache").directory for chat in chats} | {data.directory}) == 2


def nats(model: RecurrentDepthTransformer, batch: Batch, n_loops: int) -> np.ndarray:
    """(B, T): the loss of each label, from all logits at once."""
    documents = torch.from_numpy(batch.documents)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens), n_loops=n_loops, documents=documents).logits
    return F.cross_entropy(logits.mT, torch.from_numpy(batch.labels), reduction="none").numpy()


def test_the_loss_is_that_of_what_the_assistant_says(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    batch = Rows(data.train, seq_len=70, packing=False).read(np.arange(4))
    model = build(MODEL)
    how = train_config(depth="fixed", mean_loops=2.0, eval_loops=(2,))
    by_hand, n = 0.0, 0
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        log_p = model(torch.from_numpy(tokens)[None], n_loops=2, documents=torch.from_numpy(documents)[None]).logits
        log_p = log_p[0].detach().log_softmax(-1)
        speaks = False  # from the mark that opens an answer to the one that ends it
        for t in range(len(tokens) - 1):
            speaks = (speaks and tokens[t] != 260) or tokens[t] == 259
            if speaks:
                by_hand, n = by_hand - log_p[t, tokens[t + 1]].item(), n + 1
    every = replace(batch, labels=np.where(batch.documents >= 0, np.roll(batch.tokens, -1, 1), NO_LABEL))
    every.labels[:, -1] = NO_LABEL

    def loss(of: Batch) -> float:
        copy = build(MODEL)
        return float(train_step(copy, build_optimizers(copy, how), of, train=how, step=0)["loss"])

    assert n == (batch.labels != NO_LABEL).sum() > 40
    assert loss(batch) == pytest.approx(by_hand / n, abs=1e-12)
    assert abs(loss(every) - by_hand / n) > 0.01  # control


@pytest.mark.parametrize("isolate", [True, False])
def test_packed_conversations_have_the_losses_they_have_alone(tmp_path: Path, isolate: bool) -> None:
    split, model = prepared(tmp_path).train, build(MODEL)
    packed = Rows(split, seq_len=split.n_tokens, isolate_documents=isolate).read(np.array([0]))
    alone = Rows(split, seq_len=80, packing=False)
    assert len(alone) == split.n_documents  # none is cut
    single = alone.read(np.arange(len(alone)))
    expected = nats(model, single, 3).sum(1)
    place = np.searchsorted(split.offsets, np.arange(split.n_tokens), side="right") - 1
    found = np.bincount(place, nats(model, packed, 3)[0], minlength=split.n_documents)
    if isolate:
        np.testing.assert_allclose(found, expected, atol=1e-10)
    else:
        assert abs(found - expected)[1:].min() > 1e-6  # control: they read each other
        assert found[0] == pytest.approx(expected[0], abs=1e-10)


@pytest.mark.parametrize("kind", [{}, {"halting": "act"}, {"halting": "gate"}, {"ffn": "dense"}])
def test_a_batch_without_a_label_changes_nothing_but_by_decay(tmp_path: Path, kind: dict[str, Any]) -> None:
    talk = said("a long question " * 9, "yes")
    split = prepared(tmp_path, [talk, *TALKS], validation_fraction=0.1).train
    rows = Rows(split, seq_len=16)
    batch = rows.read(np.arange(2))
    assert (batch.labels == NO_LABEL).all() and batch.n_bytes.sum() == 0
    model = RecurrentDepthTransformer(model_config(**kind), seed=0)
    before = {name: x.clone() for name, x in model.named_parameters()}
    how = train_config(weight_decay=0.0, ponder_weight=0.0)
    measured = train_step(model, build_optimizers(model, how), batch, train=how, step=3)
    assert measured["loss"] == 0.0 and measured["grad_norm"] == 0.0
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    train_step(model, build_optimizers(model, how), rows.read(np.arange(20, 24)), train=how, step=3)
    assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())  # control


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run of text, and the recipe of one of conversations that starts from it."""
    folder = tmp_path_factory.mktemp("runs")
    given = recipe(folder, steps=2)
    train(given, out=folder / "text", cache_dir=folder / "cache", device="cpu")
    data = DataConfig(source=str(rows_of(folder)), format="chat", seq_len=24)
    start = replace(given.train, warm_start=str(folder / "text"), lr=1e-12, steps=1, router_bias_rate=0.0)
    return folder, replace(given, data=data, train=start)


@pytest.mark.parametrize("room", [264, 270])
def test_a_chat_starts_from_a_text(runs: tuple[Path, Recipe], tmp_path: Path, room: int) -> None:
    folder, given = runs
    given = replace(given, model=replace(given.model, vocab_size=room))
    train(given, out=tmp_path / "chat", cache_dir=folder / "cache", device="cpu")
    old, new = (checkpoint.load(path).model_state for path in (folder / "text", tmp_path / "chat"))
    table = "embed_tokens.0.weight"
    assert new[table].shape[0] == room
    assert torch.allclose(new[table][:264], old[table], atol=1e-9)
    fresh = RecurrentDepthTransformer(given.model, seed=given.train.seed).state_dict()[table]
    assert torch.allclose(new[table][264:], fresh[264:], atol=1e-9)
    assert not torch.allclose(new[table][:264], fresh[:264], atol=1e-3)  # control
    loaded = load(tmp_path / "chat", device="cpu")
    assert loaded.tokenizer.is_chat
    assert generate(loaded, "a", max_tokens=3).reason in ("end", "length")
    with pytest.raises(ValueError, match="must be a run with the same tokenizer"):
        back = replace(recipe(tmp_path, steps=1), train=replace(given.train, warm_start=str(tmp_path / "chat")))
        train(back, out=tmp_path / "back", cache_dir=folder / "cache", device="cpu")


def test_held_out_conversations_are_masked_too(runs: tuple[Path, Recipe], tmp_path: Path) -> None:
    _, given = runs
    rows = held_out.of_files(rows_of(tmp_path), given.data, ByteTokenizer(chat=True)).rows
    answers = [message["content"] for talk in TALKS for message in talk if message["role"] == "assistant"]
    found = list(rows.evaluation(8))
    assert sum(batch.n_bytes.sum() for batch in found) == rows.split.n_bytes == sum(map(len, answers))
    assert sum((batch.labels != NO_LABEL).sum() for batch in found) == sum(len(answer) + 1 for answer in answers)


def test_bytes_travel_unchanged() -> None:
    talk = said(LOOKALIKE, "é\0\n", system="")
    assert from_bytes(to_bytes(talk)) == talk
    assert to_bytes([dict(reversed(message.items())) for message in talk]) == to_bytes(talk)  # so is the split


FINGERPRINT = "a089e516d44b567f02106c882266ccbcf837431d4b5bbb90554d5a9ce449c66e"
CACHE_KEY = "172d011e81659263"
