"""Finished batches to shards on disk, by a thread of its own."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gkd.pipeline.embed import EmbeddedBatch
from gkd.pipeline.groups.draws import uniform_numbers
from gkd.pipeline.groups.partition import Partition, partition
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.spec import View
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.cache.writer import CacheWriter, ShardSamples
from gkd.storage.records.base import Records


@dataclass(frozen=True)
class PartitionedBatch:
    """A partitioned batch: an ``EmbeddedBatch`` with groups in place of embeddings."""

    rows: range
    kept: npt.NDArray[np.int64]
    views: Mapping[View, Partition]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]


def partition_batch(
    batch: EmbeddedBatch,
    labels: npt.NDArray[np.int64],
    centers: Tensor,
    settings: PartitionSettings,
    class_chunk: int | None = None,
) -> PartitionedBatch:
    """Groups of a batch in all its views; ``labels`` int64 [m] are of the kept images."""
    draws, digests = settings.draws, batch.digests[batch.kept]
    of_views = [uniform_numbers(draws, view, digests) for view in batch.embeddings] if draws else []
    # All views at once: an accelerator's time goes by operations and not by rows.
    embeddings = np.concatenate(list(batch.embeddings.values()))
    with _before_the_teacher(centers.device):
        whole = partition(
            torch.from_numpy(embeddings),
            torch.from_numpy(np.tile(labels, len(batch.embeddings))),
            centers,
            settings,
            uniforms=np.concatenate(of_views) if of_views else None,
            class_chunk=class_chunk,
        )
    count = len(labels)
    views: dict[View, Partition] = {
        view: whole.of(range(place * count, (place + 1) * count))
        for place, view in enumerate(batch.embeddings)
    }
    return PartitionedBatch(batch.rows, batch.kept, views, batch.digests, batch.skipped)


@contextmanager
def _before_the_teacher(device: torch.device) -> Iterator[None]:
    """Let a GPU take what is asked for here before a teacher's work.

    A partition is many short operations, each of which would wait for a long one.
    """
    if device.type == "cpu":
        yield
        return
    stream = _urgent_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@functools.cache
def _urgent_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def write_shard_job(
    writer: CacheWriter, shard: int, records: Records, parts: Sequence[PartitionedBatch]
) -> Callable[[], None]:
    """The work of writing a shard from its batches, all of them in order."""

    def commit() -> None:
        rows = range(parts[0].rows.start, parts[-1].rows.stop)
        samples = ShardSamples(
            keys=[records.key(row) for row in rows],
            labels=records.labels[rows.start : rows.stop],
            digests=np.concatenate([part.digests for part in parts]),
            skipped={
                place + part.rows.start - rows.start: reason
                for part in parts
                for place, reason in part.skipped.items()
            },
        )
        views = parts[0].views
        writer.write_shard(
            shard,
            {view: _join_targets(view, parts) for view in views},
            samples,
            truncated={
                view: sum(int(part.views[view].truncated.sum()) for part in parts) for view in views
            },
        )

    return commit


def _join_targets(view: View, parts: Sequence[PartitionedBatch]) -> SparseTargets:
    """Targets of consecutive batches as one; a skipped sample has no entry and zeros elsewhere."""
    return SparseTargets.concat(
        [part.views[view].targets.scatter(part.kept, len(part.rows)) for part in parts]
    )


class AsyncShardWriter:
    """One thread that writes a shard while the next one is computed.

    A second shard waits for the first, so a slow disk slows the teacher and fills no memory. An
    error of the thread is raised in the caller. On the way out, whatever the reason, the shard
    at hand is finished.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write")
        self._latest: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run ``work`` once the one before is done."""
        self._finish()
        self._latest = self._pool.submit(work)

    def check(self) -> None:
        """Raise the error of the latest work, if it has failed."""
        if self._latest is not None and self._latest.done():
            self._finish()

    def _finish(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None:
            latest.result()

    def __enter__(self) -> "AsyncShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self._finish()
        elif self._latest is not None and (second := self._latest.exception()) is not None:
            error.add_note(f"and the shard being written failed: {second}")
