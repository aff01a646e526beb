"""A campaign on a tiny experiment: resuming by cell, parallel processes, the report, the command line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ritornello import cli
from ritornello.lab import campaign
from ritornello.lab.cell import Cell
from ritornello.lab.experiments import EXPERIMENTS, adaptive_depth
from ritornello.lab.experiments.adaptive_depth import AdaptiveDepth
from ritornello.lab.experiments.base import Experiment
from ritornello.lab.experiments.depth_extrapolation import HOPS, LOOPS, DepthExtrapolation
from ritornello.lab.experiments.stability import Stability
from ritornello.lab.measure import Row, pick_rows


def shorter(cell: Cell) -> Cell:
    return replace(cell, train=replace(cell.train, steps=2, batch_size=2, warmup_steps=0))


class Tiny(DepthExtrapolation):
    """The real experiment with two steps of training and few questions."""

    n_run = 0

    def cells(self, scale: Any) -> list[Cell]:
        wanted = [cell for cell in super().cells("full") if cell.seed < 2 and cell.task == "chains"]
        return [shorter(cell) for cell in wanted if cell.arm in ("article", "dense", "plain-depth", "no-injection")]

    def run(self, cell: Cell, store: Path) -> list[Row]:
        Tiny.n_run += 1
        return super().run(cell, store)


def in_this_process(name: str, scale: Any, out: Path, missing: list[int], workers: int) -> Iterator[str]:
    """Processes of their own would not know what a test has changed."""
    return (campaign.run_cell(name, scale, str(out), index, 1) for index in missing)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Tiny:
    from ritornello.lab import measure
    from ritornello.lab.experiments import depth_extrapolation

    monkeypatch.setattr(measure, "N_QUESTIONS", 2)
    monkeypatch.setattr(campaign, "_run_all", in_this_process)
    monkeypatch.setattr(depth_extrapolation, "HOPS", (1, 2, 3, 4, 5, 6, 8, 10, 15, 20))
    monkeypatch.setattr(depth_extrapolation, "LOOPS", (1, 8, 24))
    experiment = Tiny()
    monkeypatch.setitem(EXPERIMENTS, "depth-extrapolation", experiment)
    Tiny.n_run = 0
    return experiment


def run(out: Path, **options: Any) -> Any:
    return campaign.run("depth-extrapolation", scale="full", out=out, workers=1, **options)


def test_run_resumes_by_cell_and_reports(tiny: Tiny, tmp_path: Path) -> None:
    said: list[str] = []
    page = run(tmp_path, say=said.append)
    folder = campaign.folder_of(tmp_path, "full", "depth-extrapolation")
    cells = tiny.cells("full")
    assert Tiny.n_run == len(cells) == 8 and len(said) == 9
    assert {verdict.outcome for verdict in page.verdicts} == {"inconclusive"}  # two seeds decide nothing
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {cell.arm for cell in cells}
    dense = pick_rows(rows, model="dense", metric="accuracy", rule=None, hops=10, loops=24)
    assert [row["seed"] for row in dense] == [0, 1]
    assert len(pick_rows(rows, model="plain-depth")) == 2 * 10
    assert "depth-extrapolation" in json.loads((folder / "config.json").read_text())["experiment"]
    stored = json.loads((folder / "verdicts.json").read_text())
    assert [verdict["claim"] for verdict in stored["verdicts"]] == [verdict.claim for verdict in page.verdicts]
    for name in ("report.html", "README.md", "chains-hops-by-loops.png", "chains-accuracy-by-hops.png"):
        assert (folder / name).stat().st_size > 1000

    before = (folder / "results.jsonl").read_bytes()
    lost = campaign.cell_file(folder, tiny, cells[3])
    lost.unlink()
    assert len(campaign.report_of("depth-extrapolation", scale="full", out=tmp_path).notes) == len(tiny.notes) + 1
    run(tmp_path)
    assert Tiny.n_run == len(cells) + 1
    strip = lambda text: [{k: v for k, v in json.loads(x).items() if k != "latency_ms"} for x in text.splitlines()]  # noqa: E731
    assert strip((folder / "results.jsonl").read_bytes()) == strip(before)  # its model was stored


def test_any_part_of_the_cells_can_be_reported(tiny: Tiny, tmp_path: Path) -> None:
    run(tmp_path)
    folder = campaign.folder_of(tmp_path, "full", "depth-extrapolation")
    for cell in tiny.cells("full")[:-1]:
        campaign.cell_file(folder, tiny, cell).unlink()
        page = campaign.report_of("depth-extrapolation", scale="full", out=tmp_path)
        assert {verdict.outcome for verdict in page.verdicts} <= {"inconclusive"}


def test_a_cell_that_fails_leaves_the_others(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tiny.run

    def fails(self: Tiny, cell: Cell, store: Path) -> list[Row]:
        if cell.arm == "plain-depth":
            raise OSError("disk full")
        return real(self, cell, store)

    monkeypatch.setattr(Tiny, "run", fails)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path)
    folder = campaign.folder_of(tmp_path, "full", "depth-extrapolation")
    done = list((folder / "cells").iterdir())
    assert done and not any("plain-depth" in path.name for path in done)


def test_two_campaigns_do_not_share_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    from ritornello.train import files

    folder = campaign.folder_of(tmp_path, "full", "depth-extrapolation")
    files.make_directory(folder)
    with files.lock(folder), pytest.raises(ValueError, match="in use"):
        run(tmp_path)


def test_stability_rows_and_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ritornello.lab.experiments import stability

    monkeypatch.setattr(stability, "STEPS", 3)
    monkeypatch.setattr(stability, "EVERY", 3)
    experiment = Stability()
    wanted = ("dense", "add", "plain-depth")
    cells = [cell for cell in experiment.cells("full") if cell.arm in wanted and cell.train.max_loops <= 4]
    parts = [experiment.run(cell, tmp_path) for cell in cells[::4]]
    rows = [row for part in parts for row in part]
    assert all(experiment.show([row for part in parts[:n] for row in part]) for n in range(1, len(parts)))
    steps = {row["step"] for row in pick_rows(rows, model="dense", metric="radius")}
    assert steps == {1, 3}
    assert all(row["value"] in (0.0, 1.0) for row in pick_rows(rows, metric="trains"))


def test_stability_judges_by_its_rule() -> None:
    experiment = Stability()

    def rows(share: dict[str, dict[float, float]], over_bound: float = 0.1) -> Sequence[Row]:
        made = []
        for model, by_rate in share.items():
            for rate, trains in by_rate.items():
                for seed in range(3):
                    base = {
                        "task": "chains",
                        "model": model,
                        "lr": rate,
                        "loops": 16,
                        "depth": 16,
                        "seed": seed,
                        "total": 1,
                    }
                    made.append(base | {"metric": "trains", "value": float(seed < 3 * trains)})
                    made.append(base | {"metric": "state_over_bound", "value": over_bound})
                    made.append(base | {"metric": "rho", "value": 0.9})
        return made

    all_train = {0.1: 1.0, 0.2: 1.0}
    better = {"dense": all_train, "add": {0.1: 1.0, 0.2: 0.0}}
    assert experiment.judge(rows(better))[0].outcome == "holds"
    assert experiment.judge(rows({"dense": all_train, "add": all_train}))[0].outcome == "not tested at this scale"
    worse = {"dense": {0.1: 1.0, 0.2: 0.0}, "add": all_train}
    assert experiment.judge(rows(worse))[0].outcome == "does not hold"
    assert experiment.judge(rows(better))[1].outcome == "holds"
    assert experiment.judge(rows(better, over_bound=1.1))[1].outcome == "does not hold"
    lost = [row | {"value": None} if row["metric"] == "state_over_bound" else row for row in rows(better)]
    assert experiment.judge(lost)[1].outcome == "does not hold"  # a state that is not finite is not within its bound
    assert experiment.judge(rows({"dense": all_train}))[0].outcome == "not tested at this scale"
    assert experiment.judge(rows({"add": all_train})) == []


def made_up(experiment: DepthExtrapolation, accuracy: dict[str, float], far: dict[str, float]) -> list[Row]:
    """Rows of 5 seeds: `accuracy` on the training hops, `far` beyond."""
    rows = []
    for arm in accuracy:
        plain = arm.startswith("plain")
        for seed in range(5):
            for hops in HOPS:
                for loops in (0,) if plain else LOOPS:
                    value = accuracy[arm] if hops <= 5 else far[arm] - 0.001 * seed
                    rows.append({"task": "chains", "model": arm, "seed": seed, "hops": hops, "loops": loops})
                    rows[-1] |= {"metric": "accuracy", "value": value, "total": 1}
    return rows


def test_depth_extrapolation_judges_by_its_rule() -> None:
    experiment = DepthExtrapolation()
    solved = {"article": 1.0, "dense": 1.0, "plain-depth": 1.0, "no-injection": 1.0}
    far = {"article": 1.0, "dense": 1.0, "plain-depth": 0.2, "no-injection": 0.1}

    def outcome(claim: str, accuracy: dict[str, float], far: dict[str, float]) -> str:
        rows = made_up(experiment, accuracy, far)
        found = [verdict.outcome for verdict in experiment.judge(rows) if claim in verdict.claim]
        assert len(found) == 1
        return found[0]

    assert {verdict.outcome for verdict in experiment.judge(made_up(experiment, solved, far))} == {"holds"}
    reaches, falls, matters = "article model, trained", "plain, equal depth: falls behind the article", "no injection:"
    assert outcome(reaches, solved, far | {"article": 0.3}) == "does not hold"
    assert outcome(falls, solved | {"plain-depth": 0.9}, far) == "inconclusive"  # it never solved what it trained on
    assert outcome(falls, solved, far | {"plain-depth": 0.99}) == "does not hold"
    assert outcome(matters, solved, far | {"no-injection": 0.98}) == "does not hold"


def test_what_was_not_learnt_decides_nothing() -> None:
    experiment = DepthExtrapolation()
    rows = made_up(experiment, {"dense": 0.5, "no-injection": 1.0}, {"dense": 1.0, "no-injection": 0.1})
    found = {verdict.claim: verdict.outcome for verdict in experiment.judge(rows)}
    assert [found[claim] for claim in found if "no worse" in claim or "no injection:" in claim] == ["inconclusive"] * 2


def follow_rows(rho: float, lost: float) -> list[Row]:
    """Of adaptive-depth: the smallest looped model under one rule, three seeds."""
    rows: list[Row] = []
    for seed in range(3):
        base = {"task": "chains", "model": "dense", "seed": seed, "total": 1, "hops": None}
        rows.append(base | {"metric": "rank_correlation", "rule": "hazard > 0.9", "value": rho + 0.01 * seed})
        for hops in adaptive_depth.HOPS:
            here = base | {"hops": hops}
            rows.append(here | {"metric": "accuracy", "rule": "hazard > 0.9", "value": 1 - lost})
            rows.append(here | {"metric": "loops_used", "rule": "hazard > 0.9", "value": hops + 1.0})
            rows += [here | {"metric": "accuracy", "loops": n, "value": 1.0} for n in adaptive_depth.FORCED]
    return rows


@pytest.mark.parametrize(
    ("rho", "lost", "expected"),
    [(0.9, 0.0, ["holds", "holds"]), (0.3, 0.0, ["does not hold", "holds"]), (0.9, 0.1, ["holds", "does not hold"])],
)
def test_adaptive_depth_judges_by_its_rule(
    rho: float, lost: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_depth, "FREE", adaptive_depth.LEARNED)
    found = AdaptiveDepth().judge(follow_rows(rho, lost))
    assert [verdict.outcome for verdict in found[:2]] == expected


def test_too_many_loops_can_do_harm() -> None:
    experiment = DepthExtrapolation()
    rows = made_up(experiment, {"dense": 1.0}, {"dense": 1.0})
    for row in rows:
        row["value"] -= 0.1 if row["loops"] == LOOPS[-1] else 0
    (verdict,) = [v for v in experiment.judge(rows) if "no worse" in v.claim]
    assert verdict.outcome == "does not hold"


def test_every_experiment_says_what_it_is() -> None:
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name and experiment.question.endswith("?")
        assert experiment.prediction and experiment.rules and experiment.sources
        for scale in ("quick", "full"):
            cells = experiment.cells(scale)
            assert len({cell.name for cell in cells}) == len(cells) > 0 and experiment.budget[scale]
            assert experiment.command(scale) == f"ritornello lab run {name} --{scale}"
        assert {cell.seed for cell in experiment.cells("quick")} == {0}
        assert len({cell.seed for cell in experiment.cells("full")}) >= 3


def test_experiments_share_models() -> None:
    names: list[set[str]] = [
        {cell.name for cell in EXPERIMENTS[name].cells("full")} for name in ("depth-extrapolation", "adaptive-depth")
    ]
    assert len(names[0] & names[1]) >= 6


def test_command_line(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "list"]) == 0
    listed = capsys.readouterr().out
    assert isinstance(tiny, Experiment) and all(
        name in listed for name in ("stability", "adaptive-depth", "chains", "s5")
    )
    assert cli.main(["lab", "report", "depth-extrapolation", "--full", "--out", str(tmp_path)]) == 2
    assert "lab run depth-extrapolation --full" in capsys.readouterr().err
    assert cli.main(["lab", "run", "depth-extrapolatio", "--full", "--out", str(tmp_path)]) == 2
    assert "did you mean 'depth-extrapolation'?" in capsys.readouterr().err
    assert cli.main(["lab", "run", "depth-extrapolation", "--out", str(tmp_path)]) == 2
    assert "--quick, --full" in capsys.readouterr().err
    assert cli.main(["lab", "run"]) == 2
