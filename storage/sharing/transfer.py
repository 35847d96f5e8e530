"""What a push and a pull have in common: what they count, show and say.

Both ways the manifest is the last file. A copy that was broken off is gone on with by the same
call: what stands already, and is right, is not copied again.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gkd.storage.cache.layout import Commit, FileRecord
from gkd.storage.sharing.remote import Remote
from gkd.storage.util.progress import Advance, progress

_MEGABYTE = 1_000_000
_NAMED = 3  # wrong shards or files listed in a message


@dataclass(frozen=True)
class TransferSummary:
    """What a push or pull did.

    ``whole`` says whether all of a cache stands at the target now, ``id`` is the cache's then;
    ``files`` and ``bytes`` are those asked for, metadata and records too, ``copied_files`` and
    ``copied_bytes`` those that did not stand there already.
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


class Tally:
    """Counts what is copied, by several threads at once, and shows it in megabytes."""

    def __init__(self, advance: Advance, files: Mapping[str, FileRecord]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._files = len(files)
        self._bytes = sum(record.bytes for record in files.values())
        self._done = self._told = 0
        self._copied_files = self._copied_bytes = 0

    def advance(self, amount: int) -> None:
        """So many bytes more are there."""
        with self._lock:
            self._done += amount
            whole = -(-self._done // _MEGABYTE) if self._done == self._bytes else 0
            ahead = max(whole, self._done // _MEGABYTE) - self._told
            if ahead > 0:
                self._told += ahead
                self._advance(ahead)

    def copied(self, record: FileRecord) -> None:
        """One more file was copied."""
        with self._lock:
            self._copied_files += 1
            self._copied_bytes += record.bytes

    def summary(
        self, remote: Remote, path: Path, id: str | None, seconds: float
    ) -> TransferSummary:
        """What was done, of a push or pull of ``path``."""
        return TransferSummary(
            address=remote.address,
            path=path,
            id=id,
            whole=id is not None,
            files=self._files,
            bytes=self._bytes,
            copied_files=self._copied_files,
            copied_bytes=self._copied_bytes,
            seconds=seconds,
        )


@contextmanager
def tally_of(what: str, files: Mapping[str, FileRecord]) -> Iterator[Tally]:
    """Count and show the copying of files."""
    total = sum(record.bytes for record in files.values())
    with progress(what, -(-total // _MEGABYTE), "MB") as advance:
        yield Tally(advance, files)


def shard_files(commits: Mapping[int, Commit]) -> dict[str, FileRecord]:
    """Files of shards with their sizes and hashes."""
    return {file: record for commit in commits.values() for file, record in commit.files.items()}


def named(each: Sequence[int] | Sequence[str]) -> str:
    """The first of several, and how many more there are."""
    more = f" and {len(each) - _NAMED:,} more" if len(each) > _NAMED else ""
    return (", ".join(map(str, each[:_NAMED])) or "none") + more
