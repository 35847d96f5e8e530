"""Files that torch saved, read without running their code.

The rest of storage needs no torch, so it is imported where a file is read.
"""

import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

from gkd.storage.errors import ConfigError

ZIP_START = b"PK\x03\x04"
# What training codes keep beside tensors (parsed options, Lightning's callbacks, a best accuracy as
# numpy's number): nothing of it is needed, so an inert object stands for each, and nothing of these
# packages is imported.
SETTINGS = re.compile(
    r"argparse\.Namespace|(pytorch_lightning|lightning|lightning_fabric)\..+"
    r"|numpy\.dtype|numpy\.(_core|core)\.multiarray\.scalar"
)


class Inert:
    """Stands for an object of a training code's settings; its code is not run."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_torch_file(
    path: Path,
    *,
    what: str = "weights",
    remedy: str = "get it again, or save the network's state_dict() alone",
) -> Any:
    """Content of a ``.pt`` or ``.pth`` on the CPU: tensors and builtins, and ``Inert`` settings.

    ``what`` the file should hold and the ``remedy``, what to do, are words for messages.

    Raises:
        ConfigError: for a file that is damaged, or would run code.
        OSError: for a file that the system does not open.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than 2, and then reads or refuses them.
            warnings.simplefilter("ignore", UserWarning)
            content = _load(path)
    # Damaged and hostile bytes make torch raise nearly anything, an OSError without a name too.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ConfigError(
            f"{path}: cannot be read as {what}: expected a file that torch.save wrote, of "
            f"tensors only and none that would run code, got {_described(path, error)}"
            + (f"; {remedy}" if remedy else "")
        ) from error
    damaged = _damaged_part(path)
    if damaged:
        raise ConfigError(
            f"{path}: its bytes are not those that were written: the checksum of {damaged} does "
            "not fit" + ("; get it again" if remedy else "")
        )
    return content


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(path):
            raise
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if not named or not all(map(SETTINGS.fullmatch, named)):
            raise
        # Lightning's AttributeDict is filled as a dict is, which torch allows of dicts alone.
        stands: list[Any] = [
            (dict if name.endswith(".AttributeDict") else Inert, name) for name in named
        ]
        with torch.serialization.safe_globals(stands):
            return torch.load(path, map_location="cpu", weights_only=True)


def _damaged_part(path: Path) -> str:
    """The first part of a torch file in zip form whose bytes are not those written; else empty.

    torch writes a CRC of each part, unless it was told not to, and looks at none when it reads.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return ""
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(part.CRC for part in archive.infolist()):
                return ""
            return archive.testzip() or ""
    # Damaged headers: zipfile raises its own, and what any field out of place brings.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        return f"its directory ({error})"


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
    return f"{size:,} bytes starting {start.hex()}" if size else "an empty file"
