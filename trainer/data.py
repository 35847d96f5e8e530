"""Batches of faces with their labels and their teacher's targets, in an order made from a seed.

The training process plans batches (which rows, which of them mirrored); workers decode, mirror
and look targets up a whole batch at a time. A plan depends on seed, epoch and place alone, so
any number of workers gives the same batches, and a resumed run plans on from its step.
"""

import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gkd.storage.cache import Cache
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.join import SKIPPED, join
from gkd.storage.materialise import TargetStore, materialise
from gkd.storage.records import Records, digests
from gkd.storage.rows import Subset
from gkd.storage.spec import CacheSpec
from gkd.storage.targets import at_temperature
from gkd.trainer.losses import GroupTargets

PREFETCH = 4
# Streams of random numbers drawn from one seed.
_ORDER, _FLIPS = 0, 1


@dataclass(frozen=True)
class JoinedTargets:
    """A cache's targets, and the row of the cache for each image of the records, int64 [N]."""

    store: TargetStore
    rows: npt.NDArray[np.int64]

    @property
    def spec(self) -> CacheSpec:
        """What the cache is."""
        return self.store.spec


def join_targets(
    records: Records, cache: Cache, *, workers: int, folder: Path | None = None
) -> tuple[Records, JoinedTargets]:
    """Match images with the cache by their content, and materialise its targets on this node.

    Returns the records without those that the cache skipped, and their targets.

    Raises:
        SpecMismatchError: where images are not the cache's, or class numbers differ.
        CorruptRecordError: where a record cannot be read.
        CorruptShardError: where the cache is damaged.
    """
    rows = join(records, cache, digests=digests(records, workers=workers))
    used = np.flatnonzero(rows != SKIPPED)
    if len(used) < len(rows):
        records = Subset(records, used)
    return records, JoinedTargets(materialise(cache, folder=folder), rows[used])


@dataclass(frozen=True)
class BatchPlan:
    """Rows of the records, int64 [B], and which of them to mirror, bool [B]."""

    rows: npt.NDArray[np.int64]
    flipped: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """One step's data.

    images   uint8 [B, 112, 112, 3], RGB
    labels   int64 [B]
    rows     int64 [B], of the records
    targets  of the view that each image shows; None without distillation
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    targets: GroupTargets | None

    def to(self, device: torch.device) -> "Batch":
        """The same on another device; rows stay, they are for messages."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.rows,
            self.targets.to(device) if self.targets else None,
        )

    def pin_memory(self) -> "Batch":
        """The same in pinned memory; the name is the data loader's."""
        return Batch(
            self.images.pin_memory(),
            self.labels.pin_memory(),
            self.rows,
            self.targets.pin_memory() if self.targets else None,
        )


@dataclass(frozen=True)
class Plans(Sampler[BatchPlan]):
    """The batches of a training from step ``start`` to its end, one epoch after the other.

    Each epoch is a new permutation of all ``num_images``, less an incomplete last batch.
    """

    num_images: int
    batch_size: int
    epochs: int
    seed: int
    flip: bool
    start: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.num_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Batches of the whole training."""
        return self.steps_per_epoch * self.epochs

    def starting_at(self, step: int) -> "Plans":
        """The same training from another step on."""
        return replace(self, start=step)

    def __len__(self) -> int:
        return self.total_steps - self.start

    def __iter__(self) -> Iterator[BatchPlan]:
        step = self.start
        while step < self.total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = self._rng(epoch, _ORDER).permutation(self.num_images)
            flipped = np.zeros(self.num_images, bool)
            if self.flip:
                flipped = self._rng(epoch, _FLIPS).random(self.num_images) < 0.5
            for place in range(first, self.steps_per_epoch):
                rows = order[place * self.batch_size : (place + 1) * self.batch_size]
                yield BatchPlan(rows, flipped[rows])
            step = (epoch + 1) * self.steps_per_epoch

    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        # Numpy's seeds are blind to trailing zeros: the last word is never 0.
        return np.random.default_rng([self.seed, epoch, stream + 1])


class FaceBatches(Dataset[Batch]):
    """Whole batches by their plan."""

    def __init__(
        self, records: Records, targets: JoinedTargets | None, *, temperature: float
    ) -> None:
        self.records = records
        self.targets = targets
        self.temperature = temperature

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """Decode, mirror and look up one batch.

        Raises:
            CorruptRecordError: naming file, key and offset.
        """
        images = np.stack([self.records.image(row) for row in plan.rows.tolist()])
        images[plan.flipped] = images[plan.flipped, :, ::-1]
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(self.records.labels[plan.rows]),
            torch.from_numpy(plan.rows),
            self._targets(plan),
        )

    def _targets(self, plan: BatchPlan) -> GroupTargets | None:
        if self.targets is None:
            return None
        spec = self.targets.spec
        sparse = self.targets.store.lookup(self.targets.rows[plan.rows], plan.flipped)
        batch = at_temperature(
            sparse,
            self.temperature,
            group_temperature=spec.group_temperature,
            temperatures=spec.temperatures,
        )
        return GroupTargets.from_batch(batch)


def check_data(
    records: Records,
    targets: JoinedTargets | None,
    *,
    batch_size: int,
    flip: bool,
    temperature: float,
) -> None:
    """Refuse data that cannot be trained on, before anything is built.

    Raises:
        ConfigError: naming the key of the configuration and what to do.
    """
    if len(records) < batch_size:
        raise ConfigError(
            f"train.batch_size: {records.path} has {len(records)} images, fewer than one batch of "
            f"{batch_size}; take a smaller train.batch_size"
        )
    unlabelled = np.flatnonzero(records.labels < 0)
    if len(unlabelled):
        raise ConfigError(
            f"{len(unlabelled)} records of {records.path} have no readable label, the first: "
            f"{records.where(int(unlabelled[0]))}; `gkd records verify` lists them all"
        )
    if targets is None:
        return
    if flip and "flipped" not in targets.store.views:
        raise ConfigError(
            "data.flip: the cache holds targets of the original view only; set data.flip=false, "
            "or cache again with --views original,flipped"
        )
    if temperature not in targets.spec.temperatures:
        stored = ", ".join(f"{t:g}" for t in targets.spec.temperatures)
        raise ConfigError(
            f"kd.temperature: the cache holds the secondary mass at {stored}, got {temperature:g}; "
            "choose one of these or cache again with --temperatures"
        )


def load_batches(
    dataset: FaceBatches, plans: Sampler[BatchPlan], *, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Batches by their plans, in order, made ahead by ``workers`` processes (0: here, when asked).

    There is at most one worker a core. Closing the generator ends them.

    Raises:
        GkdError: what a worker met, as it was raised there.
    """
    workers = min(workers, _usable_cores())
    loader: DataLoader[Batch | GkdError] = DataLoader(
        _Carrying(dataset),
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_ignore_interrupts,
        # Without its own, the loader draws a number from the generator that resuming restores.
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, GkdError):
            raise item
        yield item


class _Carrying(Dataset[Batch | GkdError]):
    """Hands errors over as values: the loader's own way wraps them in the worker's traceback."""

    def __init__(self, dataset: FaceBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, plan: BatchPlan) -> Batch | GkdError:
        try:
            return self.dataset[plan]
        except GkdError as error:
            return error


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts(_worker: int) -> None:
    # A Ctrl-C or a scheduler's SIGTERM reaches the whole process group: the training process
    # finishes its step and stops the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
