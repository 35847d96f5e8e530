"""Batches of faces with their labels and their teacher's targets, each from its plan.

A plan says which rows, and which of them mirrored. Targets come from memory-mapped files in any
order, or, where the disk has no room for these, from the cache's shards: then the plan has them.
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
from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.reading.join import SKIPPED, join
from gkd.storage.reading.mmap_store import DIGESTS, TargetStore, default_folder, materialise
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.base import Subset
from gkd.storage.records.digests import cached_digests
from gkd.storage.records.open import Records
from gkd.trainer.config import KdConfig, RunConfig, Signal
from gkd.trainer.data.sampler import BatchIndices, Blocks
from gkd.trainer.guards import check_classes
from gkd.trainer.head.targets import GroupTargets

Order = Literal["full", "blocks"]


@dataclass(frozen=True)
class JoinedTargets:
    """A cache's targets for the images and in the class numbers of some records.

    store        of all targets of the cache
    rows         int64 [N], row of the cache for each image
    num_classes  of records and cache together
    classes      uint32 [C], number in the records of each class of the cache; None: the same
    unmatched    images that the cache does not know and that were left out
    """

    store: TargetStore | ShardStore
    rows: npt.NDArray[np.int64]
    num_classes: int
    classes: npt.NDArray[np.uint32] | None = None
    unmatched: int = 0

    @property
    def spec(self) -> CacheSpec:
        """What the cache is."""
        return self.store.spec

    def lookup(self, plan: BatchIndices) -> SparseTargets:
        """Targets of a batch in the class numbers of the records."""
        targets = plan.targets
        if targets is None:
            assert isinstance(self.store, TargetStore)
            targets = self.store.lookup(self.rows[plan.rows], plan.flipped)
        return targets if self.classes is None else targets.renumber(self.classes)

    def blocks(self, size: int) -> Blocks:
        """Blocks of ``size`` shards of the cache, for reading in their order."""
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
    """Match images with the cache by their content, and make its targets ready on this node.

    Returns the records without those that the cache skipped or, with ``drop_unmatched``, does not
    know, and their targets: materialised, or to be read from the cache where ``order`` is blocks.
    The records have as many classes as they and the cache together. Of the cache all files must be
    there with their sizes, even where its targets stand ready; hashes are checked as they are read.

    Raises:
        SpecMismatchError: where images are not the cache's, or class numbers cannot be mapped.
        CorruptRecordError: where a record cannot be read.
        CorruptShardError: where the cache is damaged.
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


class FaceBatches(Dataset[Batch]):
    """Whole batches by their plan."""

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

    def __getitem__(self, plan: BatchIndices) -> Batch:
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

    def _targets(self, plan: BatchIndices) -> GroupTargets | None:
        if self.targets is None:
            return None
        spec, stored = self.targets.spec, self.targets.lookup(plan)
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
    """What a training takes of a cache: ``signal``, decided where it is auto."""
    return ("draws" if spec.draws else "group") if signal == "auto" else signal


def check_data(
    config: RunConfig, records: Records, targets: JoinedTargets | None, *, world_size: int = 1
) -> None:
    """Refuse data that cannot be trained on, before anything is built.

    Raises:
        ConfigError: naming the key of the configuration and what to do.
    """
    batch_size, data = config.train.batch_size, config.data
    if len(records) < batch_size:
        raise ConfigError(
            f"train.batch_size: {records.path} has {len(records)} images, fewer than one batch of "
            f"{batch_size}; take a smaller train.batch_size"
        )
    shortest = -(-records.num_classes // world_size) * (world_size - 1)
    if shortest >= records.num_classes:
        raise ConfigError(
            f"{records.path}: expected classes for each of {world_size} ranks, got "
            f"{records.num_classes}; start fewer ranks"
        )
    if batch_size % world_size or batch_size < 2 * world_size:
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {world_size} ranks, with 2 images or "
            f"more for each, got {batch_size}"
        )
    unlabelled = np.flatnonzero(records.labels < 0)
    if len(unlabelled):
        raise ConfigError(
            f"{len(unlabelled)} records of {records.path} have no label that is a class, the "
            f"first: {_label_fault(records, int(unlabelled[0]))}; `gkd records verify` lists them "
            "all"
        )
    check_classes(records, keep_empty=data.empty_classes == "keep")
    if targets is None:
        return
    if "original" not in targets.store.views:
        raise ConfigError(
            "the cache holds targets of the flipped view only, and every training shows images as "
            "they are; cache again with --views original,flipped"
        )
    if data.flip and "flipped" not in targets.store.views:
        raise ConfigError(
            "data.flip: the cache holds targets of the original view only; set data.flip=false, "
            "or cache again with --views original,flipped"
        )
    _check_signal(targets.spec, config.kd)


def _label_fault(records: Records, row: int) -> str:
    """What the records themselves say of a row without a label."""
    try:
        records.encoded(row)
    except CorruptRecordError as error:
        return str(error)
    return records.where(row)


def _check_signal(spec: CacheSpec, kd: KdConfig) -> None:
    draws, signal = spec.draws, chosen_signal(kd.signal, spec)
    if signal != "group" and draws is None:
        raise ConfigError(
            f"kd.signal: {signal} needs drawn classes, and the cache has none; set "
            "kd.signal=group, or cache again with --draws"
        )
    if signal != "group" and draws is not None and draws.temperature != kd.temperature:
        groups_too = ", or kd.signal=group" if kd.temperature in spec.temperatures else ""
        raise ConfigError(
            f"kd.temperature: the classes were drawn at {draws.temperature:g}, got "
            f"{kd.temperature:g}; set kd.temperature={draws.temperature:g}{groups_too}"
        )
    if kd.temperature not in spec.temperatures:
        stored = ", ".join(f"{t:g}" for t in spec.temperatures)
        raise ConfigError(
            f"kd.temperature: the cache holds the secondary mass at {stored}, got "
            f"{kd.temperature:g}; choose one of these or cache again with --temperatures"
        )
