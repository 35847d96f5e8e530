"""Removes what nobody uses any more from the scratch folder (``$GKD_CACHE_DIR``)."""

import contextlib
import fcntl
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from gkd.storage.reading.mmap_store import (
    DESCRIPTION,
    DIGESTS,
    EMBEDDINGS,
    LOCK,
    default_folder,
    is_folder,
    is_store,
    is_temporary,
    remove_store,
)
from gkd.storage.util.input_files import open_regular
from gkd.storage.util.lock import file_lock

DAY = 86_400
# The folder may hold other people's files, so only these exact names are gkd's.
_HOME = re.compile(r"[0-9a-f]{64}")
_FILES = {
    DIGESTS: re.compile(r"[0-9a-f]{64}\.(npz|lock)|\.[0-9a-f]{64}\.npz\.[0-9a-f]{32}"),
    EMBEDDINGS: re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{32}"),
}


@dataclass(frozen=True)
class Collected:
    """What ``collect`` found; ``removed``: it is deleted, or would be without ``dry_run``.

    days  since it was last used
    why   it is kept, or an empty string
    """

    path: Path
    bytes: int
    days: float
    removed: bool
    why: str


def collect(
    *, folder: Path | None = None, older_than: float = 0.0, dry_run: bool = False
) -> list[Collected]:
    """Delete unused stores, incomplete stores, digests and embeddings of gkd in ``folder``.

    What was used within the last ``older_than`` days is kept, and what a process has open or is
    making. Everything can be made again from its cache, its records or its model. A file that does
    not have the exact path and name of such a thing is somebody else's and is kept.
    """
    folder = (folder or default_folder()).absolute()
    now = time.time()
    found = []
    for path in sorted(_collectable(folder)):
        # Another process may remove it at the same time.
        with contextlib.suppress(FileNotFoundError):
            found.append(_collect_one(path, older_than, now, dry_run=dry_run))
    return found


def _collectable(folder: Path) -> Iterator[Path]:
    for name, pattern in _FILES.items():
        for path in (folder / name).glob("*"):
            if pattern.fullmatch(path.name) and path.is_file():
                yield path
    for home in folder.glob("*"):
        if _HOME.fullmatch(home.name) and is_folder(home):
            yield from (path for path in home.iterdir() if is_store(path) or is_temporary(path))


def _collect_one(path: Path, older_than: float, now: float, *, dry_run: bool) -> Collected:
    marker = path / DESCRIPTION if (path / DESCRIPTION).exists() else path
    days = max(0.0, now - marker.stat().st_mtime) / DAY
    files = list(path.rglob("*")) if path.is_dir() else [path]
    size = sum(file.lstat().st_size for file in files)
    why = f"used within {older_than:g} days" if days < older_than else ""
    if not why:
        with _unused(path) as unused:
            why = "" if unused else "in use"
            if unused and not dry_run:
                remove_store(path)
    return Collected(path, size, days, not why, why)


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether no process makes, opens or has open what is at ``path``; if so, none can now."""
    if not path.is_dir():
        yield True
        return
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(file_lock(path.parent / LOCK, wait=False))
            if (path / DESCRIPTION).exists():
                file = locks.enter_context(open_regular(path / DESCRIPTION))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (filelock.Timeout, BlockingIOError):
            yield False
            return
        yield True
