"""Forecast of a cache's groups, size and time from a sample, before any long run.

For each group temperature one pass computes the groups at the highest threshold; those at lower
ones are cut from them as by ``retarget``, exact to the stored precision. Only draws from a primary
group are computed for each threshold. Bytes are those of the sample's groups, written as a cache.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.pipeline.cache_spec import cache_spec, dataset_spec
from gkd.pipeline.centers.load import CLASS_MEAN, Centers, on_device
from gkd.pipeline.centers.means import require_all_classes
from gkd.pipeline.checks.calibration import check_preprocessing
from gkd.pipeline.checks.sample import random_rows
from gkd.pipeline.embed import check_labels, default_batch_size, split_batch
from gkd.pipeline.groups.partition import Partition
from gkd.pipeline.plan.sample import (
    EMBEDDED_EACH,
    Clock,
    EmbeddedImages,
    Parts,
    embed_images,
    identities_rows,
    images_of_means,
)
from gkd.pipeline.plan.size_model import measure_bytes
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.shard import partition_batch
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.retarget import cut_groups
from gkd.storage.cache.spec import VIEWS, CacheSpec, CentersSpec, DrawsSpec, View
from gkd.storage.cache.targets import decode_log_probs
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.progress import progress

DEVICES = (1, 8)
Groups = Mapping[View, Partition]


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What to forecast: the settings of ``cache``, except the two that the grid varies.

    Raises:
        ConfigError: if a value is out of range.
    """

    cache: CacheSettings = field(default_factory=CacheSettings)
    samples: int = 4096
    group_temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    thresholds: tuple[float, ...] = (0.8, 0.9, 0.93, 0.95, 0.99)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(
                f"--samples: expected 1 or more, got {self.samples}; give another number"
            )
        for option, values in (
            ("--group-temperatures", self.group_temperatures),
            ("--thresholds", self.thresholds),
        ):
            if len(set(values)) < max(len(values), 1):
                got = ",".join(f"{value:g}" for value in values) or "none"
                raise ConfigError(
                    f"{option}: expected one or more different numbers, got {got}; give each once"
                )
        for point in product(self.group_temperatures, self.thresholds):
            self.partition(*point)

    def partition(self, group_temperature: float, threshold: float) -> PartitionSettings:
        """The settings of one point of the grid."""
        return replace(
            self.cache.partition, group_temperature=group_temperature, threshold=threshold
        )


@dataclass(frozen=True)
class PlanPoint:
    """The forecast for one group temperature and threshold; groups are those of all views.

    mass       mean probability inside a group, at the group temperature
    truncated  share of the groups that ``max_group`` truncates
    bytes      of all files of the finished cache; ``bytes_per_sample`` in all views
    error      standard error of ``bytes`` as a share, from the variation of group sizes between the
               sample's identities; the error of synthetic centres is not included
    seconds    for one process on this device; ``hours`` by the number of such devices
    """

    group_temperature: float
    threshold: float
    median_size: float
    mean_size: float
    p95_size: float
    mass: float
    truncated: float
    bytes_per_sample: float
    bytes: int
    error: float | None
    seconds: float
    images_per_second: float
    hours: Mapping[int, float]


@dataclass(frozen=True)
class Plan:
    """Forecasts for a grid of settings, and the sample that they are from.

    ``sampled`` images had their groups computed, ``embedded`` ones went through the teacher for
    that; ``basis`` describes in words what the forecast is based on.
    """

    records: str
    images: int
    classes: int
    shards: int
    views: tuple[View, ...]
    draws: DrawsSpec | None
    teacher: str
    centers: str
    device: str
    precision: str
    sampled: int
    embedded: int
    teacher_images_per_second: float
    basis: tuple[str, ...]
    points: tuple[PlanPoint, ...]


def plan(
    records: Records,
    embedder: Embedder,
    centers: Centers | Literal["class-mean"],
    settings: PlanSettings,
) -> Plan:
    """Forecast the caches of a grid of group temperatures and thresholds from a sample.

    Raises:
        ConfigError: if records and settings do not fit, or no image of the sample can be read.
        GkdError: if the teacher's output is unusable.
    """
    check_labels(records)
    config = settings.cache
    views = config.views
    if centers == CLASS_MEAN:
        require_all_classes(records)
        views = VIEWS
    began = time.perf_counter()
    check_preprocessing(records, embedder, views, workers=config.workers)
    checking = time.perf_counter() - began

    batch_size = config.batch_size or default_batch_size(embedder)
    if centers == CLASS_MEAN:
        rows = identities_rows(records, EMBEDDED_EACH * settings.samples)
    else:
        rows = random_rows(records, settings.samples)
    teacher = Clock()
    pool = embed_images(
        records, rows, embedder, views, teacher, batch_size=batch_size, workers=config.workers
    )
    parts: Parts
    if centers == CLASS_MEAN:
        parts, basis = images_of_means(pool, records.num_classes, settings.samples, config.views)
        named = CentersSpec(CLASS_MEAN, CLASS_MEAN, "0" * 64)
    else:
        parts = [(pool, centers.array)]
        basis = f"group sizes are estimated from {len(pool):,} random images"
        named = centers.spec

    grid = _GroupGrid(parts, settings, embedder, batch_size)
    spec = cache_spec(
        dataset_spec(records),
        embedder,
        named,
        config.partition,
        views=config.views,
        shard_samples=config.samples_per_shard(len(records)),
        batch_size=batch_size,
    )
    points = []
    keys = list(product(settings.group_temperatures, settings.thresholds))
    with progress("measure size", len(keys), "settings") as advance:
        for temperature, threshold in keys:
            at_point = msgspec.structs.replace(
                spec, group_temperature=temperature, threshold=threshold
            )
            groups = grid.at(at_point)
            size, writing = measure_bytes(at_point, records, groups, grid.digests)
            per_image = teacher.per_image + grid.clocks[temperature].per_image + writing
            seconds = checking + per_image * len(records)
            points.append(_point(at_point, groups, grid.labels, size, seconds))
            advance()
    return Plan(
        records=records.name,
        images=len(records),
        classes=records.num_classes,
        shards=spec.num_shards,
        views=config.views,
        draws=config.partition.draws,
        teacher=embedder.name,
        centers=named.name,
        device=embedder.device,
        precision=embedder.precision,
        sampled=len(grid.labels),
        embedded=len(pool),
        teacher_images_per_second=1 / teacher.per_image,
        basis=(
            basis,
            f"times are of one process on {embedder.device} that runs teacher, partition and "
            "writing in sequence; several devices share the shards",
        ),
        points=tuple(points),
    )


class _GroupGrid:
    """Groups of a sample at all points of the grid, ``clocks`` by group temperature."""

    def __init__(
        self, parts: Parts, settings: PlanSettings, embedder: Embedder, batch_size: int
    ) -> None:
        self._highest = max(settings.thresholds)
        from_group = settings.cache.partition.draws_from_group
        thresholds = settings.thresholds if from_group else (self._highest,)
        keys = list(product(settings.group_temperatures, thresholds))
        found: dict[tuple[float, float], list[Groups]] = {key: [] for key in keys}
        self.clocks = {t: Clock() for t in settings.group_temperatures}
        images: list[EmbeddedImages] = []
        for part, array in parts:
            centers = on_device(array, embedder, settings.cache.center_precision)
            images.append(part)
            with progress("partition", len(part) * len(keys), "images") as advance:
                for key in keys:
                    config, clock = settings.partition(*key), self.clocks[key[0]]
                    clock.restart()
                    for batch in split_batch(part.batch(), batch_size):
                        labels = part.labels[batch.rows.start : batch.rows.stop]
                        groups = partition_batch(
                            batch, labels, centers, config, settings.cache.class_chunk
                        )
                        clock.stop(len(labels))
                        found[key].append(groups.views)
                        advance(len(labels))
        self._computed: dict[tuple[float, float], Groups] = {
            key: {view: Partition.concat(part[view] for part in of_parts) for view in of_parts[0]}
            for key, of_parts in found.items()
        }
        self.labels = np.concatenate([part.labels for part in images])
        self.digests = np.concatenate([part.digests for part in images])

    def at(self, spec: CacheSpec) -> Groups:
        """Groups with the temperature and threshold of ``spec``."""
        computed = self._computed.get((spec.group_temperature, spec.threshold))
        if computed is not None:
            return computed
        old = msgspec.structs.replace(spec, threshold=self._highest)
        return {
            view: Partition(
                cut_groups(groups.targets, self.labels, old, spec).targets,
                _still_truncated(groups, self.labels, spec.threshold),
            )
            for view, groups in self._computed[spec.group_temperature, self._highest].items()
        }


def _still_truncated(
    groups: Partition, labels: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.bool_]:
    """Which groups ``max_group`` truncates at a lower threshold, bool [n]."""
    targets = groups.targets
    probs = np.exp(decode_log_probs(targets.log2_probs), dtype=np.float64)
    masses = np.add.reduceat(probs, targets.offsets[:-1])
    # A label at the end of a truncated group may come after classes that were dropped.
    last = targets.offsets[1:] - 1
    masses -= np.where(targets.indices[last] == labels, probs[last], 0)
    return np.asarray(groups.truncated & (masses < threshold))


def sampling_error(
    sizes: npt.NDArray[np.number], labels: npt.NDArray[np.int64], population: int
) -> float | None:
    """Standard error of the mean of ``sizes`` [n], as a share of it, for a ``population``.

    Images of one identity are alike, so deviations are summed by identity; None for one identity.
    """
    _, identities, images = np.unique(labels, return_inverse=True, return_counts=True)
    if len(images) < 2:
        return None
    deviations = np.bincount(identities, weights=sizes) - images * sizes.mean()
    variance = len(images) / (len(images) - 1) * (deviations**2).sum() / len(sizes) ** 2
    return float(np.sqrt(variance * (1 - len(sizes) / population)) / sizes.mean())


def _point(
    spec: CacheSpec, groups: Groups, labels: npt.NDArray[np.int64], size: int, seconds: float
) -> PlanPoint:
    by_view = [view.targets.sizes for view in groups.values()]
    sizes = np.concatenate(by_view)
    mass = sum(
        np.exp(decode_log_probs(view.targets.log2_probs), dtype=np.float64).sum()
        for view in groups.values()
    )
    # The device with the most shards takes longest.
    shares = {devices: -(-spec.num_shards // devices) / spec.num_shards for devices in DEVICES}
    return PlanPoint(
        group_temperature=spec.group_temperature,
        threshold=spec.threshold,
        median_size=float(np.median(sizes)),
        mean_size=float(sizes.mean()),
        p95_size=float(np.quantile(sizes, 0.95)),
        mass=float(mass) / len(sizes),
        truncated=float(np.concatenate([view.truncated for view in groups.values()]).mean()),
        bytes_per_sample=size / spec.num_samples,
        bytes=size,
        error=sampling_error(np.sum(by_view, axis=0), labels, spec.num_samples),
        seconds=seconds,
        images_per_second=spec.num_samples / seconds,
        hours={devices: seconds * share / 3600 for devices, share in shares.items()},
    )
