"""An experiment's page, for the terminal, a browser and a repository. A failure looks as a success does."""

import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Literal

from ritornello.config import require, require_kinds
from ritornello.train import files

Outcome = Literal["holds", "does not hold", "inconclusive", "not tested at this scale"]
SYMBOLS: dict[Outcome, str] = {"holds": "✓", "does not hold": "✗", "inconclusive": "?", "not tested at this scale": "–"}
NUMBER = re.compile(r"[-+−–]?\.?\d.*|[–—]?|none|nan", re.DOTALL)
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    claim: str
    outcome: Outcome
    scale: str  # size and task
    evidence: str  # means ± sd and the number of seeds
    test: str  # with its p or interval
    rule: str  # written down before

    def __post_init__(self) -> None:
        require_kinds(self)


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        require_kinds(self)
        for i, row in enumerate(self.rows):
            require(len(row) == len(self.head), f"rows[{i}]", row, f"{len(self.head)} cells, as head has")

    @property
    def numeric(self) -> list[bool]:
        """The columns of numbers, which are set flush right."""
        columns = [[row[j] for row in self.rows] for j in range(len(self.head))]
        return [bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells) for cells in columns]


@dataclass(frozen=True, kw_only=True)
class Picture:
    name: str  # of its file, without .png
    caption: str
    image: bytes = field(repr=False)

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"\w[\w-]*", self.name)), "name", self.name, "letters, digits, _ and -")
        require(self.image.startswith(PNG), "image", self.image[:8], "a PNG file")

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + b64encode(self.image).decode()


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    question: str
    prediction: str
    command: str
    budget: str
    sources: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    facts: Mapping[str, str]  # machine, versions, seeds, minutes
    notes: tuple[str, ...]  # what a reader has to know to judge the figures

    def __post_init__(self) -> None:
        require_kinds(self)
        names = [picture.name for picture in self.pictures]
        require(len(set(names)) == len(names), "pictures", names, "different names")

    @property
    def tally(self) -> str:
        counts = Counter(verdict.outcome for verdict in self.verdicts)
        return ", ".join(f"{counts[outcome]} × {outcome}" for outcome in SYMBOLS if counts[outcome]) or "no verdicts"

    @property
    def rule(self) -> str:
        """The one rule of all verdicts, which is then said once; "" if they differ."""
        rules = {verdict.rule for verdict in self.verdicts}
        return rules.pop() if len(rules) == 1 else ""

    def details(self, verdict: Verdict) -> dict[str, str]:
        found = {"scale": verdict.scale, "evidence": verdict.evidence, "test": verdict.test}
        return found if self.rule else found | {"rule": verdict.rule}

    @property
    def about(self) -> dict[str, str]:
        return {"command": self.command, "budget": self.budget, **self.facts}


def text(page: Page, *, width: int = 110) -> str:
    """Plain lines for a terminal: the verdicts, then the tables."""
    lines = [*wrap(page.title, width), *wrap(page.question, width), "", *wrap(page.tally, width)]
    for verdict in page.verdicts:
        said = {f"{SYMBOLS[verdict.outcome]} {verdict.outcome}": verdict.claim}
        lines += ["", *_pairs(said, width), *("  " + line for line in _pairs(page.details(verdict), width - 2))]
    lines += ["", *_pairs({"rule": page.rule}, width)] if page.rule else []
    for table in page.tables:
        lines += ["", table.title, *_columns(table, width), *wrap(table.note, width)]
    lines += ["", *_pairs({f"note {i}": note for i, note in enumerate(page.notes, 1)} | page.about, width)]
    return "\n".join(lines)


def _pairs(pairs: Mapping[str, str], width: int) -> list[str]:
    return [line for name, said in pairs.items() for line in wrap(f"{name}: {said}", width, subsequent_indent="  ")]


def _columns(table: Table, width: int) -> list[str]:
    """Aligned columns; the widest wrap their cells, between words and never in a number, until the lines fit."""
    right = table.numeric
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    whole = [[*c[0].split(), *(c[1:] if right[j] else " ".join(c[1:]).split())] for j, c in enumerate(columns)]
    least = [max(map(len, parts), default=0) for parts in whole]
    while sum(widths) + 2 * len(widths) - 2 > width and (wide := [j for j, n in enumerate(widths) if n > least[j]]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    lines = []
    for row in (table.head, ["-" * n for n in widths], *table.rows):
        cells = [wrap(cell, max(n, 1), break_on_hyphens=False) for cell, n in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            set_ = [f"{part:{'>' if right[j] else '<'}{widths[j]}}" for j, part in enumerate(parts)]
            lines.append("  ".join(set_).rstrip())
    return lines


def html(page: Page) -> str:
    """One file that needs no other; everything but the template's own marks is escaped."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("ritornello.lab").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(page=page, symbols=SYMBOLS)


def markdown(page: Page) -> str:
    """The README.md of an experiment's folder; the pictures lie beside it."""
    blocks = [f"# {_plain(page.title)}", _plain(page.question), f"Prediction: {_plain(page.prediction)}"]
    blocks += ["## Verdicts", page.tally]
    for verdict in page.verdicts:
        blocks += [
            f"### {SYMBOLS[verdict.outcome]} {verdict.outcome}: {_plain(verdict.claim)}",
            _bullets(page.details(verdict)),
        ]
    blocks += ["## Rule, written down before", _plain(page.rule)] if page.rule else []
    for picture in page.pictures:
        blocks += [f"![{_plain(picture.caption)}]({picture.name}.png)", _plain(picture.caption)]
    for table in page.tables:
        rule = ("---:" if right else "---" for right in table.numeric)
        rows = [map(_plain, table.head), rule, *(map(_plain, row) for row in table.rows)]
        blocks += [f"## {_plain(table.title)}", "\n".join(f"| {' | '.join(row)} |" for row in rows), _plain(table.note)]
    for title, said in (("Notes", page.notes), ("Sources", page.sources)):
        blocks += [f"## {title}", "\n".join(f"- {_plain(line)}" for line in said)] if said else []
    blocks += ["## How it was run", f"```sh\n{page.command}\n```", _bullets({"budget": page.budget, **page.facts})]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _plain(text: str) -> str:
    """One line in which Markdown finds no marks."""
    return re.sub(r"([\\`*_\[\]<|])", r"\\\1", " ".join(text.split()))


def _bullets(pairs: Mapping[str, str]) -> str:
    return "\n".join(f"- {_plain(name)}: {_plain(said)}" for name, said in pairs.items())


def write(page: Page, folder: Path) -> None:
    """report.html, README.md, verdicts.json and the pictures, each whole or not at all."""
    files.make_directory(folder)
    for picture in page.pictures:
        files.write_atomic(folder / f"{picture.name}.png", picture.image)
    verdicts = {"command": page.command, "verdicts": [asdict(verdict) for verdict in page.verdicts]}
    files.write_atomic(folder / "verdicts.json", (json.dumps(verdicts, indent=1, ensure_ascii=False) + "\n").encode())
    files.write_atomic(folder / "README.md", markdown(page).encode())
    files.write_atomic(folder / "report.html", html(page).encode())
