"""Figures as PNG files."""

import io
from pathlib import Path
from typing import Any

from gkd.storage.util import atomic
from gkd.storage.util.disk import disk_errors


def write_png(figure: Any, out: Path, *, dpi: int = 120) -> None:
    """Draw a figure of matplotlib into a PNG file, whatever the file's name ends in.

    Raises:
        ConfigError: where ``out`` cannot be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    with disk_errors(out):
        atomic.write_file(out, image.getvalue())
