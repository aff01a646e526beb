import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ritornello.lab.figures import Curve, curves, png
from ritornello.lab.report import SYMBOLS, Page, Picture, Table, Verdict, html, markdown, text, write

HOSTILE = "<script>alert('|')</script> & \"quoted\" [x](javascript:y) *bold*"
LINK = "https://example.org/paper?a=1&b=2"
IMAGE = png(curves([Curve(label="a", x=(1,), mean=np.ones(1), sd=None)], title="", xlabel="", ylabel=""), dpi=20)


def verdict(outcome: Any = "holds", **changes: str) -> Verdict:
    parts = {"claim": f"loops help, {outcome}", "scale": "at 62,912 parameters", "evidence": "0.9 ± 0.1, 5 seeds"}
    return Verdict(outcome=outcome, **parts | {"test": "p = 0.004", "rule": "holds if p <= .05"} | changes)


def table(**changes: Any) -> Table:
    rows = (("article", "0.953 ± 0.021", "looped"), ("plain | equal", "−0.1", HOSTILE))
    return Table(**{"title": "Accuracy", "head": ("model", "10 hops", "a|b"), "rows": rows, "note": "of 5"} | changes)


def page(**changes: Any) -> Page:
    settings: dict[str, Any] = {
        "title": "Depth",
        "question": "Do loops help?",
        "prediction": "They do.",
        "command": "ritornello lab run depth --full",
        "budget": "1 core-hour",
        "sources": ("Graves 1603.08983", LINK),
        "verdicts": tuple(verdict(outcome) for outcome in SYMBOLS),
        "tables": (table(), table(rows=())),
        "pictures": tuple(Picture(name=name, caption=f"{name} {HOSTILE}", image=IMAGE) for name in ("map", "curve")),
        "facts": {"machine": "2 cores"},
        "notes": ("Depth mask.",),
    }
    return Page(**settings | changes)


class Reader(HTMLParser):
    """Every tag with its attributes, and the text outside of style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags[-1:] != [("style", {})] else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_html_escapes_every_text() -> None:
    hostile = page(
        title=HOSTILE,
        question=HOSTILE,
        prediction=HOSTILE,
        command=HOSTILE,
        budget=HOSTILE,
        sources=(HOSTILE, f"https://x/{HOSTILE}"),
        verdicts=(verdict(claim=HOSTILE, scale=HOSTILE, evidence=HOSTILE, test=HOSTILE, rule=HOSTILE),),
        tables=(table(title=HOSTILE, head=(HOSTILE,) * 3, note=HOSTILE),),
        facts={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    found = Reader(html(hostile))
    assert not found.all("script")
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.text.count(HOSTILE) >= 22  # control: all of it is there, as text
    assert Reader(f"<p>{HOSTILE}").all("script")  # control: unescaped it would be a script


def test_html_needs_no_other_file() -> None:
    source = html(page())
    found = Reader(source)
    pointing = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [value for value in pointing if not (value or "").startswith("data:image/png;base64,")] == [LINK]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not re.search(r"url\(|@import", source)
    images = found.all("img")
    assert [base64.b64decode((image["src"] or "").partition(",")[2]) for image in images] == [IMAGE, IMAGE]
    assert [image["alt"] for image in images] == [f"map {HOSTILE}", f"curve {HOSTILE}"]


def test_html_can_be_read_by_all() -> None:
    found = Reader(html(page()))
    assert found.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert {cell.get("scope") for cell in found.all("th")} == {"col", "row"}
    assert len(found.all("table")) == len([part for part in found.all("div") if part.get("class") == "scroll"]) == 2


@pytest.mark.parametrize("render", [text, html, markdown])
def test_every_outcome_is_a_word_in_the_given_order(render: Any) -> None:
    order = ["does not hold", "holds", "not tested at this scale", "inconclusive"]
    shown = render(page(verdicts=tuple(map(verdict, order))))
    at = [shown.index(f"loops help, {outcome}") for outcome in order]
    assert at == sorted(at)
    for outcome in order:
        assert re.search(rf"{re.escape(SYMBOLS[outcome])}(</span>)? {outcome}", shown)
    assert "inconclusive" not in render(page(verdicts=(verdict(),)))  # control


@pytest.mark.parametrize("render", [text, html, markdown])
def test_a_common_rule_is_said_once_and_others_each(render: Any) -> None:
    common, other = "holds if it holds", "holds if it is larger"
    shown = render(page(verdicts=(verdict(rule=common), verdict("inconclusive", rule=common))))
    assert shown.count(common) == 1
    shown = render(page(verdicts=(verdict(rule=common), verdict(rule=other), verdict(rule=common))))
    assert (shown.count(common), shown.count(other)) == (2, 1)
    for part in ("at 62,912 parameters", "0.9 ± 0.1, 5 seeds", "p = 0.004"):
        assert shown.count(part) == 3


@pytest.mark.parametrize("render", [text, html, markdown])
def test_what_a_reader_has_to_know_is_there(render: Any) -> None:
    shown = render(page())
    for part in ("Depth mask.", "ritornello lab run depth --full", "2 cores", "1 core-hour", "Do loops help?"):
        assert part in shown
    assert "no verdicts" in render(page(verdicts=()))


def lines_of(shown: Table, width: int) -> list[str]:
    lines = text(page(tables=(shown,)), width=width).splitlines()
    start = lines.index(shown.title) + 1
    return lines[start : lines.index(shown.note)]


def test_text_tables_are_aligned() -> None:
    lines = lines_of(table(), 110)
    assert len(lines) == 4
    assert len({line.index(part) for line, part in zip(lines[2:], ("looped", "<script"), strict=True)}) == 1
    assert {line[: lines[1].rindex("  ")].rstrip()[-1] for line in lines} == {"s", "-", "1"}  # numbers end together
    assert lines[3].index("−0.1") > lines[2].index("0.953")


def test_text_fits_the_terminal_and_keeps_numbers_whole() -> None:
    shown = table(rows=(("a model with a long name indeed", "0.953 ± 0.021", "so many words " * 6),))
    narrow, wide = lines_of(shown, 60), lines_of(shown, 200)
    assert max(map(len, narrow)) <= 60 < max(map(len, wide))
    assert any("0.953 ± 0.021" in line for line in narrow)
    assert sorted(" ".join(narrow[2:]).split()) == sorted(" ".join(wide[2:]).split())
    assert max(map(len, text(page(question="why? " * 50, tables=()), width=60).splitlines())) <= 60


def test_markdown_tables_have_the_same_columns_in_every_row() -> None:
    def n_cells(line: str) -> int:
        return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1

    rows = [line for line in markdown(page()).splitlines() if line.startswith("|")]
    assert [n_cells(row) for row in rows] == [3] * 6
    assert n_cells("| plain | equal | −0.1 | x |") == 4  # control
    assert "| --- | ---: | --- |" in rows
    assert r"\<script>" in markdown(page())
    assert not re.search(r"(?<!\\)<script", markdown(page()))


def test_write_makes_a_folder_that_stands_alone(tmp_path: Path) -> None:
    made = page()
    write(made, tmp_path / "a" / "depth")
    folder = tmp_path / "a" / "depth"
    names = ["README.md", "curve.png", "map.png", "report.html", "verdicts.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "report.html").read_text(encoding="utf-8") == html(made)
    named = re.findall(r"\]\((\w+\.png)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert [(folder / name).read_bytes() for name in named] == [IMAGE, IMAGE]
    write(replace(made, title="Again"), folder)
    assert "Again" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: verdict("hold"), "outcome = 'hold'.*did you mean 'holds'"),
        (lambda: verdict("proved"), "outcome"),
        (lambda: table(rows=(("a", "b"),)), r"rows\[0\].*3 cells"),
        (lambda: Picture(name="../map", caption="", image=IMAGE), "name"),
        (lambda: Picture(name="map", caption="", image=b"<svg>"), "image.*PNG"),
        (lambda: page(pictures=(Picture(name="map", caption="", image=IMAGE),) * 2), "different names"),
        (lambda: page(verdicts=[verdict()]), "verdicts.*a tuple"),
    ],
)
def test_what_is_wrong_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
