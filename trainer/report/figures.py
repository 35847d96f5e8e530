"""Figures of a run's report, as data URLs of SVG; needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gkd.storage.analysis.stats import draw_group_sizes
from gkd.storage.util import plotting
from gkd.storage.util.html import data_url

MAX_POINTS = 400  # of a curve
COLOURS = ["#1f5fa8", "#c2571a", "#3c7d3c", "#7a4a9e", "#a8323e", "#5c5c5c"]
STYLE = {
    "svg.hashsalt": "gkd",  # the same run gives the same bytes
    "font.size": 9,
    "axes.prop_cycle": f"cycler(color={COLOURS})",
    "axes.edgecolor": "#8a8f98",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "patch.linewidth": 1.3,
}

Curve = tuple[Sequence[float], Sequence[float]]


def draw_curves(curves: Mapping[str, Curve], xlabel: str) -> str:
    """A small panel for each curve (x, y), three in a row."""
    rows = -(-len(curves) // 3)
    with plotting.style(STYLE):
        figure = plotting.new_figure(9, 2.1 * rows)
        panels = figure.subplots(rows, 3, squeeze=False).ravel()
        for panel, (name, (x, y)) in zip(panels, curves.items(), strict=False):
            panel.plot(*_averaged(x, y))
            panel.set(title=_label(name), xlabel=xlabel)
            panel.set_ylim(bottom=0)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        return _svg(figure)


def draw_lines(curves: Mapping[str, Curve], xlabel: str, ylabel: str) -> str:
    """All curves (x, y) in one panel, each point marked."""
    with plotting.style(STYLE):
        figure, axes = _panel()
        for name, (x, y) in curves.items():
            axes.plot(*_averaged(x, y), "o-", markersize=3, label=_label(name))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend()
        return _svg(figure)


def draw_roc(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """(FAR, TAR) points of each set, FAR on a logarithmic scale."""
    with plotting.style(STYLE):
        figure, axes = _panel()
        for name, points in curves.items():
            far, tar = zip(*points, strict=True) if points else ((), ())
            axes.step(far, tar, where="post", label=_label(name))
        axes.set(xscale="log", ylim=(0, 1.01))
        axes.set(xlabel="false accept rate", ylabel="true accept rate")
        axes.legend(loc="lower right")
        return _svg(figure)


def draw_sizes(views: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    """Samples by group size, (size, samples) of each view, in logarithmic bins."""
    with plotting.style(STYLE):
        figure, axes = _panel()
        draw_group_sizes(axes, {_label(name): counts for name, counts in views.items()})
        return _svg(figure)


def _panel() -> tuple[Any, Any]:
    figure = plotting.new_figure(6, 3.2)
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    return data_url("image/svg+xml", plotting.svg(figure))


def _averaged(x: Sequence[float], y: Sequence[float]) -> list[list[float]]:
    """At most ``MAX_POINTS`` points, each the mean of consecutive ones."""
    if not len(x):
        return [[], []]
    parts = min(len(x), MAX_POINTS)
    return [
        [float(part.mean()) for part in np.array_split(np.asarray(values, float), parts)]
        for values in (x, y)
    ]


def _label(name: str) -> str:
    """A name from data as a label: dollars start no formula, and the font has every letter."""
    shown = "".join(letter if " " <= letter <= "~" else "?" for letter in name[:60])
    return " " * shown.startswith("_") + shown.replace("$", r"\$")
