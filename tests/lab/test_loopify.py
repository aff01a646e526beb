"""A search finds the layers that have to run twice, goes on where it stopped, and claims nothing it was not asked."""

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from ritornello import cli
from ritornello.hub.loopify import Window, loopify
from ritornello.lab.loopify import (
    Cell,
    Found,
    Search,
    Store,
    compare,
    entered,
    exams,
    grade_all,
    identity,
    spans,
    stages,
)
from ritornello.lab.questions import Exam, Item
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.hub.test_loopify import folder_of
from tests.model.builders import build

PLANTED = Window(1, 3, 2)
LETTERS = "abcdefgh"


@cache
def plain(dtype: torch.dtype = torch.float64) -> RecurrentDepthTransformer:
    """Four layers that matter."""
    model = build({"halting": "none", "layers": (4, 0, 0), "vocab_size": 264}, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(4)
    return model


@torch.no_grad()
def answered(by: RecurrentDepthTransformer, n: int, *, seed: int = 0) -> list[Item]:
    """Questions whose answer is what this model says."""
    draw = random.Random(seed)
    contexts = ["".join(draw.choices(LETTERS, k=7)) for _ in range(n)]
    logits = by(torch.tensor([list(context.encode()) for context in contexts])).logits[:, -1]
    said = logits[:, [ord(letter) for letter in LETTERS]].argmax(-1).tolist()
    return [Item("said", context=c, choices=tuple(LETTERS), answer=a) for c, a in zip(contexts, said, strict=True)]


def exam(items: list[Item]) -> Exam:
    return Exam(items, lambda text: list(text.encode()), start=256, max_len=64)


def searched(items: list[Item], path: Path, *, budget_s: float = 600, **options: object) -> Found:
    store = Store(path, identity(plain(), items))
    return Search(plain(), exam(items), store, by="accuracy", budget_s=budget_s, **options).run()


def scores(found: Found) -> list[tuple[Window | None, float, float | None]]:
    return [(cell.window, cell.bits, cell.accuracy) for cell in (found.original, *found.cells)]


def test_the_planted_window_is_found_and_holds(tmp_path: Path) -> None:
    truth = loopify(plain(), PLANTED)
    found = searched(answered(truth, 40), tmp_path / "cells.jsonl")
    winner, planted = found.winner("accuracy"), next(cell for cell in found.cells if cell.window == PLANTED)
    assert found.complete and planted.accuracy == 1 and winner is not None
    assert (winner.first, winner.last) == (1, 3), "of those that are right throughout, the surest"
    assert found.original.accuracy is not None and found.original.accuracy < 0.8
    right, naive = (compare(plain(), exam(answered(truth, 60, seed=1)), [w])[0] for w in (PLANTED, Window(0, 1, 2)))
    assert right.after["accuracy"] == 1 and right.improves("accuracy")
    assert right.gains["accuracy"].n == 60 and right.by_task.keys() == {"said"}
    assert not naive.improves("accuracy"), "control: another window"
    assert 1 < right.compute < 1.6


def test_nothing_is_claimed_where_the_model_is_right_as_it_is(tmp_path: Path) -> None:
    found = searched(answered(plain(), 20), tmp_path / "cells.jsonl")
    assert found.original.accuracy == 1 and found.winner("accuracy") is None and found.best("accuracy")


def test_what_lies_below_is_run_once_and_changes_nothing() -> None:
    items = exam(answered(plain(), 8))
    windows = [Window(*span, *step) for span in ((0, 2), (1, 3), (3, 4)) for step in ((2, (1.0, 0.3)), (3, (0.4, 0.2)))]
    found = dict(grade_all(plain(), items, windows))
    assert [*found] == sorted(windows, key=entered)
    for window, got in found.items():
        wanted = items.grade(loopify(plain(), window))
        assert got.bits == pytest.approx(wanted.bits, rel=1e-10) and (got.right == wanted.right).all()
    assert found[windows[0]].bits != pytest.approx(found[windows[1]].bits, rel=1e-3), "control"


def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    items = answered(loopify(plain(), PLANTED), 12)
    whole, seen = searched(items, tmp_path / "whole.jsonl"), Counter()

    def stop(cell: Cell) -> None:
        seen[cell.window] += 1
        if seen.total() in (7, 60):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(items, tmp_path / "parts.jsonl", say=stop)
    spent = searched(items, tmp_path / "parts.jsonl", budget_s=0)
    assert not spent.complete and 0 < len(spent.cells) < len(whole.cells)
    again = searched(items, tmp_path / "parts.jsonl", say=stop)
    assert scores(again) == scores(whole)
    assert set(seen.values()) == {1} and len(seen) == len(whole.cells) + 1
    with pytest.raises(ValueError, match="of another search"):
        searched(answered(plain(), 12, seed=3), tmp_path / "parts.jsonl")
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"window": 3}\n')
    with pytest.raises(ValueError, match=rf"parts\.jsonl line {len(seen) + 2}"):
        searched(items, tmp_path / "parts.jsonl")


def test_stages() -> None:
    assert spans(30)[:3] == [(0, 4), (2, 6), (4, 8)] and spans(1) == [(0, 1)]
    found: list[Window] = []
    for stage in stages(12, found.copy):
        assert all(0 <= window.first < window.last <= 12 for window in stage)
        found += stage
    assert Window(0, 2, 4, (0.25, 0.25)) in found and Window(0, 3, 2, (1.0, 0.5)) in found


def test_a_model_whose_layers_read_tokens_is_not_searched() -> None:
    model = build({"halting": "none", "layers": (4, 0, 0), "value_embeddings": (1, 3)})
    with pytest.raises(ValueError, match=r"value_embeddings = \(1, 3\): must be \(\) for a search"):
        exams(model, None, [])


def written(path: Path, items: list[Item]) -> Path:
    rows = [{"context": item.context, "choices": item.choices, "answer": item.answer} for item in items]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(plain(torch.float32), tmp_path / "plain")
    tasks = written(tmp_path / "tasks.jsonl", answered(loopify(plain(torch.float32), PLANTED), 80))
    how = ["loopify", str(folder), "--tasks", str(tasks), "--out", str(tmp_path / "out")]
    assert cli.main([*how, "--budget-minutes", "5", "-q"]) == 0
    assert "gain [95%]" in capsys.readouterr().out and (tmp_path / "out" / "model" / "tokenizer.json").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    best, naive = report["test"][0], report["test"][-1]
    assert [best["window"][name] for name in ("first", "last")] == [1, 3] and naive["window"]["scale"] == [1.0, 1.0]
    assert best["gains"]["accuracy"]["low"] > 0 and best["gains"]["accuracy"]["n"] == 40 == report["search"]["n"]
    assert cli.main(how) == 2 and "a folder that does not exist yet" in capsys.readouterr().err


def test_a_command_that_finds_nothing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(plain(torch.float32), tmp_path / "plain")
    tasks = written(tmp_path / "tasks.jsonl", answered(plain(torch.float32), 12))
    test = written(tmp_path / "test.jsonl", answered(plain(torch.float32), 12, seed=1))
    how = ["loopify", str(folder), "--tasks", str(tasks), "--test", str(test), "--out", str(tmp_path / "out")]
    assert cli.main([*how, "--budget-minutes", "0.001"]) == 0
    assert "nothing written" in (said := capsys.readouterr().out) and "as it is: " in said
    assert not (tmp_path / "out" / "model").exists()
    assert cli.main([*how, "--budget-minutes", "0.001", "--anyway"]) == 0
    assert (tmp_path / "out" / "model").is_dir()
    how[how.index(str(test))] = str(tasks)
    assert cli.main([*how[:-1], str(tmp_path / "new")]) == 2
    assert "--test" in capsys.readouterr().err
