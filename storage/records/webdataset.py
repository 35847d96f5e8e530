"""WebDataset's tar shards as rows of images, read at random through an index of their headers.

A sample is the consecutive members with one key, their name up to the first dot of its last part:
an image (``jpg``, ``jpeg``, ``png``, ``bmp``, ``webp``) and its label, digits in ``cls`` or a field
of ``json``. Other members are ignored.

Source: webdataset/webdataset src/webdataset/tariterators.py.
"""

import bisect
import itertools
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import Records
from gkd.storage.records.folder import SUFFIXES
from gkd.storage.records.labels import LABEL_NAMES, MAX_CLASSES, count_classes, label_fault
from gkd.storage.records.multi_file import OpenFiles, Shards, map_file
from gkd.storage.records.recordio import QUIET_BYTES
from gkd.storage.records.tar import TarFault, members, next_header
from gkd.storage.util.progress import progress

TAR = ".tar"
# A map keeps its file open, and a process may open about a thousand files.
MAX_MAPS = 128
_IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES)
_MAX_CLS_BYTES = 20
_MAX_JSON_BYTES = 1 << 20


class WebDatasetRecords(Records):
    """The images of a ``.tar`` file, or of a folder's, in natural order of their names.

    Opening reads all headers; then every image is a view of a memory map. A record's key is
    WebDataset's, after the shard's name and a slash if there are several. ``num_classes`` comes
    from the first line of ``property`` in the folder or beside the file; without it, it is the
    largest label + 1.

    A sample without an image or a label, and a damaged piece, stay rows with label -1; reading
    resumes at the next intact header. The key of a damaged piece is ``@`` and its offset.

    Raises:
        ConfigError: for an archive without a labelled image, shards that are missing
            by their names, an unreadable ``property``, or an implausibly large label.
        CorruptRecordError: for a file without an intact sample, or a repeated key.
    """

    layout = "webdataset"

    def __init__(self, path: Path) -> None:
        self._shards = shards = Shards(path, TAR)
        self.path, self.name, self._paths = shards.root, shards.name, shards.paths
        self.left_out = shards.left_out
        self._stated = shards.num_classes
        self._maps = OpenFiles(shards.paths, map_file, MAX_MAPS)
        bound = MAX_CLASSES if self._stated is None else self._stated
        parts = []
        total = sum(self._maps.sizes)
        with progress(f"index {self.path}", total, "bytes", quiet_below=QUIET_BYTES) as advance:
            for number, shard in enumerate(shards.paths):
                parts.append(_index(shard, self._maps.get(number), bound, advance))
        self._ends = list(itertools.accumulate(map(len, parts)))
        columns = np.ascontiguousarray(np.concatenate(parts).T)
        self._starts, self._offsets, self.sizes, self.labels = columns
        if not (self.labels >= 0).any():
            first = f", the first: {self.where(0)}: {self._fault(0)}" if len(self) else ""
            raise ConfigError(
                f"{self.path}: expected samples of an image and its label like KEY.jpg and "
                f"KEY.cls, KEY without a dot, got none among {len(self)} samples{first}"
            )
        self.num_classes = self._stated or count_classes(self.labels, self.where)

    def _identify(self, row: int) -> tuple[str, str]:
        number, sample = self._sample(row)
        key = sample.key.decode(errors="backslashreplace")
        where = f"{self._paths[number]}, key {key}, offset {sample.start}"
        return self._shards.key(number, key), where

    def _read(self, row: int) -> memoryview:
        if self.labels.item(row) < 0:
            raise CorruptRecordError(self._fault(row))
        offset = self._offsets.item(row)
        view = self._maps.get(bisect.bisect_right(self._ends, row))
        return view[offset : offset + self.sizes.item(row)]

    def _sample(self, row: int) -> "tuple[int, _Sample]":
        """Number of the shard, and the sample read again."""
        number = bisect.bisect_right(self._ends, row)
        return number, next(_samples(self._maps.get(number), self._starts.item(row)))

    def _fault(self, row: int) -> str:
        return self._sample(row)[1].fault(self._stated)


class _Sample(NamedTuple):
    """Members with one key: offset and size of the data of each, by the name after the first dot.

    ``start`` is the offset of the first member's header. A damaged piece has no fields and says in
    ``damage`` what is wrong.
    """

    view: memoryview
    start: int
    key: bytes
    fields: dict[bytes, tuple[int, int]]
    damage: str = ""

    def images(self) -> list[bytes]:
        """The fields that are images; a valid sample has one."""
        return [name for name in self.fields if name in _IMAGES]

    def label(self) -> int | str | None:
        """The class number; what is found in its place if that is none; None without a label."""
        if b"cls" in self.fields:
            text = self._read(b"cls", _MAX_CLS_BYTES).strip()
            return int(text) if text.isdigit() else text.decode(errors="backslashreplace") or "''"
        if b"json" not in self.fields:
            return None
        try:
            content = msgspec.json.decode(self._read(b"json", _MAX_JSON_BYTES))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return "in broken JSON"
        found = [name for name in LABEL_NAMES if isinstance(content, dict) and name in content]
        if len(found) > 1:
            return " and ".join(found)
        value = content[found[0]] if found else None
        return value if value is None or type(value) is int else repr(value)[:40]

    def fault(self, stated: int | None) -> str:
        """What is wrong with a sample without one image or without a valid label."""
        if self.damage:
            return self.damage
        images, label = self.images(), self.label()
        if len(images) != 1:
            got = ", ".join(name.decode() for name in images) or "none; links are not followed"
            return f"expected one image beside its label, got {got}"
        if label is None:
            found = ", ".join(name.decode(errors="backslashreplace") for name in self.fields)
            return (
                f"expected a label in KEY.cls or as {LABEL_NAMES[0]} in KEY.json right beside the "
                f"image, got only {found}; write the shard again, with the members of a sample "
                "together (tar --sort=name does)"
            )
        return label_fault(label, stated)

    def _read(self, field: bytes, limit: int) -> bytes:
        offset, size = self.fields[field]
        return self.view[offset : offset + min(size, limit)].tobytes()


def _samples(view: memoryview, position: int = 0) -> Iterator[_Sample]:
    """Samples and damaged pieces from the header at ``position`` to the end."""
    sample = fault = None
    while True:
        try:
            for member in members(view, position):
                folder, slash, last = member.name.rpartition(b"/")
                stem, dot, field = last.partition(b".")
                if not stem or not dot:
                    continue
                key, field = folder + slash + stem, field.lower()
                if sample is None or key != sample.key or field in sample.fields:
                    if sample is not None:
                        yield sample
                    sample = _Sample(view, member.start, key, {})
                sample.fields[field] = member.data, member.size
            position = len(view)
        except TarFault as error:
            fault, position = error, next_header(view, error.reached)
        if sample is not None:
            yield sample
        if fault is not None:
            yield _Sample(view, fault.offset, b"@%d" % fault.offset, {}, str(fault))
        if position == len(view):
            return
        sample = fault = None


def _index(
    path: Path, view: memoryview, bound: int, advance: Callable[[int], None]
) -> npt.NDArray[np.int64]:
    """Samples of a shard: start, image's offset and size, label, int64 [n, 4].

    Offset and size are -1 if there is no single image; the label is -1 if there is no valid sample.
    """
    # Plain numbers, five per sample: millions of samples stay small.
    rows = array("q")
    reported, intact, damaged = 0, False, None
    for sample in _samples(view):
        images, label = sample.images(), sample.label()
        if sample.damage:
            damaged = damaged or sample
        else:
            intact = True
            if not images and label is None:
                continue
        single = len(images) == 1
        if not (single and isinstance(label, int) and 0 <= label < bound):
            label = -1
        offset, size = sample.fields[images[0]] if single else (-1, -1)
        rows.extend((sample.start, offset, size, label, hash(sample.key)))
        advance(sample.start - reported)
        reported = sample.start
    advance(len(view) - reported)
    if damaged and not intact:
        raise CorruptRecordError(
            f"{path}: offset {damaged.start}: {damaged.damage}; fetch or write it again"
        )
    index = np.array(rows, np.int64).reshape(-1, 5)
    _require_unique(path, view, index)
    return index[:, :4]


def _require_unique(path: Path, view: memoryview, index: npt.NDArray[np.int64]) -> None:
    """Refuse a repeated key: its members are not together, or a file was appended."""
    starts, hashes = index[:, 0], index[:, 4]
    order = np.argsort(hashes, kind="stable")
    for i in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]):
        first, again = (next(_samples(view, start)) for start in starts[order[i : i + 2]].tolist())
        if first.key == again.key:
            raise CorruptRecordError(
                f"{path}: expected every key once, got "
                f"{first.key.decode(errors='backslashreplace')} at offset {first.start} and again "
                f"at {again.start}; write the shard again, with the members of a sample together "
                "(tar --sort=name does)"
            )
