"""Files and folders that are complete or absent, whatever interrupts the writer.

Both are written beside their final path under a temporary name (``.NAME.`` and 32 hex digits),
made durable and renamed.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd.storage.errors import ConfigError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; at the end of the block it becomes ``path``.

    An existing file is replaced. If the block raises, the temporary file is deleted.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


@contextmanager
def publish_dir(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; at the end of the block it becomes ``path``.

    If the block raises, the temporary folder is deleted.

    Raises:
        OSError: ENOTEMPTY or EEXIST if ``path`` already holds something. Of several processes
            that publish the same folder, exactly one succeeds.
    """
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            sync_path(inner)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Publish ``content`` at ``path``."""
    with publish_file(path) as temporary:
        temporary.write_bytes(content)


def remove_dir(path: Path) -> None:
    """Delete a folder, renamed first: an interruption leaves no half of it under its name."""
    shutil.rmtree(path.rename(temporary_path(path)))


def temporary_path(path: Path) -> Path:
    """A new name beside ``path`` for what is being written there or removed."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def delete_temporaries(folder: Path, name: str | None = None) -> None:
    """Delete what killed writers left in ``folder`` of ``name``, or of any name.

    Raises:
        ConfigError: if the disk refuses.
    """
    published = ".+" if name is None else re.escape(name)
    pattern = re.compile(rf"\.{published}\.[0-9a-f]{{32}}")
    with disk_errors(folder):
        for path in folder.glob(".*"):
            if pattern.fullmatch(path.name):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def sync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries (creations, renames), durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors for a full or read-only disk into one message with a remedy.

    Raises:
        ConfigError: instead of these errors; others pass unchanged.
    """
    try:
        yield
    except OSError as error:
        # A copy names two files; the second is the one written.
        failed = error.filename2 or error.filename or path
        if error.errno in _FULL:
            raise ConfigError(
                f"{failed}: the disk or the quota is full ({error.strerror}); free some space and "
                "run the same command again to resume: finished parts are kept"
            ) from error
        if error.errno in _READ_ONLY:
            raise ConfigError(
                f"{failed}: cannot be written ({error.strerror}); choose a folder that you may "
                "write to, or change its owner, and run the same command again"
            ) from error
        raise


def require_room(path: Path, needed: int, remedy: str = "choose another folder") -> None:
    """Check that the disk of ``path``, which need not exist yet, has ``needed`` bytes free.

    Raises:
        ConfigError: if it has fewer.
    """
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{path}: expected about {needed / 1e6:,.1f} MB of free space, got "
            f"{free / 1e6:,.1f} MB on the disk of {folder}; free some space, or {remedy}"
        )
