import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ritornello.lab.figures import KINDS, Curve, HeatMap, curves, heat_maps, png

HOPS = (1, 2, 5, 10)
X = (1.0, 2.0, 4.0)


def heat_map(loops: tuple[int, ...] = (1, 4, 8, 16), **changes: Any) -> HeatMap:
    mean = np.linspace(0, 1, len(HOPS) * (len(loops) or 1)).reshape(len(HOPS), -1)
    settings = {"title": "looped", "note": "1k parameters", "hops": HOPS, "loops": loops, "mean": mean, "sd": mean / 9}
    return HeatMap(**settings | changes)


def curve(label: str = "looped", **changes: Any) -> Curve:
    return Curve(**{"label": label, "x": X, "mean": np.array([0.2, 0.5, 0.9]), "sd": np.full(3, 0.1)} | changes)


def draw_maps(*maps: HeatMap) -> Any:
    return heat_maps(maps, train_hops=5, train_loops=8, title="Accuracy")


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    figure.draw_without_rendering()  # ticks have no text before
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def boxes(figure: Any) -> set[tuple[float, float]]:
    """Width and height of what is drawn around cells, in cells."""
    return {
        (p.get_width(), p.get_height()) for p in figure.findobj() if type(p).__name__ == "Rectangle" and p.zorder == 3
    }


MAPS = {
    "looped": heat_map(),
    "plain": heat_map(()),
    "one seed": heat_map(sd=None),
    "some missing": heat_map(mean=np.where(np.eye(4) > 0, np.nan, 0.5)),
    "all missing": heat_map(mean=np.full((4, 4), np.nan), sd=np.full((4, 4), np.nan)),
    "large": heat_map(tuple(range(1, 65)), sd=None),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_drawn_without_a_warning(name: str) -> None:
    image = png(draw_maps(MAPS[name], heat_map(())), dpi=40)
    assert image.startswith(b"\x89PNG")
    assert image == png(draw_maps(MAPS[name], heat_map(())), dpi=40)
    assert image != png(draw_maps(heat_map(mean=np.zeros((4, 4))), heat_map(())), dpi=40)  # control


def test_maps_share_one_bar_and_mark_the_training_region() -> None:
    figure = draw_maps(heat_map(), heat_map(()), heat_map())
    assert len(figure.axes) == 4
    assert texts(figure).count("accuracy") == texts(figure).count("hops and loops of training") == 1
    assert boxes(figure) == {(3, 3), (1, 3)}
    assert boxes(heat_maps([heat_map()], train_hops=5, train_loops=16, title="")) == {(4, 3)}  # control
    assert boxes(heat_maps([heat_map()], train_hops=0, train_loops=8, title="")) == set()


def test_values_and_what_is_missing_are_said() -> None:
    plain = texts(draw_maps(heat_map(())))
    assert {"no loops", "0.33 ± 0.04", "1.00 ± 0.11"} <= set(plain)
    assert "not measured" not in plain
    assert "not measured" in texts(draw_maps(MAPS["some missing"]))
    assert any("sd up to 0.11" in text for text in texts(draw_maps(heat_map(tuple(range(1, 13))))))


def test_many_maps_fill_rows_of_a_page() -> None:
    assert draw_maps(*[heat_map(tuple(range(12)))] * 9).get_figwidth() < 12
    assert draw_maps(*[heat_map()] * 2).get_figheight() < draw_maps(*[heat_map()] * 9).get_figheight()


@pytest.mark.parametrize("n", [1, 6, 7, 20])
def test_curves_are_drawn_without_a_warning(n: int) -> None:
    kinds = list(KINDS)
    lines = [curve(f"{i}", kind=kinds[i % 3], sd=None if i % 2 else np.full(3, 0.3)) for i in range(n)]
    look: Any = {
        "title": "Accuracy",
        "xlabel": "loops",
        "ylabel": "accuracy",
        "chance": {1: 0.125, 2: 0.2},
        "ylim": (0, 1.02),
    }
    figure = curves(lines, **look, vertical={2: "training", 4: "claim"}, log_x=True)
    assert png(figure, dpi=40)
    assert {"training", "claim", "guessing", *map(str, range(n))} <= set(texts(figure))
    beside = figure.legends[0].get_window_extent().x0 > figure.axes[0].get_window_extent().x1
    assert beside == (n > 6)


def test_curves_with_gaps_and_bands_below_a_log_scale() -> None:
    lines = [curve(mean=np.array([0.2, np.nan, 0.01])), curve(x=(1e12, 1e13, 1e15))]
    assert png(curves(lines, title="", xlabel="FLOPs", ylabel="loss", log_x=True, log_y=True), dpi=40)


def test_curves_differ_without_colour() -> None:
    """By dashes, marker and filling."""
    lines = [curve(f"{i}", kind=kind) for i, kind in enumerate([*KINDS] * 4)]
    drawn = curves(lines, title="", xlabel="", ylabel="").axes[0].lines
    styles = {(line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white") for line in drawn}
    assert len(styles) == len(lines)
    assert len({line.get_color() for line in drawn}) < len(lines)  # control: colour alone does not tell


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heat_map(mean=np.zeros((4, 3))), r"mean\.shape = \(4, 3\)"),
        (lambda: heat_map((), mean=np.zeros(4)), r"mean\.shape"),
        (lambda: heat_map(sd=np.zeros((3, 4))), r"sd\.shape"),
        (lambda: heat_map(mean=np.full((4, 4), 1.5)), r"mean = .*\[0, 1\]"),
        (lambda: heat_map(hops=(2, 1, 5, 10)), "hops"),
        (lambda: heat_map((1, 8, 4, 16)), "loops"),
        (lambda: curve(mean=np.zeros(2)), r"mean\.shape"),
        (lambda: curve(sd=np.zeros(4)), r"sd\.shape"),
        (lambda: curve(x=(), mean=np.zeros(0), sd=None), r"mean\.shape"),
        (lambda: curve(kind="loop"), "did you mean 'looped'"),
        (lambda: draw_maps(), "maps"),
        (lambda: curves([], title="", xlabel="", ylabel=""), "lines"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_is_cheap() -> None:
    modules = "ritornello.lab.figures, ritornello.lab.report"
    code = f"import sys, {modules}; print({{'matplotlib', 'jinja2'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    draw_maps(heat_map())
    assert "matplotlib" in sys.modules  # control
