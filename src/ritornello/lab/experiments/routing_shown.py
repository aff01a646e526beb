"""What the routing experiment reads from its rows: how experts change, what they tell; its tables and pictures."""

from collections.abc import Sequence

import numpy as np

from ritornello.lab import arms, figures, judging
from ritornello.lab.experiments.accuracies import TEST_LOOPS, Accuracies
from ritornello.lab.measure import Row, pick_rows, values
from ritornello.lab.report import Picture, Table
from ritornello.lab.routes import FORCED
from ritornello.lab.statistics import spread

SHALLOW, DEEP = 5, 20  # problems as deep as training's, and as deep as the test's
N_OFFSETS = 4  # so many hops, from 0, a walk may be ahead of its loops
OVERLAPS = ("overlap_two_loops", "overlap_two_tokens")


def change(rows: Sequence[Row], arm: str, metric: str, *, hops: int = SHALLOW, of: str = "trained") -> list[float]:
    """By seed: how different the experts are, as a share of how different those of two tokens are."""
    same, apart = (
        np.array(values(rows, model=arm, of=of, hops=hops, metric=name)) for name in (metric, "overlap_two_tokens")
    )
    return ((1 - same) / (1 - apart)).tolist()


def about_nodes(rows: Sequence[Row], arm: str, *, of: str = "trained") -> np.ndarray:
    """(seeds, loops, hops on): bits"""
    found = pick_rows(rows, model=arm, of=of, hops=DEEP, metric="bits_node")
    n_loops, n_nodes = (len({row[name] for row in found}) for name in ("loops", "ahead"))
    return np.array([row["value"] for row in found]).reshape(-1, n_loops, n_nodes)


def follows(bits: np.ndarray, ahead: int | None = None) -> tuple[int, list[float]]:
    """How many hops the walk is ahead of its loops, by the most bits, if not given; and by seed how many more bits
    there are about that node than about the better of its neighbours, a mean over loops (1, 2 …)."""
    loops = np.arange(bits.shape[1])
    at = lambda a: bits[:, loops, loops + 1 + a]  # noqa: E731
    best = max(range(N_OFFSETS), key=lambda a: at(a).mean()) if ahead is None else ahead
    near = [at(a) for a in (best - 1, best + 1)]
    return best, (at(best) - np.max(near, axis=0)).mean(-1).tolist()


def region(found: Accuracies, training: bool) -> tuple[tuple[int, ...], int, str]:
    if training:
        return found.training, arms.MAX_LOOPS, "training hops"
    return found.beyond, TEST_LOOPS, "hops beyond"


def forced_means(rows: Sequence[Row], how: str, hops: Sequence[int], loops: int, arm: str) -> list[float]:
    """By seed, over several numbers of hops."""
    return np.mean([values(rows, model=arm, metric=f"accuracy_{how}", hops=k, loops=loops) for k in hops], 0).tolist()


def _cells(rows: Sequence[Row], arm: str, of: str, hops: int, metrics: Sequence[str]) -> list[str]:
    """mean ± sd over seeds of each metric, a mean over loops where it has several"""
    found = []
    for metric in metrics:
        there = values(rows, model=arm, of=of, hops=hops, metric=metric)
        n_seeds = len({row["seed"] for row in pick_rows(rows, model=arm, of=of)})
        found.append(judging.shown(np.reshape(there, (n_seeds, -1)).mean(-1).tolist()))
    return found


def _lines(rows: Sequence[Row], routed: Sequence[str], metrics: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (arms.ARMS[arm].title, of, str(hops), *_cells(rows, arm, of, hops, metrics))
        for arm in routed
        for of in ("trained", "untrained")
        for hops in (SHALLOW, DEEP)
    )


def change_table(rows: Sequence[Row], routed: Sequence[str]) -> Table:
    metrics = ("overlap_next", "overlap_first", *OVERLAPS, "overlap_elsewhere", "overlap_moving", "overlap_arrived")
    return Table(
        title="How a token's experts overlap",
        head=(
            "model",
            "",
            "hops",
            "next loop",
            "first and later",
            "any two loops",
            "two tokens",
            "told another loop",
            "next, hops left",
            "next, none left",
        ),
        rows=_lines(rows, routed, metrics),
        note=f"Jaccard overlap over training's {arms.MAX_LOOPS} loops, 1: the same experts; mean ± sd over seeds",
    )


def information_table(rows: Sequence[Row], routed: Sequence[str]) -> Table:
    lines = []
    for arm in routed:
        for of in ("trained", "untrained"):
            bits = about_nodes(rows, arm, of=of)
            ahead, loops = follows(about_nodes(rows, arm))[0], np.arange(bits.shape[1])
            there = bits[:, loops, loops + 1 + ahead].mean(-1).tolist()
            cells = _cells(rows, arm, of, DEEP, ("bits_loop", "bits_role", "bits_left"))
            own = judging.shown(bits[:, :, 0].mean(-1).tolist())
            lines.append((arms.ARMS[arm].title, of, *cells, own, judging.shown(there), f"t + {ahead}"))
    return Table(
        title="What an expert tells, in bits",
        head=("model", "", "the loop", "the role", "hops left", "the node asked about", "the node reached", "reached"),
        rows=tuple(lines),
        note=f"on problems of {DEEP} hops, beyond shuffled labels, given the loop but for the first column; in loop t, "
        "the node so many hops on as the trained model tells most of; mean ± sd over seeds",
    )


def load_table(rows: Sequence[Row], routed: Sequence[str]) -> Table:
    metrics = ("load_least", "load_most", "load_cv", "load_cv_loop", "entropy", "dead")
    head = ("model", "", "hops", "least", "most", "CV", "CV within a loop", "bits within a loop", "never taken")
    note = f"tokens an expert gets, as a multiple of an equal share; even load is {np.log2(16):.0f} bits"
    return Table(title="Load", head=head, rows=_lines(rows, routed, metrics), note=note)


def forced_table(found: Accuracies, rows: Sequence[Row], routed: Sequence[str]) -> Table:
    lines = []
    for arm in routed:
        for training in (True, False):
            hops, loops, name = region(found, training)
            cells = [judging.shown(forced_means(rows, how, hops, loops, arm)) for how in FORCED]
            lines.append((arms.ARMS[arm].title, name, judging.shown(found.means(arm, hops, loops)), *cells))
    head = ("model", "on the", "the router's", "the first loop's", "another token's")
    note = f"training hops at {arms.MAX_LOOPS} loops, those beyond at {TEST_LOOPS}; mean ± sd over seeds"
    return Table(title="Accuracy with other experts than the router's", head=head, rows=tuple(lines), note=note)


def overlap_picture(rows: Sequence[Row], routed: Sequence[str]) -> Picture:
    lines = []
    loops = tuple(range(2, arms.MAX_LOOPS + 1))
    for arm in (routed[0], routed[-1]) if len(routed) > 1 else routed:
        for hops in (SHALLOW, DEEP):
            for of in ("trained", "untrained") if arm == routed[0] else ("trained",):
                pick = {"model": arm, "of": of, "hops": hops, "metric": "overlap_next"}
                by_seed = np.array([values(rows, loops=loop, **pick) for loop in loops])
                label = f"{arms.ARMS[arm].title}, {hops} hops" + ("" if of == "trained" else ", untrained")
                kind = "plain" if of == "untrained" else arms.ARMS[arm].role
                lines.append(figures.Curve(label=label, x=loops, mean=by_seed.mean(-1), sd=spread(by_seed), kind=kind))
    apart = float(np.mean(values(rows, of="trained", metric="overlap_two_tokens")))
    figure = figures.curves(
        lines,
        title="A token's experts in each loop and in the one before",
        xlabel="loop",
        ylabel="overlap",
        chance=dict.fromkeys(loops, apart),
        ylim=(0, 1.02),
    )
    caption = (
        "Mean overlap of a token's experts in each loop with those of the loop before, in problems of so many hops; "
        "guessing: of two different tokens."
    )
    return Picture(name="overlap-by-loop", caption=caption, image=figures.png(figure))


def walk_picture(rows: Sequence[Row], arm: str) -> Picture:
    bits, untrained = (about_nodes(rows, arm, of=of) for of in ("trained", "untrained"))
    x = tuple(range(bits.shape[2]))
    by_seed = {f"loop {i + 1}": (bits[:, i].T, "looped") for i in (0, 1, 3, bits.shape[1] - 1)}
    by_seed["loop 4, untrained"] = (untrained[:, 3].T, "plain")
    lines = [
        figures.Curve(label=label, x=x, mean=found.mean(-1), sd=spread(found), kind=kind)
        for label, (found, kind) in by_seed.items()
    ]
    figure = figures.curves(
        lines, title=f"What experts tell of the nodes ahead: {arms.ARMS[arm].title}", xlabel="hops on", ylabel="bits"
    )
    caption = f"Information of a question's expert about the node so many hops on, in problems of {DEEP} hops."
    return Picture(name="bits-by-hops-on", caption=caption, image=figures.png(figure))
