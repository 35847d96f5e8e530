"""Forecasts against the caches that are then made."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.plan.forecast import Plan, PlanPoint, PlanSettings, plan, sampling_error
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DrawsSpec, preprocess_preset
from gkd.storage.cache.targets import decode_log_probs
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.open import open_records
from tests.paths import SHARED_DATA, needs_shared_data
from tests.pipeline.faces import PixelEmbedder, centers, records_of, write_folder


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return open_records(write_folder(tmp_path_factory.mktemp("people") / "set", 20, 3))


def bytes_on_disk(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def check_point(point: PlanPoint, out: Path, tolerance: float) -> None:
    """A forecast from all images matches the cache, to the stored precision of masses."""
    cache = Cache.open(out)
    assert cache.manifest is not None
    targets = [
        cache.read_shard(shard, view)
        for view in cache.spec.views
        for shard in range(cache.spec.num_shards)
    ]
    sizes = np.concatenate([shard.sizes for shard in targets])
    assert point.median_size == np.median(sizes)
    assert point.mean_size == pytest.approx(sizes.mean(), rel=0.005)
    assert point.p95_size == pytest.approx(np.quantile(sizes, 0.95))
    mass = sum(np.exp(decode_log_probs(shard.log2_probs).astype(float)).sum() for shard in targets)
    assert point.mass == pytest.approx(mass / len(sizes), rel=0.002)
    truncated = sum(cache.manifest.truncated.values()) / len(sizes)
    assert point.truncated == pytest.approx(truncated, abs=0.006)
    assert point.bytes == pytest.approx(bytes_on_disk(out), rel=tolerance)
    assert point.bytes_per_sample == pytest.approx(point.bytes / cache.spec.num_samples)


@pytest.mark.parametrize(
    ("kind", "draws"),
    [
        ("class-mean", None),
        ("file", None),
        ("file", DrawsSpec(5, 2.0, "all")),
        ("class-mean", DrawsSpec(5, 2.0, "primary")),
    ],
    ids=str,
)
def test_a_plan_from_all_images_matches_the_cache(
    people: Records, tmp_path: Path, kind: Literal["class-mean", "file"], draws: DrawsSpec | None
) -> None:
    given = CLASS_MEAN if kind == CLASS_MEAN else centers(20)
    config = CacheSettings(
        partition=PartitionSettings(max_group=12, draws=draws), batch_size=16, shard_samples=20
    )
    settings = PlanSettings(
        cache=config, samples=60, group_temperatures=(16.0,), thresholds=(0.8, 0.99)
    )
    made = plan(people, PixelEmbedder(), given, settings)
    assert (made.images, made.sampled, made.embedded, made.shards) == (60, 60, 60, 3)
    assert len(made.points) == 2
    assert any(0 < point.truncated < 1 for point in made.points)
    for point in made.points:
        out = tmp_path / f"{point.group_temperature}-{point.threshold}"
        settings_of = settings.partition(point.group_temperature, point.threshold)
        cache_teacher(people, out, PixelEmbedder(), given, replace(config, partition=settings_of))
        check_point(point, out, 0.005)


def test_time_is_for_all_images_and_devices_share_the_shards(people: Records) -> None:
    config = CacheSettings(batch_size=8, shard_samples=6)
    settings = PlanSettings(cache=config, samples=24, group_temperatures=(1.0,), thresholds=(0.9,))
    made = plan(people, PixelEmbedder(seconds=0.02), centers(20), settings)
    (point,) = made.points
    assert made.sampled == made.embedded == 24
    # Two views of eight images take at least 0.04 seconds.
    assert made.teacher_images_per_second <= 200
    assert point.seconds > 60 / made.teacher_images_per_second
    assert point.images_per_second == pytest.approx(60 / point.seconds)
    assert point.hours == {
        1: pytest.approx(point.seconds / 3600),
        8: pytest.approx(point.seconds / 3600 * 2 / 10),  # ten shards: a device has two
    }


def test_the_standard_error_is_that_of_samples_of_identities() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 8, 500)
    labels = np.repeat(np.arange(500), images)
    # Images of one identity have groups of similar sizes.
    sizes = np.repeat(rng.lognormal(3, 1, 500), images) * rng.lognormal(0, 0.2, len(labels))
    deviations = []
    for _ in range(400):
        chosen = np.isin(labels, rng.choice(500, 150, replace=False))
        error = sampling_error(sizes[chosen], labels[chosen], len(labels))
        assert error is not None
        deviations.append((sizes[chosen].mean() / sizes.mean() - 1) / error)
    assert 0.85 < np.std(deviations) < 1.15
    assert abs(np.mean(deviations)) < 0.3
    assert sampling_error(sizes, labels, len(sizes)) == 0
    assert sampling_error(sizes[labels == 3], labels[labels == 3], len(sizes)) is None


def test_invalid_settings_and_records_are_refused(people: Records, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"samples": 0}, "--samples: expected 1 or more, got 0"),
        ({"thresholds": ()}, "--thresholds: expected one or more different numbers, got none"),
        ({"group_temperatures": (1.0, 1.0)}, "--group-temperatures: .* got 1,1"),
        ({"thresholds": (0.5, 1.5)}, "--threshold: expected from 0 to 1, got 1.5"),
        ({"group_temperatures": (0.0,)}, "--group-temperature: expected a finite number above 0"),
    ]
    for wrong, message in refused:
        with pytest.raises(ConfigError, match=message):
            PlanSettings(**wrong)
    blank = records_of(np.arange(4), tmp_path)
    with pytest.raises(ConfigError, match="none of 4 sampled records could be read"):
        plan(blank, PixelEmbedder(), centers(4), PlanSettings())
    wider = Subset(people, np.arange(60), num_classes=21)
    with pytest.raises(ConfigError, match="1 of 21 classes have no image"):
        plan(wider, PixelEmbedder(), CLASS_MEAN, PlanSettings())


def test_one_image_is_enough(people: Records) -> None:
    settings = PlanSettings(samples=1, group_temperatures=(1.0,), thresholds=(0.9,))
    made = plan(people, PixelEmbedder(), CLASS_MEAN, settings)
    assert (made.sampled, made.embedded) == (1, 60), "all identities, as there are few"


@needs_shared_data
def test_faces_are_forecast_from_half_of_them(tmp_path: Path) -> None:
    pack = open_records(SHARED_DATA / "lfw")
    records = Subset(pack, np.flatnonzero(pack.labels < 60), num_classes=60)
    teacher = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
    embedder = OnnxEmbedder(teacher, preprocess_preset("imagenet"))
    half = len(records) // 2
    settings = PlanSettings(samples=half, group_temperatures=(4.0,), thresholds=(0.93,))
    made: Plan = plan(records, embedder, CLASS_MEAN, settings)
    assert (made.sampled, made.embedded) == (half, len(records))
    partition = PartitionSettings(group_temperature=4.0)
    out = tmp_path / "faces.gkd"
    cache_teacher(records, out, embedder, CLASS_MEAN, CacheSettings(partition=partition))
    # Half of so few images varies more than half of the complete pack.
    assert made.points[0].bytes == pytest.approx(bytes_on_disk(out), rel=0.1)
