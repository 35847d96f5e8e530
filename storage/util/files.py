"""Files and folders that are complete or absent, whatever interrupts the writer.

Both are written beside their final path under a temporary name (``.NAME.`` and 32 hex digits),
made durable and renamed.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import open_regular
from gkd.storage.util.torchrun_env import log_rank0

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
# What a file system answers that has no such call: fsync of a folder, or locks.
UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EBADF,
}
_OTHER_FOLDER = "choose a folder that you may write to, or change its owner"
_REMEDIES = (
    (
        {errno.EMFILE, errno.ENFILE},
        "too many files are open: raise the limit (`ulimit -n 4096`) or use fewer workers",
    ),
    ({errno.ENOMEM}, "memory is full: use fewer workers or smaller batches"),
    ({errno.ENOENT, errno.ENOTDIR, errno.EINVAL}, "check the path"),
    ({errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.EEXIST}, "give another path"),
    (
        {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP},
        "this file system cannot do that; use a folder on another one",
    ),
    (
        {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO},
        "the disk or the network file system failed: check that it is mounted and healthy, then "
        "run the same command again",
    ),
)


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
    """Publish ``content`` at ``path``; a link there is replaced, not followed."""
    with publish_file(path) as temporary:
        temporary.write_bytes(content)


def make_below(root: Path, name: str) -> Path:
    """``root / name`` to write to, its folders made; nothing on the way there is a link.

    What a stranger made below ``root`` could lead elsewhere, and files be replaced there.

    Raises:
        ConfigError: naming the link, or the file in place of a folder.
    """
    path = root
    root.mkdir(parents=True, exist_ok=True)
    for part in PurePath(name).parts[:-1]:
        path /= part
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
        if path.is_symlink() or not path.is_dir():
            got = f"a link to {path.readlink()}" if path.is_symlink() else "a file"
            raise ConfigError(
                path=path,
                expected=f"a folder of {root}",
                got=got,
                remedy="delete it, or give another path, and run the same command again",
            )
    return root / name


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


def delete_temporaries_below(root: Path) -> None:
    """Delete what killed writers left in ``root`` and its folders; links are not followed."""
    for folder, _, _ in os.walk(root):
        delete_temporaries(Path(folder))


def sync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries (creations, renames), durable.

    Some file systems (SMB, shares of virtual machines) cannot do that for folders: they order
    renames themselves, or a power cut may lose the last ones. That is said once.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
        _report_unsynced(str(error.strerror))
    finally:
        os.close(descriptor)


@functools.cache
def _report_unsynced(reason: str) -> None:
    log_rank0(
        f"the file system cannot make folders durable ({reason}): what was written last may be "
        "missing after a power cut, and is then made again"
    )


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path, other: str = _OTHER_FOLDER) -> Iterator[None]:
    """Turn the system's errors for what is written to ``path`` into one message with a remedy.

    ``other`` is the remedy where the user may not write.

    Raises:
        ConfigError: instead of an OSError; FileNotFoundError and FileExistsError pass unchanged.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise describe_os_error(error, path, other) from error


def describe_os_error(
    error: OSError, path: Path | None = None, other: str = _OTHER_FOLDER
) -> ConfigError:
    """The system's error with the path, in ``path`` if it names none, and a remedy."""
    # A copy names two files; the second is the one written.
    failed = error.filename2 or error.filename or path
    where = None if failed is None else os.fsdecode(failed) if failed != -1 else None
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return ConfigError(
            f"the disk or the quota is full ({reason})",
            path=where,
            remedy="free some space and run the same command again",
        )
    if error.errno in _READ_ONLY:
        return ConfigError(
            f"cannot be read or written ({reason})",
            path=where,
            remedy=f"{other}, and run the same command again",
        )
    remedies = (remedy for numbers, remedy in _REMEDIES if error.errno in numbers)
    return ConfigError(reason, path=where, remedy=next(remedies, "run the same command again"))


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
