"""Figures of a run's report, as SVG; needs matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gkd.storage.util.extras import require

# Points of a curve: more are averaged in pieces.
POINTS = 400
COLOURS = ("#1f5fa8", "#c2571a", "#3c7d3c", "#7a4a9e", "#a8323e", "#5c5c5c")
STYLE = {
    "svg.hashsalt": "gkd",  # the same run, the same bytes
    "font.size": 9,
    "axes.edgecolor": "#8a8f98",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.3,
}

Curve = tuple[Sequence[float], Sequence[float]]


def draw_curves(curves: Mapping[str, Curve], xlabel: str) -> bytes:
    """One small panel a curve, (x, y) each, three beside each other."""
    figure_module = require("matplotlib.figure", "plot")
    rows = -(-len(curves) // 3)
    with _style():
        figure = figure_module.Figure(figsize=(9, 2.1 * rows), layout="constrained")
        panels = figure.subplots(rows, 3, squeeze=False).ravel()
        for panel, (name, (x, y)) in zip(panels, curves.items(), strict=False):
            panel.plot(*_thin(x, y), color=COLOURS[0])
            panel.set(title=_plain(name), xlabel=xlabel)
            panel.set_ylim(bottom=0)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        return _svg(figure)


def draw_lines(curves: Mapping[str, Curve], xlabel: str, ylabel: str) -> bytes:
    """All curves in one panel, each point marked."""
    with _style():
        figure, axes = _panel()
        for number, (name, (x, y)) in enumerate(curves.items()):
            axes.plot(*_thin(x, y), "o-", markersize=3, color=_colour(number), label=_plain(name))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(frameon=False)
        return _svg(figure)


def draw_roc(curves: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """(FAR, TAR) points of each set, FAR in logarithmic scale."""
    with _style():
        figure, axes = _panel()
        for number, (name, points) in enumerate(curves.items()):
            far, tar = zip(*points, strict=True) if points else ((), ())
            axes.step(far, tar, where="post", color=_colour(number), label=_plain(name))
        axes.set(xscale="log", ylim=(0, 1.01), xlabel="false accept rate")
        axes.set(ylabel="true accept rate")
        axes.legend(frameon=False, loc="lower right")
        return _svg(figure)


def draw_sizes(views: Mapping[str, Sequence[tuple[int, int]]]) -> bytes:
    """Samples by group size, (size, samples) of each view, in logarithmic bins."""
    with _style():
        figure, axes = _panel()
        largest = max((size for sizes in views.values() for size, _ in sizes), default=1)
        bins = np.unique(np.geomspace(1, max(largest, 2), 40).round()) - 0.5
        for number, (name, counts) in enumerate(views.items()):
            sizes, samples = zip(*counts, strict=True) if counts else ((), ())
            axes.hist(
                sizes,
                [*bins, largest + 0.5],
                weights=samples,
                histtype="step",
                linewidth=1.3,
                color=_colour(number),
                label=_plain(name),
            )
        axes.set(xscale="log", xlabel="classes in the primary group", ylabel="samples")
        powers = [1 << power for power in range(largest.bit_length())]
        axes.set_xticks(powers, [f"{size:,}" for size in powers], rotation=45 * (len(powers) > 9))
        axes.minorticks_off()
        axes.legend(frameon=False)
        return _svg(figure)


def _style() -> Any:
    return require("matplotlib", "plot").rc_context(STYLE)


def _panel() -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "plot").Figure(figsize=(6, 3.2), layout="constrained")
    return figure, figure.add_subplot()


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _svg(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``POINTS`` points, each the mean of a piece."""
    pieces = min(len(x), POINTS)
    if pieces == 0:
        return [], []
    return (
        [float(part.mean()) for part in np.array_split(np.asarray(x, float), pieces)],
        [float(part.mean()) for part in np.array_split(np.asarray(y, float), pieces)],
    )


def _plain(name: str) -> str:
    """A stranger's name as a label: dollars begin no formula, a font lacks no letter."""
    shown = "".join(letter if " " <= letter <= "~" else "?" for letter in name[:60])
    return " " * shown.startswith("_") + shown.replace("$", r"\$")
