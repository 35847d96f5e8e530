"""WebDataset's tar shards as rows of images, read at random through an index of their headers.

A sample is the consecutive members with one key, their name up to the first dot of its last part:
an image (``jpg``, ``jpeg``, ``png``, ``bmp``, ``webp``) and its label, digits in ``cls`` or a field
of ``json``. Other members are ignored.

Source: webdataset/webdataset src/webdataset/tariterators.py.
"""

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
from gkd.storage.records.labels import (
    LABEL_NAMES,
    MAX_CLASSES,
    count_classes,
    label_fault,
    read_property,
)
from gkd.storage.records.multi_file import OpenFiles, Shards, map_file
from gkd.storage.records.recordio import PROGRESS_BYTES, QUIET_BYTES
from gkd.storage.records.tar import TarFault, members, next_header
from gkd.storage.util.progress import progress

TAR = ".tar"
# A map keeps its file open, and a process may open about a thousand files.
MAX_MAPS = 128
_IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES)
_MAX_CLS_BYTES = 20
_MAX_JSON_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class WebDatasetRecords(Records):
    """The images of a ``.tar`` file, or of a folder's, in natural order of their names.

    Opening reads all headers; then every image is a view of a memory map. A record's key is
    WebDataset's, after the shard's name and a slash if there are several. ``num_classes`` comes
    from the first line of ``property`` in the folder or beside the file; without it, it is the
    largest label + 1.

    A sample without an image or a label, and a damaged piece, stay rows with label -1; reading
    resumes at the next intact header.

    Raises:
        ConfigError: for a compressed archive, one without a labelled image, shards that are missing
            by their names, an unreadable ``property``, or an implausibly large label.
        CorruptRecordError: for a file without an intact sample, or a repeated key.
    """

    def __init__(self, path: Path) -> None:
        self._shards = shards = Shards(path, TAR)
        self.path, self.name = shards.root, shards.name
        self.layout, self.indexed, self.label_order = "webdataset", True, "recordio"
        self._stated = read_property(shards.property_path)
        self._maps = OpenFiles(shards.paths, map_file, MAX_MAPS)
        bound = MAX_CLASSES if self._stated is None else self._stated
        parts = []
        total = sum(self._maps.sizes)
        with progress(f"index {self.path}", total, "bytes", quiet_below=QUIET_BYTES) as advance:
            for number, shard in enumerate(shards.paths):
                parts.append(_index(shard, self._maps[number], bound, advance))
                shards.append(len(parts[-1]))
        columns = np.ascontiguousarray(np.concatenate(parts).T)
        self._starts, self._offsets, self.sizes, self.labels = columns
        if not (self.labels >= 0).any():
            first = f", the first: {self.where(0)}: {self._fault(0)}" if len(self) else ""
            raise ConfigError(
                f"{self.path}: expected samples of an image and its label like KEY.jpg and "
                f"KEY.cls, KEY without a dot, got none among {len(self)} samples{first}"
            )
        self.num_classes = self._stated or count_classes(self.labels, self.where)

    def key(self, row: int) -> str:
        """WebDataset's key, or the offset if the key cannot be read."""
        number, view, start = self._locate(row)
        return self._shards.key(number, _key_at(view, start))

    def where(self, row: int) -> str:
        """File, key and offset."""
        number, view, start = self._locate(row)
        return f"{self._shards.paths[number]}, key {_key_at(view, start)}, offset {start}"

    def _read(self, row: int) -> memoryview:
        if self.labels.item(row) < 0:
            raise CorruptRecordError(self._fault(row))
        number, _ = self._shards.locate(row)
        offset = self._offsets.item(row)
        return self._maps[number][offset : offset + self.sizes.item(row)]

    def _files(self) -> Iterator[tuple[str, Path]]:
        return self._shards.files()

    def _locate(self, row: int) -> tuple[int, memoryview, int]:
        """Number and map of the sample's shard, and the offset of its first header."""
        number, _ = self._shards.locate(row)
        return number, self._maps[number], self._starts.item(row)

    def _fault(self, row: int) -> str:
        _, view, start = self._locate(row)
        try:
            return next(_samples(view, start)).fault(self._stated)
        except TarFault as fault:
            return str(fault)


class _Sample(NamedTuple):
    """Members with one key: offset and size of the data of each, by the name after the first dot.

    ``start`` is the offset of the first member's header.
    """

    view: memoryview
    start: int
    key: bytes
    fields: dict[bytes, tuple[int, int]]

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
        found = {}
        if isinstance(content, dict):
            found = {name: content[name] for name in LABEL_NAMES if name in content}
        if len(found) > 1:
            return " and ".join(found)
        value = next(iter(found.values()), None)
        return value if value is None or type(value) is int else repr(value)[:40]

    def fault(self, stated: int | None) -> str:
        """What is wrong with a sample without one image or without a valid label."""
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


def _index(
    path: Path, view: memoryview, bound: int, advance: Callable[[int], None]
) -> npt.NDArray[np.int64]:
    """Samples of a shard: start, image's offset and size, label, int64 [n, 4].

    Offset and size are -1 if there is no single image; the label is -1 if there is no valid sample.
    """
    for magic, kind in _COMPRESSED.items():
        if view[: len(magic)] == magic:
            raise ConfigError(
                f"{path}: expected a plain tar file, got one compressed by {kind}, which cannot be "
                "read at random; decompress it once, its images take no more space"
            )
    # Plain numbers, five per sample: millions of samples stay small.
    rows = array("q")
    position = reported = samples = 0
    while True:
        try:
            for sample in _samples(view, position):
                samples += 1
                images, label = sample.images(), sample.label()
                if not images and label is None:
                    continue
                single = len(images) == 1
                if not (single and isinstance(label, int) and 0 <= label < bound):
                    label = -1
                offset, size = sample.fields[images[0]] if single else (-1, -1)
                rows.extend((sample.start, offset, size, label, hash(sample.key)))
                if sample.start - reported > PROGRESS_BYTES:
                    advance(sample.start - reported)
                    reported = sample.start
            break
        except TarFault as fault:
            position = next_header(view, fault.offset)
            if position == len(view) and not samples:
                raise CorruptRecordError(
                    f"{path}: offset {fault.offset}: {fault}; fetch or write it again"
                ) from fault
            rows.extend((fault.offset, -1, -1, -1, hash(_offset_key(fault.offset))))
            if position == len(view):
                break
    advance(len(view) - reported)
    index = np.array(rows, np.int64).reshape(-1, 5)
    _require_unique(path, view, index[:, 0], index[:, 4])
    return index[:, :4]


def _samples(view: memoryview, position: int = 0) -> Iterator[_Sample]:
    """Samples from the header at ``position`` to the end.

    Raises:
        TarFault: at damage, after the samples before it.
    """
    sample = None
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
    except TarFault:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def _key_at(view: memoryview, start: int) -> str:
    try:
        key = next(_samples(view, start)).key
    except TarFault:
        key = _offset_key(start)
    return key.decode(errors="backslashreplace")


def _offset_key(offset: int) -> bytes:
    return b"@%d" % offset


def _require_unique(
    path: Path,
    view: memoryview,
    starts: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.int64],
) -> None:
    """Refuse a repeated key: its members are not together, or a file was appended."""
    order = np.argsort(hashes, kind="stable")
    for i in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        first, again = (int(starts[row]) for row in order[i : i + 2])
        key = _key_at(view, first)
        if key == _key_at(view, again):
            raise CorruptRecordError(
                f"{path}: expected every key once, got {key} at offset {first} and again at "
                f"{again}; write the shard again, with the members of a sample together (tar "
                "--sort=name does)"
            )
