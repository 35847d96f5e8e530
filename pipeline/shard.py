"""Shards of a cache as values: computed from embeddings, and committed to a place."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gkd.pipeline.embed import EmbeddedBatch, RowBatch, join_rows, whole_shards
from gkd.pipeline.groups.draws import uniform_numbers
from gkd.pipeline.groups.partition import Partition, partition
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import Sharding, View
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.records.base import Records


@dataclass(frozen=True)
class PartitionedBatch(RowBatch):
    """A batch with the groups of its m images in each view."""

    views: Mapping[View, Partition]


@dataclass(frozen=True)
class Shard:
    """What one shard of a cache holds; ``truncated`` counts groups cut at ``max_group``."""

    rows: range
    targets: Mapping[View, SparseTargets]
    samples: ShardSamples
    truncated: Mapping[View, int]


def compute_shards(
    batches: Iterable[EmbeddedBatch],
    records: Records,
    centers: Tensor,
    settings: PartitionSettings,
    sharding: Sharding,
    *,
    class_chunk: int | None,
    advance: Callable[[int], object],
) -> Iterator[Shard]:
    """The shards of consecutive batches, each a function of its own rows alone.

    Batches must not reach over the end of a shard. ``advance`` is called with the rows of each.
    """

    def partition_rows(batch: EmbeddedBatch) -> PartitionedBatch:
        labels = records.labels[batch.rows.start + batch.kept]
        return partition_batch(batch, labels, centers, settings, class_chunk)

    # Maps and no loops, whose variables would keep a shard while the next one is computed.
    parts = whole_shards(map(partition_rows, batches), sharding, advance)
    return map(partial(assemble_shard, records), parts)


def partition_batch(
    batch: EmbeddedBatch,
    labels: npt.NDArray[np.int64],
    centers: Tensor,
    settings: PartitionSettings,
    class_chunk: int | None = None,
) -> PartitionedBatch:
    """Groups of a batch in all its views; ``labels`` int64 [m] are of the kept images."""
    draws, digests = settings.draws, batch.digests[batch.kept]
    uniforms = [uniform_numbers(draws, view, digests) for view in batch.embeddings] if draws else []
    # All views at once: an accelerator's time depends on operations and not on rows.
    embeddings = np.concatenate(list(batch.embeddings.values()))
    with _ahead_of_the_teacher(centers.device):
        of_views = partition(
            torch.from_numpy(embeddings),
            torch.from_numpy(np.tile(labels, len(batch.embeddings))),
            centers,
            settings,
            uniforms=np.concatenate(uniforms) if uniforms else None,
            class_chunk=class_chunk,
        )
    count = len(labels)
    views: dict[View, Partition] = {
        view: of_views.of(range(index * count, (index + 1) * count))
        for index, view in enumerate(batch.embeddings)
    }
    return PartitionedBatch(batch.rows, batch.kept, batch.digests, batch.skipped, views)


@contextmanager
def _ahead_of_the_teacher(device: torch.device) -> Iterator[None]:
    """Let a GPU prefer this work to a teacher's.

    A partition is many short operations, each of which would wait for a long one.
    """
    if device.type == "cpu":
        yield
        return
    stream = _priority_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@functools.cache
def _priority_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def assemble_shard(records: Records, parts: Sequence[PartitionedBatch]) -> Shard:
    """A shard from its batches, all of them in order."""
    joined, views = join_rows(parts), parts[0].views
    return Shard(
        rows=joined.rows,
        # Skipped rows have no entries.
        targets={
            view: SparseTargets.concat(
                [part.views[view].targets.scatter(part.kept, len(part.rows)) for part in parts]
            )
            for view in views
        },
        samples=ShardSamples(
            keys=[records.key(row) for row in joined.rows],
            labels=records.labels[joined.rows.start : joined.rows.stop],
            digests=joined.digests,
            skipped=joined.skipped,
        ),
        truncated={
            view: sum(int(part.views[view].truncated.sum()) for part in parts) for view in views
        },
    )


def commit_shard(writer: CacheWriter, shard: Shard) -> None:
    """Write a shard to the writer's cache and commit it."""
    number = writer.spec.sharding.shard_of(shard.rows.start)
    writer.write_shard(number, shard.targets, shard.samples, truncated=shard.truncated)
