"""MXNet record packs as rows of images, in InsightFace's layout or im2rec's."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Layout, Records
from gkd.storage.records.labels import class_numbers, count_classes, label_fault, read_property
from gkd.storage.records.recordio import HEADER, RecordReader, read_index
from gkd.storage.util.input_files import refuse_foreign
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
        refuse_foreign(self.path, "a RecordIO file", error=CorruptRecordError, allowed=("empty",))
        self._reader = RecordReader(self.path)
        index = self.path.with_suffix(".idx")
        self.indexed = index.exists()
        if self.indexed:
            self._paths = [self.path, index]
            keys, offsets = read_index(index)
            order = np.argsort(keys, kind="stable")
            keys, offsets = keys[order], offsets[order]
        else:
            self._paths = [self.path]
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

    def _identify(self, row: int) -> tuple[str, str]:
        key = str(self._keys[row])
        return key, f"{self.path}, key {key}, offset {self._offsets[row]}"

    def _read(self, row: int) -> memoryview:
        # ``item`` gives plain integers, without NumPy's scalars: half the time of indexing.
        offset = self._offsets.item(row)
        body = self._reader.body(offset)
        if self.labels.item(row) < 0:
            label = float(self._reader.read(offset).labels[0])
            remedy = "write this record again or leave it out"
            if self._stated is None:
                remedy = "write the pack with class numbers"
            elif label >= self._stated and label.is_integer():
                remedy = "correct the first line of the property file if it belongs to another pack"
            raise CorruptRecordError(label_fault(f"{label:g}", self._stated, remedy))
        return body


class RecordParts(Records):
    """The images of several packs of one folder, one pack after the other, as WebFace42M comes.

    The packs share one numbering of the identities, and the ``property`` file beside them. A key is
    the pack's name, a slash and the key in that pack: ``webface_03/17``. Raises what ``RecordFile``
    raises.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts = parts = [RecordFile(path) for path in paths]
        self.path = parts[0].path.parent
        self.name = self.path.name
        layouts: set[Layout] = {part.layout for part in parts}
        self.layout = layouts.pop() if len(layouts) == 1 else "mixed"
        self.indexed = all(part.indexed for part in parts)
        self.num_classes = max(part.num_classes for part in parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._paths = [path for part in parts for path in part._paths]
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))

    def _identify(self, row: int) -> tuple[str, str]:
        part, inner = self._locate(row)
        key, where = part._identify(inner)
        return f"{part.path.stem}/{key}", where

    def _read(self, row: int) -> memoryview:
        part, inner = self._locate(row)
        return part._read(inner)

    def _locate(self, row: int) -> tuple[RecordFile, int]:
        number = bisect.bisect_right(self._starts, row) - 1
        return self.parts[number], row - self._starts[number]


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
    first, last = headers["label"][empty], headers["second"][empty]
    # Exact only to the spacing of float32 at that size.
    miscount = np.abs((last - first) - (len(first) - 1))
    counted = np.any(miscount <= np.where(last < EXACT_FLOAT32, 0, np.spacing(last)))
    image_at_zero = np.any((keys == 0) & (headers["size"] >= 0) & ~empty)
    return empty if counted or not image_at_zero else np.zeros_like(empty)
