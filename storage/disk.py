"""Turns what a disk refuses into one message with a way out."""

import errno
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
        place = error.filename or path
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
