"""Parquet files with image bytes and labels, as hubs publish them, as rows of images."""

import bisect
import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Records
from gkd.storage.records.classes import MAX_CLASSES, label_fault, labelled_classes, read_property
from gkd.storage.records.multi_file import Shards, require_fetched
from gkd.storage.records.parquet_blocks import ParquetBlocks, arrow_errors
from gkd.storage.records.parquet_columns import Columns, find_columns
from gkd.storage.util.progress import progress

PARQUET = ".parquet"


class ParquetRecords(Records):
    """The images of a ``.parquet`` file, or of a folder's, in natural order of their names.

    ``find_columns`` says which columns they are in. A record's key is the row's number in the file,
    after the file's name and a slash where there are several. ``num_classes`` comes from the first
    line of ``property`` in the folder or beside the file, else from the names of the classes that
    ``datasets`` writes, else it is the largest label + 1, unless that is far more than so many
    images prove.

    In order, rows are read as fast as they are decompressed; at random, up to a row group for each:
    whoever reads them often packs them first (``pack``). ``sizes`` takes a pass over all bytes when
    it is first asked for.

    A row without image or label stays a row, as do those of a row group that cannot be decoded.

    Raises:
        ConfigError: where the columns are not told, the files differ in them or in their classes,
            a file is missing by the others' names, no image is inside (only paths), or the largest
            label is that of no data set of this size.
        CorruptRecordError: for a file that is no Parquet.
    """

    def __init__(self, path: Path) -> None:
        self._shards = shards = Shards(path, PARQUET)
        self.path, self.name = shards.root, shards.name
        self.layout, self.indexed, self.label_order = "parquet", True, "recordio"
        for shard in shards.paths:
            require_fetched(shard)
        columns = _common_columns(shards.paths)
        self._label, self._classes = columns.label, read_property(shards.property_path)
        if self._classes is None and columns.names is not None:
            self._classes = len(columns.names)
        self._blocks = ParquetBlocks(shards.paths, columns.image)
        # Rows before each row group, and row groups before each file.
        self._ends, self._groups = [0], [0]
        labels = [np.empty(0, np.int64)]
        for number, shard in enumerate(shards.paths):
            footer = self._blocks.open(number).metadata
            rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            labels.append(self._read_labels(number))
            shards.append(len(labels[-1]))
            if min(rows, default=0) < 0 or sum(rows) != len(labels[-1]):
                raise CorruptRecordError(
                    f"{shard}: expected {sum(rows)} labels as the file's footer says, got "
                    f"{len(labels[-1])}; fetch or write it again"
                )
            self._groups.append(self._groups[-1] + len(rows))
            self._ends.extend(itertools.accumulate(rows, initial=self._ends.pop()))
        self.labels = np.concatenate(labels)
        if not len(self):
            raise ConfigError(f"{self.path}: expected rows with images, got none; name other files")
        self._require_images()
        self.num_classes = self._classes or labelled_classes(self.labels, self.where)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:  # type: ignore[override]  # set when it is read
        """Bytes of the encoded images, int64 [N], -1 where there are none, by decompressing all."""
        sizes = np.full(len(self), -1, np.int64)
        with progress("measure images", len(self), "images", quiet_below=QUIET_ROWS) as advance:
            for number, (first, end) in enumerate(itertools.pairwise(self._groups)):
                for group in range(end - first):
                    start, stop = self._ends[first + group : first + group + 2]
                    with contextlib.suppress(CorruptRecordError):  # told where a row is read
                        for block in self._blocks.blocks(number, group):
                            lengths = pc.call_function("binary_length", [block]).fill_null(-1)
                            sizes[start : start + len(block)] = lengths.to_numpy()
                            start += len(block)
                    advance(stop - self._ends[first + group])
        return sizes

    @property
    def group_rows(self) -> int:
        """Images of the largest row group."""
        return max(stop - start for start, stop in itertools.pairwise(self._ends))

    def key(self, row: int) -> str:
        """The row's number in its file."""
        number, inside = self._shards.place(row)
        return self._shards.key(number, str(inside))

    def where(self, row: int) -> str:
        """File, row and row group in words."""
        number, inside = self._shards.place(row)
        _, group, _ = self._place(row)
        return f"{self._shards.paths[number]}, row {inside} in row group {group}"

    def encoded(self, row: int) -> memoryview:
        """The encoded image, a view of the block that was decompressed with it.

        Raises:
            CorruptRecordError: naming file and row, what was expected and what was got.
        """
        number, group, place = self._place(row)
        try:
            if self.labels.item(row) < 0:
                label = self._read_group(number, group)[place].as_py()
                raise CorruptRecordError(label_fault(label, self._classes))
            value = self._blocks.get(number, group, place)
            if value is None:
                raise CorruptRecordError(
                    f"expected the image's bytes in {self._blocks.column}, got null; write the "
                    "file again with the image in it, or without this row"
                )
        except CorruptRecordError as error:
            raise CorruptRecordError(f"{self.where(row)}: {error}") from error
        return value

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name of every file, and what the system says now of it."""
        return self._shards.stamps()

    def _place(self, row: int) -> tuple[int, int, int]:
        """File, row group and place in the row group."""
        number, _ = self._shards.place(row)
        group = bisect.bisect_right(self._ends, row) - 1
        return number, group - self._groups[number], row - self._ends[group]

    def _require_images(self) -> None:
        """Refuse rows that name their images only, told by the first of them."""
        number, group, _ = self._place(0)
        try:
            first = next(self._blocks.blocks(number, group))
        except (CorruptRecordError, StopIteration):
            return  # told where a row is read
        if first.null_count == len(first):
            raise ConfigError(
                f"{self.path}: expected the images in {self._blocks.column}, got no bytes in the "
                f"first {len(first)} rows; where there are only paths, write the files again with "
                "the images in them, or name the folder of the images"
            )

    def _read_labels(self, number: int) -> npt.NDArray[np.int64]:
        """Labels of a file, -1 for what is no class and where a row group cannot be decoded."""
        file = self._blocks.open(number)
        bound = MAX_CLASSES if self._classes is None else self._classes
        try:
            return _class_numbers(file.read(columns=[self._label], use_threads=False)[0], bound)
        except (pa.ArrowException, OSError):
            labels = []
            for group in range(file.num_row_groups):
                try:
                    labels.append(_class_numbers(self._read_group(number, group), bound))
                except CorruptRecordError:
                    rows = file.metadata.row_group(group).num_rows
                    labels.append(np.full(rows, -1, np.int64))
            return np.concatenate(labels)

    def _read_group(self, number: int, group: int) -> Any:
        """The labels of a row group."""
        with arrow_errors("expected labels that can be decoded", "fetch the file again"):
            file = self._blocks.open(number)
            return file.read_row_group(group, columns=[self._label], use_threads=False)[0]


def _common_columns(paths: Sequence[Path]) -> Columns:
    """The columns, which all files must agree in, and in the names of the classes."""
    first: Columns | None = None
    for path in paths:
        with arrow_errors(f"{path}: expected a Parquet file", "fetch or write it again"):
            columns = find_columns(path, pq.read_schema(path, memory_map=True))
        if first is not None and columns != first:
            what = "names of the classes" if columns.names != first.names else "columns"
            raise ConfigError(
                f"{path}: expected the {what} of {paths[0].name}, got others; keep one data set in "
                "the folder"
            )
        first = columns
    assert first is not None  # a data set has a file
    return first


def _class_numbers(column: Any, bound: int) -> npt.NDArray[np.int64]:
    """Whole numbers of any width to class numbers below ``bound``, -1 for others and for null."""
    values = column.fill_null(0).to_numpy()
    named = column.is_valid().to_numpy() & (values >= 0) & (values < bound)
    labels = np.full(len(values), -1, np.int64)
    labels[named] = values[named]
    return labels
