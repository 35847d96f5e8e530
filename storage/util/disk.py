"""Turns what a disk refuses, or would, into one message with a way out."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd.storage.errors import ConfigError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what to do where writing ``path`` fails because the disk is full or closed.

    Raises:
        ConfigError: instead of the error of the system; others pass.
    """
    try:
        yield
    except OSError as error:
        # Of two, as a copy has, the second is what is written.
        place = error.filename2 or error.filename or path
        if error.errno in _FULL:
            raise ConfigError(
                f"{place}: the disk has no room for it, or this user or process is allowed no more "
                f"({error.strerror}); make room and run the same command again to go on: what is "
                "finished stays"
            ) from error
        if error.errno in _CLOSED:
            raise ConfigError(
                f"{place}: cannot be written ({error.strerror}); choose a folder that you may "
                "write to, or change its owner, and run the same command again"
            ) from error
        raise


def require_room(path: Path, needed: int, remedy: str = "choose another place") -> None:
    """Refuse work that the disk of ``path``, which need not be there yet, has no room for.

    Raises:
        ConfigError: where fewer than ``needed`` bytes are free.
    """
    folder = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{path}: about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free on "
            f"the disk of {folder}; make room, or {remedy}"
        )
