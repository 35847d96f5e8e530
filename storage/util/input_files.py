"""Files of others, opened with care: regular, of bounded size, and named for what they are."""

import errno
import os
import re
import shlex
import stat
from collections.abc import Collection
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.text import without_password

# Of a file of settings, metadata or logged lines.
SMALL = 1 << 28
_HEAD = 512
_ADDRESS = re.compile(r"^[A-Za-z][\w+.-]+:+/|://")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Foreign(NamedTuple):
    """What a file is in place of the one that was expected, and how to get that."""

    kind: str
    found: str
    remedy: str


# Compressed files by kind: the program that unpacks them, and the suffixes that it takes.
_UNPACK = {
    "gzip": ("gunzip", (".gz", ".tgz")),
    "bzip2": ("bunzip2", (".bz2", ".tbz2")),
    "xz": ("unxz", (".xz", ".txz")),
    "zstd": ("unzstd", (".zst", ".tzst")),
    "zip": ("unzip", (".zip",)),
}
_AGAIN = "download it again, and check the address and your access"
_FOREIGN = (
    (
        rb"version https://git-lfs",
        Foreign(
            "lfs",
            "a Git-LFS pointer to the file",
            "fetch the file itself by `git lfs pull` in its repository",
        ),
    ),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head)",
        Foreign("html", "an HTML page", _AGAIN),
    ),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<error>",
        Foreign("xml", "the error message of an object store", _AGAIN),
    ),
    (
        rb"(?i)\s*(\{\s*\"?(error|errors|message)\"?\s*:|(error:?\s*)?(404|403|401)\b|not found"
        rb"|entry not found|access denied|access to model|invalid username)",
        Foreign("text", "the error message of a server", _AGAIN),
    ),
    (rb"\x1f\x8b", Foreign("gzip", "a gzip file", "unpack it")),
    (rb"BZh[1-9]", Foreign("bzip2", "a bzip2 file", "unpack it")),
    (rb"\xfd7zXZ\x00", Foreign("xz", "an xz file", "unpack it")),
    (rb"\x28\xb5\x2f\xfd", Foreign("zstd", "a zstd file", "unpack it")),
    (rb"PK\x03\x04", Foreign("zip", "a zip archive", "unpack it")),
    (rb"7z\xbc\xaf\x27\x1c", Foreign("7z", "a 7z archive", "unpack it")),
    (rb"Rar!\x1a\x07", Foreign("rar", "a RAR archive", "unpack it")),
    (
        rb"\x00{512}",
        Foreign("zeros", "a file that begins with zeros", f"its download was cut: {_AGAIN}"),
    ),
    (rb"\Z", Foreign("empty", "an empty file", _AGAIN)),
)


def require_local(path: str) -> None:
    """Refuse an address, such as ``s3://bucket/x`` or ``s3:/bucket/x``, in place of a path.

    Raises:
        ConfigError: naming it without its password.
    """
    if _ADDRESS.search(path):
        raise ConfigError(
            expected="a local path",
            got=f"the address {without_password(path)}",
            remedy="`gkd targets pull` copies a cache from an address, `gkd targets push` copies "
            "one to it; copy other files by a program of your own",
        )


def open_regular(path: Path, *, follow_links: bool = True) -> FileIO:
    """Open a regular file for reading, without buffer; whoever waits at a pipe would wait for ever.

    Raises:
        OSError: if it is anything else, cannot be opened or, without ``follow_links``, is a
            symbolic link; ``strerror`` says what it is.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links and path.is_symlink():
            text = "a symbolic link, expected the file itself"
            raise OSError(errno.ELOOP, text, str(path)) from error
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from error
        raise
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        text = f"{_KINDS.get(kind, 'no file')}, expected a regular file"
        raise OSError(errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL, text, str(path))
    return os.fdopen(descriptor, "rb", buffering=0)


def read_small(path: Path, limit: int = SMALL, *, follow_links: bool = True) -> bytes:
    """Content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: as ``open_regular``, and if it is larger, before its memory is taken.
    """
    with open_regular(path, follow_links=follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            text = f"{size:,} bytes, expected at most {limit:,} in such a file"
            raise OSError(errno.EINVAL, text, str(path))
        content = bytearray()
        while part := file.read(limit + 1 - len(content)):
            content += part
        return bytes(content)


def resolve_below(folder: Path, name: str) -> Path:
    """Path of the file that a list of others names: in ``folder``, or in a folder below it.

    Raises:
        ValueError: if the name leads elsewhere, or is none.
    """
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise ValueError(f"expected the name of a file below {folder}, got {name!r}")
    return folder / name


def describe_foreign(head: bytes, allowed: Collection[str] = ()) -> Foreign | None:
    """What a file is by its first bytes, if that is what people get in place of a file.

    ``allowed`` are kinds that the expected file may be, such as ``zip``.
    """
    for pattern, foreign in _FOREIGN:
        if foreign.kind not in allowed and re.match(pattern, head):
            return foreign
    return None


def refuse_foreign(
    path: Path,
    expected: str,
    *,
    error: type[GkdError] = ConfigError,
    allowed: Collection[str] = (),
    like_it: str = "",
) -> None:
    """Refuse a file that is plainly not ``expected``: a pointer to it, a page about it, an archive.

    ``like_it`` is a shell pattern of the files that probably have the same fault.

    Raises:
        GkdError: the ``error``, if it is one of these, or not a regular file.
        FileNotFoundError: if there is none.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        raise
    except OSError as failure:
        raise error(
            path=path, expected=expected, got=failure.strerror, remedy="check the path"
        ) from failure
    if foreign := describe_foreign(head, allowed):
        remedy = foreign.remedy
        if foreign.kind in _UNPACK:
            program, suffixes = _UNPACK[foreign.kind]
            name = shlex.quote(str(path))
            if path.suffix.lower() in suffixes:
                remedy = f"unpack it by `{program} {like_it or name}`"
            else:
                renamed = shlex.quote(f"{path}{suffixes[0]}")
                remedy = f"unpack it by `mv {name} {renamed} && {program} {renamed}`"
        raise error(path=path, expected=expected, got=foreign.found, remedy=remedy)
