"""Size of a complete cache, from a sample's groups written as the cache would write them."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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

INDEX_ENTRY_BYTES, CRC_BYTES = 16, 4  # of a packed array's index, an entry for each inner chunk


class _SampleBytes(NamedTuple):
    """Bytes that grow with the samples, with the shards, and with neither.

    per_sample  data of arrays and of the table of samples, all views
    per_shard   commit record, its part of the manifest, and what each file adds to its data
    fixed       metadata, card and the rest of the manifest
    seconds     of writing, for each sample
    """

    per_sample: float
    per_shard: float
    fixed: int
    seconds: float


def measure_bytes(
    spec: CacheSpec,
    records: Records,
    views: Mapping[View, Partition],
    digests: npt.NDArray[np.uint8],
) -> tuple[int, float]:
    """Bytes of all files of the finished cache, and seconds of writing for each sample.

    Measured on temporary caches of the groups of n images. ``spec`` is that of the complete cache.
    Keys and labels are those of consecutive records, as in a shard; ``digests`` uint8 [n, 16] are
    the sample's.

    Raises:
        ConfigError: if the temporary folder has no room.
    """
    shard_samples = min(spec.shard_samples, len(digests))
    shards = len(digests) // shard_samples
    count = shards * shard_samples
    written = _write(spec, records, views, digests, range(count), shard_samples)
    # Even a minimal shard has headers, footers and checksums, so their bytes belong to each shard.
    smallest = int(np.argmin(sum(view.targets.sizes for view in views.values())))
    least = _write(spec, records, views, digests, range(smallest, smallest + 1), 1).per_sample
    per_sample = (written.per_sample * count - shards * least) / max(count - shards, 1)
    per_shard = round(written.per_shard + _index_bytes(spec) + least - per_sample)
    total = per_sample * spec.num_samples + per_shard * spec.num_shards + written.fixed
    return round(total), written.seconds


def _write(
    spec: CacheSpec,
    records: Records,
    views: Mapping[View, Partition],
    digests: npt.NDArray[np.uint8],
    rows: range,
    shard_samples: int,
) -> _SampleBytes:
    """Bytes of a cache of ``rows`` of the sample, without the indices of packed arrays."""
    first = (len(records) - len(rows)) // 2
    neighbours = Subset(records, np.arange(first, first + len(rows)))
    small = msgspec.structs.replace(spec, num_samples=len(rows), shard_samples=shard_samples)
    shards = range(small.num_shards)
    with tempfile.TemporaryDirectory(prefix="gkd-plan-") as folder:
        path = Path(folder) / "sample.gkd"
        writer = CacheWriter(path, small)
        began = time.perf_counter()
        for shard in shards:
            inside = small.shard_rows(shard)
            chosen = range(rows.start + inside.start, rows.start + inside.stop)
            groups: dict[View, Partition] = {v: view.of(chosen) for v, view in views.items()}
            own_digests = digests[chosen.start : chosen.stop]
            batch = PartitionedBatch(inside, np.arange(len(inside)), own_digests, {}, groups)
            commit_shard(writer, assemble_shard(neighbours, [batch]))
        seconds = time.perf_counter() - began
        write_card(path)
        names = [layout.CARD, *(name for name, _ in layout.metadata_files(small))]
        files = {name: file_record(path / name) for name in names}
        commits = [
            (read_commit(path, small, shard), file_record(path / layout.commit_file(shard)))
            for shard in shards
        ]
    one, two = (len(layout.manifest_content(small, files, commits[:1] * n)) for n in (1, 2))
    arrays = sum(file.bytes for commit, _ in commits for file in commit.files.values())
    return _SampleBytes(
        per_sample=(arrays - len(shards) * _index_bytes(small)) / len(rows),
        per_shard=commits[0][1].bytes + two - one,
        fixed=sum(file.bytes for file in files.values()) + 2 * one - two,
        seconds=seconds / len(rows),
    )


def _index_bytes(spec: CacheSpec) -> int:
    """Bytes of one shard's indices, which have an entry for every chunk, written or not."""
    chunks = layout.packed_width(spec) // layout.INNER_CHUNK
    packed = [a for view in spec.views for a in layout.arrays(spec, view).values() if a.packed]
    return len(packed) * (INDEX_ENTRY_BYTES * chunks + CRC_BYTES)
