"""Digests of all images of records, cached on disk for large data sets."""

import contextlib
import hashlib
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Records
from gkd.storage.records.images import DIGEST_BYTES, digest
from gkd.storage.util.files import disk_errors, publish_file
from gkd.storage.util.input_files import open_regular
from gkd.storage.util.lock import file_lock
from gkd.storage.util.parallel import map_rows
from gkd.storage.util.progress import progress

# Hashing fewer bytes takes no longer than looking for a cached result.
MIN_CACHED_BYTES = 1 << 28
SETTLED_SECONDS = 2.0


def digests(records: Records, *, workers: int) -> npt.NDArray[np.uint8]:
    """Digests of all encoded images, uint8 [N, 16], hashed by ``workers`` threads.

    Zero for a row that cannot be read.
    """
    hashed = np.zeros(len(records), f"V{DIGEST_BYTES}")

    def hash_row(row: int) -> None:
        with contextlib.suppress(CorruptRecordError):
            hashed[row] = digest(records.encoded(row))

    with progress("hash images", len(records), "images", quiet_below=QUIET_ROWS) as advance:
        for _ in map_rows(hash_row, len(records), workers=workers):
            advance()
    return hashed.view(np.uint8).reshape(-1, DIGEST_BYTES)


def cached_digests(records: Records, folder: Path, *, workers: int) -> npt.NDArray[np.uint8]:
    """``digests``, cached in ``folder`` if the data set is large.

    A cached result serves as long as the path, the labels and the size and modification time of
    every file are the same. If a file changed within the last ``SETTLED_SECONDS``, nothing is
    cached: another change within one tick of the file system's clock would go unnoticed.

    Raises:
        ConfigError: if ``folder`` cannot be written.
        CorruptRecordError: if a file is missing.
    """
    if records.sizes.sum() < MIN_CACHED_BYTES:
        return digests(records, workers=workers)
    path, newest = _cache_path(records, folder)
    found = _read_cached(path, len(records))
    if found is not None:
        return found
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # One rank of a node reads the data, the others find its result.
        with file_lock(path.with_suffix(".lock")):
            found = _read_cached(path, len(records))
            if found is None:
                found = digests(records, workers=workers)
                settled = time.time() - newest >= SETTLED_SECONDS
                if settled and _cache_path(records, folder)[0] == path:
                    with publish_file(path) as temporary, temporary.open("wb") as file:
                        np.savez(file, digests=found)
    return found


def _cache_path(records: Records, folder: Path) -> tuple[Path, float]:
    """Path of the cached digests of the current records, and when a file last changed."""
    hashed = hashlib.sha256(f"{records.path}\n{records.fingerprint}\n".encode())
    newest = 0.0
    for name, stamp in records.stamps():
        hashed.update(f"{name}\0{stamp.st_size} {stamp.st_mtime_ns}\n".encode())
        newest = max(newest, stamp.st_mtime)
    return folder / f"{hashed.hexdigest()}.npz", newest


def _read_cached(path: Path, count: int) -> npt.NDArray[np.uint8] | None:
    """Cached digests, or None if there are none or they are damaged."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
            cached: npt.NDArray[np.uint8] = archive["digests"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if cached.shape != (count, DIGEST_BYTES) or cached.dtype != np.uint8:
        return None
    # Garbage collection goes by the time of last use.
    with contextlib.suppress(OSError):
        os.utime(path)
    return cached
