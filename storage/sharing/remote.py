"""Files at any fsspec address: s3://, gs://, hf://, sftp://, a folder."""

import errno
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from gkd.storage.errors import ConfigError, CorruptShardError, GkdError, IncompleteCacheError
from gkd.storage.util.files import disk_errors, make_below, write_file
from gkd.storage.util.text import without_password

Advance = Callable[[int], None]
_BLOCK_BYTES = 1 << 22
# Time limit of a call: for the answer, and for the bytes at the slowest rate accepted.
_ANSWER_SECONDS, _MIN_BYTES_PER_SECOND = 300.0, 50_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXPECTED_ADDRESS = "give the path of a folder, or an address such as s3://bucket/faces.gkd"


def is_address(text: str) -> bool:
    """Whether fsspec must open it: ``protocol://...``, not the path of a local folder."""
    return "://" in text or "::" in text


_WRONG_CREDENTIALS = re.compile(r"InvalidAccessKey|SignatureDoesNotMatch|ExpiredToken|NoCredential")


class Remote:
    """A folder at an fsspec address; ``options`` go to its backend and override its settings.

    ``address`` is for messages, without a password.

    ``folder`` is its path if it is a local folder, else None. Any number of threads may use one.
    All methods raise:

        ConfigError           if the address, the credentials or the bucket do not work, or the
                              local disk is full
        IncompleteCacheError  if the connection failed after the backend's own retries
        CorruptShardError     if a file does not have the expected size
    """

    def __init__(self, address: str, options: Mapping[str, Any] | None = None) -> None:
        path = address.partition("://")[2] if "://" in address else address
        url = address[: len(address) - len(path)] + path.rstrip("/")
        self.address, self._url = without_password(url), url
        # fsspec takes an empty path for the current folder.
        if not path.strip("/"):
            raise ConfigError(
                "names no bucket or folder",
                path=without_password(address) or "an empty address",
                remedy=_EXPECTED_ADDRESS,
            )
        try:
            files, self._root = fsspec.url_to_fs(url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(
                without_password(str(error)),
                path=self.address,
                remedy=f"{_EXPECTED_ADDRESS}, whose Python package for fsspec is installed",
            ) from error
        except Exception as error:
            raise _transfer_error(self.address, error) from error
        self.folder = Path(self._root) if isinstance(files, LocalFileSystem) else None
        self._options = dict(options or {})
        # Synchronous backends, such as that of sftp://, may hold a connection that only one thread
        # can use, and need folders to be created.
        self._shared = files if files.async_impl else None
        self._created: set[str] = set()
        self._creating = threading.Lock()

    def location(self, file: str) -> str:
        """The address of a file, for messages."""
        return f"{self.address}/{file}"

    def names(self) -> list[str]:
        """Names in the folder itself, without hidden files."""
        with self._errors(self.address):
            try:
                found = self._call("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
            finally:
                # fsspec would answer later calls from this listing.
                self._files.invalidate_cache()
        # Some object stores mark a folder by an empty object of its own name.
        marker = (self._root.strip("/"), 0)
        entries = [(entry["name"].strip("/"), entry["size"]) for entry in found]
        names = {name.rpartition("/")[2] for name, size in entries if (name, size) != marker}
        return sorted(name for name in names if not name.startswith("."))

    def nearest_parent_with(self, file: str) -> str | None:
        """Address of the nearest parent folder that contains ``file``, None without one."""
        protocol, separator, _ = self.address.partition("://")
        for folder in PurePosixPath(self._root).parents:
            if not folder.name:
                return None
            # A parent folder may be closed to this user, or no valid name for the backend.
            with suppress(Exception):
                if self._call("isfile", str(folder / file)):
                    return f"{protocol}{separator}{folder}"
        return None

    def size(self, file: str) -> int | None:
        """Bytes of a file, None if it does not exist."""
        with self._errors(self.location(file)):
            try:
                return int(self._call("info", self._path(file))["size"])
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, file: str, max_bytes: int) -> bytes | None:
        """Content of a small file, None if it does not exist."""
        size = self.size(file)
        if not size:
            return None if size is None else b""
        if size > max_bytes:
            raise CorruptShardError(
                path=self.location(file),
                expected=f"at most {max_bytes:,} bytes",
                got=f"{size:,}",
                remedy="no cache has such a file, check the address",
            )
        with self._errors(self.location(file)):
            return bytes(self._call("cat_file", self._path(file), start=0, end=size, size=size))

    def fetch(self, file: str, to: Path, size: int, advance: Advance) -> None:
        """Copy a file of ``size`` bytes to ``to``; ``advance`` receives the bytes as they come."""
        callback = _ByteCount(advance, size, self.location(file))
        with self._errors(self.location(file), to):
            self._call("get_file", self._path(file), str(to), callback=callback, size=size)
        callback.finish()

    def send(self, source: Path, file: str, advance: Advance) -> None:
        """Copy a local file there; if interrupted, no file with its full size is left."""
        size = source.stat().st_size
        callback = _ByteCount(advance, size, self.location(file))
        with self._errors(self.location(file), source):
            if self.folder is not None:
                _write_local(self.folder, file, source.read_bytes())
            else:
                self._create_folder_of(file)
                self._call("put_file", str(source), self._path(file), callback=callback, size=size)
        callback.finish()

    def write(self, file: str, content: bytes) -> None:
        """Write a small file."""
        with self._errors(self.location(file)):
            if self.folder is not None:
                _write_local(self.folder, file, content)
            else:
                self._create_folder_of(file)
                self._call("pipe_file", self._path(file), content, size=len(content))

    def sha256(self, file: str) -> str:
        """Hex sha256 of a file, which is read back."""
        digest = hashlib.sha256()
        with (
            self._errors(self.location(file)),
            self._files.open(self._path(file), "rb") as stream,
        ):
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @property
    def _files(self) -> Any:
        # fsspec keeps one instance for each thread and connects it on the first call.
        return self._shared or fsspec.url_to_fs(self._url, **self._options)[0]

    def _call(self, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
        """Call the backend with a time limit, which it lacks if a server goes silent midway."""
        if self._shared is not None:
            options["timeout"] = _ANSWER_SECONDS + size / _MIN_BYTES_PER_SECOND
        return getattr(self._files, method)(*arguments, **options)

    def _create_folder_of(self, file: str) -> None:
        folder = self._path(file).rpartition("/")[0]
        with self._creating:
            # Asynchronous backends are object stores without folders: this would create buckets.
            if self._shared is None and folder not in self._created:
                self._files.makedirs(folder, exist_ok=True)
                self._created.add(folder)

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    @contextmanager
    def _errors(self, location: str, local: Path | None = None) -> Iterator[None]:
        """Turn the errors of any backend, which have no common base, into ours.

        Errors of the local disk and of the file ``local`` pass.
        """
        try:
            yield
        except GkdError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and (
                error.errno in _DISK_FULL or (local and error.filename == str(local))
            ):
                raise
            raise _transfer_error(location, error) from error


class _ByteCount(Callback):  # type: ignore[misc]
    """Passes on a backend's counts of bytes, and stops a file that is longer than expected."""

    def __init__(self, advance: Advance, size: int, location: str) -> None:
        super().__init__()
        self._advance, self._size, self._location = advance, size, location
        self._done = 0

    def relative_update(self, inc: int = 1) -> None:
        self._done += inc
        if self._done > self._size:
            raise CorruptShardError(
                path=self._location,
                expected=f"{self._size:,} bytes",
                got="more",
                remedy="the cache there is damaged, ask its owner to push it again",
            )
        self._advance(inc)

    def absolute_update(self, value: int) -> None:
        self.relative_update(value - self._done)

    def finish(self) -> None:
        """Count what the backend did not report."""
        self._advance(self._size - self._done)


def _write_local(folder: Path, file: str, content: bytes) -> None:
    with disk_errors(folder / file):
        write_file(make_below(folder, file), content)


def _transfer_error(location: str, error: Exception) -> GkdError:
    name, text = type(error).__name__, without_password(str(error))
    if re.search(r"(?i)access ?denied", text) and not _WRONG_CREDENTIALS.search(text):
        return ConfigError(
            f"access denied ({text})",
            path=location,
            remedy="these credentials are known there but may not list, read or write this: ask "
            "its owner for the right, or give others; a wrong address is answered so too where "
            "listing is not allowed",
        )
    if isinstance(error, PermissionError) or "Credentials" in name or "Authentication" in name:
        return ConfigError(
            f"access refused ({text})",
            path=location,
            remedy="set the credentials of this address in the environment (for s3:// "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in the settings of its backend, or with "
            "--storage-option, and run the same command again",
        )
    cause = "no answer" if isinstance(error, FSTimeoutError) else f"{name}: {text}"
    kind = ConfigError if isinstance(error, FileNotFoundError | TypeError) else IncompleteCacheError
    return kind(
        cause,
        path=location,
        remedy="check the address, the --storage-option values, the server and the network, and "
        "run the same command again to resume: copied files are kept",
    )
