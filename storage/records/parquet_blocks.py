"""Images from Parquet files, decoded in blocks that are kept together with their neighbours."""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.multi_file import OpenFiles

BLOCK_ROWS = 128
# A value that Parquet stores once becomes as many copies as rows refer to it: so few are decoded
# before their size is looked at.
PIECE_ROWS = 8
MAX_BLOCK_BYTES = 1 << 28
# A row of images takes a hundred bytes at least, but null takes none: their number is bounded by
# the file's size before memory is taken for labels.
MAX_ROWS_PER_BYTE = 8
# Threads that read side by side use their blocks again and again.
MAX_BYTES = 1 << 27
# An open file keeps its footer in memory, which can be megabytes.
MAX_FILES = 8
MAX_CURSORS = 8
FEWER_ROWS = "expected as many rows as the file's footer says, got fewer; fetch the file again"


class ParquetBlocks:
    """Blocks of ``BLOCK_ROWS`` images of the row groups of Parquet files; for threads and forks.

    Parquet says where row groups start but not where values do, so a row group is decoded from its
    start. Reading the rows in order decodes each once; a random read decodes up to a whole row
    group. The last ``MAX_BYTES`` of blocks stay in memory. Pickles by path.
    """

    def __init__(self, files: OpenFiles[Any], column: str) -> None:
        self.files, self.column = files, column
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int, int], Any] = OrderedDict()
        self._bytes = 0
        # Row groups being read: the number of the next block, and the iterator of the blocks.
        self._cursors: OrderedDict[tuple[int, int], tuple[int, Iterator[Any]]] = OrderedDict()

    def __reduce__(self) -> tuple[object, ...]:
        return ParquetBlocks, (self.files, self.column)

    def get(self, file: int, group: int, row: int) -> memoryview | None:
        """The bytes of a row of a row group, a view of its block; None for null.

        Raises:
            CorruptRecordError: if the row group cannot be decoded; the caller knows the location.
        """
        number, inner = divmod(row, BLOCK_ROWS)
        with self._lock:
            block = self._block(file, group, number)
        if inner >= len(block):
            raise CorruptRecordError(FEWER_ROWS)
        value = block[inner].as_buffer()
        # pyarrow's view is of signed bytes, which decoders refuse.
        return None if value is None else memoryview(value).cast("B")

    def blocks(self, file: int, group: int) -> Iterator[Any]:
        """All blocks of a row group in order, arrays of bytes, decoded one at a time."""
        with arrow_errors("expected a row group that can be decoded", "fetch the file again"):
            pieces: list[Any] = []
            rows = size = 0
            for batch in self.files.get(file).iter_batches(
                math.gcd(BLOCK_ROWS, PIECE_ROWS),
                row_groups=[group],
                columns=[self.column],
                use_threads=False,
            ):
                (array,) = batch.columns
                if pa.types.is_struct(array.type):
                    (array,) = array.flatten()  # a struct that is null has no bytes
                pieces.append(array)
                rows, size = rows + len(array), size + array.nbytes
                if size > MAX_BLOCK_BYTES:
                    raise CorruptRecordError(
                        f"expected at most {MAX_BLOCK_BYTES} bytes in {BLOCK_ROWS} images, got "
                        f"{size} in {rows}; write the file again without them"
                    )
                if rows == BLOCK_ROWS:
                    yield pa.concat_arrays(pieces)
                    pieces, rows, size = [], 0, 0
            if pieces:
                yield pa.concat_arrays(pieces)

    def labels(self, file: int, groups: Sequence[int], column: str) -> Any:
        """The labels of row groups as they are stored.

        Raises:
            CorruptRecordError: if they cannot be decoded.
        """
        with arrow_errors("expected labels that can be decoded", "fetch the file again"):
            opened = self.files.get(file)
            labels = opened.read_row_groups(groups, columns=[column], use_threads=False)[0]
        if len(labels) != sum(opened.metadata.row_group(group).num_rows for group in groups):
            raise CorruptRecordError(FEWER_ROWS)
        return labels

    def _block(self, file: int, group: int, number: int) -> Any:
        key = file, group, number
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        first, blocks = self._cursors.pop((file, group), (number + 1, iter(())))
        if first > number:
            first, blocks = 0, self.blocks(file, group)
        for current, block in enumerate(blocks, first):
            self._keep((file, group, current), block)
            if current == number:
                self._cursors[file, group] = current + 1, blocks
                if len(self._cursors) > MAX_CURSORS:
                    self._cursors.popitem(last=False)
                return block
        raise CorruptRecordError(FEWER_ROWS)

    def _keep(self, key: tuple[int, int, int], block: Any) -> None:
        if key in self._kept:
            self._bytes -= self._kept.pop(key).nbytes
        self._kept[key] = block
        self._bytes += block.nbytes
        while self._bytes > MAX_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def open_parquet(path: Path) -> Any:
    """A Parquet file, opened by pyarrow.

    Raises:
        CorruptRecordError: if it is not a complete Parquet file.
    """
    with arrow_errors(f"{path}: expected a Parquet file", "fetch or write it again"):
        opened = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    size = path.stat().st_size
    if opened.metadata.num_rows > MAX_ROWS_PER_BYTE * size:
        raise CorruptRecordError(
            f"{path}: expected rows with images, got {opened.metadata.num_rows} rows in "
            f"{size} bytes; fetch or write it again"
        )
    return opened


@contextmanager
def arrow_errors(expected: str, remedy: str) -> Iterator[None]:
    """Turn pyarrow's errors into those of records."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptRecordError(f"{expected}, got: {reason}; {remedy}") from error
