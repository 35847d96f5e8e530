"""What a whole cache will weigh, from a sample's groups written as the cache would write them."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.pipeline.groups.partition import Partition
from gkd.pipeline.shard import PartitionedBatch, assemble_shard, commit_shard
from gkd.storage.cache import layout
from gkd.storage.cache.card import write_card
from gkd.storage.cache.layout import file_record
from gkd.storage.cache.metadata import read_commit
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.records.base import Records, Subset

INDEX_ENTRY_BYTES, CRC_BYTES = 16, 4  # of a packed array's index, an entry an inner chunk


@dataclass(frozen=True)
class SampleBytes:
    """Bytes that grow with the samples, with the shards, and with neither.

    per_sample  data of arrays and of the table of samples, all views
    per_shard   commit record, its part of the manifest, and what every file has around its data
    fixed       metadata, card and the rest of the manifest
    seconds     that writing the sample took, for each of its samples
    """

    per_sample: float
    per_shard: int
    fixed: int
    seconds: float

    def whole(self, spec: CacheSpec) -> int:
        """Bytes of all files of the finished cache."""
        data = self.per_sample * spec.num_samples
        return round(data + self.per_shard * spec.num_shards + self.fixed)


def measure_bytes(
    spec: CacheSpec,
    records: Records,
    views: Mapping[View, Partition],
    digests: npt.NDArray[np.uint8],
) -> SampleBytes:
    """Write the groups of n images into a temporary cache and weigh its files.

    ``spec`` is that of the whole cache. Keys and labels are those of consecutive records, as a
    shard has them; ``digests`` uint8 [n, 16] are the sample's.

    Raises:
        ConfigError: where the temporary folder has no room.
    """
    shard_samples = min(spec.shard_samples, len(digests))
    count = len(digests) // shard_samples * shard_samples
    whole = _write(spec, records, views, digests, range(count), shard_samples)
    # What a shard of hardly anything weighs comes with every shard: of headers, footers, checksums.
    sizes = sum(each.targets.sizes for each in views.values())
    smallest = int(np.argmin(sizes))
    least = _write(spec, records, views, digests, range(smallest, smallest + 1), 1).arrays
    per_sample = (whole.arrays - whole.shards * least) / max(count - whole.shards, 1)
    return SampleBytes(
        per_sample=per_sample,
        per_shard=round(whole.per_shard + _index_bytes(spec) + least - per_sample),
        fixed=whole.fixed,
        seconds=whole.seconds / count,
    )


@dataclass(frozen=True)
class _Written:
    """A written sample: bytes of the data of all its shards, without indices, and of the rest."""

    shards: int
    arrays: int
    per_shard: int
    fixed: int
    seconds: float


def _write(
    spec: CacheSpec,
    records: Records,
    views: Mapping[View, Partition],
    digests: npt.NDArray[np.uint8],
    rows: range,
    shard_samples: int,
) -> _Written:
    """Write some of the sample in whole shards."""
    shards = len(rows) // shard_samples
    first = (len(records) - len(rows)) // 2
    neighbours = Subset(records, np.arange(first, first + len(rows)))
    small = msgspec.structs.replace(spec, num_samples=len(rows), shard_samples=shard_samples)
    with tempfile.TemporaryDirectory(prefix="gkd-plan-") as folder:
        path = Path(folder) / "sample.gkd"
        writer = CacheWriter(path, small)
        began = time.perf_counter()
        for shard in range(shards):
            inside = small.shard_rows(shard)
            taken = range(rows.start + inside.start, rows.start + inside.stop)
            part = _cut_out(views, digests, taken, inside)
            commit_shard(writer, assemble_shard(neighbours, [part]))
        seconds = time.perf_counter() - began
        write_card(path)
        names = [layout.CARD, *(name for name, _ in layout.metadata_files(small))]
        files = {name: file_record(path / name) for name in names}
        commits = [
            (read_commit(path, small, shard), file_record(path / layout.commit_file(shard)))
            for shard in range(shards)
        ]
    one, two = (len(layout.manifest_content(small, files, commits[:1] * n)) for n in (1, 2))
    arrays = sum(file.bytes for commit, _ in commits for file in commit.files.values())
    return _Written(
        shards=shards,
        arrays=arrays - shards * _index_bytes(small),
        per_shard=commits[0][1].bytes + two - one,
        fixed=sum(file.bytes for file in files.values()) + 2 * one - two,
        seconds=seconds,
    )


def _cut_out(
    views: Mapping[View, Partition], digests: npt.NDArray[np.uint8], taken: range, rows: range
) -> PartitionedBatch:
    """Images ``taken`` of the sample as ``rows`` of a cache."""
    place = slice(taken.start, taken.stop)
    cut: dict[View, Partition] = {view: whole.of(taken) for view, whole in views.items()}
    return PartitionedBatch(rows, np.arange(len(rows)), cut, digests[place], {})


def _index_bytes(spec: CacheSpec) -> int:
    """Of one shard: packed arrays tell the place of every chunk, also of those that are absent."""
    chunks = layout.packed_width(spec) // layout.INNER_CHUNK
    packed = [a for view in spec.views for a in layout.arrays(spec, view).values() if a.packed]
    return len(packed) * (INDEX_ENTRY_BYTES * chunks + CRC_BYTES)
