"""MXNet's RecordIO files without MXNet: framing, image headers, indexes.

A record is ``u32 magic, u32 word, data`` padded with zeros to 4 bytes, little-endian; the word
holds a part flag in its upper 3 bits and the length in the other 29. If data holds the magic at a
multiple of 4, the writer splits it there into parts and drops those 4 bytes; the reader puts them
back. An image record's data is the header ``IfQQ`` (flag, label, id, id2), ``flag`` float32 labels
if flag > 0, then the encoded image.

Source: dmlc/dmlc-core include/dmlc/recordio.h and src/recordio.cc, apache/mxnet
python/mxnet/recordio.py.
"""

import mmap
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

from gkd.storage.errors import ConfigError, CorruptDataError, CorruptRecordError
from gkd.storage.records.multi_file import map_file, require_unchanged
from gkd.storage.util.files import publish_file
from gkd.storage.util.input_files import refuse_foreign
from gkd.storage.util.progress import progress

MAGIC = 0xCED7230A
LENGTH_BITS = 29
MAX_LENGTH = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)
# Of hostile files: what is known of broken records takes some hundred megabytes at most.
MAX_BROKEN = 1 << 20
# Scans of smaller files show no progress.
QUIET_BYTES = 1 << 30
# The header of a record: number of labels, 0 for the single one of the header; first label; second
# label, 0 if there is none; bytes of the encoded image. Flag and size are -1 if it is unreadable.
HEADER = np.dtype([("flag", "i8"), ("label", "f4"), ("second", "f4"), ("size", "i8")])

_MAGIC_BYTES = struct.pack("<I", MAGIC)
_MAGIC_PATTERN = re.compile(re.escape(_MAGIC_BYTES))
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_START = struct.Struct("<III")  # magic, word, flag


class Record(NamedTuple):
    """A parsed image record.

    labels  float32 [max(flag, 1)]    the class comes first
    body    the encoded image, without a copy if the record is one part
    """

    flag: int
    labels: npt.NDArray[np.float32]
    id: int
    id2: int
    body: memoryview


class RecordReader:
    """One memory map of a ``.rec`` file: holds no position, so threads and forks can share it.

    Pickles by path; a file that has changed its size since is refused. Errors do not name the file
    and the record's offset: the caller knows them.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path.absolute()
        if size is not None:
            require_unchanged(path, size)
        self._view = map_file(self.path)
        self.size = len(self._view)
        self._map = self._view.obj if self.size else None
        self._words = np.frombuffer(self._view[: self.size // 4 * 4], "<u4")
        # Where later parts of broken records start, and what is wrong with all that lead there:
        # known, thousands of records that lead into one broken chain are walked in linear time.
        self._broken: dict[int, str] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return RecordReader, (self.path, self.size)

    def payload(self, offset: int) -> memoryview:
        """Data of the record at ``offset``: a view of the map if it is one part, else a copy.

        Raises:
            CorruptRecordError: if there is no complete record.
        """
        parts = [self._view[start : start + length] for start, length in self._parts(offset)]
        return parts[0] if len(parts) == 1 else memoryview(_MAGIC_BYTES.join(parts))

    def read(self, offset: int) -> Record:
        """The image record at ``offset``.

        Raises:
            CorruptRecordError: as ``payload``, and if the header does not fit the data.
        """
        payload = self.payload(offset)
        if len(payload) < _HEADER.size:
            raise CorruptRecordError(
                f"expected a header of {_HEADER.size} bytes, got {len(payload)}"
            )
        flag, label, id_, id2 = _HEADER.unpack_from(payload)
        start = _HEADER.size + 4 * flag
        if start > len(payload):
            raise CorruptRecordError(
                f"expected {flag} labels by the header's flag, got {len(payload)} bytes"
            )
        labels = np.array([label], np.float32)
        if flag:
            labels = np.frombuffer(payload, "<f4", flag, _HEADER.size)
        return Record(flag, labels, id_, id2, payload[start:])

    def body(self, offset: int) -> memoryview:
        """The encoded image of the record at ``offset``; raises what ``read`` raises."""
        self._require_whole()
        # Training reads single images: the common case, an undamaged record of one part, is fast.
        if 0 <= offset <= self.size - _START.size and not offset & 3:
            magic, word, flag = _START.unpack_from(self._view, offset)
            start = offset + _FRAME.size + _HEADER.size + 4 * flag
            end = offset + _FRAME.size + word
            # With a part flag the word is larger than any length.
            if magic == MAGIC and word <= MAX_LENGTH and start <= end <= self.size:
                return self._view[start:end]
        return self.read(offset).body

    def scan(self) -> npt.NDArray[np.int64]:
        """Offsets of all records in file order, int64, by walking the file without an index.

        If the walk meets damage, the offset of the damage is in the result (reading there raises
        an error that describes it) and the walk resumes at the next start of a record.
        """
        offsets = []
        position = 0
        with progress(f"scan {self.path}", self.size, "bytes", quiet_below=QUIET_BYTES) as advance:
            while position < self.size:
                offsets.append(position)
                try:
                    *_, (start, length) = self._parts(position)
                    position = start + (length + 3) // 4 * 4
                except CorruptRecordError:
                    position = self._next_start(position + 4)
                advance(position - offsets[-1])
        return np.array(offsets, np.int64)

    def headers(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Headers (``HEADER``) of the records at ``offsets``, both [n], gathered without a loop."""
        self._require_whole()
        headers = np.zeros(len(offsets), HEADER)
        headers["flag"] = headers["size"] = -1
        words, floats = self._words, self._words.view("<f4")
        aligned = (offsets >= 0) & (offsets & 3 == 0)
        rows = np.flatnonzero(aligned & (offsets <= self.size - _FRAME.size - _HEADER.size))
        at = offsets[rows] >> 2
        starts_record = words[at] == MAGIC
        part_flags = words[at + 1] >> LENGTH_BITS
        lengths = (words[at + 1] & MAX_LENGTH).astype(np.int64)
        split = rows[starts_record & (part_flags == FIRST)]

        label_counts = words[at + 2].astype(np.int64)
        sizes = lengths - _HEADER.size - 4 * label_counts
        readable = starts_record & (part_flags == WHOLE) & (sizes >= 0)
        readable &= offsets[rows] + _FRAME.size + lengths <= self.size
        rows, at, label_counts = rows[readable], at[readable], label_counts[readable]
        headers["flag"][rows] = label_counts
        headers["size"][rows] = sizes[readable]
        # Without a label array the label is the header's second field, else the array follows it.
        headers["label"][rows] = floats[np.where(label_counts > 0, at + 8, at + 3)]
        paired = label_counts > 1
        headers["second"][rows[paired]] = floats[at[paired] + 9]

        for row in split:
            try:
                record = self.read(int(offsets[row]))
            except CorruptRecordError:
                continue  # stays marked unreadable, as the broken headers above
            second = record.labels[1] if record.flag > 1 else 0
            headers[row] = record.flag, record.labels[0], second, len(record.body)
        return headers

    def _require_whole(self) -> None:
        """Refuse a file that was cut since it was mapped: reads beyond its end kill a process."""
        if isinstance(self._map, mmap.mmap) and (size := self._map.size()) < self.size:
            raise CorruptDataError(
                path=self.path,
                expected=f"{self.size} bytes as when it was opened",
                got=f"{size}: the file was cut or replaced while it is read",
                remedy="restore the file and start again",
            )

    def _parts(self, offset: int) -> Iterator[tuple[int, int]]:
        """Start and length of the data of each part of the record at ``offset``."""
        self._require_whole()
        flag, start, length = self._part(offset)
        if flag not in (WHOLE, FIRST):
            raise CorruptRecordError(f"expected the start of a record, got part flag {flag}")
        yield start, length
        walked: list[int] = []
        try:
            while flag not in (WHOLE, LAST):
                # Every part but the last ends at a multiple of 4.
                position = start + length
                if position in self._broken or len(self._broken) > MAX_BROKEN:
                    raise CorruptRecordError(self._broken.get(position, "too many broken records"))
                walked.append(position)
                flag, start, length = self._part(position, f" at offset {position}")
                if flag not in (MIDDLE, LAST):
                    raise CorruptRecordError(
                        f"expected a later part at offset {position}, got flag {flag}"
                    )
                yield start, length
        except CorruptRecordError as error:
            self._broken.update(dict.fromkeys(walked, str(error)))
            raise

    def _part(self, position: int, location: str = "") -> tuple[int, int, int]:
        """Flag, and start and length of the data, of the part at ``position``."""
        if not 0 <= position <= self.size - _FRAME.size or position & 3:
            raise CorruptRecordError(
                f"expected a record at a multiple of 4 below the file's end {self.size}, "
                f"got offset {position}"
            )
        magic, word = _FRAME.unpack_from(self._view, position)
        if magic != MAGIC:
            raise CorruptRecordError(f"expected magic 0x{MAGIC:08x}{location}, got 0x{magic:08x}")
        start, length = position + _FRAME.size, word & MAX_LENGTH
        if start + length > self.size:
            raise CorruptRecordError(
                f"expected {length} bytes from offset {start}, got {self.size - start}: the file "
                "is truncated or the length is damaged"
            )
        return word >> LENGTH_BITS, start, length

    def _next_start(self, position: int) -> int:
        """The next multiple of 4 at which a record may start, or the end of the file."""
        for found in _MAGIC_PATTERN.finditer(self._view, position):
            at = found.start()
            if not at & 3 and at + 8 <= self.size and self._view[at + 7] >> 5 <= FIRST:
                return at
        return self.size


def read_index(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Keys int64 [n] and offsets int64 [n] of an ``.idx`` file (``key TAB offset``), in its order.

    Raises:
        CorruptRecordError: for a line that is not two integers, or a repeated key.
    """
    remedy = "write the index again, or remove it to have the .rec file scanned"
    expected = "lines of key, tab, offset"
    refuse_foreign(path, expected, error=CorruptRecordError, allowed=("empty",))
    if not path.stat().st_size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    names = ["key", "offset"]
    try:
        table = csv.read_csv(
            path,
            csv.ReadOptions(column_names=names),
            csv.ParseOptions(delimiter="\t"),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64()), null_values=[]),
        )
    except pa.ArrowInvalid as error:
        raise CorruptRecordError(
            f"{path}: expected lines of key, tab, offset, got: {error}; {remedy}"
        ) from error
    keys, offsets = (table[name].to_numpy() for name in names)
    unique, counts = np.unique(keys, return_counts=True)
    if len(unique) < len(keys):
        raise CorruptRecordError(
            f"{path}: expected every key once, got key {unique[counts > 1][0]} again "
            f"({len(keys) - len(unique)} such lines); {remedy}"
        )
    return keys, offsets


def encode_record(
    label: float | Sequence[float], body: bytes | memoryview, *, id: int = 0, id2: int = 0
) -> bytes:
    """An image record's data: header, label array if ``label`` is a sequence, image."""
    if isinstance(label, Sequence):
        header = _HEADER.pack(len(label), 0.0, id, id2) + np.array(label, "<f4").tobytes()
    else:
        header = _HEADER.pack(0, label, id, id2)
    return header + body


def frame(payload: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """The pieces of a record as written: split at embedded magics, padded to 4 bytes.

    Raises:
        ConfigError: for more than the 2^29 - 1 bytes that a record can hold.
    """
    payload = memoryview(payload)
    if len(payload) > MAX_LENGTH:
        raise ConfigError(
            f"a record holds at most {MAX_LENGTH} bytes, got {len(payload)}; use smaller images"
        )
    words = np.frombuffer(payload[: len(payload) // 4 * 4], "<u4")
    magics = (4 * np.flatnonzero(words == MAGIC)).tolist()
    starts = [0, *(at + 4 for at in magics)]
    for number, (start, end) in enumerate(zip(starts, [*magics, len(payload)], strict=True)):
        flag = {0: FIRST, len(magics): LAST}.get(number, MIDDLE) if magics else WHOLE
        yield _FRAME.pack(MAGIC, flag << LENGTH_BITS | end - start)
        yield payload[start:end]
    yield bytes(-len(payload) % 4)


@contextmanager
def record_writer(path: Path) -> Iterator[Callable[[int, bytes | memoryview], None]]:
    """Write ``path`` (.rec) and its ``.idx``; both appear when the block ends.

    Yields a function that appends a record's data (see ``encode_record``) under a key. A block
    left by an exception leaves nothing.

    Raises:
        ConfigError: if either file exists.
    """
    index_path = path.with_suffix(".idx")
    for existing in (path, index_path):
        if existing.exists():
            raise ConfigError(f"{existing}: exists already; remove it or choose another name")
    # Published in reverse order, the index first: a .rec file alone is a complete pack.
    with (
        publish_file(path) as temporary,
        temporary.open("wb") as file,
        publish_file(index_path) as temporary_index,
        temporary_index.open("wb") as index,
    ):

        def write(key: int, payload: bytes | memoryview) -> None:
            index.write(b"%d\t%d\n" % (key, file.tell()))
            file.writelines(frame(payload))

        yield write
