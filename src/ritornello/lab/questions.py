"""Texts to predict and questions with choices, from a JSONL file, and how a model does on each.

A line is {"text": …} or {"context": …, "choices": [… …], "answer": its number or itself}, with "task" to tell kinds
apart. A choice counts by the log-likelihood of its tokens after the context, as in lm-eval.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello import recipes
from ritornello.config import require
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.loss import linear_cross_entropy

MAX_BYTES = 200_000_000
MAX_WINDOW = 1024  # tokens of a text that are read at once
BATCH_TOKENS = 2048
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Item:
    """A text; or a question: what comes before, what may follow, and the number of the choice that is right."""

    task: str
    text: str = ""
    context: str = ""
    choices: tuple[str, ...] = ()
    answer: int = 0


def read_items(path: Path) -> list[Item]:
    """Those of a file, each once.

    Raises:
        ValueError: a line that is neither, or texts and questions mixed; file and line are named.
    """
    lines = recipes.read_text(path, max_bytes=MAX_BYTES).splitlines()
    items = [_item(line, f"{path} line {i}", path.stem) for i, line in enumerate(lines, 1) if line.strip()]
    require(len(items) > 0, str(path), "empty", "texts or questions, one a line")
    kinds = {bool(item.choices) for item in items}
    require(len(kinds) == 1, str(path), "texts and questions", "of one kind")
    return list(dict.fromkeys(items))


def _item(line: str, place: str, task: str) -> Item:
    body = recipes.parse_json(line, place)
    require(isinstance(body, dict), place, body, "an object")
    task = body.get("task", task)
    require(isinstance(task, str), f"{place}: task", task, "a string")
    if "text" in body:
        text = body["text"]
        require(isinstance(text, str) and text != "", f"{place}: text", text, "a string, not empty")
        return Item(task, text=text)
    context, choices, answer = (body.get(name) for name in ("context", "choices", "answer"))
    require(isinstance(context, str), f"{place}: context", context, "a string")
    several = isinstance(choices, list) and len(choices) > 1 and all(isinstance(x, str) and x for x in choices)
    require(
        several and len(set(choices)) == len(choices), f"{place}: choices", choices, "two or more different strings"
    )
    answer = choices.index(answer) if answer in choices else answer
    known = type(answer) is int and 0 <= answer < len(choices)
    require(known, f"{place}: answer", answer, "one of the choices, or its number from 0")
    return Item(task, context=context, choices=tuple(choices), answer=answer)


def split(items: Sequence[Item], *, seed: int) -> tuple[list[Item], list[Item]]:
    """Two halves, each with half of every task."""
    halves: tuple[list[Item], list[Item]] = [], []
    for task in dict.fromkeys(item.task for item in items):
        some = [item for item in items if item.task == task]
        random.Random(f"{seed} {task}").shuffle(some)
        for half, part in zip(halves, (some[: len(some) // 2], some[len(some) // 2 :]), strict=True):
            half += part
    require(bool(halves[0]), "items", len(items), "two of a task, or more")
    return halves


def fingerprint(items: Sequence[Item]) -> str:
    return sha256(json.dumps([vars(item) for item in items], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Scores:
    """By item: bits of a text, or of the right choice among all; weight, a text's bytes, or 1; right, of questions."""

    bits: NDArray[np.float64]
    weight: NDArray[np.float64]
    right: NDArray[np.float64] | None

    @property
    def mean_bits(self) -> float:
        """Per byte, or per question."""
        return float(self.bits.sum() / self.weight.sum())

    @property
    def accuracy(self) -> float | None:
        return None if self.right is None else float(self.right.mean())

    def where(self, chosen: NDArray[np.bool_]) -> "Scores":
        return Scores(self.bits[chosen], self.weight[chosen], None if self.right is None else self.right[chosen])


@dataclass(frozen=True)
class Batch:
    """tokens (B, T), filled up on the right. rows, places, targets (n,): what is predicted where; parts (n,): of which
    text or choice, over all batches."""

    tokens: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor
    parts: NDArray[np.int64]

    def to(self, device: torch.device) -> "Batch":
        tokens, rows, places, targets = (x.to(device) for x in (self.tokens, self.rows, self.places, self.targets))
        return Batch(tokens, rows, places, targets, self.parts)


class Exam:
    """Items as a model of one tokenizer reads them. A context that several choices follow is run once where each is a
    single token."""

    def __init__(self, items: Sequence[Item], encode: Encode, *, start: int, max_len: int) -> None:
        """start: the id before a text; max_len: tokens that the model reads.

        Raises:
            ValueError: a question that is longer, a choice that adds no token.
        """
        self.items, self.start, self.max_len = items, start, max_len
        wanted: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}  # by row: place, target, part
        self.first_part = [0]
        for item in items:
            pieces = self._choices(item, encode) if item.choices else [self._windows(item, encode)]
            for part, found in enumerate(pieces, self.first_part[-1]):
                for ids, n_targets in found:
                    rest = wanted.setdefault(tuple(ids[:-1]), [])
                    rest += [(i - 1, ids[i], part) for i in range(len(ids) - n_targets, len(ids))]
            self.first_part.append(self.first_part[-1] + len(pieces))
        rows = sorted(wanted.items(), key=lambda row: len(row[0]))
        self.batches, begin = [], 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or (end + 1 - begin) * len(rows[end][0]) > BATCH_TOKENS:
                self.batches.append(_batch(rows[begin:end]))
                begin = end
        self.n_tokens = sum(len(ids) for ids, _ in rows)
        self.longest = len(rows[-1][0])

    def _windows(self, item: Item, encode: Encode) -> list[tuple[list[int], int]]:
        """A text in pieces, each after the last token of the one before it: ids, and how many at the end count."""
        ids, size = [self.start, *encode(item.text)], min(MAX_WINDOW, self.max_len)
        require(len(ids) > 1, "text", item.text, "of a token at least")
        pieces = [ids[i : i + size + 1] for i in range(0, len(ids) - 1, size)]
        return [(piece, len(piece) - 1) for piece in pieces]

    def _choices(self, item: Item, encode: Encode) -> list[list[tuple[list[int], int]]]:
        """Each with the context before it, whose spaces at the end belong to the choice."""
        context = item.context.rstrip()
        before = encode(context) if context else []
        found = []
        for choice in item.choices:
            ids = encode(item.context + choice)
            n = len(ids) - len(before)
            require(n > 0, "choice", choice, f"of a token at least after {item.context[-40:]!r}")
            require(len(ids) <= self.max_len, "question", f"{len(ids)} tokens", f"at most the model's {self.max_len}")
            found.append([(ids if before else [self.start, *ids], n)])
        return found

    @torch.inference_mode()
    def grade(self, model: RecurrentDepthTransformer, hidden: Callable[[int, Batch], Tensor] | None = None) -> Scores:
        """hidden: gives those (B, T, D) of a batch, by its number; None: the model's own."""
        nats = np.zeros(self.first_part[-1])
        for i, stored in enumerate(self.batches):
            batch = stored.to(model.head_weight.device)
            found = hidden(i, batch) if hidden else model(batch.tokens, return_logits=False).hidden
            wanted = found[batch.rows, batch.places].to(model.head_weight.dtype)
            losses = linear_cross_entropy(wanted, model.head_weight, batch.targets, reduction="none")
            np.add.at(nats, batch.parts, losses.double().cpu().numpy())
        bits = nats / math.log(2)
        if not self.items[0].choices:
            return Scores(bits, np.array([len(item.text.encode()) for item in self.items], dtype=np.float64), None)
        spans = [bits[slice(*span)] for span in pairwise(self.first_part)]
        total = np.array([-np.logaddexp2.reduce(-span) for span in spans])
        own = np.array([span[item.answer] for span, item in zip(spans, self.items, strict=True)])
        right = [float(span.argmin() == item.answer) for span, item in zip(spans, self.items, strict=True)]
        return Scores(own - total, np.ones(len(own)), np.array(right))


def _batch(rows: list[tuple[tuple[int, ...], list[tuple[int, int, int]]]]) -> Batch:
    longest = len(rows[-1][0])
    tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rows])
    found: list[Any] = [(row, *one) for row, (_, wanted) in enumerate(rows) for one in wanted]
    row, place, target, part = (np.array(column) for column in zip(*found, strict=True))
    return Batch(tokens, torch.from_numpy(row), torch.from_numpy(place), torch.from_numpy(target), part)
