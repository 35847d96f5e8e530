"""Files at any fsspec address: s3://, gs://, hf://, sftp://, a folder."""

import errno
import hashlib
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
from gkd.storage.util.files import disk_errors, write_file

Advance = Callable[[int], None]
_BLOCK_BYTES = 1 << 22
# What a server that still answers needs at most, and how slow a line may be.
_PATIENCE_SECONDS, _LEAST_BYTES_A_SECOND = 300.0, 50_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_address(text: str) -> bool:
    """Whether fsspec must open it: ``protocol://...``, not the path of a folder here."""
    return "://" in text or "::" in text


class Remote:
    """A folder at an fsspec address; ``options`` go to its backend, over fsspec's own settings.

    ``folder`` is its path where it is a folder of this machine, else None. Any number of threads
    may use one. Its methods raise

        ConfigError           the address, the credentials or the bucket do not work, a disk is full
        IncompleteCacheError  the connection failed after the backend's own retries
        CorruptShardError     a file has not the size that it should have
    """

    def __init__(self, address: str, options: Mapping[str, Any] | None = None) -> None:
        protocol, colon, place = address.partition("://")
        self.address = address.rstrip("/") if not colon else f"{protocol}://{place.rstrip('/')}"
        # fsspec takes nothing for the folder where it runs.
        if not (place if colon else address).strip("/"):
            raise _nowhere(address)
        try:
            files, self._root = fsspec.url_to_fs(self.address, **(options or {}))
        except ImportError as error:
            raise ConfigError(
                f"{address}: {error}; addresses of this protocol need that Python package, "
                "install it with pip"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{address}: {error}; expected the path of a folder, or an address such as "
                "s3://bucket/faces.gkd, gs://, hf:// or sftp://"
            ) from error
        except Exception as error:
            raise _explanation(self.address, error) from error
        if not self._root.strip("/"):
            raise _nowhere(address)
        self.folder = Path(self._root) if isinstance(files, LocalFileSystem) else None
        self._options = dict(options or {})
        # The others, such as that of sftp://, may hold a connection for one thread at a time, and
        # have folders that must be made before a file is.
        self._shared = files if files.async_impl else None
        self._made: set[str] = set()
        self._making = threading.Lock()

    def place(self, file: str) -> str:
        """The address of a file, for messages."""
        return f"{self.address}/{file}"

    def names(self) -> list[str]:
        """What stands in the folder itself, hidden files left out."""
        with self._explained(self.address):
            try:
                found = self._ask("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
            finally:
                # Later questions are about what is there then.
                self._files.invalidate_cache()
        # Some object stores mark a folder by an empty object of its own name.
        marker = (self._root.strip("/"), 0)
        entries = [(each["name"].strip("/"), each["size"]) for each in found]
        names = {name.rpartition("/")[2] for name, size in entries if (name, size) != marker}
        return sorted(name for name in names if not name.startswith("."))

    def around(self, file: str) -> str | None:
        """Address of the nearest folder above that holds such a file, None without one."""
        protocol, colon, _ = self.address.partition("://")
        for folder in PurePosixPath(self._root).parents:
            if not folder.name:
                return None
            # What is above may be closed to us, or to ask of it may make no sense.
            with suppress(Exception):
                if self._ask("isfile", str(folder / file)):
                    return f"{protocol}://{folder}" if colon else str(folder)
        return None

    def size(self, file: str) -> int | None:
        """Bytes of a file, None where there is none."""
        with self._explained(self.place(file)):
            try:
                return int(self._ask("info", self._path(file))["size"])
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, file: str, most_bytes: int) -> bytes | None:
        """Content of a small file, None where there is none."""
        size = self.size(file)
        if not size:
            return None if size is None else b""
        if size > most_bytes:
            raise CorruptShardError(
                f"{self.place(file)}: expected at most {most_bytes:,} bytes, got {size:,}; "
                "no cache has such a file, check the address"
            )
        with self._explained(self.place(file)):
            return bytes(self._ask("cat_file", self._path(file), start=0, end=size, size=size))

    def fetch(self, file: str, to: Path, size: int, advance: Advance) -> None:
        """Copy a file of ``size`` bytes to ``to``, telling ``advance`` of bytes as they come."""
        callback = _Bytes(advance, size, self.place(file))
        with self._explained(self.place(file), to):
            self._ask("get_file", self._path(file), str(to), callback=callback, size=size)
        callback.finish()

    def send(self, content: Path, file: str, advance: Advance) -> None:
        """Copy a local file there; what an interruption leaves never has the file's size."""
        size = content.stat().st_size
        callback = _Bytes(advance, size, self.place(file))
        with self._explained(self.place(file), content):
            if self.folder is not None:
                _write_local(Path(self._path(file)), content.read_bytes())
            else:
                self._make_folder_of(file)
                self._ask("put_file", str(content), self._path(file), callback=callback, size=size)
        callback.finish()

    def write(self, file: str, content: bytes) -> None:
        """Write a small file."""
        with self._explained(self.place(file)):
            if self.folder is not None:
                _write_local(Path(self._path(file)), content)
            else:
                self._make_folder_of(file)
                self._ask("pipe_file", self._path(file), content, size=len(content))

    def sha256(self, file: str) -> str:
        """Hex sha256 of a file, which is read back for it."""
        digest = hashlib.sha256()
        with (
            self._explained(self.place(file)),
            self._files.open(self._path(file), "rb") as stream,
        ):
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @property
    def _files(self) -> Any:
        # fsspec keeps one for each thread, and opens it on the first call.
        return self._shared or fsspec.url_to_fs(self.address, **self._options)[0]

    def _ask(self, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
        """Call the backend, which has no limit of its own where a server goes silent midway."""
        if self._shared is not None:
            options["timeout"] = _PATIENCE_SECONDS + size / _LEAST_BYTES_A_SECOND
        return getattr(self._files, method)(*arguments, **options)

    def _make_folder_of(self, file: str) -> None:
        folder = self._path(file).rpartition("/")[0]
        with self._making:
            # Where all threads share one there are no folders, and this would make buckets.
            if self._shared is None and folder not in self._made:
                self._files.makedirs(folder, exist_ok=True)
                self._made.add(folder)

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    @contextmanager
    def _explained(self, place: str, local: Path | None = None) -> Iterator[None]:
        """Turn the errors of any backend, which have no common base, into ours.

        Errors of the disk and of the file ``local`` pass: they are not the backend's.
        """
        try:
            yield
        except GkdError:
            raise
        except OSError as error:
            if error.errno in _DISK_FULL or (local and error.filename == str(local)):
                raise
            raise _explanation(place, error) from error
        except Exception as error:
            raise _explanation(place, error) from error


class _Bytes(Callback):  # type: ignore[misc]
    """Passes a backend's counts of bytes on, and stops a file that is longer than it should be."""

    def __init__(self, advance: Advance, size: int, place: str) -> None:
        super().__init__()
        self._advance, self._size, self._place = advance, size, place
        self._done = 0

    def relative_update(self, inc: int = 1) -> None:
        self._done += inc
        if self._done > self._size:
            raise CorruptShardError(
                f"{self._place}: expected {self._size:,} bytes, got more; the cache there is "
                "damaged, ask its owner to push it again"
            )
        self._advance(inc)

    def absolute_update(self, value: int) -> None:
        self.relative_update(value - self._done)

    def finish(self) -> None:
        """Count what the backend did not tell of."""
        self._advance(self._size - self._done)


def _write_local(path: Path, content: bytes) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)


def _nowhere(address: str) -> ConfigError:
    return ConfigError(
        f"{address or 'an empty address'}: names no bucket or folder; expected the path of a "
        "folder, or an address such as s3://bucket/faces.gkd"
    )


def _explanation(place: str, error: Exception) -> GkdError:
    """What a backend's error means to a user."""
    name = type(error).__name__
    if isinstance(error, FSTimeoutError):
        return IncompleteCacheError(
            f"{place}: the server took the request and then went silent; see what it does, then "
            "run the same command again to resume: what was copied stays"
        )
    if isinstance(error, PermissionError) or "Credentials" in name or "Authentication" in name:
        return ConfigError(
            f"{place}: access refused ({error}); give the credentials of this address in the "
            "environment (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in the settings "
            "of its backend, or with --storage-option, then run the same command again"
        )
    if isinstance(error, FileNotFoundError):
        return ConfigError(
            f"{place}: not there ({error}); see whether its bucket and folder still exist, then "
            "run the same command again: what was copied stays"
        )
    if isinstance(error, TypeError):
        return ConfigError(
            f"{place}: {error}; give --storage-option only as this address's Python package, an "
            "fsspec file system, knows them"
        )
    return IncompleteCacheError(
        f"{place}: {name}: {error}; check address and network, then run the same command again "
        "to go on: what was copied stays"
    )
