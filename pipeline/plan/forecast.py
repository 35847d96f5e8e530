"""What a cache will cost and what its groups will be like, from a sample, before any long run.

Of each group temperature one pass gives the groups at the highest threshold; those at lower ones
are cut from them as ``retarget`` does, exact to the stored precision. Only draws from a primary
group are made for each threshold. Bytes are those of the sample's groups as the cache would write
them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from gkd.pipeline.cache_spec import cache_spec, dataset_spec
from gkd.pipeline.centers.load import CLASS_MEAN, Centers, on_device
from gkd.pipeline.centers.means import require_all_classes
from gkd.pipeline.checks.calibration import check_preprocessing
from gkd.pipeline.embed import check_labels, default_batch_size, split_batch
from gkd.pipeline.groups.partition import Partition
from gkd.pipeline.plan.sample import (
    EMBEDDED_EACH,
    Clock,
    EmbeddedImages,
    Sample,
    embed_rows,
    identities_rows,
    images_of_file,
    images_of_means,
    random_rows,
)
from gkd.pipeline.plan.size_model import measure_bytes
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.shard import partition_batch
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.retarget import cut_groups
from gkd.storage.cache.spec import VIEWS, CacheSpec, CentersSpec, DrawsSpec, View
from gkd.storage.cache.targets import SparseTargets, decode_log_probs
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.progress import progress

DEVICES = (1, 8)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What to forecast: ``cache`` as it would be made, but for the grid's two settings.

    Raises:
        ConfigError: for a value outside its range.
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
        for temperature in self.group_temperatures:
            for threshold in self.thresholds:
                self.partition(temperature, threshold)

    def partition(self, group_temperature: float, threshold: float) -> PartitionSettings:
        """The settings of one point of the grid."""
        return replace(
            self.cache.partition, group_temperature=group_temperature, threshold=threshold
        )


@dataclass(frozen=True)
class PlanPoint:
    """The forecast for one group temperature and threshold; groups are those of all views.

    mass       mean probability that a group captures, at the group temperature
    truncated  share of the groups that ``max_group`` cuts
    bytes      of all files of the finished cache; ``bytes_per_sample`` in all views
    error      standard error of ``bytes`` as a share, from how group sizes vary over the sample's
               identities; what centres do that stand for unknown ones comes on top
    seconds    that one process on this device takes; ``hours`` by number of such devices
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

    ``sampled`` images had their groups made, ``embedded`` ones went through the teacher for that;
    ``basis`` says in words what stands for what.
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
        ConfigError: where records and settings do not fit, or no image of the sample can be read.
        GkdError: where the teacher's output is unusable.
    """
    check_labels(records)
    if centers == CLASS_MEAN:
        require_all_classes(records)
    config = settings.cache
    views = VIEWS if centers == CLASS_MEAN else config.views
    began = time.perf_counter()
    check_preprocessing(records, embedder, views, workers=config.workers)
    checking = time.perf_counter() - began

    if centers == CLASS_MEAN:
        rows = identities_rows(records, EMBEDDED_EACH * settings.samples)
    else:
        rows = random_rows(records, settings.samples)
    embedding = Clock()
    pool = embed_rows(
        records,
        rows,
        embedder,
        views,
        embedding,
        batch_size=config.batch_size or default_batch_size(embedder),
        workers=config.workers,
    )
    if centers == CLASS_MEAN:
        sample = images_of_means(pool, records.num_classes, settings.samples, config.views)
        named = CentersSpec(CLASS_MEAN, CLASS_MEAN, "0" * 64)
    else:
        sample = images_of_file(pool, centers, config.views)
        named = centers.spec

    found = _grid_groups(sample, settings, embedder)
    spec = cache_spec(
        dataset_spec(records),
        embedder,
        named,
        config.partition,
        views=config.views,
        shard_samples=config.samples_per_shard(len(records)),
    )
    points = []
    grid = [(t, p) for t in settings.group_temperatures for p in settings.thresholds]
    with progress("weigh", len(grid), "settings") as advance:
        for temperature, threshold in grid:
            of_point = msgspec.structs.replace(
                spec, group_temperature=temperature, threshold=threshold
            )
            groups = found.at(of_point)
            weighed = measure_bytes(of_point, records, groups, found.digests)
            each = embedding.per_image + found.clocks[temperature].per_image + weighed.seconds
            seconds = checking + each * len(records)
            points.append(_point(of_point, groups, found.labels, weighed.whole(of_point), seconds))
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
        sampled=len(found.labels),
        embedded=sample.embedded,
        teacher_images_per_second=1 / embedding.per_image,
        basis=(
            sample.basis,
            f"times are of one process on {embedder.device} that runs teacher, partition and "
            "writing one after the other; more devices share the shards",
        ),
        points=tuple(points),
    )


@dataclass(frozen=True)
class _GridGroups:
    """Groups of a sample at each group temperature, and at the thresholds that were computed."""

    made: Mapping[tuple[float, float], Mapping[View, Partition]]
    clocks: Mapping[float, Clock]
    highest: float
    labels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]

    def at(self, spec: CacheSpec) -> Mapping[View, Partition]:
        """Groups by the settings of ``spec``."""
        made = self.made.get((spec.group_temperature, spec.threshold))
        if made is not None:
            return made
        old = msgspec.structs.replace(spec, threshold=self.highest)
        stricter = {}
        for view, whole in self.made[spec.group_temperature, self.highest].items():
            groups = cut_groups(whole.targets, self.labels, old, spec)
            truncated = _still_truncated(whole, self.labels, spec.threshold)
            stricter[view] = Partition(groups.targets, truncated)
        return stricter


def _still_truncated(
    whole: Partition, labels: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.bool_]:
    """Which groups ``max_group`` cuts at a lower threshold, bool [n]."""
    targets = whole.targets
    probs = np.exp(decode_log_probs(targets.log2_probs), dtype=np.float64)
    masses = np.add.reduceat(probs, targets.offsets[:-1])
    # A label in the last place of a cut group stands where others were cut off.
    last = targets.offsets[1:] - 1
    masses -= np.where(targets.indices[last] == labels, probs[last], 0)
    return np.asarray(whole.truncated & (masses < threshold))


def _grid_groups(sample: Sample, settings: PlanSettings, embedder: Embedder) -> _GridGroups:
    highest = max(settings.thresholds)
    draws_from_group = settings.cache.partition.draws_from_group
    thresholds = settings.thresholds if draws_from_group else (highest,)
    keys = [(t, p) for t in settings.group_temperatures for p in thresholds]
    parts: dict[tuple[float, float], list[Mapping[View, Partition]]] = {key: [] for key in keys}
    clocks = {t: Clock() for t in settings.group_temperatures}
    seen: list[EmbeddedImages] = []
    size = settings.cache.batch_size or default_batch_size(embedder)
    for images, array in sample.parts:
        centers = on_device(array, embedder, settings.cache.center_precision)
        seen.append(images)
        with progress("partition", len(images) * len(keys), "images") as advance:
            for key in keys:
                for part in _partitioned(images, centers, settings, key, size, clocks[key[0]]):
                    parts[key].append(part)
                    advance(len(next(iter(part.values())).truncated))
    return _GridGroups(
        {key: _joined(found) for key, found in parts.items()},
        clocks,
        highest,
        np.concatenate([images.labels for images in seen]),
        np.concatenate([images.digests for images in seen]),
    )


def _partitioned(
    images: EmbeddedImages,
    centers: Tensor,
    settings: PlanSettings,
    key: tuple[float, float],
    size: int,
    clock: Clock,
) -> Iterator[Mapping[View, Partition]]:
    config = settings.partition(*key)
    for batch in split_batch(images.batch(), size):
        began = time.perf_counter()
        labels = images.labels[batch.rows.start : batch.rows.stop]
        part = partition_batch(batch, labels, centers, config, settings.cache.class_chunk)
        clock.add(len(labels), time.perf_counter() - began)
        yield part.views


def _joined(parts: Sequence[Mapping[View, Partition]]) -> Mapping[View, Partition]:
    return {
        view: Partition(
            SparseTargets.concat([part[view].targets for part in parts]),
            np.concatenate([part[view].truncated for part in parts]),
        )
        for view in parts[0]
    }


def sampling_error(
    sizes: npt.NDArray[np.number], labels: npt.NDArray[np.int64], population: int
) -> float | None:
    """Standard error of the mean of ``sizes`` [n], as a share of it, as one of ``population``.

    Images of one identity are alike, so their deviations count together; None of one identity.
    """
    _, places, images = np.unique(labels, return_inverse=True, return_counts=True)
    if len(images) < 2:
        return None
    together = np.bincount(places, weights=sizes) - images * sizes.mean()
    variance = len(images) / (len(images) - 1) * (together**2).sum() / len(sizes) ** 2
    return float(np.sqrt(variance * (1 - len(sizes) / population)) / sizes.mean())


def _point(
    spec: CacheSpec,
    groups: Mapping[View, Partition],
    labels: npt.NDArray[np.int64],
    size: int,
    seconds: float,
) -> PlanPoint:
    sizes = np.concatenate([whole.targets.sizes for whole in groups.values()])
    truncated = np.concatenate([whole.truncated for whole in groups.values()])
    masses = [
        np.exp(decode_log_probs(whole.targets.log2_probs), dtype=np.float64).sum()
        for whole in groups.values()
    ]
    most = {devices: -(-spec.num_shards // devices) / spec.num_shards for devices in DEVICES}
    return PlanPoint(
        group_temperature=spec.group_temperature,
        threshold=spec.threshold,
        median_size=float(np.median(sizes)),
        mean_size=float(sizes.mean()),
        p95_size=float(np.quantile(sizes, 0.95)),
        mass=float(sum(masses)) / len(sizes),
        truncated=float(truncated.mean()),
        bytes_per_sample=size / spec.num_samples,
        bytes=size,
        error=sampling_error(
            np.sum([whole.targets.sizes for whole in groups.values()], axis=0),
            labels,
            spec.num_samples,
        ),
        seconds=seconds,
        images_per_second=spec.num_samples / seconds,
        hours={devices: seconds * share / 3600 for devices, share in most.items()},
    )
