"""Who diverges: learning rate × injection × loops, and what the loop does meanwhile."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ritornello.lab import arms, figures, judging
from ritornello.lab.cell import Cell, Trained, build, train
from ritornello.lab.dynamics import largest_state, observe
from ritornello.lab.experiments.base import Experiment, Scale
from ritornello.lab.measure import Costs, Row, pick_rows, problems, row, values
from ritornello.lab.report import Outcome, Picture, Table, Verdict
from ritornello.lab.statistics import MIN_SEEDS
from ritornello.lab.tasks import build_task
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import Batch

TASK = "chains"
SIZES = {"n_nodes": 16, "n_chains": 4}
RATES = (3e-3, 1e-2, 3e-2)
DEPTHS = (4, 16)
STEPS, EVERY, LAST = 200, 50, 20
LOOPED = ("dense", "linear", "add", "no-injection", "article")
PLAIN = ("plain-depth", "plain-one-layer")
INJECTION = {
    "dense": "lti",
    "linear": "linear",
    "add": "add",
    "no-injection": "none",
}  # the arms that differ in nothing else
BEYOND = (8, 16, 32, 64)  # times the training depth
_ENDS = SIZES["n_chains"] / SIZES["n_nodes"]  # the share of questions that are about an end, which answers itself
_COPYING = -_ENDS * math.log(_ENDS) - (1 - _ENDS) * math.log((1 - _ENDS) / (SIZES["n_nodes"] - 1))
TRAINS_BELOW = 0.95 * _COPYING  # 2.59 nats: the node asked about, as often as it is right, and any other else


class Stability(Experiment):
    name = "stability"
    title = "Stability: who trains at high rates?"
    question = (
        "Does LTI injection train at learning rates and depths where other injections diverge or stop learning, and "
        "does its state stay bounded beyond training depth?"
    )
    prediction = (
        "With `lti` the loss stays finite at every learning rate, and the state within state_bound() at 64 times "
        "the training depth; with `add`, which forgets nothing, high rates and 16 loops do not train."
    )
    rules: ClassVar = {
        "stable": (
            f"A cell trains if loss and gradient stay finite and the mean loss of its last {LAST} steps is below "
            f"{TRAINS_BELOW:.2f} nats, .95 of what is lost without following an edge: by naming the node asked about "
            "as often as it is right, and any other else. A setting is a learning rate and a number of loops. "
            "Holds: in no setting does another injection train in every seed and lti not, and in some setting lti "
            "trains in every seed and `add` in fewer than half. Does not hold: somewhere another injection trains "
            "in every seed and lti in fewer than half. Not tested at this scale: every injection trains everywhere. "
            "Else, or under 3 seeds, inconclusive."
        ),
        "bounded": (
            "A check of the code more than of the claim, for with lti it follows from the equations, and the bound "
            "is wide. Holds: in every lti cell of one dense layer that trained, at 8 to 64 times the training depth, "
            "the largest state of any token is finite and at most state_bound(), and rho(A) < 1 at every "
            "measurement. Else it does not hold; under 3 seeds, or where nothing trained, inconclusive."
        ),
    }
    sources = (
        "Parcae 2604.12946 (plain residual looping diverges above 2e-4, LTI trains at 1e-3)",
        "Huginn 2502.05171 (two failed runs)",
    )
    budget: ClassVar = {"quick": "1 minute on 2 cores", "full": "about 40 core-minutes"}
    measured: ClassVar = {"steps": STEPS, "every": EVERY, "last": LAST, "learnt": TRAINS_BELOW, "beyond": BEYOND}
    notes = (
        "16 nodes in 4 chains, batches of 8, 200 steps at a fixed number of loops; all questions asked, none masked.",
        "What counts as training was chosen after a look at one other seed (experiments/LOG.md, entry 7), in which no "
        "loss was ever not finite; it says who learns soon, which need not be who stays stable in a long run.",
    )

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "quick":
            return [_cell(arm, rate, 8, 0) for arm in ("dense", "add") for rate in (3e-3, 1e-1)]
        arms_and_depths = [(arm, depth) for arm in (*LOOPED, *PLAIN) for depth in DEPTHS]
        arms_and_depths.remove(("plain-one-layer", DEPTHS[-1]))  # it has no depth to vary
        return [_cell(arm, rate, depth, seed) for seed in range(3) for arm, depth in arms_and_depths for rate in RATES]

    def run(self, cell: Cell, store: Path) -> list[Row]:
        """Nothing here is worth keeping but the measurements."""
        seen: list[tuple[int, dict[str, float]]] = []
        losses: list[float] = []
        found = train(cell, watch=_watcher(cell, seen), losses=losses)
        final = float(np.mean(losses[-LAST:])) if found.diverged is None else math.nan
        trains = final < TRAINS_BELOW
        loops, layers = (0, cell.model.n_prelude_layers) if cell.model.is_plain else (cell.train.max_loops, 0)
        setting = {
            "lr": cell.train.lr,
            "loops": loops,
            "depth": loops or layers,
            **Costs(found, cell.build_task()).at(loops),
        }
        add = lambda metric, value, **more: row(  # noqa: E731
            self.name, found, metric=metric, value=value, n=1, **setting, **more
        )
        rows = [add("trains", float(trains)), add("final_loss", final)]
        rows += [add(metric, value, step=step) for step, values in seen for metric, value in values.items()]
        return rows + [add(metric, value, times=times) for times, metric, value in _beyond(found, trains)]

    def judge(self, rows: Sequence[Row]) -> list[Verdict]:
        return [self._most_stable(rows), self._bounded(rows)] if pick_rows(rows, model="dense") else []

    def _most_stable(self, rows: Sequence[Row]) -> Verdict:
        share = shares(rows)
        others = [model for model in ("linear", "add", "no-injection") if any(key[0] == model for key in share)]
        every = {(rate, depth) for _, rate, depth in share}
        settings = sorted(at for at in every if all((model, *at) in share for model in ("dense", *others)))
        behind = [at for at in settings if any(share[other, *at] == 1 for other in others) and share["dense", *at] < 1]
        lost = [at for at in behind if share["dense", *at] < 0.5]
        ahead = [at for at in settings if share["dense", *at] == 1 and share.get(("add", *at), 1.0) < 0.5]
        outcome: Outcome = "inconclusive"
        if all(share[model, *at] == 1 for model in ("dense", *others) for at in settings):
            outcome = "not tested at this scale"
        elif lost:
            outcome = "does not hold"
        elif ahead and not behind:
            outcome = "holds"
        counted = {model: sum(share[model, *at] == 1 for at in settings) for model in ("dense", *others)}
        said = [f"{INJECTION[model]} trains in {n} of {len(settings)}" for model, n in counted.items()]
        said += [f"lti fails where another trains: {_settings(behind)}"] if behind else []
        said += [f"`add` fails where lti trains: {_settings(ahead)}"] if ahead else []
        return self._enough_seeds(
            rows,
            "stable",
            claim="LTI injection trains wherever another injection trains, and somewhere where `add` does not",
            outcome=outcome,
            evidence="; ".join(said),
            test="counts of (learning rate, loops) at which every seed trains",
        )

    def _bounded(self, rows: Sequence[Row]) -> Verdict:
        found = pick_rows(rows, model="dense", metric="state_over_bound")
        over = values(found)
        all_rho = pick_rows(rows, model="dense", metric="rho")
        rho = max(values(all_rho), default=math.nan) if None not in {row["value"] for row in all_rho} else math.inf
        control = values(rows, model="add", metric="state_over_bound")
        outcome: Outcome = (
            "holds" if len(over) == len(found) and max(over, default=0) <= 1 and rho < 1 else "does not hold"
        )
        said = f"largest state / bound {max(over, default=math.nan):.3g} over {len(over)} measurements"
        said += f", {len(found) - len(over)} more not finite" if len(found) > len(over) else ""
        said += f"; largest rho(A) {rho:.5f}"
        if control:
            lost = len(pick_rows(rows, model="add", metric="state_over_bound")) - len(control)
            said += f"; `add`, against the bound that lti has at its start, up to {max(control):.3g}"
            said += f" and {lost} times not finite" if lost else ""
        return self._enough_seeds(
            rows,
            "bounded",
            claim="LTI injection: the state stays within state_bound() far beyond training depth",
            outcome=outcome if found else "inconclusive",
            evidence=said,
            test=f"maximum over seeds, rates and {', '.join(map(str, BEYOND))} times the training depth",
        )

    def _enough_seeds(self, rows: Sequence[Row], rule: str, *, outcome: Outcome, **said: str) -> Verdict:
        seeds = len({row["seed"] for row in pick_rows(rows, model="dense")})
        return self.verdict(rule, rows, "dense", outcome=outcome if seeds >= MIN_SEEDS else "inconclusive", **said)

    def show(self, rows: Sequence[Row]) -> tuple[list[Table], list[Picture]]:
        return [_share_table(rows), _dynamics_table(rows)], [_loss_picture(rows), _gradient_picture(rows)]


def _cell(arm: str, rate: float, loops: int, seed: int) -> Cell:
    task = build_task(TASK, SIZES)
    schedule: dict[str, Any] = {"steps": STEPS, "batch_size": 8, "warmup_steps": 20, "lr": rate}
    plain = arms.ARMS[arm].role == "plain"
    if not plain:
        schedule |= {"depth": "fixed", "min_loops": 1, "max_loops": loops, "mean_loops": float(loops)}
    made = arms.cell(arm, task, seed=seed, masked=False, sizes=SIZES, **schedule)
    n_layers = loops if arm == "plain-depth" else 1
    model = replace(made.model, n_prelude_layers=n_layers) if plain else replace(made.model, n_loops=loops)
    return replace(made, model=model)


def _watcher(
    cell: Cell, seen: list[tuple[int, dict[str, float]]]
) -> Callable[[int, RecurrentDepthTransformer, Batch], None] | None:
    if cell.model.is_plain:
        return None

    def watch(step: int, model: RecurrentDepthTransformer, batch: Batch) -> None:
        if step == 1 or step % EVERY == 0:
            found = observe(model, batch, n_loops=cell.train.max_loops)
            by_loop = {f"gradient_{i + 1}": value for i, value in enumerate(found.gradient)}
            seen.append((step, {"rho": found.rho, "state": found.state, "radius": found.radius} | by_loop))

    return watch


def _beyond(found: Trained, trains: bool) -> Iterator[tuple[int, str, float]]:
    """The largest state against the bound; without one of its own, against the one lti starts with."""
    cell = found.cell
    if cell.model.is_plain or not trains:
        return
    loops = cell.train.max_loops
    bounded = cell.model.injection in ("lti", "linear")
    reference = found.model if bounded else build(replace(cell, model=replace(cell.model, injection="lti")))
    test = problems(cell.build_task(), 5, told=False, n=2)
    reached = largest_state(found.model, test, depths=tuple(loops * times for times in BEYOND))
    for times in BEYOND:
        yield times, "state_over_bound", reached[loops * times] / reference.state_bound(loops * times)


def _title(model: str) -> str:
    if model not in INJECTION:
        return arms.ARMS[model].title
    return f"{INJECTION[model]} injection".replace("none", "no")


def _settings(found: Sequence[tuple[float, int]]) -> str:
    return ", ".join(f"lr {rate:g} at {depth}" for rate, depth in found)


def shares(rows: Sequence[Row]) -> dict[tuple[str, float, int], float]:
    """{(model, learning rate, depth): share of seeds that train}; depth in loops, of a plain model in layers."""
    found: dict[tuple[str, float, int], list[float]] = {}
    for r in pick_rows(rows, metric="trains"):
        found.setdefault((r["model"], r["lr"], r["depth"]), []).append(r["value"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _models(rows: Sequence[Row]) -> list[str]:
    there = {row["model"] for row in rows}
    return [model for model in (*LOOPED, *PLAIN) if model in there]


def _share_table(rows: Sequence[Row]) -> Table:
    share = shares(rows)
    rates = sorted({rate for _, rate, _ in share})
    lines = []
    for model in _models(rows):
        for depth in sorted({at for name, _, at in share if name == model}):
            losses = [values(rows, model=model, depth=depth, lr=rate, metric="final_loss") for rate in rates]
            cells = (
                f"{share[model, rate, depth]:.0%}, {judging.shown(loss) if loss else 'not finite'}"
                if (model, rate, depth) in share
                else "–"
                for rate, loss in zip(rates, losses, strict=True)
            )
            lines.append((_title(model), str(depth), *cells))
    head = ("model", "loops or layers", *(f"lr {rate:g}" for rate in rates))
    return Table(
        title="Share of seeds that train, and their loss",
        head=head,
        rows=tuple(lines),
        note=f"mean loss of the last {LAST} steps",
    )


def _dynamics_table(rows: Sequence[Row]) -> Table:
    lines = []
    for model in _models(rows):
        for loops in sorted({r["loops"] for r in pick_rows(rows, model=model, metric="radius")}):
            for step in (1, STEPS):
                cells = []
                for metric in ("rho", "state", "radius"):
                    there = values(rows, model=model, loops=loops, step=step, metric=metric)
                    cells.append(f"{min(there):.3g} … {max(there):.3g}" if there else "–")
                lines.append((_title(model), str(loops), str(step), *cells))
    head = ("model", "loops", "step", "rho", "RMS(h) / RMS(e)", "loop Jacobian's spectral radius")
    note = "smallest and largest over learning rates and seeds, of those still finite"
    return Table(title="What the loop does", head=head, rows=tuple(lines), note=note)


def _loss_picture(rows: Sequence[Row]) -> Picture:
    share = shares(rows)
    loops = max(at for _, _, at in share)
    lines = []
    for model in _models(rows):
        rates = sorted({rate for name, rate, depth in share if name == model and depth == loops})
        if not rates:  # one layer has no depth, and of a part of the cells others may be missing
            continue
        losses = [values(rows, model=model, depth=loops, lr=rate, metric="final_loss") for rate in rates]
        mean = np.array([np.mean(found) if found else np.nan for found in losses])
        sd = np.array([np.std(found, ddof=1) if len(found) > 1 else np.nan for found in losses])
        lines.append(figures.Curve(label=_title(model), x=tuple(rates), mean=mean, sd=sd, kind=arms.ARMS[model].role))
    figure = figures.curves(
        lines,
        title=f"Loss after {STEPS} steps at {loops} loops or layers",
        xlabel="learning rate",
        ylabel="loss, nats",
        log_x=True,
    )
    caption = f"Mean loss of the last {LAST} steps by learning rate at {loops} loops or layers; missing: not finite."
    return Picture(name="loss-by-learning-rate", caption=caption, image=figures.png(figure))


def _gradient_picture(rows: Sequence[Row]) -> Picture:
    loops = max(row["loops"] for row in rows)
    rate = min(row["lr"] for row in rows)
    lines = []
    for model in _models(rows):
        if arms.ARMS[model].role == "plain":
            continue
        by_loop = [
            values(rows, model=model, loops=loops, lr=rate, step=STEPS, metric=f"gradient_{i + 1}")
            for i in range(loops)
        ]
        mean = np.array([np.mean(found) if found else np.nan for found in by_loop])
        lines.append(
            figures.Curve(
                label=_title(model),
                x=tuple(range(1, loops + 1)),
                mean=mean,
                sd=None,
                kind=arms.ARMS[model].role,
            )
        )
    figure = figures.curves(
        lines, title=f"Gradient by loop after {STEPS} steps", xlabel="loop", ylabel="‖∂loss/∂h‖", log_y=True
    )
    caption = f"Norm of the loss's gradient at the state after each loop, learning rate {rate:g}, mean over seeds."
    return Picture(name="gradient-by-loop", caption=caption, image=figures.png(figure))
