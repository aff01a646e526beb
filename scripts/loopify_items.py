"""Items for `ritornello loopify`: FOLDER/{texts,questions}-{search,test}.jsonl.

    python scripts/loopify_items.py FOLDER

Search and test share no text, fact or sum. Texts are what comes with Python: English is the language reference that
`pydoc` carries, at most five pieces of a topic, Python the standard library's functions. Questions are made by rule.
"""

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

Row = dict[str, Any]
LENGTH = 400  # characters of a text
TEXTS = {"search": 6, "test": 100}  # of each kind
QUESTIONS = {"search": 16, "test": 200}
MODULES = """argparse ast calendar cmd configparser csv datetime difflib doctest enum fractions gzip heapq inspect
json.decoder locale mailbox netrc optparse pdb pickletools platform plistlib pprint queue random sched
shelve shutil smtplib statistics string tarfile textwrap threading timeit trace turtle typing
unittest.case urllib.parse uuid zipfile""".split()
CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna,
Poland Warsaw, Hungary Budapest, Sweden Stockholm, Norway Oslo, Finland Helsinki, Denmark Copenhagen,
Ireland Dublin, Belgium Brussels, Russia Moscow, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Croatia
Zagreb, Serbia Belgrade, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Nigeria Abuja, Ghana Accra, Morocco
Rabat, Tunisia Tunis, Algeria Algiers, Japan Tokyo, China Beijing, India Delhi, Iran Tehran, Iraq
Baghdad, Syria Damascus, Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Philippines Manila, Mongolia
Ulaanbaatar, Pakistan Islamabad, Bangladesh Dhaka, Nepal Kathmandu, Afghanistan Kabul, Australia
Canberra, Canada Ottawa, Cuba Havana, Jamaica Kingston, Peru Lima, Chile Santiago, Ecuador Quito,
Colombia Bogota, Venezuela Caracas, Uruguay Montevideo, Argentina Buenos-Aires, Iceland Reykjavik"""
OPPOSITES = """hot cold, big small, tall short, fast slow, early late, open closed, full empty, hard soft, light dark,
new old, rich poor, strong weak, happy sad, wet dry, clean dirty, cheap expensive, deep shallow, wide
narrow, thick thin, loud quiet, smooth rough, sharp blunt, brave cowardly, kind cruel, awake asleep,
alive dead, inside outside, above below, before after, up down, left right, north south, east west, day
night, love hate, win lose, buy sell, give take, push pull, begin end, remember forget, near far, true
false, good bad, sweet sour, rise fall, arrive leave, ask answer"""
CYCLES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "ten twenty thirty forty fifty sixty seventy eighty ninety",
    "spring summer autumn winter",
    "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
)
WORDS = """apple river stone garden window music paper silver winter summer bridge castle doctor engine flower
forest friend island kitchen letter market mirror morning mountain number ocean orange pencil pepper
picture planet pocket potato rabbit school shadow spider spring station street sugar table teacher temple
ticket tiger travel turtle valley village water weather wheel yellow bottle butter button camera candle
carpet cheese circle coffee cotton desert dragon""".split()


def pairs(text: str) -> list[tuple[str, str]]:
    return [(a, b.replace("-", " ")) for a, b in (entry.split() for entry in text.split(","))]


def question(task: str, context: str, right: str, wrong: Sequence[str], draw: random.Random) -> Row:
    choices = [f" {choice}" for choice in [right, *wrong]]
    draw.shuffle(choices)
    return {"task": task, "context": context, "choices": choices, "answer": f" {right}"}


def facts(task: str, table: str, forms: tuple[str, ...], draw: random.Random, half: int) -> Iterator[Row]:
    known = pairs(table)
    mine = [pair for i, pair in enumerate(known) if i % 2 == half]
    while True:
        (a, b), form = draw.choice(mine), draw.choice(forms)
        wrong = draw.sample([other for _, other in mine if other not in (a, b)], 3)
        yield question(task, form.format(a), b, wrong, draw)


def sums(draw: random.Random, half: int) -> Iterator[Row]:
    while True:
        a, b = draw.randint(1, 49), draw.randint(1, 49)
        if (a + b) % 2 == half:
            near = [a + b + off for off in (-10, -2, -1, 1, 2, 10) if a + b + off > 0]
            wrong = draw.sample([str(n) for n in near], 3)
            yield question("sums", f"3 + 4 = 7\n12 + 15 = 27\n{a} + {b} =", str(a + b), wrong, draw)


def larger(draw: random.Random, half: int) -> Iterator[Row]:
    while True:
        a, b = draw.sample(range(10, 100), 2)
        if (a + b) % 2 == half:
            context = f"Of the numbers {a} and {b}, the larger one is"
            yield question("larger", context, str(max(a, b)), [str(min(a, b))], draw)


def copies(draw: random.Random, half: int) -> Iterator[Row]:
    mine = WORDS[half::2]
    while True:
        some = draw.sample(mine, 6)
        at = draw.randrange(2, 6)
        shown, begun = " ".join(some), " ".join(some[:at])
        wrong = draw.sample([word for word in some if word != some[at]], 3)
        yield question("copies", f"{shown}. Again: {begun}", some[at], wrong, draw)


def series(draw: random.Random, half: int) -> Iterator[Row]:
    while True:
        names = draw.choice(CYCLES).split()
        at, n = draw.randrange(len(names)), draw.randint(1, 3)
        if at % 2 == half and at >= n:
            others = [name for name in names if name not in names[at - n : at + 1]]
            more = [word for word in WORDS if word not in names]
            wrong = draw.sample(others if len(others) >= 3 else others + more, 3)
            yield question("series", ", ".join(names[at - n : at]) + ",", names[at], wrong, draw)


def capitals(draw: random.Random, half: int) -> Iterator[Row]:
    return facts("capitals", CAPITALS, ("The capital of {} is", "{}'s capital city is"), draw, half)


def opposites(draw: random.Random, half: int) -> Iterator[Row]:
    forms = "The opposite of {} is", "The word that means the opposite of {} is"
    return facts("opposites", OPPOSITES, forms, draw, half)


KINDS: tuple[Callable[[random.Random, int], Iterator[Row]], ...] = (sums, larger, copies, series, capitals, opposites)


def questions(half: int, n: int) -> Iterator[Row]:
    for kind in KINDS:
        draw = random.Random(f"{kind.__name__} {half}")
        found: dict[str, Row] = {}
        for row in kind(draw, half):
            found.setdefault(json.dumps([row["context"], sorted(row["choices"])]), row)
            if len(found) == n:
                break
        yield from found.values()


def texts(half: int, n: int) -> Iterator[Row]:
    draw = random.Random(half)
    some = [text for _, text in sorted(topics.items())][half::2]
    english = [text[i : i + LENGTH] for text in some for i in range(0, 5 * LENGTH, LENGTH)]
    for kind, sources in (("english", english), ("python", functions(half))):
        draw.shuffle(sources)
        long = [text for text in sources if len(text) >= LENGTH][:n]
        assert len(long) == n, f"{len(long)} texts of {kind}"
        yield from ({"task": kind, "text": text[:LENGTH]} for text in long)


def functions(half: int) -> list[str]:
    """Sources of functions and methods, of every second module."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for name in MODULES[half::2]:
        source = (root / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        found += ["".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for half, name in enumerate(("search", "test")):
        for kind, rows in (("texts", texts(half, TEXTS[name])), ("questions", questions(half, QUESTIONS[name]))):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}-{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
