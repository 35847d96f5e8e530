"""Plots by matplotlib, an optional package, without its global state."""

import io
from pathlib import Path
from typing import Any

from gkd.storage.util.extras import require
from gkd.storage.util.files import disk_errors, write_file


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of ``width`` x ``height`` inches.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    module = require("matplotlib.figure", "plot")
    return module.Figure(figsize=(width, height), layout="constrained")


def style(settings: dict[str, Any]) -> Any:
    """A context manager that applies matplotlib's rc ``settings`` within its block.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    return require("matplotlib", "plot").rc_context(settings)


def write_png(figure: Any, out: Path, *, dpi: int = 120) -> None:
    """Draw a figure into a PNG file, whatever the file's name ends in.

    Raises:
        ConfigError: if ``out`` cannot be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    with disk_errors(out):
        write_file(out, image.getvalue())


def svg(figure: Any) -> bytes:
    """A figure as SVG, without date and creator: the same figure gives the same bytes."""
    image = io.BytesIO()
    figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()
