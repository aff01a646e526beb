"""The main job on real text: train a small looped model and plain opponents, and show what depth is worth."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ritornello import recipes
from ritornello.accounting import count_parameters, fit_ffn
from ritornello.config import ModelConfig, Recipe, default_exit
from ritornello.device import n_cores
from ritornello.engine.generate import Loaded, generate, load
from ritornello.lab.processes import Beside
from ritornello.progress import Progress
from ritornello.train import files, ngram, runs
from ritornello.train.data import Batch, Rows, prepare
from ritornello.train.evaluate import evaluate, gap
from ritornello.train.shards import Dataset
from ritornello.train.trainer import CACHE, train

DEPTHS = (1, 2, 4, 8, 16, 32)
N_WINDOWS = 384  # of the validation text, evenly spread; the same for every model
PROMPT = 'def read_lines(path):\n    """'
PLAIN_LR = 4e-3  # the best of 2, 4 and 8e-3, as the looped model's is: experiments/LOG.md
TOTAL, ACTIVE = "plain-total", "plain-active"
TITLES = {TOTAL: "plain transformer, equal total parameters", ACTIVE: "plain transformer, equal active parameters"}


def run(*, out: Path, quiet: bool = False, offline: bool = False) -> dict[str, Any]:
    """Train what is not trained yet in `out`, print the comparison, draw it, continue a prompt. Returns the results."""
    start = time.monotonic()
    looped = replace(recipes.from_mapping(recipes.read_toml(recipes.find("demo"))), name="rdt")
    plain = [opponent(looped, name) for name in (TOTAL, ACTIVE)]
    with Progress(looped.train.steps, quiet=quiet) as progress:
        dataset = prepare(looped.data, Path.home() / CACHE, offline=offline, progress=progress.stage)
        progress.note(_describe_data(dataset))
        worker = _start_plain(plain, out, offline)
        train(looped, out=out / looped.name, resume=True, observer=progress, offline=offline)
        if worker is not None:
            progress.note("looped model trained; waiting for its plain opponents")
            _wait(worker, plain, out, quiet)
    trained = {recipe.name: load(out / recipe.name) for recipe in (looped, *plain)}
    rows = Rows(dataset.validation, seq_len=looped.data.seq_len)
    batches = list(rows.evaluation(32, N_WINDOWS // 32))
    results = compare(trained, looped.name, dataset, batches)
    results["minutes"] = round((time.monotonic() - start) / 60, 2)
    files.write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    plot(results, out / "depth.png")
    print(report(results))
    print(f"\ncurve: {out / 'depth.png'}   figures: {out / 'results.json'}   {results['minutes']:.1f} minutes")
    _continue(trained[looped.name])
    print(f"\nNext: ritornello generate {out / looped.name} --prompt 'import ' --loops 8")
    return results


def opponent(looped: Recipe, name: str) -> Recipe:
    """The same recipe with a plain transformer of as many parameters: in total, or that one token uses."""
    target = count_parameters(looped.model)["total" if name == TOTAL else "active"]
    settings = replace(looped.train, lr=PLAIN_LR)
    return replace(looped, name=name, model=matched_plain(looped.model, target), train=settings)


def matched_plain(model: ModelConfig, n_parameters: int) -> ModelConfig:
    """The plain transformer of `n_parameters` nearest to Llama's proportions: feed-forward networks of 8/3 dim."""
    best = None
    for n_layers in range(1, 33):
        base = replace(
            model,
            n_prelude_layers=n_layers,
            n_recurrent_layers=0,
            n_coda_layers=0,
            ffn="dense",
            lora_rank=0,
            halting="none",
        )
        if count_parameters(replace(base, ffn_dim=1))["total"] > n_parameters:
            break
        found = fit_ffn(base, n_parameters)
        if best is None or abs(found.ffn_dim - model.dim * 8 / 3) < abs(best.ffn_dim - model.dim * 8 / 3):
            best = found
    assert best is not None, "one layer is smaller than any looped model"
    return best


def _start_plain(plain: Sequence[Recipe], out: Path, offline: bool) -> Beside[None] | None:
    """Train the opponents in a process beside this one, half of the cores each; in this one if there is one core."""
    cores = n_cores()
    arguments = ([recipes.to_json(recipe) for recipe in plain], str(out), max(1, cores // 2), offline)
    if cores == 1:
        _train_plain(*arguments)
        return None
    torch.set_num_threads(cores - cores // 2)
    return Beside(_train_plain, *arguments)


def _train_plain(plain: Sequence[str], out: str, n_threads: int, offline: bool) -> None:
    torch.set_num_threads(n_threads)
    for text in plain:
        recipe = recipes.from_json(text)
        train(recipe, out=Path(out, recipe.name), resume=True, offline=offline)


def _wait(worker: Beside[None], plain: Sequence[Recipe], out: Path, quiet: bool) -> None:
    """Show how far the other process is, from the metrics it writes."""
    total = sum(recipe.train.steps for recipe in plain)
    with Progress(total, quiet=quiet) as progress:
        while not worker.ends_within(1.0):
            done = [runs.lines(out / recipe.name) for recipe in plain]
            steps = sum(lines[-1]["step"] for lines in done if lines)
            last = next((line for lines in reversed(done) for line in reversed(lines) if "loss" in line), None)
            if last is not None:
                progress.update(steps, {key: last[key] for key in ("loss", "tok_per_s")})
    worker.result()


def compare(trained: Mapping[str, Loaded], looped: str, dataset: Dataset, batches: Sequence[Batch]) -> dict[str, Any]:
    """Bits per byte of every model on the same windows."""
    model = trained[looped].model
    found = evaluate(model, batches, loops=DEPTHS, exit=default_exit(model.config.halting))
    assert found.exit_nats is not None
    curve = {n: found.bpb(found.nats[n]) for n in DEPTHS}
    plain = {}
    for name in (TOTAL, ACTIVE):
        scored = evaluate(trained[name].model, batches, loops=(1,))
        plain[name] = {"bpb": scored.bpb(scored.nats[1]), **_size(trained[name])}
    return {
        "looped": {"bpb": curve, **_size(trained[looped])},
        "halting": {"bpb": found.bpb(found.exit_nats), "mean_loops": found.exit_loops},
        "gains": {f"{a}->{b}": gap(found.nats[a], found.nats[b], found.n_bytes) for a, b in ((1, 2), (2, 4))},
        "plain": plain,
        "trigram": {"bpb": float(ngram.window_bits(dataset, batches).sum() / found.n_bytes.sum())},
        "validation_bytes": int(found.n_bytes.sum()),
        "data": dataset.fingerprint,
    }


def _size(loaded: Loaded) -> dict[str, Any]:
    counted = count_parameters(loaded.recipe.model)
    steps, data = loaded.recipe.train, loaded.recipe.data
    tokens = steps.steps * steps.batch_size * data.seq_len
    return {"parameters": counted["total"], "active_parameters": counted["active"], "training_tokens": tokens}


def _describe_data(dataset: Dataset) -> str:
    n_train, n_validation = dataset.train.n_bytes / 1e6, dataset.validation.n_bytes / 1e6
    packages = len(dataset.held_out)
    return (
        f"text: Python's standard library, {n_train:.1f} MB to train on, {n_validation:.1f} MB of {packages} other "
        f"packages to validate; fingerprint {dataset.corpus_fingerprint[:12]}, it differs by Python version"
    )


def verdict(results: Mapping[str, Any]) -> str:
    """What the figures say, a plain model's win first."""
    curve = results["looped"]["bpb"]
    best = min(curve, key=curve.__getitem__)
    name = min(results["plain"], key=lambda name: results["plain"][name]["bpb"])
    plain = results["plain"][name]["bpb"]
    lines = []
    if plain < curve[best]:
        lines.append(f"The {TITLES[name]} wins: {plain:.3f} bits per byte against {curve[best]:.3f} at {best} loops.")
    else:
        lines.append(f"The looped model wins: {curve[best]:.3f} bits per byte at {best} loops against {plain:.3f}.")
    for pair, (gained, error) in results["gains"].items():
        a, b = pair.split("->")
        said = "gain" if gained > 3 * error else "gain nothing certain:"
        lines.append(f"{a} to {b} loops {said} {gained:.4f} +- {error:.4f} (one standard error, paired over windows).")
    beyond = curve[DEPTHS[-1]] - curve[best]
    said = "hold" if beyond <= 0.02 else "break down"
    lines.append(f"{DEPTHS[-1]} loops, far beyond training, {said}: {beyond:.4f} worse than the best.")
    trigram = results["trigram"]["bpb"]
    lines.append(f"The byte trigram model is {'beaten' if curve[best] < trigram else 'NOT beaten'}: {trigram:.3f}.")
    return "\n".join(lines)


def report(results: Mapping[str, Any]) -> str:
    """The verdict, then the table."""
    looped, plain, halting = results["looped"], results["plain"], results["halting"]
    size = f"{looped['parameters']:>10,} {looped['active_parameters']:>10,}"
    rows = [(f"looped, {n} loops", size, value) for n, value in looped["bpb"].items()]
    rows.append((f"looped, halting (mean {halting['mean_loops']:.1f} loops)", size, halting["bpb"]))
    for name, found in plain.items():
        sizes = f"{found['parameters']:>10,} {found['active_parameters']:>10,}"
        rows.append((TITLES[name], sizes, found["bpb"]))
    rows.append(("byte trigram, interpolated Witten-Bell", " " * 21, results["trigram"]["bpb"]))
    head = f"{'':44} {'parameters':>10} {'active':>10}   bits per byte"
    lines = [f"{title:44} {sizes}   {value:.4f}" for title, sizes, value in rows]
    note = f"one seed; the same {results['validation_bytes']:,} bytes of held-out text for every row"
    return "\n".join((verdict(results), "", head, *lines, note))


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Bits per byte by loops, as a PNG."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curve, halting = results["looped"]["bpb"], results["halting"]
    axes.plot(list(curve), list(curve.values()), "o-", color="C0", label="looped, depth forced")
    axes.plot(halting["mean_loops"], halting["bpb"], "*", ms=13, color="C0", label="looped, tokens halt (mean loops)")
    for (name, found), color in zip(results["plain"].items(), ("C1", "C2"), strict=True):
        axes.axhline(found["bpb"], color=color, ls="--", label=TITLES[name])
    lowest, highest = min(curve.values()), max(curve.values())
    trigram = results["trigram"]["bpb"]
    axes.set_title(f"One model, read at many depths (byte trigram: {trigram:.2f}, off the chart)", fontsize=11)
    if trigram < highest + 2 * (highest - lowest):
        axes.axhline(trigram, color="0.5", ls=":", label="byte trigram")
        axes.set_title("One model, read at many depths", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(curve), [str(n) for n in curve])
    axes.set(xlabel="loops at inference", ylabel="bits per byte of held-out text")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    files.write_atomic(path, image.getvalue())


def _continue(loaded: Loaded) -> None:
    """The same prompt at several depths, and with halting."""
    print("\nThe prompt, continued at several depths (the likeliest token each time):")
    for n_loops in (1, 4, 16):
        found = generate(loaded, PROMPT, n_loops=n_loops, max_tokens=32, temperature=0.0)
        print(f"--- {n_loops} loops\n{PROMPT}{found.text}")
    exit = default_exit(loaded.model.config.halting)
    found = generate(loaded, PROMPT, n_loops=16, exit=exit, max_tokens=32, temperature=0.0)
    print(f"--- halting, {np.mean(found.loops):.1f} loops on average\n{PROMPT}{found.text}")
