"""Keeps two runs off one target.

The process that makes a target (of several ranks the first) holds a lock file beside it from its
start to its end. The operating system releases the lock when the process ends, however it ends.
"""

import errno
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import filelock
import msgspec

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.files import disk_errors
from gkd.storage.util.input_files import read_small
from gkd.storage.util.torchrun_env import log_rank0

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_PATIENCE = 5.0  # seconds


def try_lock(descriptor: int, operation: int) -> bool:
    """``flock``; False if the file system has no locks.

    Some have none: Lustre without the mount option flock, NFS without its lock service, some of
    FUSE.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``path``, one process at a time; says so if it waits for long.

    Raises:
        filelock.Timeout: if another process holds it, without ``wait``.
        ConfigError: if its file system has no locks.
    """
    with tempfile.TemporaryFile(dir=path.parent) as tried:
        if not try_lock(tried.fileno(), fcntl.LOCK_EX):
            raise ConfigError(
                "its file system has no locks, which keep processes from one another's files",
                path=path.parent,
                remedy="set GKD_CACHE_DIR to a folder on a local disk",
            )
    lock = filelock.FileLock(path, timeout=_PATIENCE if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        if not wait:
            raise
        log_rank0(f"{path}: waiting for another process of gkd that holds this lock")
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


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
        self._file: int | None = None

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
            while self._file is None:
                self._file = self._locked_file()
            started = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            holder = Holder(socket.gethostname(), os.getpid(), started, self.run)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, msgspec.json.encode(holder), 0)

    def _locked_file(self) -> int | None:
        """The lock file, open and locked; None if its holder has deleted it since: try again."""
        # No link is followed, and no FIFO waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o666)
        try:
            self._lock(file)
            if os.path.samestat(os.fstat(file), self.path.stat(follow_symlinks=False)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._in_use("") from error
            if error.errno not in _NO_LOCKS:
                raise
            self._go_without(error)

    def _go_without(self, error: OSError) -> None:
        """Where no file can be locked, what the file says must do: a dead process holds nothing."""
        holder, without = self.holder(), f"this file system locks no files ({error.strerror})"
        if holder is not None and not (
            holder.host == socket.gethostname() and _is_dead(holder.pid)
        ):
            raise self._in_use(f"{without}, and the lock file names a run that may have ended; ")
        print(
            f"{self.target}: {without}: start no second run that writes it",
            file=sys.stderr,
            flush=True,
        )

    def _in_use(self, why: str) -> ConfigError:
        gone = "it or its host is gone" if why else "its host is gone for good"
        return ConfigError(
            f"another run is writing it: {self.holder() or 'an unknown process'}",
            path=self.target,
            remedy=f"{why}wait until it ends or stop it, then run the same command again (if "
            f"{gone}, delete {self.path})",
        )

    def release(self) -> None:
        """Give the lock up; without effect if it is not held."""
        if self._file is not None:
            # Deleted while still held: whoever opened the file before sees that it has no name.
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

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


def _is_dead(pid: int) -> bool:
    """Whether this host has no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
