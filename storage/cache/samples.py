"""The table of a shard's samples: row, record key, label and image digest, in Parquet."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gkd.storage.cache.metadata import corrupt
from gkd.storage.records.images import DIGEST_BYTES

# Twice the longest path; a sample's complete row, unpacked.
_MAX_KEY_BYTES = 8192
_MAX_ROW_BYTES = _MAX_KEY_BYTES + 1024
_MAX_BATCH_BYTES = 1 << 28
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("digest", pa.binary(DIGEST_BYTES)),
    ]
)


@dataclass(frozen=True)
class ShardSamples:
    """n samples of one shard, in row order.

    keys     record keys, unique within the data set
    labels   int64 [n]
    digests  uint8 [n, 16]  of the encoded images
    skipped  position of a sample without targets -> the reason; it has group size 0, secondary 0
             and no digest
    """

    keys: Sequence[str]
    labels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]

    def slice(self, rows: range) -> "ShardSamples":
        """Consecutive samples."""
        here = slice(rows.start, rows.stop)
        skipped = {i - rows.start: why for i, why in self.skipped.items() if i in rows}
        return ShardSamples(self.keys[here], self.labels[here], self.digests[here], skipped)

    @classmethod
    def from_table(cls, table: pa.Table, skipped: Mapping[str, str]) -> "ShardSamples":
        """The samples of a table, with the reasons in ``skipped`` by key."""
        keys = table["key"].to_pylist()
        missing = np.flatnonzero(table["digest"].is_null().to_numpy())
        return cls(
            keys,
            table["label"].to_numpy(),
            digests_of(table),
            {sample: skipped[keys[sample]] for sample in missing.tolist()},
        )

    @classmethod
    def concat(cls, parts: Sequence["ShardSamples"]) -> "ShardSamples":
        """The samples of one or more parts, one part after the other."""
        starts = itertools.accumulate((len(part.keys) for part in parts), initial=0)
        return cls(
            [key for part in parts for key in part.keys],
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.digests for part in parts]),
            {
                start + i: why
                for start, part in zip(starts, parts, strict=False)
                for i, why in part.skipped.items()
            },
        )


def write_samples(path: Path, rows: range, samples: ShardSamples) -> None:
    """Write the table of a shard's samples, which are ``rows`` of the data set."""
    present = np.ones(len(rows), bool)
    present[list(samples.skipped)] = False
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(DIGEST_BYTES),
        len(rows),
        [
            pa.py_buffer(np.packbits(present, bitorder="little")),
            pa.py_buffer(np.ascontiguousarray(samples.digests, np.uint8)),
        ],
    )
    table = pa.table(
        {
            "row": np.arange(rows.start, rows.stop, dtype=np.int64),
            "key": pa.array(samples.keys, pa.string()),
            "label": np.asarray(samples.labels, np.int64),
            "digest": digests,
        }
    )
    # Every option that decides the bytes, so that they do not depend on pyarrow's defaults.
    pq.write_table(
        table,
        path,
        row_group_size=len(rows),
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={
            "row": "DELTA_BINARY_PACKED",
            "key": "DELTA_BYTE_ARRAY",
            "label": "DELTA_BINARY_PACKED",
            "digest": "PLAIN",
        },
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )


def parse_samples(
    content: pa.Buffer, path: Path, rows: range, skipped: Collection[str]
) -> pa.Table:
    """The table in the content of the file ``path``, checked against ``rows`` and skipped keys.

    Raises:
        CorruptShardError: if it cannot be decoded or is not that of these rows.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            metadata = file.metadata
            if metadata.num_rows != len(rows) or file.schema_arrow != _SCHEMA:
                corrupt(path, f"expected {len(rows)} rows of {_SCHEMA.names}")
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if size > len(rows) * _MAX_ROW_BYTES:
                corrupt(path, f"{size:,} bytes unpacked for {len(rows):,} samples")
            table = _unpack(path, file, size)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        corrupt(path, f"it cannot be decoded ({error})", error)
    if not np.array_equal(table["row"].to_numpy(), np.arange(rows.start, rows.stop)):
        corrupt(path, f"its rows are not {rows.start} to {rows.stop - 1}")
    if table["key"].null_count or table["label"].null_count:
        corrupt(path, "a sample without key or label")
    if sorted(table["key"].filter(table["digest"].is_null()).to_pylist()) != sorted(skipped):
        corrupt(path, "samples without digest are not those that the commit record skips")
    return table


def _unpack(path: Path, file: pq.ParquetFile, size: int) -> pa.Table:
    """A table of samples of ``size`` bytes, with the length of its keys checked batch by batch.

    Keys are stored without the prefix that they share with the previous one, so a small hostile
    file may expand to many long ones; none is longer than all bytes together.
    """
    rows = max(1, _MAX_BATCH_BYTES // max(size, 1))
    batches = []
    for batch in file.iter_batches(batch_size=rows):
        lengths = pc.call_function("binary_length", [batch["key"]])
        longest = pc.call_function("max", [lengths]).as_py() or 0
        if longest > _MAX_KEY_BYTES:
            corrupt(path, f"a record key of {longest:,} bytes")
        batches.append(batch)
    return pa.Table.from_batches(batches, _SCHEMA)


def digests_of(table: pa.Table) -> npt.NDArray[np.uint8]:
    """Digests uint8 [n, 16] of a table of samples, zero for a skipped one."""
    column = table["digest"].combine_chunks().fill_null(bytes(DIGEST_BYTES))
    raw = np.frombuffer(column.buffers()[1], np.uint8)
    start = column.offset * DIGEST_BYTES
    return raw[start : start + len(column) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)
