"""Items of a file, and what a model's logits make of them, beside the slow way."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.lab.questions import Exam, Item, Scores, read_items, split
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.builders import build

START = 256


def encode(text: str) -> list[int]:
    return list(text.encode())


def model() -> RecurrentDepthTransformer:
    return build({"halting": "none", "layers": (2, 0, 0), "vocab_size": 264}, dtype=torch.float64)


def exam(*items: Item, max_len: int = 64) -> Exam:
    return Exam(items, encode, start=START, max_len=max_len)


def nats(of: RecurrentDepthTransformer, ids: list[int], n_targets: int) -> float:
    """Of the last so many, one pass for them alone."""
    log_probs = of(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_probs[i - 1, ids[i]]) for i in range(len(ids) - n_targets, len(ids)))


QUESTIONS = (
    Item("a", context="2+2= ", choices=("4", "5", "22"), answer=0),  # a space that belongs to the choices
    Item("a", context="x", choices=("yes", "no"), answer=1),
    Item("b", context="", choices=("one", "three"), answer=1),
    Item("b", context="2+2= ", choices=("7", "4"), answer=1),
)


@torch.no_grad()
def test_questions_as_one_by_one() -> None:
    of = model()
    found = exam(*QUESTIONS).grade(of)
    for i, item in enumerate(QUESTIONS):
        before = item.context.rstrip()
        ids = [encode(item.context + choice) for choice in item.choices]
        costs = [nats(of, one, len(one) - len(before)) if before else nats(of, [START, *one], len(one)) for one in ids]
        p = np.exp(-np.array(costs)) / np.exp(-np.array(costs)).sum()
        assert found.bits[i] == pytest.approx(-math.log2(p[item.answer]), rel=1e-10)
        assert found.right is not None and found.right[i] == float(p.argmax() == item.answer)
    assert found.accuracy == found.right.mean() and found.mean_bits == found.bits.mean()
    assert 0 < found.accuracy < 1, "control: some are right, some wrong"


@torch.no_grad()
def test_a_text_in_pieces_costs_every_byte_once() -> None:
    of, text = model(), "Häuser am Fluß, " * 3
    found = exam(Item("t", text=text), Item("t", text="kurz"), max_len=20).grade(of)
    ids = [START, *encode(text)]
    pieces = [ids[i : i + 21] for i in range(0, len(ids) - 1, 20)]
    wanted = sum(nats(of, piece, len(piece) - 1) for piece in pieces) / math.log(2)
    assert found.bits[0] == pytest.approx(wanted, rel=1e-10) and found.right is None
    assert found.weight.tolist() == [len(text.encode()), 4]
    assert found.mean_bits == pytest.approx(found.bits.sum() / (len(text.encode()) + 4))


def test_choices_of_one_token_share_their_context() -> None:
    single = exam(Item("", context="2+2=", choices=("4", "5", "6")))
    assert single.n_tokens == 4
    assert exam(Item("", context="2+2=", choices=("4", "5", "16"))).n_tokens == 4 + 5


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at most the model's 8"):
        exam(Item("", context="2+2 = 4 or", choices=("a", "b")), max_len=8)


def test_halves_hold_half_of_each_task() -> None:
    items = [Item(task, text=f"{task} {i}") for i in range(40) for task in "ab"]
    search, test = split(items, seed=1)
    assert len(search) == len(test) == 40 and not set(search) & set(test)
    assert sum(item.task == "a" for item in search) == 20
    assert split(items, seed=1) == (search, test) != split(items, seed=2)


def test_scores_of_some() -> None:
    some = Scores(np.array([1.0, 2.0]), np.array([1.0, 3.0]), None).where(np.array([False, True]))
    assert some.mean_bits == 2 / 3 and some.accuracy is None


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    lines = [
        {"context": "1+1=", "choices": ["2", "3"], "answer": "2"},
        {"context": "", "choices": ["2", "3"], "answer": 1},
    ]
    path.write_text("\n".join(map(json.dumps, [*lines, {**lines[0], "answer": 0}])) + "\n\n")
    items = read_items(path)
    assert items == [
        Item("sums", context="1+1=", choices=("2", "3"), answer=0),
        Item("sums", context="", choices=("2", "3"), answer=1),
    ], "the same question once"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "must be texts or questions, one a line"),
        ([[]], "line 1 = []: must be an object"),
        ([{"text": ""}], "line 1: text = ''"),
        ([{"text": "a", "task": 3}], "line 1: task = 3: must be a string"),
        ([{"context": "a"}], "line 1: choices = None"),
        ([{"context": "a", "choices": ["b", "b"], "answer": 0}], "two or more different strings"),
        ([{"context": "a", "choices": ["b", "c"], "answer": 2}], "line 1: answer = 2"),
        ([{"context": "a", "choices": ["b", "c"], "answer": True}], "line 1: answer = True"),
        ([{"text": "a"}, {"context": "a", "choices": ["b", "c"], "answer": 0}], "must be of one kind"),
    ],
    ids=str,
)
def test_what_is_refused(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError) as error:
        read_items(path)
    assert message in str(error.value) and str(path) in str(error.value)
