"""Runs the cells of an experiment in parallel processes; what is done is never done again."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ritornello import __version__, recipes
from ritornello.config import pick, require
from ritornello.device import n_cores
from ritornello.lab import report
from ritornello.lab.cell import Cell
from ritornello.lab.experiments import EXPERIMENTS
from ritornello.lab.experiments.base import Experiment, Scale
from ritornello.lab.measure import Row
from ritornello.lab.processes import each_alone
from ritornello.train import files

RESULTS = "results.jsonl"
CONFIG = "config.json"
Say = Callable[[str], None]


def run(name: str, *, scale: Scale, out: Path, workers: int = 0, say: Say = lambda _: None) -> report.Page:
    """Run what is missing of the experiment `name`, write its report, and return the page.

    out/<scale>/<name> gets the results, out/models the trained models, which experiments share. workers: processes,
    each with its share of the cores; 0: one for each core.

    Raises:
        ValueError: no such experiment, or another process at work in the folder.
    """
    experiment = pick(EXPERIMENTS, name, "experiment")
    folder = folder_of(out, scale, name)
    files.make_directory(folder / "cells")
    files.make_directory(out / "models")
    with files.lock(folder):
        cells = experiment.cells(scale)
        files.write_atomic(folder / CONFIG, config(experiment, scale, cells).encode())
        missing = [i for i, cell in enumerate(cells) if not cell_file(folder, experiment, cell).exists()]
        say(f"{name}: {len(cells)} cells, {len(missing)} to run")
        for done, said in enumerate(_run_all(name, scale, out, missing, workers), start=1):
            say(f"[{done}/{len(missing)}] {said}")
        return write_report(experiment, scale, out)


def folder_of(out: Path, scale: Scale, name: str) -> Path:
    return out / scale / name


def cell_file(folder: Path, experiment: Experiment, cell: Cell) -> Path:
    """Rows measured in another way go elsewhere, so that none are taken for these."""
    how = hashlib.sha256(json.dumps(experiment.measured, sort_keys=True).encode()).hexdigest()[:6]
    return folder / "cells" / f"{cell.name}-{how}.jsonl"


def _run_all(name: str, scale: Scale, out: Path, missing: list[int], workers: int) -> Iterator[str]:
    cores = n_cores()
    workers = max(1, min(workers or cores, len(missing)))
    threads = max(1, cores // workers)
    return each_alone(run_cell, [(name, scale, str(out), i, threads) for i in missing], at_once=workers)


def run_cell(name: str, scale: Scale, out: str, index: int, threads: int) -> str:
    """One cell, in a process of its own; returns a line about it."""
    import torch

    torch.set_num_threads(threads)
    experiment = EXPERIMENTS[name]
    cell = experiment.cells(scale)[index]
    start = time.perf_counter()
    rows = experiment.run(cell, Path(out, "models"))
    write_rows(cell_file(folder_of(Path(out), scale, name), experiment, cell), rows)
    return f"{cell.task} {cell.arm} seed {cell.seed}: {time.perf_counter() - start:.0f} s"


def config(experiment: Experiment, scale: Scale, cells: list[Cell]) -> str:
    """config.json: everything that the results depend on."""
    import torch

    machine = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": n_cores(),
        "python": platform.python_version(),
    }
    versions = {"ritornello": __version__, "torch": torch.__version__}
    what = {
        "experiment": experiment.name,
        "scale": scale,
        "rules": dict(experiment.rules),
        "prediction": experiment.prediction,
        "measured": dict(experiment.measured),
    }
    listed = {cell.name: asdict(cell) for cell in cells}
    return json.dumps(what | {"machine": machine, "versions": versions, "cells": listed}, indent=1) + "\n"


def write_rows(path: Path, rows: list[Row]) -> None:
    files.write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def read_rows(folder: Path, experiment: Experiment, cells: list[Cell]) -> tuple[list[Row], int]:
    """The rows of the finished cells, in their order, and how many cells are finished."""
    found = [cell_file(folder, experiment, cell) for cell in cells]
    done = [path for path in found if path.exists()]
    text = [recipes.read_text(path, max_bytes=1 << 30) for path in done]
    return [recipes.parse_json(line, folder) for part in text for line in part.splitlines()], len(done)


def write_report(experiment: Experiment, scale: Scale, out: Path) -> report.Page:
    """results.jsonl, the page and its pictures from what has been run so far.

    Raises:
        ValueError: nothing has been run yet.
    """
    folder = folder_of(out, scale, experiment.name)
    cells = experiment.cells(scale)
    rows, n_done = read_rows(folder, experiment, cells)
    remedy = f"{experiment.command(scale)} runs it"
    require(bool(rows), "experiment", experiment.name, f"one with results in {folder}", remedy)
    write_rows(folder / RESULTS, rows)
    tables, pictures = experiment.show(rows)
    verdicts, unfinished = experiment.judge(rows), ()
    if n_done < len(cells):
        unfinished = (f"{n_done} of {len(cells)} cells are finished: nothing is decided yet.",)
        verdicts = [replace(verdict, outcome="inconclusive") for verdict in verdicts]
    page = report.Page(
        title=experiment.title,
        question=experiment.question,
        prediction=experiment.prediction,
        command=experiment.command(scale),
        budget=experiment.budget[scale],
        sources=experiment.sources,
        verdicts=tuple(verdicts),
        tables=tuple(tables),
        pictures=tuple(pictures),
        facts=facts(rows, cells),
        notes=(*unfinished, *experiment.notes),
    )
    report.write(page, folder)
    return page


def facts(rows: list[Row], cells: list[Cell]) -> dict[str, str]:
    """What the page says of seeds, machine and versions."""
    import torch

    seeds = sorted({row["seed"] for row in rows})
    return {
        "seeds": ", ".join(map(str, seeds)),
        "cells": str(len(cells)),
        "machine": f"{n_cores()} cores, {platform.machine()}, {platform.system()}",
        "versions": f"ritornello {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def report_of(name: str, *, scale: Scale, out: Path) -> report.Page:
    """The report of what has been run so far."""
    return write_report(pick(EXPERIMENTS, name, "experiment"), scale, out)
