"""Batches one after the other, made ahead of the training by processes of their own.

The training process plans batches; workers decode, mirror and look targets up a whole batch at a
time. A plan depends on seed, epoch and place alone, so any number of workers gives the same
batches, and a resumed run plans on from its step.

Where targets come from the cache's shards, an epoch goes through blocks of shards in random order
and through the images of a block in random order, and the training process looks targets up, so
that each shard is read once an epoch and a few are in memory.
"""

import signal
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import GkdError
from gkd.storage.reading.shard_store import Block, ShardStore
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.data.dataset import Batch, FaceBatches
from gkd.trainer.data.sampler import BatchIndices, BatchSampler
from gkd.trainer.head.targets import GroupTargets

PREFETCH = 4


def load_batches(
    dataset: FaceBatches, plans: BatchSampler, *, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Batches by their plans, in order, made ahead by ``workers`` processes (0: here, when asked).

    There is at most one worker a core of this rank's. Closing the generator ends them.

    Raises:
        GkdError: what a worker met, as it was raised there.
    """
    workers = min(workers, usable_cores())
    sampler: Sampler[Any] = plans
    if dataset.targets is not None and isinstance(dataset.targets.store, ShardStore):
        sampler = _WithTargets(plans, dataset.targets.store, dataset.targets.rows)
    loader: DataLoader[_Made] = DataLoader(
        _Carrying(dataset, pack=workers > 0),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_ignore_interrupts,
        # Without its own, the loader draws a number from the generator that resuming restores.
        generator=torch.Generator(),
    )
    made = iter(loader)
    try:
        for item in made:
            match item:
                case Batch():
                    yield item
                case _Packed():
                    yield item.batch()
                case error:
                    raise error
    finally:
        # Not left to the garbage collector: a traceback may hold the loader, and workers that live
        # on, deaf to SIGTERM as they are, would block the interpreter's end.
        if isinstance(made, _MultiProcessingDataLoaderIter):
            made._shutdown_workers()


@dataclass(frozen=True)
class _Packed:
    """A batch on its way out of a worker, in two tensors.

    Each tensor that goes to another process costs a file in shared memory, which for small ones is
    far more than their bytes. ``rest`` holds all but the images, ``fields`` says what: a name, and
    type and length of its tensor.
    """

    images: Tensor
    rest: Tensor
    fields: tuple[tuple[str, torch.dtype, int], ...]

    @classmethod
    def of(cls, batch: Batch) -> "_Packed":
        """Labels, rows and targets in one tensor."""
        named = {"labels": batch.labels, "rows": batch.rows}
        if batch.targets is not None:
            named |= {f"targets.{name}": value for name, value in batch.targets.tensors().items()}
        # The longest type first, so that each stands where its type may stand.
        fields = sorted(named.items(), key=lambda field: -field[1].itemsize)
        return cls(
            batch.images,
            torch.cat([value.contiguous().view(torch.uint8) for _, value in fields]),
            tuple((name, value.dtype, len(value)) for name, value in fields),
        )

    def pin_memory(self) -> "_Packed":
        """The same in pinned memory; the name is the data loader's."""
        return _Packed(self.images.pin_memory(), self.rest.pin_memory(), self.fields)

    def batch(self) -> Batch:
        """The batch, over the same memory."""
        values: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        begin = 0
        for name, dtype, length in self.fields:
            end = begin + length * dtype.itemsize
            inside = name.removeprefix("targets.")
            (values if inside == name else targets)[inside] = self.rest[begin:end].view(dtype)
            begin = end
        return Batch(self.images, **values, targets=GroupTargets(**targets) if targets else None)


_Made = Batch | _Packed | GkdError | OSError


class _Carrying(Dataset[_Made]):
    """Hands errors over as values: the loader's own way wraps them in the worker's traceback."""

    def __init__(self, dataset: FaceBatches, *, pack: bool) -> None:
        self.dataset, self.pack = dataset, pack

    def __getitem__(self, plan: BatchIndices | GkdError | OSError) -> _Made:
        if not isinstance(plan, BatchIndices):
            return plan
        try:
            batch = self.dataset[plan]
        except (GkdError, OSError) as error:
            return error
        return _Packed.of(batch) if self.pack else batch


def _ignore_interrupts(_worker: int) -> None:
    # A Ctrl-C or a scheduler's SIGTERM reaches the whole process group: the training process
    # finishes its step and stops the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass(frozen=True)
class _WithTargets(Sampler[BatchIndices | GkdError | OSError]):
    """BatchSampler with their targets, read block by block by a thread that is one block ahead.

    Hands an error over as its last value: raised inside the loader, it would keep the loader alive,
    and that its workers.
    """

    plans: BatchSampler
    store: ShardStore
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[BatchIndices | GkdError | OSError]:
        try:
            yield from self._plans()
        except (GkdError, OSError) as error:
            yield error

    def _plans(self) -> Iterator[BatchIndices]:
        loaded: dict[int, Future[Block]] = {}
        with ThreadPoolExecutor(1, "read blocks") as pool:
            try:
                for plan in self.plans:
                    assert plan.blocks is not None
                    first, last = int(plan.blocks[0]), int(plan.blocks[-1])
                    for number in [number for number in loaded if number < first]:
                        del loaded[number]
                    for number in range(first, max(first + 1, last) + 1):
                        shards = self.plans.block_shards(number) if number not in loaded else None
                        if shards is not None:
                            loaded[number] = pool.submit(self.store.load, shards)
                    yield replace(plan, targets=self._lookup(plan, plan.blocks, loaded))
            finally:
                pool.shutdown(cancel_futures=True)

    def _lookup(
        self, plan: BatchIndices, blocks: npt.NDArray[np.int64], loaded: dict[int, Future[Block]]
    ) -> SparseTargets:
        parts = []
        for number in np.unique(blocks).tolist():
            rows, flipped = plan.rows[blocks == number], plan.flipped[blocks == number]
            parts.append(loaded[number].result().lookup(self.rows[rows], flipped))
        return SparseTargets.concat(parts)
