"""What every form of records offers: rows of a label and an encoded image."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.images import decode_face
from gkd.storage.records.labels import LabelOrder

# Below this number of rows no progress is shown.
QUIET_ROWS = 100_000
# What a user may give as records.
FORMS = (
    "a folder with train.rec, a .rec, .parquet or .tar file, a folder of these, or a folder with "
    "one folder of images per identity"
)
Layout = Literal["insightface", "im2rec", "mixed", "folder", "parquet", "webdataset"]


class Records(ABC):
    """Labelled face images in rows; pickles by path and can be shared by threads and forks.

    path         absolute, as opened
    name         short name of the data set
    layout       how it is stored; a pack is "insightface" or "im2rec", several packs may be "mixed"
    indexed      False for packs without an .idx file, which were scanned
    label_order  how the identities got their numbers
    num_classes  every label is below it
    labels       int64 [N], -1 if a record's header is unreadable or its label names no class
    sizes        int64 [N], bytes of the encoded images, -1 if unreadable
    left_out     what lies among the data and is no row: lines for people
    """

    path: Path
    name: str
    layout: Layout
    indexed: bool = True
    label_order: LabelOrder = "recordio"
    num_classes: int
    labels: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    left_out: Sequence[str] = ()
    _paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """The record's own name: ``17``, or ``person_a/0003.jpg``."""
        return self._identify(row)[0]

    def where(self, row: int) -> str:
        """The record's location for messages: file, key and offset."""
        return self._identify(row)[1]

    def encoded(self, row: int) -> memoryview:
        """The encoded image, if possible a view of the file without a copy.

        Raises:
            CorruptRecordError: if it cannot be read or its label names no class; ``path`` is the
                record's location, ``problem`` what is wrong with it.
        """
        try:
            return self._read(row)
        except CorruptRecordError as error:
            error.path = self.where(row)
            raise

    def face(self, row: int) -> tuple[memoryview, npt.NDArray[np.uint8]]:
        """The encoded image, and its pixels, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: as ``encoded``, and if the bytes are no image or one of another
                size. The caller may add a remedy.
        """
        try:
            encoded = self._read(row)
            return encoded, decode_face(encoded)
        except CorruptRecordError as error:
            error.path = self.where(row)
            raise

    def image(self, row: int) -> npt.NDArray[np.uint8]:
        """The pixels of ``face``, with a remedy in its errors."""
        try:
            return self.face(row)[1]
        except CorruptRecordError as error:
            error.remedy = (
                "write this record again or leave it out: `gkd records verify` lists all such "
                "records"
            )
            raise

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name and current status of every file that the images come from.

        Raises:
            CorruptRecordError: if a file is missing.
        """
        for name, path in self._files():
            try:
                yield name, os.stat(path)  # noqa: PTH116  # millions of paths, as plain strings
            except OSError as error:
                raise CorruptRecordError(
                    f"{path}: {error.strerror}; put it back, or run the command again without it"
                ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of labels and encoded sizes (int64, little-endian) in row order."""
        hashed = hashlib.sha256(np.ascontiguousarray(self.labels, "<i8").data)
        hashed.update(np.ascontiguousarray(self.sizes, "<i8").data)
        return hashed.hexdigest()

    @abstractmethod
    def _identify(self, row: int) -> tuple[str, str]:
        """Key and location of a record."""

    @abstractmethod
    def _read(self, row: int) -> memoryview:
        """``encoded``, with errors that do not name the location."""

    def _files(self) -> Iterator[tuple[str, str | Path]]:
        """Name and path of every file that the images come from."""
        return ((path.name, path) for path in self._paths)


class Subset(Records):
    """The rows ``rows`` of other records, int64 [M].

    ``num_classes`` may be larger than theirs: the additional classes have no images.
    """

    def __init__(
        self, records: Records, rows: npt.NDArray[np.int64], num_classes: int | None = None
    ) -> None:
        self.records, self.rows = records, rows
        self.path, self.name = records.path, records.name
        self.layout, self.indexed = records.layout, records.indexed
        self.label_order, self.left_out = records.label_order, records.left_out
        self.num_classes = records.num_classes if num_classes is None else num_classes
        self.labels, self.sizes = records.labels[rows], records.sizes[rows]

    def _identify(self, row: int) -> tuple[str, str]:
        return self.records._identify(int(self.rows[row]))

    def _read(self, row: int) -> memoryview:
        return self.records._read(int(self.rows[row]))

    def _files(self) -> Iterator[tuple[str, str | Path]]:
        return self.records._files()
