"""Keeps two runs off one target.

The process that makes a target (of several ranks the first) holds a lock file beside it from its
start to its end. The operating system releases the lock when the process ends, however it ends.
"""

import os
import shutil
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import filelock
import msgspec

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.files import disk_errors
from gkd.storage.util.input_files import read_small


class Holder(msgspec.Struct, frozen=True):
    """Content of the lock file: the process that holds it, and the run that it belongs to."""

    host: str
    pid: int
    started: str
    run: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


class WriteLock:
    """The right of one run to write ``target``; a context manager.

    ``run`` identifies the run. Its other ranks, which do not acquire the lock, can call ``check``
    on a lock of the same ``run``.
    """

    def __init__(self, target: Path, run: str | None = None) -> None:
        self.target, self.run = target, run or uuid.uuid4().hex
        self.path = target.with_name(f".{target.name}.lock")
        self._lock = filelock.FileLock(self.path, timeout=0)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: if another run holds it, naming its host, process and start, or if the
                folder cannot be written.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():  # killed runs of earlier versions left a folder
                shutil.rmtree(self.path)
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                raise ConfigError(
                    f"another run is writing it: {self.holder() or 'an unknown process'}",
                    path=self.target,
                    remedy="wait until it ends or stop it, then run the same command again (if its "
                    f"host is gone for good, delete {self.path})",
                ) from error
            # Without flock, filelock falls back to a file whose content is its own.
            if not isinstance(self._lock, filelock.SoftFileLock):
                started = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
                holder = Holder(socket.gethostname(), os.getpid(), started, self.run)
                self.path.write_bytes(msgspec.json.encode(holder))

    def release(self) -> None:
        """Give the lock up; without effect if it is not held."""
        if self._lock.is_locked:
            # Deleted while still held: whoever opened the file before sees that it has no name.
            self.path.unlink(missing_ok=True)
            self._lock.release()

    def holder(self) -> Holder | None:
        """Who holds the lock, if anyone does and the file names it."""
        try:
            return msgspec.json.decode(read_small(self.path), type=Holder)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def check(self) -> None:
        """Make sure that no other run has taken the target over.

        Raises:
            GkdError: if one has, because the process of this run that held the lock has ended.
        """
        holder = self.holder()
        if holder is not None and holder.run != self.run:
            raise GkdError(
                f"another run has taken it over: {holder}; this run writes nothing more",
                path=self.target,
                remedy="run the same command again once no other run is writing",
            )

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
