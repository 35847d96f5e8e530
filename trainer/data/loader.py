"""Batches in order, made ahead of the training by worker processes.

The training process draws the indices of batches; workers decode, mirror and look up targets, a
complete batch at a time. Indices depend only on seed, epoch and step, so any number of workers
gives the same batches, and a resumed run continues from its step.

If targets come from the cache's shards, an epoch visits blocks of shards in random order and the
images of a block in random order, and the training process looks up targets, so that each shard is
read once per epoch and few are in memory.
"""

import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import GkdError
from gkd.storage.reading.shard_store import Block, ShardStore
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.data.dataset import Batch, FaceBatches
from gkd.trainer.data.sampler import BatchIndices, BatchSampler
from gkd.trainer.head.targets import GroupTargets

PREFETCH = 4


class BatchLoader(Iterator[Batch]):
    """The batches of ``sampler``, made ahead by ``workers`` processes (0: here, when requested).

    There is at most one worker per core of this rank. ``close`` ends them. ``next`` raises what a
    worker raised, as a GkdError or OSError.
    """

    def __init__(
        self, dataset: FaceBatches, sampler: BatchSampler, *, workers: int, pin: bool
    ) -> None:
        workers = min(workers, usable_cores())
        indices: Iterable[Any] = sampler
        if dataset.targets is not None and isinstance(dataset.targets.store, ShardStore):
            indices = _with_targets(sampler, dataset.targets.store, dataset.targets.rows)
        loader: DataLoader[_Item] = DataLoader(
            _ErrorsAsItems(dataset),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_ignore_interrupts,
            # Without its own generator the loader would draw from the one that a resume restores.
            generator=torch.Generator(),
        )
        self._items = iter(loader)

    def __next__(self) -> Batch:
        try:
            item: _Item = next(self._items)
            if isinstance(item, Exception):
                raise item
        except BaseException:
            self.close()
            raise
        return item.batch()

    def close(self) -> None:
        """End the workers."""
        # Not left to the garbage collector: a traceback may hold the loader, and living workers,
        # which ignore SIGTERM, would block the interpreter's exit.
        if isinstance(self._items, _MultiProcessingDataLoaderIter):
            self._items._shutdown_workers()

    def dead_workers(self) -> list[str]:
        """``process P (exit code C)`` for each worker that died; call it once closed."""
        return [
            f"process {worker.pid} (exit code {worker.exitcode})"
            for worker in getattr(self._items, "_workers", [])
            if worker.exitcode not in (None, 0)
        ]


@dataclass(frozen=True)
class _Packed:
    """A batch as two tensors, as a worker sends it.

    Each tensor that is sent to another process costs a file in shared memory, for small ones far
    more than their bytes. ``rest`` holds everything but the images, ``fields`` describe it: name,
    dtype and length of each tensor.
    """

    images: Tensor
    rest: Tensor
    fields: tuple[tuple[str, torch.dtype, int], ...]

    @classmethod
    def pack(cls, batch: Batch) -> Self:
        named = {"labels": batch.labels, "rows": batch.rows}
        if batch.targets is not None:
            named |= {f"targets.{name}": value for name, value in batch.targets.tensors().items()}
        # The widest dtype first, so that each is aligned.
        fields = sorted(named.items(), key=lambda field: -field[1].itemsize)
        return cls(
            batch.images,
            torch.cat([value.contiguous().view(torch.uint8) for _, value in fields]),
            tuple((name, value.dtype, len(value)) for name, value in fields),
        )

    def pin_memory(self) -> "_Packed":
        """Copy to pinned memory; torch's data loader calls it by this name."""
        return replace(self, images=self.images.pin_memory(), rest=self.rest.pin_memory())

    def batch(self) -> Batch:
        """The batch, over the same memory."""
        sizes = [length * dtype.itemsize for _, dtype, length in self.fields]
        values = {
            name: part.view(dtype)
            for (name, dtype, _), part in zip(self.fields, self.rest.split(sizes), strict=True)
        }
        labels, rows = values.pop("labels"), values.pop("rows")
        targets = {name.removeprefix("targets."): value for name, value in values.items()}
        return Batch(self.images, labels, rows, GroupTargets(**targets) if targets else None)


_Item = _Packed | GkdError | OSError


class _ErrorsAsItems(Dataset[_Item]):
    """Returns errors as items: the loader itself would wrap them in the worker's traceback."""

    def __init__(self, dataset: FaceBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: BatchIndices | GkdError | OSError) -> _Item:
        if not isinstance(indices, BatchIndices):
            return indices
        try:
            return _Packed.pack(self.dataset[indices])
        except (GkdError, OSError) as error:
            return error


def _ignore_interrupts(_worker: int) -> None:
    # Ctrl-C or a scheduler's SIGTERM reaches the whole process group: the training process finishes
    # its step and stops the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _with_targets(
    sampler: BatchSampler, store: ShardStore, rows: npt.NDArray[np.int64]
) -> Iterator[BatchIndices | GkdError | OSError]:
    """A sampler's indices with their targets, read by a thread that is one block ahead.

    An error is the last item: raised inside the loader, it would keep the loader and its workers
    alive.
    """
    loaded: dict[int, Future[Block]] = {}
    try:
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(1, "read blocks")
            stack.callback(pool.shutdown, cancel_futures=True)
            for indices in sampler:
                assert indices.blocks is not None
                first, last = int(indices.blocks[0]), int(indices.blocks[-1])
                for number in [number for number in loaded if number < first]:
                    del loaded[number]
                for number in range(first, max(first + 1, last) + 1):
                    shards = sampler.block_shards(number) if number not in loaded else None
                    if shards is not None:
                        loaded[number] = pool.submit(store.load, shards)
                parts = []
                for number in np.unique(indices.blocks).tolist():
                    of_block = indices.blocks == number
                    of_cache, flipped = rows[indices.rows[of_block]], indices.flipped[of_block]
                    parts.append(loaded[number].result().lookup(of_cache, flipped))
                yield replace(indices, targets=SparseTargets.concat(parts))
    except (GkdError, OSError) as error:
        yield error
