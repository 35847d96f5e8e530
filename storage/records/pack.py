"""MXNet record packs as rows of images, in InsightFace's layout or im2rec's."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Layout, Records
from gkd.storage.records.labels import class_numbers, count_classes, label_fault, read_property
from gkd.storage.records.recordio import HEADER, RecordReader, read_index
from gkd.storage.util.progress import progress

# From here on float32 labels cannot represent every class.
EXACT_FLOAT32 = 2**24
HEADER_BLOCK = 1 << 18


class RecordFile(Records):
    """The images of a ``.rec`` file, in numeric order of their keys in the ``.idx`` beside it.

    Without an ``.idx`` the file is scanned, and a record's key is its number in the file from 0:
    the header's own id field is not unique in packs that were shuffled or merged.

    In InsightFace's layout, key 0 and one record per identity hold two labels and no image; they
    are left out. In im2rec's layout every record is an image. The records show which layout it is.
    ``num_classes`` comes from the first line of the file ``property`` beside the pack; without it,
    it is the largest label + 1. Labels are float32: classes from 2^24 on may be rounded.

    A record with an unreadable header, or whose label names no class, stays a row with label -1.

    Raises:
        ConfigError: if there is no image, ``property`` cannot be read, or the largest label is
            implausible for a data set of this size.
        CorruptRecordError: if the index cannot be read.
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
        metadata = _metadata_records(keys, headers)
        self.layout = "insightface" if metadata.any() else "im2rec"
        images = ~metadata
        if not images.any():
            raise ConfigError(
                f"{self.path}: expected records with images, got {len(keys)} records and no image; "
                "name a pack with images"
            )
        self._keys, self._offsets, headers = keys[images], offsets[images], headers[images]
        self.sizes = headers["size"].copy()
        self._stated = read_property(self.path.with_name("property"))
        self.labels = class_numbers(headers["label"], self._stated, self.sizes >= 0)
        self.num_classes = self._stated or count_classes(self.labels, self.where)

    def key(self, row: int) -> str:
        """The record's key in the index, or its number in the file."""
        return str(self._keys[row])

    def where(self, row: int) -> str:
        """File, key and offset."""
        return f"{self.path}, key {self._keys[row]}, offset {self._offsets[row]}"

    def _read(self, row: int) -> memoryview:
        # ``item`` gives plain integers, without NumPy's scalars: half the time of indexing.
        offset = self._offsets.item(row)
        body = self._reader.body(offset)
        if self.labels.item(row) < 0:
            raise CorruptRecordError(self._label_fault(float(self._reader.read(offset).labels[0])))
        return body

    def _label_fault(self, label: float) -> str:
        remedy = "write this record again or leave it out"
        if self._stated is None:
            remedy = "write the pack with class numbers"
        elif label >= self._stated and label.is_integer():
            remedy = "correct the first line of the property file if it belongs to another pack"
        return label_fault(f"{label:g}", self._stated, remedy)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in [self.path, self.path.with_suffix(".idx")][: 1 + self.indexed]:
            yield path.name, path


class RecordParts(Records):
    """The images of several packs of one folder, one pack after the other, as WebFace42M comes.

    The packs share one numbering of the identities, and the ``property`` file beside them. A key is
    the pack's name, a slash and the key in that pack.

    Raises:
        ConfigError: if a pack has no image, or ``property`` cannot be read.
        CorruptRecordError: if an index cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts = tuple(RecordFile(path) for path in paths)
        self.path = self.parts[0].path.parent
        self.name = self.path.name
        self.label_order = self.parts[0].label_order
        layouts: set[Layout] = {part.layout for part in self.parts}
        self.layout = layouts.pop() if len(layouts) == 1 else "mixed"
        self.indexed = all(part.indexed for part in self.parts)
        self.num_classes = max(part.num_classes for part in self.parts)
        self.labels = np.concatenate([part.labels for part in self.parts])
        self.sizes = np.concatenate([part.sizes for part in self.parts])
        self._ends = np.cumsum([len(part) for part in self.parts])

    def key(self, row: int) -> str:
        """The pack's name and the record's key in it: ``webface_03/17``."""
        part, inner = self._locate(row)
        return f"{part.path.stem}/{part.key(inner)}"

    def where(self, row: int) -> str:
        """File, key and offset."""
        part, inner = self._locate(row)
        return part.where(inner)

    def _read(self, row: int) -> memoryview:
        part, inner = self._locate(row)
        return part._read(inner)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for part in self.parts:
            yield from part._files()

    def _locate(self, row: int) -> tuple[RecordFile, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        part = self.parts[number]
        return part, row - int(self._ends[number]) + len(part)


def _read_headers(reader: RecordReader, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """Headers of all records [n], read in file order so that the disk can read ahead."""
    headers = np.empty(len(offsets), HEADER)
    order = np.argsort(offsets, kind="stable")
    with progress("read headers", len(offsets), "records", quiet_below=QUIET_ROWS) as advance:
        for start in range(0, len(offsets), HEADER_BLOCK):
            rows = order[start : start + HEADER_BLOCK]
            headers[rows] = reader.headers(offsets[rows])
            advance(len(rows))
    return headers


def _metadata_records(
    keys: npt.NDArray[np.int64], headers: npt.NDArray[np.void]
) -> npt.NDArray[np.bool_]:
    """Marks InsightFace's header and identity records, bool [n]; none in another layout.

    All of them have two labels and no image. That alone could be an image lost by a writer, so the
    pack must also lack an image at key 0, or hold the header record elsewhere: its labels
    ``[a, b]`` count the other records without an image, b - a.
    """
    empty: npt.NDArray[np.bool_] = (headers["flag"] == 2) & (headers["size"] == 0)
    if not empty.any():
        return empty
    image_at_zero = bool(np.any((keys == 0) & (headers["size"] >= 0) & ~empty))
    first, last = headers["label"][empty], headers["second"][empty]
    # Exact only to the spacing of float32 at that size.
    miscount = np.abs((last - first) - (len(first) - 1))
    counted = bool(np.any(miscount <= np.where(last < EXACT_FLOAT32, 0, np.spacing(last))))
    return empty if counted or not image_at_zero else np.zeros_like(empty)
