"""Parquet files with image bytes and labels, as hubs publish them, as rows of images."""

import bisect
import contextlib
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import QUIET_ROWS, Records
from gkd.storage.records.labels import LABEL_NAMES, class_numbers, count_classes, label_fault
from gkd.storage.records.multi_file import OpenFiles, Shards
from gkd.storage.records.parquet_blocks import MAX_FILES, ParquetBlocks, open_parquet
from gkd.storage.util.progress import progress

PARQUET = ".parquet"
IMAGE_NAMES = ("image", "img", "face", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())


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

    layout = "parquet"

    def __init__(self, path: Path) -> None:
        self._shards = shards = Shards(path, PARQUET)
        self.path, self.name, self._paths = shards.root, shards.name, shards.paths
        self.left_out = shards.left_out
        columns = _common_columns(shards.paths)
        self._label, self._stated = columns.label, shards.num_classes
        if self._stated is None and columns.names is not None:
            self._stated = len(columns.names)
        files = OpenFiles(shards.paths, open_parquet, MAX_FILES)
        self._blocks = ParquetBlocks(files, columns.image)
        # File and number of each row group, and the rows before each.
        self._groups: list[tuple[int, int]] = []
        self._starts = [0]
        labels = [np.empty(0, np.int64)]
        for number in range(len(shards.paths)):
            group_sizes = self._group_sizes(number)
            labels.append(self._file_labels(number, group_sizes))
            self._groups.extend((number, group) for group in range(len(group_sizes)))
            self._starts.extend(itertools.accumulate(group_sizes, initial=self._starts.pop()))
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
            bounds = itertools.pairwise(self._starts)
            for group, (start, stop) in zip(self._groups, bounds, strict=True):
                advance(stop - start)
                with contextlib.suppress(CorruptRecordError):  # reading a row raises it
                    for block in self._blocks.blocks(*group):
                        lengths = pc.call_function("binary_length", [block]).fill_null(-1)
                        sizes[start : start + len(block)] = lengths.to_numpy()
                        start += len(block)
        return sizes

    @property
    def group_rows(self) -> int:
        """Number of images in the largest row group."""
        return int(np.diff(self._starts).max())

    def _identify(self, row: int) -> tuple[str, str]:
        number, group, _, inner = self._locate(row)
        where = f"{self._paths[number]}, row {inner} in row group {group}"
        return self._shards.key(number, inner), where

    def _read(self, row: int) -> memoryview:
        number, group, inner, _ = self._locate(row)
        if self.labels.item(row) < 0:
            label = self._blocks.labels(number, [group], self._label)[inner].as_py()
            raise CorruptRecordError(label_fault(label, self._stated))
        value = self._blocks.get(number, group, inner)
        if value is None:
            raise CorruptRecordError(
                f"expected the image's bytes in {self._blocks.column}, got null; write the file "
                "again with the image in it, or without this row"
            )
        return value

    def _locate(self, row: int) -> tuple[int, int, int, int]:
        """File, row group, row in the row group and row in the file."""
        position = bisect.bisect_right(self._starts, row) - 1
        number, group = self._groups[position]
        return number, group, row - self._starts[position], row - self._starts[position - group]

    def _require_images(self) -> None:
        """Refuse rows that only name their images, by the first of them."""
        number, group, *_ = self._locate(0)
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
        footer = self._blocks.files.get(number).metadata
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        if min(sizes, default=0) < 0 or sum(sizes) != footer.num_rows:
            raise CorruptRecordError(
                f"{self._paths[number]}: expected row groups of {footer.num_rows} rows in all as "
                f"the file's footer says, got {sum(sizes)}; fetch or write it again"
            )
        return sizes

    def _file_labels(self, number: int, group_sizes: Sequence[int]) -> npt.NDArray[np.int64]:
        """Class numbers of a file, -1 for all rows of a row group that cannot be decoded."""
        try:
            return self._class_numbers(number, range(len(group_sizes)))
        except CorruptRecordError:
            labels = np.full(sum(group_sizes), -1, np.int64)
            ends = itertools.accumulate(group_sizes)
            for group, (size, end) in enumerate(zip(group_sizes, ends, strict=True)):
                with contextlib.suppress(CorruptRecordError):
                    labels[end - size : end] = self._class_numbers(number, [group])
            return labels

    def _class_numbers(self, number: int, groups: Sequence[int]) -> npt.NDArray[np.int64]:
        column = self._blocks.labels(number, groups, self._label)
        valid = column.is_valid().to_numpy()
        return class_numbers(column.fill_null(0).to_numpy(), self._stated, valid)


class Columns(NamedTuple):
    """The column of image bytes and that of labels.

    image  path of the bytes: ``image``, or ``image.bytes`` in a struct
    label  name of a column of integers
    names  of the classes, in their order, if the file lists them
    """

    image: str
    label: str
    names: list[str] | None


def find_columns(path: Path, schema: Any) -> Columns:
    """The columns of a file by the features that ``datasets`` writes into it, else by convention.

    An image is a column of bytes, or a struct with a field ``bytes``; a label is a column of
    integers with one of the ``LABEL_NAMES``, or named ``id`` if there is none of these.

    Raises:
        ConfigError: if there is no such column or more than one, naming all.
    """

    features = _features(schema)
    images = {
        field.name: leaf.name
        for field in schema
        for leaf in field.flatten()  # the fields of a struct as ``field.inner``
        if leaf.type in _BYTES and leaf.name in (field.name, f"{field.name}.bytes")
    }

    def described(kind: str) -> list[str]:
        return [name for name in schema.names if features.get(name, {}).get("_type") == kind]

    def named(*names: str) -> list[str]:
        return [name for name in schema.names if name.lower() in names]

    def only(what: str, *candidates: list[str]) -> str:
        found = next(filter(None, candidates), [])
        if len(found) != 1:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise ConfigError(
                f"{path}: expected one {what}, got {' and '.join(found) or 'none'} among "
                f"{columns}; write the file again with one column of such a name"
            )
        return found[0]

    candidates = described("Image"), named(*IMAGE_NAMES), schema.names
    image = only("column of image bytes", *([n for n in c if n in images] for c in candidates))
    label = only(
        f"column of class numbers, named {', '.join(LABEL_NAMES)} or id",
        described("ClassLabel"),
        named(*LABEL_NAMES),
        named("id"),
    )
    kind = schema.field(label).type
    if not pa.types.is_integer(kind):
        raise ConfigError(
            f"{path}: expected integers in the column {label}, got {kind}; write the numbers of "
            'the identities there (datasets: class_encode_column("...") makes them)'
        )
    classes = features.get(label, {}).get("names")
    names = list(map(str, classes)) if isinstance(classes, list) and classes else None
    return Columns(images[image], label, names)


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


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The description of the columns by ``datasets``; empty if there is none that can be read."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: feature for name, feature in features if isinstance(feature, dict)}
