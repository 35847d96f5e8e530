"""MXNet's RecordIO files without MXNet: framing, image headers, indexes.

A record is ``u32 magic, u32 word, data`` padded with zeros to 4 bytes, little-endian; the word
holds a part flag in its upper 3 bits and the length in the other 29. Where data holds the magic
at a multiple of 4, the writer splits it there into parts and drops those 4 bytes; the reader puts
them back. An image record's data is the header ``IfQQ`` (flag, label, id, id2), ``flag`` float32
labels where flag > 0, then the encoded image.

Source: dmlc/dmlc-core include/dmlc/recordio.h and src/recordio.cc, apache/mxnet
python/mxnet/recordio.py.
"""

import mmap
import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.csv

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.util.files import sync_file, sync_folder
from gkd.storage.util.progress import progress

MAGIC = 0xCED7230A
LENGTH_BITS = 29
MAX_LENGTH = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)
QUIET_BYTES = 1 << 30
TOLD_BYTES = 1 << 25

_MAGIC_BYTES = struct.pack("<I", MAGIC)
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_FLAG = struct.Struct("<I")
_START = struct.Struct("<III")  # magic, word, flag


class Record(NamedTuple):
    """An image record taken apart.

    labels  float32 [max(flag, 1)]    the class stands first
    body    the encoded image, without a copy where the record is one part
    """

    flag: int
    labels: npt.NDArray[np.float32]
    id: int
    id2: int
    body: memoryview


@dataclass(frozen=True)
class Headers:
    """The headers of n records, read at once.

    flags   int64   [n]   number of labels, 0 for the single one of the header; -1: unreadable
    labels  float32 [n]   first label
    seconds float32 [n]   second label, 0 where there is none
    sizes   int64   [n]   bytes of the encoded image; -1: unreadable
    """

    flags: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    seconds: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.int64]


class RecordReader:
    """One memory map of a ``.rec`` file: holds no position, so threads and forks may share it.

    Pickles by path; a file that changed its size on the way is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        self._view = memoryview(mapped)
        self._words = np.frombuffer(self._view[: self.size // 4 * 4], "<u4")

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.size)

    def where(self, offset: int, key: object = None) -> str:
        """The place of a record in words, for messages."""
        named = "" if key is None else f"key {key}, "
        return f"{self.path}, {named}offset {offset}"

    def payload(self, offset: int, key: object = None) -> memoryview:
        """Data of the record at ``offset``: a view of the map where it is one part, else a copy.

        Raises:
            CorruptRecordError: naming file, key and offset, what was expected and what was got.
        """
        flag, start, length = self._part(offset, offset, key)
        if flag == WHOLE:
            return self._view[start : start + length]
        if flag != FIRST:
            raise self._fault(offset, key, f"expected the start of a record, got part flag {flag}")
        parts = [self._view[start : start + length]]
        while flag != LAST:
            # Every part but the last ends at a multiple of 4.
            flag, start, length = self._part(start + length, offset, key)
            if flag not in (MIDDLE, LAST):
                raise self._fault(
                    offset, key, f"expected a later part at offset {start - 8}, got flag {flag}"
                )
            parts.append(self._view[start : start + length])
        return memoryview(_MAGIC_BYTES.join(parts))

    def read(self, offset: int, key: object = None) -> Record:
        """The image record at ``offset``.

        Raises:
            CorruptRecordError: as ``payload`` does, and where the header does not fit the data.
        """
        payload = self.payload(offset, key)
        start = self._body_start(payload, offset, key)
        flag, label, id_, id2 = _HEADER.unpack_from(payload)
        labels = (
            np.frombuffer(payload, "<f4", flag, _HEADER.size)
            if flag
            else np.array([label], np.float32)
        )
        return Record(flag, labels, id_, id2, payload[start:])

    def body(self, offset: int, key: object = None) -> memoryview:
        """The encoded image of the record at ``offset``; raises what ``read`` raises."""
        # Training reads images one by one: the usual record, whole and sound, goes a short way.
        if 0 <= offset <= self.size - _START.size and not offset & 3:
            magic, word, flag = _START.unpack_from(self._view, offset)
            start = offset + _FRAME.size + _HEADER.size + 4 * flag
            end = offset + _FRAME.size + word
            # With a part flag the word is larger than any length.
            if magic == MAGIC and word <= MAX_LENGTH and start <= end <= self.size:
                return self._view[start:end]
        payload = self.payload(offset, key)
        return payload[self._body_start(payload, offset, key) :]

    def scan(self) -> npt.NDArray[np.int64]:
        """Offsets of all records in file order, int64, by walking the file without an index.

        Where the walk meets damage, the offset of the damage stands in the result (reading there
        raises and says what is wrong) and the walk goes on at the next start of a record.
        """
        offsets = []
        position = told = 0
        with progress(f"scan {self.path}", self.size, "bytes", quiet_below=QUIET_BYTES) as advance:
            while position < self.size:
                offsets.append(position)
                try:
                    position = self._end(position)
                except CorruptRecordError:
                    position = self._next_start(position + 4)
                if position - told > TOLD_BYTES:
                    advance(position - told)
                    told = position
            advance(self.size - told)
        return np.array(offsets, np.int64)

    def headers(self, offsets: npt.NDArray[np.int64]) -> Headers:
        """Headers of the records at ``offsets`` [n], gathered from the map without a loop."""
        count = len(offsets)
        flags = np.full(count, -1, np.int64)
        labels = np.zeros(count, np.float32)
        seconds = np.zeros(count, np.float32)
        sizes = np.full(count, -1, np.int64)
        words = self._words
        inside = (offsets >= 0) & (offsets & 3 == 0)
        rows = np.flatnonzero(inside & (offsets <= self.size - _FRAME.size - _HEADER.size))
        at = offsets[rows] >> 2
        part_flags = words[at + 1] >> LENGTH_BITS
        lengths = (words[at + 1] & MAX_LENGTH).astype(np.int64)
        started = words[at] == MAGIC
        split = rows[started & (part_flags == FIRST)]

        whole = started & (part_flags == WHOLE) & (lengths >= _HEADER.size)
        whole &= offsets[rows] + _FRAME.size + lengths <= self.size
        rows, at, lengths = rows[whole], at[whole], lengths[whole]
        label_counts = words[at + 2].astype(np.int64)
        bodies = lengths - _HEADER.size - 4 * label_counts
        fits = bodies >= 0
        rows, at, label_counts, bodies = rows[fits], at[fits], label_counts[fits], bodies[fits]
        flags[rows] = label_counts
        sizes[rows] = bodies
        floats = words.view("<f4")
        # Without a label array the label is the header's second field, else the array follows it.
        labels[rows] = floats[np.where(label_counts > 0, at + 8, at + 3)]
        paired = label_counts > 1
        seconds[rows[paired]] = floats[at[paired] + 9]

        for row in split:
            try:
                record = self.read(int(offsets[row]))
            except CorruptRecordError:
                continue  # stays marked unreadable, as the broken headers above do
            flags[row], sizes[row] = record.flag, len(record.body)
            labels[row] = record.labels[0]
            seconds[row] = record.labels[1] if record.flag > 1 else 0
        return Headers(flags, labels, seconds, sizes)

    def _part(self, position: int, offset: int, key: object) -> tuple[int, int, int]:
        """Flag, start and length of the part at ``position`` of the record at ``offset``."""
        if not 0 <= position <= self.size - _FRAME.size or position & 3:
            raise self._fault(
                offset,
                key,
                f"expected a record at a multiple of 4 below the file's end {self.size}, "
                f"got offset {position}",
            )
        magic, word = _FRAME.unpack_from(self._view, position)
        if magic != MAGIC:
            at = "" if position == offset else f" at offset {position}"
            raise self._fault(offset, key, f"expected magic 0x{MAGIC:08x}{at}, got 0x{magic:08x}")
        start, length = position + _FRAME.size, word & MAX_LENGTH
        if start + length > self.size:
            raise self._fault(
                offset,
                key,
                f"expected {length} bytes from offset {start}, got {self.size - start}: "
                "the file is truncated or the length is damaged",
            )
        return word >> LENGTH_BITS, start, length

    def _body_start(self, payload: memoryview, offset: int, key: object) -> int:
        if len(payload) < _HEADER.size:
            raise self._fault(
                offset, key, f"expected a header of {_HEADER.size} bytes, got {len(payload)}"
            )
        (flag,) = _FLAG.unpack_from(payload)
        start = _HEADER.size + 4 * int(flag)
        if start > len(payload):
            raise self._fault(
                offset,
                key,
                f"expected {flag} labels by the header's flag, got {len(payload)} bytes",
            )
        return start

    def _end(self, offset: int) -> int:
        """Where the record at ``offset`` ends; raises what ``payload`` raises."""
        flag, start, length = self._part(offset, offset, None)
        if flag != WHOLE:
            self.payload(offset)
        while flag not in (WHOLE, LAST):
            flag, start, length = self._part(start + length, offset, None)
        return start + (length + 3) // 4 * 4

    def _next_start(self, position: int) -> int:
        """The next multiple of 4 where a record may start, or the end of the file."""
        step = 1 << 18
        for at in range(position // 4, len(self._words), step):
            for found in at + np.flatnonzero(self._words[at : at + step] == MAGIC):
                if found + 1 < len(self._words) and self._words[found + 1] >> LENGTH_BITS <= FIRST:
                    return int(found) * 4
        return self.size

    def _fault(self, offset: int, key: object, reason: str) -> CorruptRecordError:
        return CorruptRecordError(f"{self.where(offset, key)}: {reason}")


def _reopen(path: Path, size: int) -> RecordReader:
    reader = RecordReader(path)
    if reader.size != size:
        raise CorruptRecordError(
            f"{path}: expected {size} bytes as when it was opened, got {reader.size}; "
            "the file changed under a running command: run it again"
        )
    return reader


def read_index(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Keys int64 [n] and offsets int64 [n] of an ``.idx`` file (``key TAB offset``), as they stand.

    Raises:
        CorruptRecordError: for a line that is not two whole numbers, or a key that stands twice.
    """
    if not path.stat().st_size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    names = ["key", "offset"]
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(column_names=names),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t"),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pyarrow.int64()), null_values=[]
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise CorruptRecordError(
            f"{path}: expected lines of key, tab, offset, got: {error}; "
            "write the index again, or remove it to have the .rec file scanned"
        ) from error
    keys, offsets = (table[name].to_numpy() for name in names)
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise CorruptRecordError(
            f"{path}: expected every key once, got key {twice[0]} again ({len(twice)} such lines); "
            "write the index again, or remove it to have the .rec file scanned"
        )
    return keys, offsets


def encode_record(
    label: float | Sequence[float], body: bytes | memoryview, *, id: int = 0, id2: int = 0
) -> bytes:
    """An image record's data: header, label array where ``label`` is a sequence, image."""
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
    magics = [4 * int(at) for at in np.flatnonzero(words == MAGIC)]
    starts = [0, *(at + 4 for at in magics)]
    for start, end in zip(starts, [*magics, len(payload)], strict=True):
        if not magics:
            flag = WHOLE
        elif start == 0:
            flag = FIRST
        else:
            flag = MIDDLE if start != starts[-1] else LAST
        yield _FRAME.pack(MAGIC, flag << LENGTH_BITS | end - start)
        yield payload[start:end]
    yield bytes(-len(payload) % 4)


class RecordWriter:
    """Writes ``path`` (.rec) and its ``.idx`` aside; both appear when the ``with`` block ends.

    A block left by an exception leaves nothing. Raises ConfigError where either file exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index_path = path.with_suffix(".idx")
        for existing in (self.path, self.index_path):
            if existing.exists():
                raise ConfigError(f"{existing}: exists already; remove it or choose another name")
        token = uuid.uuid4().hex
        self._aside = path.with_name(f".{self.path.name}.{token}")
        self._index_aside = path.with_name(f".{self.index_path.name}.{token}")

    def __enter__(self) -> Self:
        self._file = self._aside.open("wb")
        self._index = self._index_aside.open("wb")
        return self

    def write(self, key: int, payload: bytes | memoryview) -> None:
        """Append a record (see ``encode_record``) under ``key``."""
        self._index.write(b"%d\t%d\n" % (key, self._file.tell()))
        self._file.writelines(frame(payload))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
            self._index.close()
            if kind is None:
                sync_file(self._aside)
                sync_file(self._index_aside)
                # The index first: a .rec file is a whole pack by itself.
                self._index_aside.replace(self.index_path)
                self._aside.replace(self.path)
                sync_folder(self.path.parent)
        finally:
            self._aside.unlink(missing_ok=True)
            self._index_aside.unlink(missing_ok=True)
