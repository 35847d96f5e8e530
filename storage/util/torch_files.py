"""Files saved by torch, read without running their code.

The rest of storage does not need torch, so it is imported when a file is read.
"""

import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import refuse_foreign

ZIP_START = b"PK\x03\x04"
# What training code saves beside tensors (parsed options, Lightning's callbacks, an accuracy as a
# NumPy number). None of it is needed, so it is read as inert objects, without importing these
# packages.
SETTINGS = re.compile(
    r"argparse\.Namespace|(pytorch_lightning|lightning|lightning_fabric)\..+"
    r"|numpy\.dtype|numpy\.(_core|core)\.multiarray\.scalar"
)


class Inert:
    """Replaces an object of a training code's settings; its code is not run."""

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

    ``what`` the file should hold and the ``remedy`` are used in messages.

    Raises:
        ConfigError: if the file is damaged, or would run code.
        OSError: if the system does not open the file.
    """
    refuse_foreign(path, f"a file of {what}", allowed=("zip", "empty"))
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than 2, and then reads or refuses them.
            warnings.simplefilter("ignore", UserWarning)
            content = _load(path)
    # Damaged and hostile bytes make torch raise almost anything, even an OSError without a file.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ConfigError(
            f"cannot be read as {what}",
            path=path,
            expected="a file that torch.save wrote, of tensors only and none that would run code",
            got=_described(path, error),
            remedy=remedy,
        ) from error
    if damaged := _damaged_part(path):
        raise ConfigError(
            f"its bytes are not those that were written: the checksum of {damaged} does not match",
            path=path,
            remedy=remedy and "get it again",
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
        # Lightning's AttributeDict is filled like a dict, which torch allows only for dicts.
        replacements: list[Any] = [
            (dict if name.endswith(".AttributeDict") else Inert, name) for name in named
        ]
        with torch.serialization.safe_globals(replacements):
            return torch.load(path, map_location="cpu", weights_only=True)


def _damaged_part(path: Path) -> str:
    """The first damaged part of a torch file in zip form; empty if there is none.

    torch writes a CRC of each part, unless switched off, and does not check it on reading.
    """
    if _start(path) != ZIP_START:
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            checked = any(part.CRC for part in archive.infolist())
            return (checked and archive.testzip()) or ""
    # Damaged headers: zipfile's own errors, and those of any wrong field.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        return f"its directory ({error})"


def _described(path: Path, error: Exception) -> str:
    """What the refused file is; torch's own message advises running its code."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"one that names {named[1]}"
    if zipfile.is_zipfile(path):
        return "another zip archive, or a damaged one"
    size, start = path.stat().st_size, _start(path)
    if start == ZIP_START:
        return f"one that is cut off after {size:,} bytes"
    return f"{size:,} bytes starting {start.hex()}" if size else "an empty file"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(ZIP_START))
