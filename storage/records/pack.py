"""MXNet record packs as rows of images: InsightFace's layout and im2rec's."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Records
from gkd.storage.records.classes import MAX_CLASSES, labelled_classes, read_property
from gkd.storage.records.recordio import Headers, RecordReader, read_index
from gkd.storage.util.progress import progress

# From here on a float32 label cannot name every class.
EXACT_FLOAT32 = 2**24
HEADER_BLOCK = 1 << 18


class RecordFile(Records):
    """The images of a ``.rec`` file, in numeric order of their keys in the ``.idx`` beside it.

    Without an ``.idx`` the file is scanned and a record's key is its number in the file, from 0:
    the header's own id field is not unique in packs that were shuffled or merged.

    In the layout of InsightFace, key 0 and one record an identity hold two labels and no image;
    they are left out. In that of im2rec every record is an image. Which it is, the records say.
    ``num_classes`` comes from the first line of ``property`` where that file stands beside, else
    it is the largest label + 1, unless that is far more than so many images prove. Labels are
    float32: classes from 2^24 on may be rounded.

    A record whose header cannot be read, or whose label is no class, stays a row with label -1.

    Raises:
        ConfigError: where there is no image, ``property`` cannot be read, or the largest label
            is that of no data set of this size.
        CorruptRecordError: where the index cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.name = self.path.parent.name if self.path.stem == "train" else self.path.stem
        self.label_order = "recordio"
        self._reader = RecordReader(self.path)
        index = self.path.with_suffix(".idx")
        self.indexed = index.exists()
        if self.indexed:
            keys, offsets = read_index(index)
            order = np.argsort(keys, kind="stable")
            keys, offsets = keys[order], offsets[order]
        else:
            offsets = self._reader.scan()
            keys = np.arange(len(offsets))
        headers = _read_headers(self._reader, offsets)
        metadata = _metadata(keys, headers)
        self.layout = "insightface" if metadata.any() else "im2rec"
        images = ~metadata
        if not images.any():
            raise ConfigError(
                f"{self.path}: expected records with images, got {len(keys)} records and no image; "
                "name a pack that holds some"
            )
        self._keys, self._offsets = keys[images], offsets[images]
        self.sizes = headers.sizes[images]
        self._property = read_property(self.path.with_name("property"))
        bound = MAX_CLASSES if self._property is None else self._property
        self.labels = _classes(headers.labels[images], self.sizes, bound)
        self.num_classes = self._property or labelled_classes(self.labels, self.where)

    def key(self, row: int) -> str:
        """The record's key in the index, or its number in the file."""
        return str(self._keys[row])

    def where(self, row: int) -> str:
        """File, key and offset in words."""
        return self._reader.where(int(self._offsets[row]), self._keys[row])

    def encoded(self, row: int) -> memoryview:
        """The encoded image, a view of the memory map where the record is one part.

        Raises:
            CorruptRecordError: naming file, key and offset, what was expected and what was got.
        """
        # Twice as fast as indexing: plain integers without NumPy's scalars between.
        body = self._reader.body(self._offsets.item(row), self._keys.item(row))
        if self.labels.item(row) < 0:
            raise self._label_fault(row)
        return body

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name of the pack and of its index, and what the system says now of each.

        Raises:
            CorruptRecordError: where a file is gone.
        """
        for path in [self.path, self.path.with_suffix(".idx")][: 1 + self.indexed]:
            try:
                yield path.name, path.stat()
            except OSError as error:
                raise CorruptRecordError(f"{path}: {error.strerror}; put it back") from error

    def _label_fault(self, row: int) -> CorruptRecordError:
        (label, *_) = self._reader.read(int(self._offsets[row])).labels
        if self._property is None:
            expected, remedy = "a whole number from 0", "write the pack with class numbers"
        else:
            expected = f"a class from 0 to {self._property - 1}"
            remedy = "write this record again or leave it out"
            if label >= self._property and float(label).is_integer():
                remedy = "correct the first line of the property file if it belongs to another pack"
        return CorruptRecordError(
            f"{self.where(row)}: expected {expected}, got label {label:g}; {remedy}"
        )


def _read_headers(reader: RecordReader, offsets: npt.NDArray[np.int64]) -> Headers:
    """Headers of all records, read in the order of the file so that the disk reads ahead."""
    count = len(offsets)
    headers = Headers(
        np.empty(count, np.int64),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        np.empty(count, np.int64),
    )
    order = np.argsort(offsets, kind="stable")
    with progress("read headers", count, "records", quiet_below=QUIET_ROWS) as advance:
        for start in range(0, count, HEADER_BLOCK):
            rows = order[start : start + HEADER_BLOCK]
            block = reader.headers(offsets[rows])
            headers.flags[rows] = block.flags
            headers.labels[rows] = block.labels
            headers.seconds[rows] = block.seconds
            headers.sizes[rows] = block.sizes
            advance(len(rows))
    return headers


def _metadata(keys: npt.NDArray[np.int64], headers: Headers) -> npt.NDArray[np.bool_]:
    """Which records are InsightFace's header and identities, bool [n]; none in another layout.

    All of them have two labels and no image. That alone could be an image lost by a writer, so
    the pack must also lack an image at key 0, or hold the header record elsewhere: its labels
    ``[a, b]`` count the other records without an image, b - a.
    """
    empty: npt.NDArray[np.bool_] = (headers.flags == 2) & (headers.sizes == 0)
    if not empty.any():
        return empty
    image_at_zero = bool(np.any((keys == 0) & (headers.sizes >= 0) & ~empty))
    first, last = headers.labels[empty], headers.seconds[empty]
    # Exact only to the spacing of float32 at that size.
    miscount = np.abs((last - first) - (len(first) - 1))
    counted = bool(np.any(miscount <= np.where(last < EXACT_FLOAT32, 0, np.spacing(last))))
    return empty if counted or not image_at_zero else np.zeros_like(empty)


def _classes(
    labels: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64], bound: int
) -> npt.NDArray[np.int64]:
    """Float labels to class numbers below ``bound``, -1 for what is none, int64 [n]."""
    exact = labels.astype(np.float64)
    with np.errstate(invalid="ignore"):
        named = (sizes >= 0) & (exact >= 0) & (exact < bound) & (exact == np.floor(exact))
    return np.where(named, exact, -1).astype(np.int64)
