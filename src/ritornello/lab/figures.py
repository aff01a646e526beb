"""What experiments draw: accuracy by hops and loops, and curves with their spread."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any, Required, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from ritornello.config import require, require_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = NDArray[np.floating[Any]]
# Okabe and Ito's colours without the yellow. Dashes and filling say the kind, the marker which curve: it reads in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
KINDS = {"looped": ("-", True), "plain": ("--", False), "ablation": (":", True)}  # dashes, filled marker
FEW_CELLS = 24  # so many have room for their values
FEW_TICKS = 8  # so many places are all named on a logarithmic axis
MAX_BELOW = 6  # curves whose legend has room below the axes
# Inches: a panel, the room around it, and the widest row of panels that stays legible when scaled to a page.
HEIGHT, LEFT, GAP, TOP, BOTTOM, BAR, WIDEST = 2.7, 0.6, 0.45, 0.75, 0.55, 0.9, 11.5


@dataclass(frozen=True, kw_only=True, eq=False)
class HeatMap:
    """Accuracies `mean` (hops, loops) in [0, 1], NaN where not measured; loops = () is a plain model, one column."""

    title: str
    note: str
    hops: tuple[int, ...]
    loops: tuple[int, ...]
    mean: Numbers
    sd: Numbers | None

    def __post_init__(self) -> None:
        _require_shapes(self.mean, self.sd, (len(self.hops), len(self.loops) or 1))
        outside = self.mean[(self.mean < 0) | (self.mean > 1)]
        require(outside.size == 0, "mean", outside[:3].tolist(), "in [0, 1], or NaN where not measured")
        for name, axis in (("hops", self.hops), ("loops", self.loops)):
            require(all(a < b for a, b in pairwise(axis)), name, axis, "increasing")

    @property
    def width(self) -> float:
        """In inches."""
        return 0.2 * min(max(len(self.loops), 7), 24)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Values `mean` (n,) at `x`, `sd` (n,) over seeds; `kind` is a key of KINDS."""

    label: str
    x: tuple[float, ...]
    mean: Numbers
    sd: Numbers | None
    kind: str = "looped"

    def __post_init__(self) -> None:
        _require_shapes(self.mean, self.sd, (len(self.x),))
        require_choice("kind", self.kind, tuple(KINDS))


def _require_shapes(mean: Numbers, sd: Numbers | None, shape: tuple[int, ...]) -> None:
    require(mean.size > 0 and mean.shape == shape, "mean.shape", mean.shape, f"{shape}, as the axes say, and not empty")
    require(sd is None or sd.shape == shape, "sd.shape", getattr(sd, "shape", None), f"{shape}, or sd None")


def heat_maps(maps: Sequence[HeatMap], *, train_hops: int, train_loops: int, title: str) -> "Figure":
    """One panel each, in their order; a box around the hops and loops of training."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    require(len(maps) > 0, "maps", maps, "at least one")
    rows, mesh, y = _fill_rows(maps), None, 0.0
    width = max(sum(panel.width + GAP for panel in row) for row in rows) + LEFT - GAP + BAR
    width = max(width, 0.3 + 0.09 * len(title))
    height = len(rows) * (HEIGHT + TOP + BOTTOM) + 0.6
    figure = Figure(figsize=(width, height))
    place = lambda x, y, w: figure.add_axes((x / width, y / height, w / width, HEIGHT / height))  # noqa: E731
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=12, va="top")
    for i, row in enumerate(rows):
        x, y = LEFT, height - 0.3 - TOP - HEIGHT - i * (HEIGHT + TOP + BOTTOM)
        for panel in row:
            mesh = _draw_map(axes := place(x, y, panel.width), panel)
            _draw_box(axes, panel, train_hops, train_loops)
            axes.set_ylabel("hops" if panel is row[0] else "")
            x += panel.width + GAP
    assert mesh is not None
    figure.colorbar(mesh, cax=place(width - BAR + 0.2, y, 0.15)).set_label("accuracy")
    key = [Patch(fc="white", ec="black", lw=1.5, label="hops and loops of training")]
    if any(np.isnan(panel.mean).any() for panel in maps):
        key.append(Patch(fc="white", ec="0.6", hatch="////", label="not measured"))
    figure.legend(handles=key, loc="lower left", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _fill_rows(maps: Sequence[HeatMap]) -> list[list[HeatMap]]:
    rows: list[list[HeatMap]] = [[]]
    for panel in maps:
        if rows[-1] and sum(other.width + GAP for other in (*rows[-1], panel)) + BAR > WIDEST:
            rows.append([])
        rows[-1].append(panel)
    return rows


def _draw_map(axes: "Axes", panel: HeatMap) -> Any:
    n_hops, n_loops = panel.mean.shape
    few, sd = panel.mean.size <= FEW_CELLS, panel.sd if panel.sd is not None and np.isfinite(panel.sd).any() else None
    mesh = axes.pcolormesh(np.ma.masked_invalid(panel.mean), vmin=0, vmax=1, cmap="viridis", ec="white", lw=0.3)
    axes.patch.set(hatch="////", facecolor="white", edgecolor="0.6")
    every = -(-n_loops // 24)
    names = [str(n) for n in panel.loops[::every]]
    axes.set_xticks(np.arange(0, n_loops, every) + 0.5, names or ["no loops"], fontsize=7.5)
    axes.set_yticks(np.arange(n_hops) + 0.5, [str(k) for k in panel.hops], fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_xlabel("loops" if panel.loops else "")
    spread = "" if few or sd is None else f", sd up to {np.nanmax(sd):.2f}"
    note = _wrap(panel.note + spread, panel.width / 0.062)
    at = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(note, (0, 1), xytext=(0, 4), **at, fontsize=7.5, color="0.3")
    pad = 5 + 10 * (1 + note.count("\n"))
    axes.set_title(_wrap(panel.title, panel.width / 0.072), loc="left", fontsize=9, pad=pad)
    for i, j in np.argwhere(np.isfinite(panel.mean)) if few else ():
        color = "white" if panel.mean[i, j] < 0.6 else "black"
        said = f"{panel.mean[i, j]:.2f}" + ("" if sd is None or panel.loops else f" ± {sd[i, j]:.2f}")
        axes.text(j + 0.5, i + 0.5, said, ha="center", va="center", fontsize=7, color=color)
    return mesh


def _wrap(text: str, width: float) -> str:
    """Lines of `width` characters that part no number from its unit."""
    return fill(re.sub(r"(?<=[\d×]) (?=\S)", "\u00a0", text), int(width))


def _draw_box(axes: "Axes", panel: HeatMap, train_hops: int, train_loops: int) -> None:
    from matplotlib.patches import Rectangle

    n_hops = sum(k <= train_hops for k in panel.hops)
    n_loops = sum(n <= train_loops for n in panel.loops) if panel.loops else 1
    for color, width in (("black", 3.6), ("white", 1.6)) if n_hops and n_loops else ():  # one shows on any colour
        axes.add_patch(Rectangle((0, 0), n_loops, n_hops, fill=False, ec=color, lw=width, clip_on=False, zorder=3))


class Look(TypedDict, total=False):
    """What is said around a chart; `vertical` names dashed lines at its keys."""

    title: Required[str]
    xlabel: Required[str]
    ylabel: Required[str]
    vertical: Mapping[float, str]
    chance: Mapping[int, float]  # what guessing gets, by x
    log_x: bool
    log_y: bool
    ylim: tuple[float, float] | None


def curves(lines: Sequence[Curve], **look: Unpack[Look]) -> "Figure":
    """Means with bands of one sd."""

    def draw(axes: "Axes", line: Curve, style: dict[str, Any]) -> None:
        axes.plot(line.x, line.mean, label=line.label, ms=5, lw=1.6, **style)
        if line.sd is not None:
            axes.fill_between(line.x, line.mean - line.sd, line.mean + line.sd, color=style["color"], alpha=0.15, lw=0)

    return _chart(lines, draw, look)


def _chart(lines: Sequence[Curve], draw: "Callable[[Axes, Curve, dict[str, Any]], None]", look: Look) -> "Figure":
    from matplotlib.figure import Figure

    require(len(lines) > 0, "lines", lines, "at least one")
    beside = len(lines) > MAX_BELOW
    figure = Figure(figsize=(10, 4.5) if beside else (7.5, 5), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(lines):
        color, (dashes, filled) = COLORS[i % len(COLORS)], KINDS[line.kind]
        marker = {"marker": MARKERS[i % len(MARKERS)], "mfc": color if filled else "white"}
        draw(axes, line, {"color": color, "ls": dashes, **marker})
    if chance := look.get("chance"):
        axes.plot(list(chance), list(chance.values()), color="0.5", ls=(0, (1, 2)), lw=1.2, label="guessing")
    vertical = look.get("vertical", {})
    for i, (x, name) in enumerate(vertical.items()):
        axes.axvline(x, color="0.4", ls=(0, (6, 4)), lw=1)
        at = {"xytext": (0, 3 + 10 * (i % 2)), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
        axes.annotate(name, (x, 1), **at, ha="center", fontsize=8, color="0.3")
    _scale(axes, sorted({x for line in lines for x in line.x}), look.get("log_x", False), look.get("log_y", False))
    axes.set(xlabel=look["xlabel"], ylabel=look["ylabel"], ylim=look.get("ylim") or axes.get_ylim())
    axes.set_title(look["title"], loc="left", fontsize=11, pad=6 + 10 * min(len(vertical), 2))
    axes.grid(color="0.92", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    place: Any = "outside right upper" if beside else "outside lower center"
    figure.legend(loc=place, ncols=1 if beside else 2, frameon=False, fontsize=8.5)
    return figure


def _scale(axes: "Axes", places: Sequence[float], log_x: bool, log_y: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    if log_x:
        axes.set_xscale("log", base=2 if places[-1] <= 1 << 16 else 10)  # loops and hops by doubling, FLOPs by tens
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if len(ticks := sorted(set(places))) <= FEW_TICKS:
            axes.set_xticks(ticks)
    elif all(float(x).is_integer() for x in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if log_y:
        axes.set_yscale("log")


def png(figure: "Figure", *, dpi: int = 150) -> bytes:
    """The figure as a file: the same bytes for the same figure."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()
