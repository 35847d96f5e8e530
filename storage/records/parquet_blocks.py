"""Image bytes of Parquet files, read in blocks that go with what stands beside them."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gkd.storage.errors import CorruptRecordError

BLOCK_ROWS = 128
# Threads that read side by side each need their block again and again.
MOST_BYTES = 1 << 27
# A file held open keeps its footer in memory, which can be megabytes.
MOST_FILES = 8
MOST_CURSORS = 8
_FEWER = "expected as many rows as the file's footer says, got fewer; fetch the file again"


class ParquetBlocks:
    """Blocks of ``BLOCK_ROWS`` images of the row groups of ``paths``; for threads and forks.

    Parquet says where row groups start, not where values do, so a row group is decoded from its
    start. Whoever goes through the rows in order decodes each once; whoever jumps decodes up to
    a whole row group for an image. The last blocks stay in memory, ``MOST_BYTES`` of them.

    Pickles by path; a file that changed its size is refused.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths, self.column = paths, column
        self.sizes = [path.stat().st_size for path in paths]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "column": self.column, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def get(self, file: int, group: int, place: int) -> memoryview | None:
        """The bytes at ``place`` of a row group, a view of the block; None where there are none.

        Raises:
            CorruptRecordError: where the row group cannot be decoded; the caller knows the place.
        """
        number, inside = divmod(place, BLOCK_ROWS)
        with self._lock:
            block = self._block(file, group, number)
        if inside >= len(block):
            raise CorruptRecordError(_FEWER)
        value = block[inside].as_buffer()
        # pyarrow's view is of signed bytes, which decoders do not take.
        return None if value is None else memoryview(value).cast("B")

    def open(self, file: int) -> Any:
        """The file, opened by pyarrow.

        Raises:
            CorruptRecordError: where it is no whole Parquet file, or changed its size.
        """
        with self._lock:
            found = self._files.get(file)
            if found is None:
                found = self._files[file] = self._open(self.paths[file], self.sizes[file])
                if len(self._files) > MOST_FILES:
                    self._files.popitem(last=False)
            return found

    def blocks(self, file: int, group: int) -> Iterator[Any]:
        """All blocks of a row group in order, arrays of bytes, decoded as they are taken."""
        with arrow_errors("expected a row group that can be decoded", "fetch the file again"):
            for batch in self.open(file).iter_batches(
                BLOCK_ROWS, row_groups=[group], columns=[self.column], use_threads=False
            ):
                (array,) = batch.columns
                if pa.types.is_struct(array.type):
                    (array,) = array.flatten()  # a struct that is null has no bytes
                yield array

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int, int], Any] = OrderedDict()
        self._bytes = 0
        # Row groups that are being gone through: the next block's number, and the blocks.
        self._cursors: OrderedDict[tuple[int, int], tuple[int, Iterator[Any]]] = OrderedDict()

    def _open(self, path: Path, expected: int) -> Any:
        with arrow_errors(f"{path}: expected a Parquet file", "fetch or write it again"):
            size = path.stat().st_size
            if size != expected:
                raise CorruptRecordError(
                    f"{path}: expected {expected} bytes as when it was opened, got {size}; "
                    "the file changed under a running command: run it again"
                )
            return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)

    def _block(self, file: int, group: int, number: int) -> Any:
        found = self._kept.get((file, group, number))
        if found is not None:
            self._kept.move_to_end((file, group, number))
            return found
        begin, blocks = self._cursors.pop((file, group), (number + 1, iter(())))
        if begin > number:
            begin, blocks = 0, self.blocks(file, group)
        for at, block in enumerate(blocks, begin):
            self._keep((file, group, at), block)
            if at == number:
                self._cursors[file, group] = at + 1, blocks
                if len(self._cursors) > MOST_CURSORS:
                    self._cursors.popitem(last=False)
                return block
        raise CorruptRecordError(_FEWER)

    def _keep(self, place: tuple[int, int, int], block: Any) -> None:
        if place in self._kept:
            self._bytes -= self._kept.pop(place).nbytes
        self._kept[place] = block
        self._bytes += block.nbytes
        while self._bytes > MOST_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


@contextmanager
def arrow_errors(expected: str, remedy: str) -> Iterator[None]:
    """Errors of pyarrow as those of a record."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptRecordError(f"{expected}, got: {reason}; {remedy}") from error
