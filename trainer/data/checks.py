"""Data that a configuration cannot be trained on is refused before anything is built."""

from pathlib import Path

import numpy as np

from gkd.storage.cache.spec import CacheSpec
from gkd.storage.errors import ConfigError, CorruptRecordError, SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.util.text import first_few
from gkd.trainer.config import KdConfig, RunConfig
from gkd.trainer.data.dataset import JoinedTargets, chosen_signal


def check_data(
    config: RunConfig, records: Records, targets: JoinedTargets | None, *, world_size: int = 1
) -> JoinedTargets | None:
    """The targets that a training uses: ``targets``, or None without distillation.

    Raises:
        ConfigError: naming the key of the configuration and a remedy, if the data cannot be used.
        SpecMismatchError: if the targets were joined for other records, or are of a cache other
            than ``data.cache_id``.
    """
    if targets is not None:
        require_agreed_cache(config.data.cache_id, targets.store.cache_id, "the targets")
    _check_batches(config.train.batch_size, records, world_size)
    _check_labels(records, keep_empty=config.data.empty_classes == "keep")
    if not config.kd.enabled:
        return None
    if targets is None:
        raise ConfigError(
            "kd.enabled: no targets were given; name a cache of targets, or train without "
            "distillation (--without-kd)"
        )
    if len(targets.rows) != len(records) or targets.num_classes != records.num_classes:
        raise SpecMismatchError(
            f"{records.path} has {len(records)} images of {records.num_classes} classes, the "
            f"targets are joined for {len(targets.rows)} images of {targets.num_classes}; "
            "join the records with the cache that was made from them"
        )
    needed = {"original", "flipped"} if config.data.flip else {"original"}
    missing = needed - set(targets.store.views)
    if missing:
        remedy = "" if "original" in missing else "set data.flip=false, or "
        raise ConfigError(
            f"data.flip: the cache holds targets of the {' and '.join(targets.store.views)} view "
            f"only, and this training shows {' and '.join(sorted(missing))} images too; {remedy}"
            "cache again with --views original,flipped"
        )
    _check_signal(targets.spec, config.kd)
    return targets


def require_agreed_cache(agreed: str, found: str, path: Path | str) -> None:
    """Refuse a cache other than the one that was ``agreed`` on; empty for any.

    Raises:
        SpecMismatchError: if the ids differ.
    """
    if agreed and agreed.strip().lower() != found:
        raise SpecMismatchError(
            "another cache than the one that was agreed on (--cache-id, data.cache_id)",
            path=path,
            expected=agreed,
            got=found,
            remedy="get that cache, or agree on this one with `--cache-id` and its id",
        )


def _check_batches(batch_size: int, records: Records, world_size: int) -> None:
    if len(records) < batch_size:
        raise ConfigError(
            f"train.batch_size: {records.path} has {len(records)} images, fewer than one batch of "
            f"{batch_size}; choose a smaller train.batch_size"
        )
    # The last rank has the fewest classes.
    if -(-records.num_classes // world_size) * (world_size - 1) >= records.num_classes:
        raise ConfigError(
            f"{records.path}: expected classes for each of {world_size} ranks, got "
            f"{records.num_classes}; start fewer ranks"
        )
    if batch_size % world_size or batch_size < 2 * world_size:
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {world_size} ranks, with 2 images or "
            f"more for each, got {batch_size}"
        )


def _check_labels(records: Records, *, keep_empty: bool) -> None:
    faulty = np.flatnonzero((records.labels < 0) | (records.labels >= records.num_classes))
    if len(faulty):
        raise ConfigError(
            f"{len(faulty)} records of {records.path} have no label among its "
            f"{records.num_classes} classes, the first: {_label_fault(records, int(faulty[0]))}; "
            "`gkd records verify` lists them all, and the `property` file of a pack has the number "
            "of classes"
        )
    present = np.unique(records.labels)
    if len(present) < 2:
        raise ConfigError(
            f"{records.path}: expected images of at least two identities, got only class "
            f"{records.labels[0]}; a class layer needs classes to distinguish"
        )
    empty = records.num_classes - len(present)
    if empty and not keep_empty:
        # Not an array of all classes: their number comes from a file and may be anything.
        lowest = np.arange(min(records.num_classes, len(present) + 5))
        shown = first_few(np.setdiff1d(lowest, present).tolist(), 5, count=empty)
        raise ConfigError(
            f"{records.path}: {empty:,} of {records.num_classes:,} classes have no image "
            f"({shown}); if the records were filtered, or are a part of a data set, set "
            "data.empty_classes=keep, else correct `property` or the labels"
        )


def _label_fault(records: Records, row: int) -> str:
    try:
        records.encoded(row)
    except CorruptRecordError as error:
        return str(error)
    return f"{records.labels[row]} of {records.where(row)}"


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
