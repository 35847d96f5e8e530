"""Checks the sizes of encoded chunks before any library decodes them."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.layout import INNER_CHUNK, ArrayLayout
from gkd.storage.errors import CorruptShardError

_CRC_BYTES = 4
_INDEX_ENTRY_BYTES = 16
_ABSENT = np.uint64(2**64 - 1)
_BLOSC_HEADER = np.dtype(
    [
        ("versions", "u1", 2),
        ("flags", "u1"),
        ("typesize", "u1"),
        ("decoded", "<u4"),
        ("blocksize", "<u4"),
        ("encoded", "<u4"),
    ]
)


def check_chunks(path: Path, array: ArrayLayout, entries: int) -> None:
    """Check that one row's file holds exactly the chunks of ``entries``, with correct sizes.

    Reads the shard index and 16 bytes per chunk. Otherwise a reader would allocate whatever size a
    forged chunk claims, and read zeros for an absent one.

    Raises:
        CorruptShardError: naming the file.
    """
    size = path.stat().st_size
    if array.packed:
        starts, lengths = _index(path, array, size)
        used = math.ceil(entries / INNER_CHUNK)
        if (starts[used:] != _ABSENT).any() or (lengths[used:] != _ABSENT).any():
            _refuse(path, f"chunks beyond the {used} of its {entries} entries")
        starts, lengths = starts[:used], lengths[:used]
        values = INNER_CHUNK
    else:
        starts, lengths = np.zeros(1, np.uint64), np.array([size], np.uint64)
        values = math.prod(array.shape[1:])
    _check_spans(path, starts, lengths, size)

    heads = _heads(path, starts)
    wrong = (
        (heads["decoded"] != values * array.dtype.itemsize)
        | (heads["typesize"] != array.dtype.itemsize)
        | (heads["encoded"] + np.uint64(_CRC_BYTES) != lengths)
    )
    if wrong.any():
        _refuse(path, f"chunk {wrong.argmax()} with forged sizes")


def _index(
    path: Path, array: ArrayLayout, size: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    chunks = array.shape[1] // INNER_CHUNK
    index_bytes = chunks * _INDEX_ENTRY_BYTES + _CRC_BYTES
    if size < index_bytes:
        _refuse(path, f"{size} bytes, fewer than the {index_bytes} of its index")
    with path.open("rb") as file:
        file.seek(size - index_bytes)
        table = np.frombuffer(file.read(chunks * _INDEX_ENTRY_BYTES), "<u8").reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _check_spans(
    path: Path, starts: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64], size: int
) -> None:
    if (starts == _ABSENT).any():
        _refuse(path, f"no chunk {(starts == _ABSENT).argmax()}")
    least = np.uint64(_BLOSC_HEADER.itemsize + _CRC_BYTES)
    if (starts > size).any() or (lengths > size).any() or (lengths < least).any():
        _refuse(path, "chunks outside the file")
    # Chunks of format 1 follow each other without gaps.
    if (starts != np.concatenate([[np.uint64(0)], np.cumsum(lengths)[:-1]])).any():
        _refuse(path, "chunks that overlap or leave gaps")


def _heads(path: Path, starts: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    heads = bytearray()
    with path.open("rb") as file:
        for start in starts.tolist():
            file.seek(start)
            heads += file.read(_BLOSC_HEADER.itemsize)
    return np.frombuffer(heads, _BLOSC_HEADER)


def _refuse(path: Path, what: str) -> None:
    raise CorruptShardError(f"{path}: damaged or hostile: it has {what}")
