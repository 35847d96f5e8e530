"""What every source of images offers: rows of a label and an encoded image."""

import contextlib
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import filelock
import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import LabelOrder
from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.images import DIGEST_BYTES, decode_face, digest
from gkd.storage.util.files import disk_errors, write_file
from gkd.storage.util.parallel import ordered_map, row_blocks
from gkd.storage.util.progress import progress

QUIET_ROWS = 100_000
# Less is hashed again as fast as it is looked for.
LEAST_KEPT_BYTES = 1 << 28
SETTLED_SECONDS = 2.0
# What a user may name as records.
KINDS = (
    "a folder with train.rec, a .rec, .parquet or .tar file, a folder of these, or a folder with "
    "one folder of images an identity"
)
Layout = Literal["insightface", "im2rec", "mixed", "folder", "parquet", "webdataset"]


class Records(Protocol):
    """Labelled face images in rows; pickles by path and may be shared by threads and forks.

    path         absolute, as opened
    name         short name of the data set
    layout       how it is stored; a pack's is "insightface" or "im2rec", "mixed" of parts of both
    indexed      False for packs without an .idx file, which were scanned
    label_order  how the identities got their numbers
    num_classes  labels are below it
    labels       int64 [N], -1 where a record's header is unreadable or its label is no class
    sizes        int64 [N], bytes of the encoded images, -1 where unreadable
    """

    path: Path
    name: str
    layout: Layout
    indexed: bool
    label_order: LabelOrder
    num_classes: int
    labels: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """The record's own name: ``17``, or ``person_a/0003.jpg``."""
        ...

    def where(self, row: int) -> str:
        """File, key and offset in words, for messages."""
        ...

    def encoded(self, row: int) -> memoryview:
        """The encoded image, without a copy where it stands in one piece.

        Raises:
            CorruptRecordError: naming file, key and offset, what was expected and what was got;
                its text starts with ``where`` and a colon.
        """
        ...

    def image(self, row: int) -> npt.NDArray[np.uint8]:
        """The decoded face, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: as ``encoded`` does, and for no image or one of another size.
        """
        try:
            return decode_face(self.encoded(row), self.where(row))
        except CorruptRecordError as error:
            raise CorruptRecordError(
                f"{error}; write this record again or leave it out: `gkd records verify` lists all "
                "such records"
            ) from error

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name of every file that the images come from, and what the system says now of it.

        Raises:
            CorruptRecordError: where a file is gone.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of labels and encoded sizes (int64, little-endian) in row order."""
        hashed = hashlib.sha256(self.labels.astype("<i8").tobytes())
        hashed.update(self.sizes.astype("<i8").tobytes())
        return hashed.hexdigest()


class Subset(Records):
    """Some rows of other records, int64 [M], as records of their own.

    There may be more classes than the records know, without images.
    """

    def __init__(
        self, records: Records, rows: npt.NDArray[np.int64], num_classes: int | None = None
    ) -> None:
        self.records, self.rows = records, rows
        self.path, self.name = records.path, records.name
        self.layout, self.indexed = records.layout, records.indexed
        self.label_order = records.label_order
        self.num_classes = records.num_classes if num_classes is None else num_classes
        self.labels, self.sizes = records.labels[rows], records.sizes[rows]

    def key(self, row: int) -> str:
        """The record's own name."""
        return self.records.key(int(self.rows[row]))

    def where(self, row: int) -> str:
        """File, key and offset in words, for messages."""
        return self.records.where(int(self.rows[row]))

    def encoded(self, row: int) -> memoryview:
        """The encoded image.

        Raises:
            CorruptRecordError: where it cannot be read.
        """
        return self.records.encoded(int(self.rows[row]))

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name of every file behind the records, and what the system says now of it."""
        return self.records.stamps()


def kept_digests(records: Records, folder: Path, *, workers: int) -> npt.NDArray[np.uint8]:
    """``digests``, kept in ``folder`` for the next time where the data set is large.

    They are found again as long as path, labels and the size and time of change of every file are
    the same. Files that changed within the last ``SETTLED_SECONDS`` are hashed and not kept:
    another change within one tick of the file system's clock could not be told.

    Raises:
        ConfigError: where ``folder`` cannot be written.
        CorruptRecordError: as ``digests`` does.
    """
    if records.sizes.sum() < LEAST_KEPT_BYTES:
        return digests(records, workers=workers)
    path, newest = _kept_path(records, folder)
    found = _read_kept(path, len(records))
    if found is not None:
        return found
    lock = filelock.FileLock(path.with_suffix(".lock"))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # of a node's ranks one reads the data, the others find what it kept
    try:
        found = _read_kept(path, len(records))
        if found is not None:
            return found
        made = digests(records, workers=workers)
        if time.time() - newest >= SETTLED_SECONDS and _kept_path(records, folder)[0] == path:
            buffer = io.BytesIO()
            np.savez(buffer, digests=made)
            with disk_errors(path):
                write_file(path, buffer.getvalue())
        return made
    finally:
        lock.release()


def _kept_path(records: Records, folder: Path) -> tuple[Path, float]:
    """Where the digests of records as they are now would be kept, and when a file last changed."""
    hashed = hashlib.sha256(f"{records.path}\n{records.fingerprint}\n".encode())
    newest = 0.0
    for name, stamp in records.stamps():
        hashed.update(f"{name}\0{stamp.st_size} {stamp.st_mtime_ns}\n".encode())
        newest = max(newest, stamp.st_mtime)
    return folder / f"{hashed.hexdigest()}.npz", newest


def _read_kept(path: Path, count: int) -> npt.NDArray[np.uint8] | None:
    """Kept digests, or None where there are none that are whole."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            kept: npt.NDArray[np.uint8] = archive["digests"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if kept.shape != (count, DIGEST_BYTES) or kept.dtype != np.uint8:
        return None
    # When it was last used decides when it is collected.
    with contextlib.suppress(PermissionError):
        os.utime(path)
    return kept


def digests(records: Records, *, workers: int) -> npt.NDArray[np.uint8]:
    """Digests of all encoded images, uint8 [N, 16], hashed by ``workers`` threads.

    Zero for a row that cannot be read.
    """

    def digest_row(row: int) -> bytes:
        try:
            return digest(records.encoded(row))
        except CorruptRecordError:
            return bytes(DIGEST_BYTES)

    def digest_rows(rows: range) -> bytes:
        return b"".join(map(digest_row, rows))

    out = np.empty((len(records), DIGEST_BYTES), np.uint8)
    blocks = row_blocks(len(records))
    done = 0
    with progress("hash images", len(records), "images", quiet_below=QUIET_ROWS) as advance:
        for hashed in ordered_map(digest_rows, blocks, workers=workers):
            block = np.frombuffer(hashed, np.uint8).reshape(-1, DIGEST_BYTES)
            out[done : done + len(block)] = block
            done += len(block)
            advance(len(block))
    return out
