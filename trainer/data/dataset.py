"""Batches of faces with their labels and their teacher's targets, made from their indices.

``BatchIndices`` name the rows of a batch and which of them to mirror. Targets come from
memory-mapped files in any order, or, if the disk has no room for these, from the cache's shards:
then they are part of the indices.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gkd.storage.cache.importance import drawn_targets
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.targets import SparseTargets, TargetBatch, at_temperature
from gkd.storage.reading.join import SKIPPED, join
from gkd.storage.reading.mmap_store import DIGESTS, TargetStore, default_folder, materialise
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.digests import cached_digests
from gkd.trainer.config import Signal
from gkd.trainer.data.sampler import BatchIndices, Blocks
from gkd.trainer.head.targets import GroupTargets

Order = Literal["full", "blocks"]


@dataclass(frozen=True)
class JoinedTargets:
    """A cache's targets for given records, in their class numbers.

    store        all targets of the cache
    rows         int64 [N], the cache's row of each image
    num_classes  of records and cache together
    classes      uint32 [C], the records' number of each class of the cache; None if they are equal
    unmatched    number of images that the cache does not contain and that were left out
    """

    store: TargetStore | ShardStore
    rows: npt.NDArray[np.int64]
    num_classes: int
    classes: npt.NDArray[np.uint32] | None = None
    unmatched: int = 0

    @property
    def spec(self) -> CacheSpec:
        """The specification of the cache."""
        return self.store.spec

    def lookup(self, indices: BatchIndices) -> SparseTargets:
        """Targets of a batch, in the class numbers of the records."""
        targets = indices.targets
        if targets is None:
            assert isinstance(self.store, TargetStore)
            targets = self.store.lookup(self.rows[indices.rows], indices.flipped)
        return targets if self.classes is None else targets.renumber(self.classes)

    def blocks(self, size: int) -> Blocks:
        """Blocks of ``size`` shards of the cache, for reading block by block."""
        return Blocks(self.rows // self.spec.shard_samples, size)


def join_targets(
    records: Records,
    cache: Cache,
    *,
    workers: int,
    folder: Path | None = None,
    drop_unmatched: bool = False,
    order: Order = "full",
) -> tuple[Records, JoinedTargets]:
    """Match images with the cache by their content, and prepare its targets on this node.

    Returns the records without those that the cache skipped or, with ``drop_unmatched``, does not
    contain, and their targets: materialised, or, if ``order`` is blocks, to be read from the cache.
    The returned records have the classes of records and cache together. All files of the cache must
    exist with their sizes, even if its targets are materialised already; hashes are checked when
    files are read.

    Raises:
        SpecMismatchError: if images are not in the cache, or class numbers cannot be mapped.
        CorruptRecordError: if a record cannot be read.
        CorruptShardError: if the cache is damaged.
    """
    cache.require_files()
    home = folder or default_folder()
    digests = cached_digests(records, home / DIGESTS, workers=workers)
    found = join(records, cache, digests=digests, drop_unmatched=drop_unmatched)
    used = np.flatnonzero(found.rows != SKIPPED)
    if len(used) < len(records) or found.num_classes != records.num_classes:
        records = Subset(records, used, found.num_classes)
    return records, JoinedTargets(
        ShardStore(cache) if order == "blocks" else materialise(cache, folder=home),
        found.rows[used],
        found.num_classes,
        found.classes,
        found.unmatched,
    )


@dataclass(frozen=True)
class Batch:
    """The data of one step.

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
        """Copy to a device, except rows, which are for messages."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.rows,
            self.targets.to(device) if self.targets else None,
        )


class FaceBatches(Dataset[Batch]):
    """Complete batches by their indices."""

    def __init__(
        self,
        records: Records,
        targets: JoinedTargets | None,
        *,
        temperature: float,
        signal: Signal = "auto",
    ) -> None:
        self.records = records
        self.targets = targets
        self.temperature = temperature
        self.signal = signal if targets is None else chosen_signal(signal, targets.spec)

    def __getitem__(self, indices: BatchIndices) -> Batch:
        """Decode and mirror the images of a batch, and look up its targets.

        Raises:
            CorruptRecordError: naming file, key and offset.
        """
        images = np.stack([self.records.image(row) for row in indices.rows.tolist()])
        images[indices.flipped] = images[indices.flipped, :, ::-1]
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(self.records.labels[indices.rows]),
            torch.from_numpy(indices.rows),
            self._targets(indices),
        )

    def _targets(self, indices: BatchIndices) -> GroupTargets | None:
        if self.targets is None:
            return None
        spec, stored = self.targets.spec, self.targets.lookup(indices)
        groups: TargetBatch | None = None
        if self.signal != "draws":
            groups = at_temperature(
                stored,
                self.temperature,
                group_temperature=spec.group_temperature,
                temperatures=spec.temperatures,
            )
        if groups is not None and self.signal == "group":
            return GroupTargets.from_batch(groups)
        assert spec.draws is not None
        return GroupTargets.from_batch(drawn_targets(stored, spec.draws, groups))


def chosen_signal(signal: Signal, spec: CacheSpec) -> Signal:
    """The signal that a training uses: ``signal``, or if it is auto the best that a cache has."""
    return ("draws" if spec.draws else "group") if signal == "auto" else signal
