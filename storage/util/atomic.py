"""Files that are either whole or absent, whatever interrupts the writer."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (creations, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a place to write what is published at ``path`` at the end, unless an error ends it.

    Synced, renamed, folder synced.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        sync_file(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def delete_temporaries(folder: Path, name: str | None = None) -> None:
    """Delete what killed writers left on its way to ``folder / name``, or to anything in it."""
    published = ".+" if name is None else re.escape(name)
    aside = re.compile(rf"\.{published}\.[0-9a-f]{{32}}")
    for path in folder.glob(".*"):
        if aside.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Publish ``content`` at ``path``: written aside, synced, renamed, folder synced."""
    with atomic_path(path) as aside:
        aside.write_bytes(content)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
