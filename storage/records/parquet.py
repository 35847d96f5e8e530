"""Parquet files with image bytes and labels, as hubs publish them, as rows of images."""

import bisect
import contextlib
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Records
from gkd.storage.records.labels import (
    LABEL_NAMES,
    class_numbers,
    count_classes,
    label_fault,
    read_property,
)
from gkd.storage.records.multi_file import Shards
from gkd.storage.records.parquet_blocks import (
    FEWER_ROWS,
    ParquetBlocks,
    arrow_errors,
    open_parquet,
)
from gkd.storage.util.progress import progress

PARQUET = ".parquet"
IMAGE_NAMES = ("image", "img", "face", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_BYTES = "bytes"


class ParquetRecords(Records):
    """The images of a ``.parquet`` file, or of a folder's, in natural order of their names.

    ``find_columns`` determines the columns. A record's key is the row's number in the file, after
    the file's name and a slash if there are several. ``num_classes`` comes from the first line of
    ``property`` in the folder or beside the file; without it, from the names of the classes that
    ``datasets`` writes; without these, it is the largest label + 1.

    In order, rows are read as fast as they are decompressed; each random read decodes up to a row
    group, so records that are read often at random should be packed first (``pack``). ``sizes``
    takes a pass over all bytes on first access.

    A row without image or label stays a row, as do those of a row group that cannot be decoded.

    Raises:
        ConfigError: if the columns are not clear, the files differ in them or in their classes, a
            file is missing by the others' names, there are no images (only paths), or the largest
            label is implausible for a data set of this size.
        CorruptRecordError: for a file that is not Parquet.
    """

    def __init__(self, path: Path) -> None:
        self._shards = shards = Shards(path, PARQUET)
        self.path, self.name = shards.root, shards.name
        self.layout, self.indexed, self.label_order = "parquet", True, "recordio"
        columns = _common_columns(shards.paths)
        self._label, self._stated = columns.label, read_property(shards.property_path)
        if self._stated is None and columns.names is not None:
            self._stated = len(columns.names)
        self._blocks = ParquetBlocks(shards.paths, columns.image)
        # File and number of each row group, and the rows before each.
        self._groups: list[tuple[int, int]] = []
        self._ends = [0]
        labels = [np.empty(0, np.int64)]
        for number in range(len(shards.paths)):
            group_sizes = self._group_sizes(number)
            labels.append(self._file_labels(number, group_sizes))
            self._groups.extend((number, group) for group in range(len(group_sizes)))
            self._ends.extend(itertools.accumulate(group_sizes, initial=self._ends.pop()))
            shards.append(sum(group_sizes))
        self.labels = np.concatenate(labels)
        if not len(self):
            raise ConfigError(f"{self.path}: expected rows with images, got none; name other files")
        self._require_images()
        self.num_classes = self._stated or count_classes(self.labels, self.where)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:  # type: ignore[override]  # set on first access
        """Bytes of the encoded images, int64 [N], -1 if there are none, by decompressing all."""
        sizes = np.full(len(self), -1, np.int64)
        with progress("measure images", len(self), "images", quiet_below=QUIET_ROWS) as advance:
            bounds = itertools.pairwise(self._ends)
            for (number, group), (start, stop) in zip(self._groups, bounds, strict=True):
                with contextlib.suppress(CorruptRecordError):  # reading a row raises it
                    done = start
                    for block in self._blocks.blocks(number, group):
                        lengths = pc.call_function("binary_length", [block]).fill_null(-1)
                        sizes[done : done + len(block)] = lengths.to_numpy()
                        done += len(block)
                advance(stop - start)
        return sizes

    @property
    def group_rows(self) -> int:
        """Number of images in the largest row group."""
        return max(stop - start for start, stop in itertools.pairwise(self._ends))

    def key(self, row: int) -> str:
        """The row's number in its file."""
        number, inner = self._shards.locate(row)
        return self._shards.key(number, str(inner))

    def where(self, row: int) -> str:
        """File, row and row group."""
        number, inner = self._shards.locate(row)
        _, group, _ = self._locate(row)
        return f"{self._shards.paths[number]}, row {inner} in row group {group}"

    def _read(self, row: int) -> memoryview:
        number, group, inner = self._locate(row)
        if self.labels.item(row) < 0:
            label = self._read_labels(number, [group])[inner].as_py()
            raise CorruptRecordError(label_fault(label, self._stated))
        value = self._blocks.get(number, group, inner)
        if value is None:
            raise CorruptRecordError(
                f"expected the image's bytes in {self._blocks.column}, got null; write the file "
                "again with the image in it, or without this row"
            )
        return value

    def _files(self) -> Iterator[tuple[str, Path]]:
        return self._shards.files()

    def _locate(self, row: int) -> tuple[int, int, int]:
        """File, row group and row in the row group."""
        position = bisect.bisect_right(self._ends, row) - 1
        return *self._groups[position], row - self._ends[position]

    def _require_images(self) -> None:
        """Refuse rows that only name their images, by the first of them."""
        number, group, _ = self._locate(0)
        try:
            first = next(self._blocks.blocks(number, group))
        except (CorruptRecordError, StopIteration):
            return  # reading a row raises it
        if first.null_count == len(first):
            raise ConfigError(
                f"{self.path}: expected the images in {self._blocks.column}, got no bytes in the "
                f"first {len(first)} rows; if there are only paths, write the files again with "
                "the images in them, or name the folder of the images"
            )

    def _group_sizes(self, number: int) -> list[int]:
        """Rows of each row group of a file."""
        footer = self._blocks.files[number].metadata
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        if min(sizes, default=0) < 0 or sum(sizes) != footer.num_rows:
            raise CorruptRecordError(
                f"{self._shards.paths[number]}: expected row groups of {footer.num_rows} rows in "
                f"all as the file's footer says, got {sum(sizes)}; fetch or write it again"
            )
        return sizes

    def _file_labels(self, number: int, group_sizes: Sequence[int]) -> npt.NDArray[np.int64]:
        """Class numbers of a file, -1 for all rows of a row group that cannot be decoded."""
        try:
            return self._class_numbers(number, range(len(group_sizes)))
        except CorruptRecordError:
            labels = []
            for group, size in enumerate(group_sizes):
                try:
                    labels.append(self._class_numbers(number, [group]))
                except CorruptRecordError:
                    labels.append(np.full(size, -1, np.int64))
            return np.concatenate(labels)

    def _class_numbers(self, number: int, groups: Sequence[int]) -> npt.NDArray[np.int64]:
        column = self._read_labels(number, groups)
        valid = column.is_valid().to_numpy()
        return class_numbers(column.fill_null(0).to_numpy(), self._stated, valid)

    def _read_labels(self, number: int, groups: Sequence[int]) -> Any:
        """The labels of row groups as they are stored."""
        with arrow_errors("expected labels that can be decoded", "fetch the file again"):
            file = self._blocks.files[number]
            column = file.read_row_groups(groups, columns=[self._label], use_threads=False)[0]
        if len(column) != sum(file.metadata.row_group(group).num_rows for group in groups):
            raise CorruptRecordError(FEWER_ROWS)
        return column


@dataclass(frozen=True)
class Columns:
    """The column of image bytes and that of labels.

    image  path of the bytes: ``image``, or ``image.bytes`` in a struct
    label  name of a column of integers
    names  of the classes, in their order, if the file lists them
    """

    image: str
    label: str
    names: tuple[str, ...] | None


def find_columns(path: Path, schema: Any) -> Columns:
    """The columns of a file by the features that ``datasets`` writes into it, else by convention.

    An image is a column of bytes, or a struct with a field ``bytes``; a label is a column of
    integers with one of the ``LABEL_NAMES``, or named ``id`` if there is none of these.

    Raises:
        ConfigError: if there is no such column or more than one, naming all.
    """
    features = _features(schema)
    images = {field.name: column for field in schema if (column := _bytes_path(field))}
    named = _of_type(features, "Image") or [n for n in images if n.lower() in IMAGE_NAMES]
    image = _only(
        path, "column of image bytes", schema, [n for n in named if n in images] or images
    )
    labels = _of_type(features, "ClassLabel")
    for names in (LABEL_NAMES, ("id",)):
        labels = labels or [name for name in schema.names if name.lower() in names]
    label = _only(
        path, f"column of class numbers, named {', '.join(LABEL_NAMES)} or id", schema, labels
    )
    kind = schema.field(label).type
    if not pa.types.is_integer(kind):
        raise ConfigError(
            f"{path}: expected integers in the column {label}, got {kind}; write the numbers of "
            'the identities there (datasets: class_encode_column("...") makes them)'
        )
    classes = features.get(label, {}).get("names")
    is_list = isinstance(classes, list) and bool(classes)
    return Columns(images[image], label, tuple(map(str, classes or ())) if is_list else None)


def _common_columns(paths: Sequence[Path]) -> Columns:
    """The columns and names of classes, which must be the same in all files."""
    common: Columns | None = None
    for path in paths:
        with open_parquet(path) as file:
            columns = find_columns(path, file.schema_arrow)
        common = common or columns
        if columns != common:
            what = "names of the classes" if columns.names != common.names else "columns"
            raise ConfigError(
                f"{path}: expected the {what} of {paths[0].name}, got others; keep one data set in "
                "the folder"
            )
    assert common is not None  # a data set has a file
    return common


def _only(path: Path, what: str, schema: Any, found: Iterable[str]) -> str:
    names = list(found)
    if len(names) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ConfigError(
            f"{path}: expected one {what}, got {' and '.join(names) or 'none'} among {columns}; "
            "write the file again with one column of such a name"
        )
    return names[0]


def _bytes_path(field: Any) -> str | None:
    if _is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index(_BYTES)
        if index >= 0 and _is_bytes(field.type.field(index).type):
            return f"{field.name}.{_BYTES}"
    return None


def _is_bytes(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The description of the columns by ``datasets``; empty if there is none that can be read."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: feature for name, feature in features if isinstance(feature, dict)}


def _of_type(features: dict[str, dict[str, Any]], kind: str) -> list[str]:
    return [name for name, feature in features.items() if feature.get("_type") == kind]
