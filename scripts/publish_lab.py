"""Copy the results of `ritornello lab run … --full` into experiments/, and rewrite RESULTS.md from all that is there.

What an earlier date published of the same experiment is replaced.

python scripts/publish_lab.py [--date 2026-11-24] [--from runs/lab]
"""

import argparse
import json
import shutil
import sys
from datetime import date
from pathlib import Path

from ritornello.lab import campaign
from ritornello.lab.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
PUBLISHED = ("results.jsonl", "config.json", "verdicts.json", "report.html", "README.md", "*.png")
PICTURES = {  # that the README shows
    "hops-by-loops.png": "*-depth-extrapolation/chains-hops-by-loops.png",
    "loops-by-hops.png": "*-adaptive-depth/loops-by-hops.png",
}
HEAD = """# Results

Every claim that was tested, with its verdict; what failed stands beside what held. Each was tested at one small scale,
which its row names, by a rule that its page states ([how](docs/lab.md)). `experiments/` holds the rows behind each
figure. A page whose campaign is under way says how many of its cells are finished, and decides nothing before all are.

The *article model* has all that the article names: prelude, experts, LTI injection, LoRA, halting, coda; the *smallest
looped model* one dense layer and a gate. *Depth mask*: in training a question is asked only if the loops can reach it.
*Beyond*: 6 to 20 hops. *Hazard*: a gate's probability of stopping now; *KL*: how much the prediction changes from loop
to loop; *cumulative*: ACT's probabilities added up. *ρ*: Spearman's, of loops used and hops needed. *lti*, *linear*,
*add*, *none*: how the input comes back. In brackets: seed by seed.

| claim | verdict | at which scale | evidence | test | experiment |
|---|---|---|---|---|---|
"""


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
    rows = []
    for name in EXPERIMENTS:
        for path in (ROOT / "experiments").glob(f"*-{name}/verdicts.json"):  # at most one
            page = json.loads(path.read_text(encoding="utf-8"))
            rows += [row(verdict, path.parent.name, page["command"]) for verdict in page["verdicts"]]
    (ROOT / "RESULTS.md").write_text(HEAD + "".join(rows), encoding="utf-8")
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


def row(verdict: dict[str, str], folder: str, command: str) -> str:
    link = f"[{folder}](experiments/{folder}/README.md), `{command}`"
    said = (verdict[name] for name in ("scale", "evidence", "test"))
    cells = (verdict["claim"], f"**{verdict['outcome']}**", *said, link)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
