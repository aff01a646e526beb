"""Copy the results of `ritornello lab run … --full` into experiments/, and rewrite RESULTS.md from all that is there.

What an earlier date published of the same experiment is replaced.

python scripts/publish_lab.py [--date 2026-11-24] [--from runs/lab]
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from ritornello.lab import campaign
from ritornello.lab.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
PUBLISHED = ("results.jsonl", "config.json", "verdicts.json", "report.html", "README.md", "*.png")
PICTURES = {  # that the README shows
    "hops-by-loops.png": "*-depth-extrapolation/chains-hops-by-loops.png",
    "loops-by-hops.png": "*-adaptive-depth/loops-by-hops.png",
    "nodes-by-loops.png": "*-superposition/reachability-nodes-by-loops.png",
    "walks-of-new-facts.png": "*-systematic-generalisation/walks-out-by-hops.png",
}
# What the article says, and which verdicts of which experiment answer it: those whose claims begin so. AGAINST: one
# that contradicts the article if it holds.
AGAINST = "against: "
CLAIMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Half the parameters are enough for the same quality (770M for 1.3B)",
        "parameter-efficiency",
        ("looped, 0.59 of the parameters: as good as plain", "looped, 0.59 of the parameters: better than plain"),
    ),
    (
        "A block that loops is as good as as many layers",
        "parameter-efficiency",
        (f"{AGAINST}looped, always 4 loops: worse than",),
    ),
    (
        "It combines what it has never seen combined",
        "systematic-generalisation",
        (
            "smallest looped model, tied: 0.9 on",
            "smallest looped model, tied: better than plain, equal depth, tied at 2 hops of new facts",
            "smallest looped model, tied, anchored: 0.9 on",
        ),
    ),
    (
        "Trained on 5 hops, it answers 10 and 20",
        "depth-extrapolation",
        ("article model, trained on 5 hops", "smallest looped model, trained on 5 hops, answers 20"),
    ),
    ("Plain transformers do not", "depth-extrapolation", ("plain, ",)),
    (
        "The state cannot grow without bound, however many loops",
        "stability",
        ("LTI injection: the state stays within",),
    ),
    ("LTI injection trains where others diverge", "stability", ("LTI injection trains wherever",)),
    (
        "Each token decides when to stop",
        "adaptive-depth",
        (
            "article model, hazard > 0.9: ",
            "ACT, mixture, cumulative > 0.99: ",
            "ACT, last state, cumulative > 0.99: ",
        ),
    ),
    (
        "Each loop can take other experts",
        "routing",
        (
            "article model: a token's experts differ",
            "article model: the same state takes other experts",
            "article model: experts follow",
            "article model: holding the first loop's experts",
            "article model: experts share the load",
            "article model: experts are better",
        ),
    ),
    (
        "Its parts (which of them earns its place is our question)",
        "ablation",
        tuple(
            f"{part}: earns its place"
            for part in ("prelude", "coda", "LoRA", "loop embedding", "mixture of experts", "injection")
        ),
    ),
    ("Prelude and coda adapt, the loop reasons (ours)", "ablation", (f"{AGAINST}article model: the ",)),
    (
        "Gains saturate with depth",
        "test-time-depth",
        ("looped, 0.59 of the parameters: loss settles", "smallest looped model: loss settles"),
    ),
    (
        "Too many loops are overthinking",
        "test-time-depth",
        (
            f"{AGAINST}looped, 0.59 of the parameters: 32 loops",
            f"{AGAINST}looped, always 4 loops: 32 loops",
            f"{AGAINST}smallest looped model: 40 loops",
        ),
    ),
    ("A loop is a latent step of a chain of thought", "loops-vs-cot", ("Silent loops",)),
    (
        "It searches breadth-first, many paths at once",
        "superposition",
        ("smallest looped model, reachability in a graph: ",),
    ),
    (
        "Answers certified for every further loop (ours)",
        "certified-depth",
        ("smallest looped model: answers", "what is certified"),
    ),
)
UNTESTED = ("Scaling laws say what a training will give", "At equal FLOPs more loops on fewer tokens are better")
HEAD = """# Results

What an article on [OpenMythos](https://github.com/kyegomez/OpenMythos) claims of looped models, and what came of each
claim here; what failed stands beside what held. Everything was tested at one small scale, by rules that the
experiments' pages state ([how](docs/lab.md)). Below stands every verdict with its evidence; `experiments/` holds the
rows behind each figure. A page whose campaign is under way says how many of its cells are finished, and decides
nothing before all are.

"""
WORDS = """
The *article model* has all that the article names, small: prelude, 16 experts of which 2 are active (there 384 and
8), LTI injection, LoRA of rank 4, halting, coda; what is taken away takes its parameters along. The *smallest looped
model* has one dense layer and a gate. *Anchored*: its state is pulled to the vocabulary after each loop, which the
article does not have. *Answers 20*: .95 at 10 hops and .90 at 20. *Depth mask*: in training a question is asked only
if the loops can reach it. *Beyond*: 6 to 20 hops. *Hazard*: a gate's probability of stopping now; *KL*: how much the
prediction changes from loop to loop; *cumulative*: ACT's probabilities added up. *ρ*: Spearman's, of loops used and
hops needed. *lti*, *linear*, *add*, *none*: how the input comes back. In brackets: seed by seed.
"""
Page = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--date", default=date.today().isoformat())
    parser.add_argument("--from", dest="source", type=Path, default=Path("runs/lab"))
    options = parser.parse_args()
    for name in EXPERIMENTS:
        folder = campaign.folder_of(options.source, "full", name)
        if any((folder / "cells").glob("*.jsonl")):
            campaign.report_of(name, scale="full", out=options.source)
            print(publish(name, folder, options.date))
    for name, picture in PICTURES.items():
        for path in (ROOT / "experiments").glob(picture):
            shutil.copyfile(path, ROOT / "docs" / name)
    (ROOT / "RESULTS.md").write_text(results(published()), encoding="utf-8")
    return 0


def publish(name: str, folder: Path, day: str) -> Path:
    target = ROOT / "experiments" / f"{day}-{name}"
    for earlier in (ROOT / "experiments").glob(f"*-{name}"):
        shutil.rmtree(earlier)
    target.mkdir(parents=True)
    for pattern in PUBLISHED:
        for path in sorted(folder.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    return target


def published() -> dict[str, Page]:
    """By experiment, in the order of EXPERIMENTS: verdicts.json, its `folder` and `title`."""
    found = {}
    for name in EXPERIMENTS:
        for path in (ROOT / "experiments").glob(f"*-{name}/verdicts.json"):  # at most one
            page = json.loads(path.read_text(encoding="utf-8"))
            found[name] = page | {"folder": path.parent.name, "title": EXPERIMENTS[name].title}
    return found


def results(pages: Mapping[str, Page]) -> str:
    """RESULTS.md: the article's claims, then the verdicts of each experiment."""
    head = table("the article says", "tested as", "verdict", "at which scale", "evidence, command")
    claims = [
        answer(said, pages[name], starts) if name in pages else later(said, name) for said, name, starts in CLAIMS
    ]
    claims += [later(said) for said in UNTESTED]
    return HEAD + head + "".join(claims) + WORDS + "".join(section(page) for page in pages.values())


def later(said: str, name: str = "") -> str:
    return line(said, "", "not tested yet", "", f"`{EXPERIMENTS[name].command('full')}`" if name else "")


def answer(said: str, page: Page, starts: tuple[str, ...]) -> str:
    """A line for each verdict that answers one claim of the article; each verdict once."""
    link = f"[`{page['command']}`](experiments/{page['folder']}/README.md)"
    lines, listed = [], set[str]()
    for start in starts:
        against = start.startswith(AGAINST)
        begins = start.removeprefix(AGAINST)
        found = [verdict for verdict in page["verdicts"] if verdict["claim"].startswith(begins)]
        for verdict in [verdict for verdict in found if verdict["claim"] not in listed]:
            claim, outcome, scale = shown(verdict, "claim", "outcome", "scale")
            outcome += ", which contradicts it" if against and verdict["outcome"] == "holds" else ""
            lines.append(line("" if lines else said, claim, outcome, scale, link))
            listed.add(verdict["claim"])
        if not found:
            lines.append(line("" if lines else said, begins, "not decided yet", "", link))
    return "".join(lines)


def section(page: Page) -> str:
    counts = Counter(verdict["outcome"] for verdict in page["verdicts"])
    counted = ", ".join(f"{n} × {outcome}" for outcome, n in counts.most_common())
    link = f"[{page['folder']}](experiments/{page['folder']}/README.md)"
    rows = (line(*shown(verdict, "claim", "outcome", "scale", "evidence", "test")) for verdict in page["verdicts"])
    head = table("claim", "verdict", "at which scale", "evidence", "test")
    return f"\n## {page['title']}\n\n{link}, `{page['command']}`: {counted}\n\n{head}{''.join(rows)}"


def shown(verdict: Mapping[str, str], *names: str) -> list[str]:
    return [f"**{verdict[name]}**" if name == "outcome" else verdict[name] for name in names]


def table(*head: str) -> str:
    return line(*head) + "|" + "---|" * len(head) + "\n"


def line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
