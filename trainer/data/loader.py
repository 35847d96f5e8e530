"""Batches in order, made ahead of the training by worker processes.

The training process draws the indices of batches; workers decode, mirror and look up targets, a
complete batch at a time. Indices depend only on seed, epoch and step, so any number of workers
gives the same batches, and a resumed run continues from its step.

If targets come from the cache's shards, an epoch visits blocks of shards in random order and the
images of a block in random order, and the training process looks up targets, so that each shard is
read once per epoch and few are in memory.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing import queues
from multiprocessing.process import BaseProcess
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import GkdError
from gkd.storage.reading.shard_store import Block, ShardStore
from gkd.storage.util.signals import STOP_SIGNALS
from gkd.storage.util.torchrun_env import log_rank0, usable_cores
from gkd.trainer.data.dataset import Batch, FaceBatches
from gkd.trainer.data.sampler import BatchIndices, BatchSampler
from gkd.trainer.data.shared_memory import MORE, batch_bytes, fit, free_bytes
from gkd.trainer.head.targets import GroupTargets

# A batch that has not come by then never will: a disk or a network does not answer.
STUCK_SECONDS = 600.0
_SPEAK_SECONDS = 30.0
# Workers that do not end when asked are killed.
_END_SECONDS = 5.0
_CANNOT_SEND = 70


class BatchLoader(Iterator[Batch]):
    """The batches of ``sampler``, made ahead by ``workers`` processes (0: here, when requested).

    There is at most one worker per core of this rank, and fewer if shared memory has no room for
    their batches. ``close`` ends them. ``next`` raises what a worker raised, as a GkdError or
    OSError, and a GkdError if nothing came for ``STUCK_SECONDS``.
    """

    def __init__(
        self, dataset: FaceBatches, sampler: BatchSampler, *, workers: int, pin: bool
    ) -> None:
        rows = sampler.batch_size // sampler.world_size
        batch = batch_bytes(rows, dataset.targets, dataset.signal)
        self._workers, ahead, fewer = fit(min(workers, usable_cores()), batch, free_bytes())
        if fewer:
            log_rank0(fewer)
        indices: Iterable[Any] = sampler
        if dataset.targets is not None and isinstance(dataset.targets.store, ShardStore):
            indices = _with_targets(sampler, dataset.targets.store, dataset.targets.rows)
        loader: DataLoader[_Item] = DataLoader(
            _ErrorsAsItems(dataset),
            batch_size=None,
            sampler=indices,
            num_workers=self._workers,
            pin_memory=pin,
            prefetch_factor=ahead if self._workers else None,
            worker_init_fn=_prepare_worker,
            # So that a wait for a batch can be looked at, and left, once a second.
            timeout=1.0 if self._workers else 0.0,
            # Without its own generator the loader would draw from the one that a resume restores.
            generator=torch.Generator(),
        )
        # The thread that copies to pinned memory makes 1 the default of all threads to come.
        self._threads = torch.get_num_threads()
        self._taken = 0
        try:
            self._items = iter(loader)
        except (OSError, RuntimeError) as error:
            raise GkdError(
                f"data.workers: {self._workers} processes cannot be started ({error}); set "
                "data.workers=0, or raise the limits of processes and open files (ulimit -u, -n)"
            ) from error

    def __next__(self) -> Batch:
        batch = self.take(lambda: False)
        assert batch is not None
        return batch

    def take(self, stopped: Callable[[], bool]) -> Batch | None:
        """The next batch; None if ``stopped`` becomes true while it is waited for."""
        began, speak = time.monotonic(), _SPEAK_SECONDS
        try:
            while True:
                try:
                    item: _Item = next(self._items)
                    break
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader timed out"):
                        raise
                waited = time.monotonic() - began
                if stopped():
                    return None
                if waited > min(speak, STUCK_SECONDS):
                    speak += _SPEAK_SECONDS
                    self._report_wait(waited)
            if isinstance(item, Exception):
                raise item
        except BaseException:
            self.close()
            raise
        self._taken += 1
        return item.batch()

    def _report_wait(self, waited: float) -> None:
        """Say which worker has not delivered; an error if it has not for too long."""
        # Torch deals batches to the workers in turn.
        process = getattr(self._items, "_workers", [])[self._taken % self._workers]
        late = f"process {process.pid}, which prepares data, has not delivered for {waited:.0f} s"
        if waited > STUCK_SECONDS:
            raise GkdError(
                f"{late}; see whether the disk or network of the records answers, and run the "
                "same command again"
            )
        print(late, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the workers."""
        # Not left to the garbage collector: a traceback may hold the loader, and living workers,
        # which ignore SIGTERM, would block the interpreter's exit.
        if isinstance(self._items, _MultiProcessingDataLoaderIter):
            kill = threading.Timer(_END_SECONDS, _kill, [self._items._workers])
            kill.daemon = True
            kill.start()
            with suppress(RuntimeError):  # torch reports the killed
                self._items._shutdown_workers()
            kill.cancel()
            torch.set_num_threads(self._threads)

    def dead_workers(self) -> str:
        """Which workers died, of what and probably why; empty if none. Call it once closed."""
        codes = {
            worker.pid: worker.exitcode
            for worker in getattr(self._items, "_workers", [])
            if worker.exitcode not in (None, 0)
        }
        if not codes:
            return ""
        named = ", ".join(f"process {pid} ({_ended_by(code)})" for pid, code in codes.items())
        # Those that were killed for the death of another come later, by SIGKILL.
        why = next((_CAUSES[code] for code in codes.values() if code in _CAUSES), _OUT_OF_MEMORY)
        return f"a process that prepares data died: {named}; {why}"


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


_OUT_OF_MEMORY = "often memory ran out: set fewer data.workers or provide more memory"
_CRASHED = "native code crashed: check the records with `gkd records verify`"
_CAUSES = {
    -signal.SIGBUS: "a file that it had mapped was cut or its disk failed: check with `gkd records "
    "verify` and `gkd targets verify`, and write no file that a training reads",
    -signal.SIGSEGV: _CRASHED,
    -signal.SIGABRT: _CRASHED,
    -signal.SIGILL: _CRASHED,
    -signal.SIGFPE: _CRASHED,
    _CANNOT_SEND: "it could not send a batch, for the reason that it printed above",
}


def _ended_by(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


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

    def shared(self) -> Self:
        """Move to shared memory, for another process.

        Raises:
            GkdError: if there is no room.
        """
        try:
            self.images.share_memory_()
            self.rest.share_memory_()
        except (RuntimeError, OSError) as error:
            raise GkdError(
                f"a batch of {self.images.nbytes / 2**20:,.1f} MiB finds no room in shared memory "
                f"({error}); {MORE}, or set fewer data.workers or a smaller train.batch_size"
            ) from error
        return self

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
            packed = _Packed.pack(self.dataset[indices])
            # Torch would do this in a thread, whose errors it prints, and then wait for ever.
            return packed.shared() if get_worker_info() else packed
        except (GkdError, OSError) as error:
            return error


def _prepare_worker(_worker: int) -> None:
    # Ctrl-C or a scheduler's signal reaches the whole process group: the training process finishes
    # its step and stops the workers itself.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Torch's handlers blame shared memory, whatever was cut.
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)
    # A batch that the sending thread drops would be waited for: end instead.
    queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, _item: object) -> None:
    print(
        f"process {os.getpid()}, which prepares data, cannot send a batch: {error}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(_CANNOT_SEND)


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
