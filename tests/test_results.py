"""RESULTS.md says what stands in experiments/, and answers what the article says."""

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def publish_lab() -> Any:
    spec = importlib.util.spec_from_file_location("publish_lab", ROOT / "scripts" / "publish_lab.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_those_of_the_experiments() -> None:
    script = publish_lab()
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == script.results(script.published())


def test_each_claim_of_the_article_is_answered_by_verdicts_that_there_are() -> None:
    script = publish_lab()
    pages = script.published()
    for said, name, starts in script.CLAIMS:
        if name in pages:
            assert "not decided yet" not in script.answer(said, pages[name], starts), said


def test_a_verdict_is_listed_once_and_says_if_it_contradicts() -> None:
    verdicts = [verdict("one claim"), verdict("another", "holds"), verdict("and a third", "holds")]
    page = {"folder": "f", "title": "t", "command": "c", "verdicts": verdicts}
    script = publish_lab()
    lines = script.answer("said", page, ("one", f"{script.AGAINST}anot", "an", "two")).splitlines()
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["one claim", "**does not hold**"],
        ["another", "**holds**, which contradicts it"],
        ["and a third", "**holds**"],
        ["two", "not decided yet"],
    ]


def test_every_verdict_is_listed_and_counted() -> None:
    page = {"folder": "f", "title": "t", "command": "c", "verdicts": [verdict("one|claim"), verdict("b", "holds")]}
    section = publish_lab().section(page)
    assert "1 × does not hold, 1 × holds" in section and "| one\\|claim | **does not hold** |" in section


def verdict(claim: str, outcome: str = "does not hold") -> dict[str, str]:
    return {"claim": claim, "outcome": outcome, "scale": "s", "evidence": "e", "test": "t", "rule": "r"}
