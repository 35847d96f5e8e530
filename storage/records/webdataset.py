"""WebDataset's tar shards as rows of images, read at random through an index of their headers.

A sample is the members that stand together under one key, their name up to the first dot of its
last part: an image (``jpg``, ``jpeg``, ``png``, ``bmp``, ``webp``) and its label, digits in ``cls``
or a field of ``json``. Other members are passed over.

Source: webdataset/webdataset src/webdataset/tariterators.py.
"""

import mmap
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import Records
from gkd.storage.records.classes import (
    LABEL_NAMES,
    MAX_CLASSES,
    label_fault,
    labelled_classes,
    read_property,
)
from gkd.storage.records.folder import SUFFIXES
from gkd.storage.records.multi_file import Shards, require_fetched
from gkd.storage.records.recordio import QUIET_BYTES, TOLD_BYTES
from gkd.storage.records.tar import TarFault, members, next_header
from gkd.storage.util.progress import progress

TAR = ".tar"
# A map keeps its file open, and a process may open about a thousand.
MOST_MAPS = 128
_IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES)
_MOST_CLS_BYTES = 20
_MOST_JSON_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class WebDatasetRecords(Records):
    """The images of a ``.tar`` file, or of a folder's, in natural order of their names.

    The headers are walked through when it is opened; then every image is a view of a memory map.
    A record's key is WebDataset's, after the shard's name and a slash where there are several.
    ``num_classes`` comes from the first line of ``property`` in the folder or beside the file, else
    it is the largest label + 1, unless that is far more than so many images prove.

    A sample without an image or a label, and a place that is damaged, stay rows with label -1; the
    walk goes on at the next header that is whole.

    Raises:
        ConfigError: for a compressed archive, one without a labelled image, shards that are missing
            by their names, an unreadable ``property``, or a largest label of no data set this size.
        CorruptRecordError: for a file without a whole sample, or a key that stands twice in it.
    """

    def __init__(self, path: Path) -> None:
        self._shards = shards = Shards(path, TAR)
        self.path, self.name = shards.root, shards.name
        self.layout, self.indexed, self.label_order = "webdataset", True, "recordio"
        for shard in shards.paths:
            require_fetched(shard)
        self._property = read_property(shards.property_path)
        self._maps = _Maps(shards.paths)
        bound = MAX_CLASSES if self._property is None else self._property
        parts = []
        whole = sum(self._maps.sizes)
        with progress(f"index {self.path}", whole, "bytes", quiet_below=QUIET_BYTES) as advance:
            for number, shard in enumerate(shards.paths):
                parts.append(_index(shard, self._maps[number], bound, advance))
                shards.append(len(parts[-1].labels))
        # Offsets of each sample's first header and of its image.
        self._starts = np.concatenate([part.starts for part in parts])
        self._offsets = np.concatenate([part.offsets for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.labels = np.concatenate([part.labels for part in parts])
        if not (self.labels >= 0).any():
            first = f", the first: {self.where(0)}: {self._fault(0)}" if len(self) else ""
            raise ConfigError(
                f"{self.path}: expected samples of an image and its label like KEY.jpg and "
                f"KEY.cls, KEY without a dot, got none among {len(self)} samples{first}"
            )
        self.num_classes = self._property or labelled_classes(self.labels, self.where)

    def key(self, row: int) -> str:
        """WebDataset's key, or the offset where that cannot be read."""
        number, _ = self._shards.place(row)
        start = int(self._starts[row])
        return self._shards.key(number, _key_at(self._maps[number], start))

    def where(self, row: int) -> str:
        """File, key and offset in words."""
        number, _ = self._shards.place(row)
        start = int(self._starts[row])
        key = _key_at(self._maps[number], start)
        return f"{self._shards.paths[number]}, key {key}, offset {start}"

    def encoded(self, row: int) -> memoryview:
        """The encoded image, a view of the memory map.

        Raises:
            CorruptRecordError: naming file, key and offset, what was expected and what was got.
        """
        if self.labels.item(row) < 0:
            raise CorruptRecordError(f"{self.where(row)}: {self._fault(row)}")
        number, _ = self._shards.place(row)
        offset = self._offsets.item(row)
        return self._maps[number][offset : offset + self.sizes.item(row)]

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name of every shard, and what the system says now of it."""
        return self._shards.stamps()

    def _fault(self, row: int) -> str:
        number, _ = self._shards.place(row)
        try:
            sample = next(_samples(self._maps[number], int(self._starts[row])))
        except TarFault as fault:
            return str(fault)
        return sample.fault(self._property)


class _Sample(NamedTuple):
    """Members under one key: offset and size of each one's data, by what follows the first dot."""

    view: memoryview
    start: int
    key: bytes
    fields: dict[bytes, tuple[int, int]]

    def images(self) -> list[bytes]:
        """The fields that are images; one of them, where all is well."""
        return [name for name in self.fields if name in _IMAGES]

    def label(self) -> int | str | None:
        """The class's number; what stands in its place where that is none; None without one."""
        if (place := self.fields.get(b"cls")) is not None:
            text = self._read(place, _MOST_CLS_BYTES).strip()
            return int(text) if text.isdigit() else text.decode(errors="backslashreplace") or "''"
        if (place := self.fields.get(b"json")) is None:
            return None
        try:
            content = msgspec.json.decode(self._read(place, _MOST_JSON_BYTES))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return "in broken JSON"
        found = {}
        if isinstance(content, dict):
            found = {name: content[name] for name in LABEL_NAMES if name in content}
        if len(found) > 1:
            return " and ".join(found)
        value = next(iter(found.values()), None)
        return value if value is None or type(value) is int else repr(value)[:40]

    def fault(self, count: int | None) -> str:
        """What is wrong with a sample without an image or without a label below ``count``."""
        images, label = self.images(), self.label()
        if len(images) != 1:
            got = ", ".join(name.decode() for name in images) or "none; links are not followed"
            return f"expected one image beside its label, got {got}"
        if label is None:
            beside = ", ".join(name.decode(errors="backslashreplace") for name in self.fields)
            return (
                f"expected a label in KEY.cls or as {LABEL_NAMES[0]} in KEY.json right beside the "
                f"image, got only {beside}; write the shard again, with the members of a sample "
                "together (tar --sort=name does)"
            )
        return label_fault(label, count)

    def _read(self, place: tuple[int, int], most: int) -> bytes:
        offset, size = place
        return self.view[offset : offset + min(size, most)].tobytes()


class _Index(NamedTuple):
    """Samples of a shard, int64 [n]; -1 where there is no image, or the label is no class."""

    starts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def _index(path: Path, view: memoryview, bound: int, advance: Callable[[int], None]) -> _Index:
    """Walk through a shard; labels from ``bound`` on are no class."""
    for magic, kind in _COMPRESSED.items():
        if view[: len(magic)] == magic:
            raise ConfigError(
                f"{path}: expected a plain tar file, got one compressed by {kind}, where nothing "
                "can be read at random; unpack it once, its images take no more room"
            )
    # Numbers in arrays, a few dozen bytes a sample: millions of samples stay small.
    starts, offsets, sizes, labels, hashes = (array("q") for _ in range(5))
    position = told = samples = 0
    while True:
        try:
            for sample in _samples(view, position):
                samples += 1
                images, label = sample.images(), sample.label()
                if not images and label is None:
                    continue
                starts.append(sample.start)
                hashes.append(hash(sample.key))
                alone = len(images) == 1
                if not alone or not isinstance(label, int) or not 0 <= label < bound:
                    label = -1
                labels.append(label)
                offset, size = sample.fields[images[0]] if alone else (-1, -1)
                offsets.append(offset)
                sizes.append(size)
                if sample.start - told > TOLD_BYTES:
                    advance(sample.start - told)
                    told = sample.start
            break
        except TarFault as fault:
            position = next_header(view, fault.offset)
            lost = position == len(view)
            if lost and not samples:
                raise CorruptRecordError(
                    f"{path}: offset {fault.offset}: {fault}; fetch or write it again"
                ) from fault
            starts.append(fault.offset)
            hashes.append(hash(_place_key(fault.offset)))
            for numbers in (offsets, sizes, labels):
                numbers.append(-1)
            if lost:
                break
    advance(len(view) - told)
    index = _Index(*(np.array(each, np.int64) for each in (starts, offsets, sizes, labels)))
    _require_once(path, view, index.starts, np.array(hashes, np.int64))
    return index


def _samples(view: memoryview, position: int = 0) -> Iterator[_Sample]:
    """Samples from the header at ``position`` on.

    Raises:
        TarFault: at damage, after the members before it.
    """
    sample = None
    damage = None
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
    except TarFault as fault:
        damage = fault
    if sample is not None:
        yield sample
    if damage is not None:
        raise damage


def _key_at(view: memoryview, start: int) -> str:
    try:
        key = next(_samples(view, start)).key
    except TarFault:
        key = _place_key(start)
    return key.decode(errors="backslashreplace")


def _place_key(offset: int) -> bytes:
    return b"@%d" % offset


def _require_once(
    path: Path,
    view: memoryview,
    starts: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.int64],
) -> None:
    """Refuse a key that stands twice: its members do not stand together, or a file was appended."""
    order = np.argsort(hashes, kind="stable")
    for at in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        first, again = (int(starts[row]) for row in order[at : at + 2])
        key = _key_at(view, first)
        if key == _key_at(view, again):
            raise CorruptRecordError(
                f"{path}: expected every key once, got {key} at offset {first} and again at "
                f"{again}; write the shard again, with the members of a sample together (tar "
                "--sort=name does)"
            )


class _Maps:
    """Memory maps of files, opened when they are asked for, the last ``MOST_MAPS`` kept.

    Pickles by path; a file that changed its size is refused.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.sizes = [path.stat().st_size for path in paths]
        self._views: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _views={}, _lock=threading.Lock())

    def __getitem__(self, number: int) -> memoryview:
        view = self._views.get(number)
        return self._open(number) if view is None else view

    def _open(self, number: int) -> memoryview:
        path, expected = self.paths[number], self.sizes[number]
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise CorruptRecordError(f"{path}: {error.strerror}; put it back") from error
        if size != expected:
            raise CorruptRecordError(
                f"{path}: expected {expected} bytes as when it was opened, got {size}; "
                "the file changed under a running command: run it again"
            )
        view = memoryview(mapped)
        with self._lock:
            if len(self._views) >= MOST_MAPS:
                # The map lives on while someone holds a view of it.
                self._views.pop(next(iter(self._views)))
            self._views[number] = view
        return view
