"""Files that torch saved, read without running their code."""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from gkd.storage.errors import ConfigError

ZIP_START = b"PK\x03\x04"


def read_torch_file(path: Path) -> Any:
    """Content of a ``.pt`` or ``.pth`` on the CPU: tensors and builtins only.

    Raises:
        ConfigError: for a file that is damaged, or would run code.
        OSError: for a file that the system does not open.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than 2, and then reads or refuses them.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged and hostile bytes make torch raise nearly anything, an OSError without a name too.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ConfigError(
            f"{path}: cannot be read as weights: expected a file that torch.save wrote, of "
            f"tensors only and none that would run code, got {_described(path, error)}; "
            "get it again, or save the network's state_dict() alone"
        ) from error


def _described(path: Path, error: Exception) -> str:
    """What a file that torch refused is; torch's own words advise to run its code."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return f"one that names {named[1]}"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    if zipfile.is_zipfile(path):
        return "another zip archive, or a damaged one"
    if start == ZIP_START:
        return f"one that is cut off after {size:,} bytes"
    return f"{size:,} bytes starting {start.hex() or 'nowhere'}"
