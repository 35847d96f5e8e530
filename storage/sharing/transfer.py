"""What push and pull share: copying in threads, counts, progress and the summary.

Both write the manifest last. The same call resumes an interrupted copy: files that are already
there and right are not copied again.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gkd.storage.cache.layout import Commit, FileRecord
from gkd.storage.util.parallel import for_each
from gkd.storage.util.progress import Advance, progress

WORKERS = 8
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class TransferSummary:
    """What a push or pull did.

    id                          the cache's, None if only some shards were pulled
    whole                       whether the target is now a complete cache
    files, bytes                of all that was asked for, with metadata and records
    copied_files, copied_bytes  of what was not there already
    """

    address: str
    path: Path
    id: str | None
    whole: bool
    files: int
    bytes: int
    copied_files: int
    copied_bytes: int
    seconds: float


class Transfer:
    """Copies ``files``, in parts, and counts them; ``transfer`` makes one."""

    def __init__(self, files: Mapping[str, FileRecord], advance: Advance) -> None:
        self._files = files
        self._advance = advance
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._done = self._copied_files = self._copied_bytes = 0

    def copy(
        self,
        files: Collection[str],
        *,
        is_copied: Callable[[str], bool],
        copy: Callable[[str], object],
        workers: int = WORKERS,
    ) -> None:
        """Call ``copy``, which calls ``advance``, on each file that is not copied already."""

        def copy_one(file: str) -> None:
            size = self._files[file].bytes
            if is_copied(file):
                self.advance(size)
                return
            copy(file)
            with self._lock:
                self._copied_files += 1
                self._copied_bytes += size

        for_each(copy_one, files, workers=workers)

    def advance(self, count: int) -> None:
        """Show that ``count`` bytes more are there."""
        with self._lock:
            shown = _megabytes(self._done)
            self._done += count
            if _megabytes(self._done) > shown:
                self._advance(_megabytes(self._done) - shown)

    def summary(self, address: str, path: Path, id: str | None) -> TransferSummary:
        """The summary of a push or pull of ``path``."""
        return TransferSummary(
            address=address,
            path=path,
            id=id,
            whole=id is not None,
            files=len(self._files),
            bytes=total_bytes(self._files),
            copied_files=self._copied_files,
            copied_bytes=self._copied_bytes,
            seconds=time.monotonic() - self._began,
        )


@contextmanager
def transfer(what: str, files: Mapping[str, FileRecord]) -> Iterator[Transfer]:
    """A transfer of ``files`` in all, whose progress is shown in megabytes."""
    with progress(what, _megabytes(total_bytes(files)), "MB") as advance:
        yield Transfer(files, advance)


def shard_files(commits: Mapping[int, Commit]) -> dict[str, FileRecord]:
    """Files of shards with their sizes and hashes."""
    return {file: record for commit in commits.values() for file, record in commit.files.items()}


def total_bytes(files: Mapping[str, FileRecord]) -> int:
    """Bytes of files."""
    return sum(record.bytes for record in files.values())


def _megabytes(count: int) -> int:
    return -(-count // _MEGABYTE)
