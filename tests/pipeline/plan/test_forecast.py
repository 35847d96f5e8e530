"""Forecasts against the caches that are then made, and against what all class means would give."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.centers.means import class_means
from gkd.pipeline.groups.partition import partition
from gkd.pipeline.plan import sample as plan_sample
from gkd.pipeline.plan.forecast import Plan, PlanPoint, PlanSettings, plan, sampling_error
from gkd.pipeline.plan.sample import (
    Clock,
    EmbeddedImages,
    identities_rows,
    images_of_means,
    random_rows,
)
from gkd.pipeline.plan.synthetic_centers import synthetic_centers
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, DrawsSpec, View, preprocess_preset
from gkd.storage.cache.targets import decode_log_probs
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Subset
from gkd.storage.records.open import Records, open_records
from tests.paths import SHARED_DATA, needs_shared_data
from tests.pipeline.faces import PixelEmbedder, centers, write_folder
from tests.storage.records.packs import payload, write_pack


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return open_records(write_folder(tmp_path_factory.mktemp("people") / "set", 30, 3))


def bytes_on_disk(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def check_point(point: PlanPoint, out: Path, tolerance: float) -> None:
    """A forecast from all images is what the cache holds, to the stored precision of masses."""
    cache = Cache.open(out)
    assert cache.manifest is not None
    targets = [
        cache.read_shard(shard, view)
        for view in cache.spec.views
        for shard in range(cache.spec.num_shards)
    ]
    sizes = np.concatenate([each.sizes for each in targets])
    assert point.median_size == np.median(sizes)
    assert point.mean_size == pytest.approx(sizes.mean(), rel=0.005)
    assert point.p95_size == pytest.approx(np.quantile(sizes, 0.95))
    mass = sum(np.exp(decode_log_probs(each.log2_probs).astype(float)).sum() for each in targets)
    assert point.mass == pytest.approx(mass / len(sizes), rel=0.002)
    cut = sum(cache.manifest.truncated.values()) / len(sizes)
    assert point.truncated == pytest.approx(cut, abs=0.006)
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
def test_a_plan_of_all_images_is_the_cache_that_is_made(
    people: Records, tmp_path: Path, kind: Literal["class-mean", "file"], draws: DrawsSpec | None
) -> None:
    given = CLASS_MEAN if kind == CLASS_MEAN else centers(30)
    config = CacheSettings(
        partition=PartitionSettings(max_group=12, draws=draws), batch_size=16, shard_samples=30
    )
    settings = PlanSettings(
        cache=config, samples=90, group_temperatures=(16.0,), thresholds=(0.8, 0.99, 0.5)
    )
    made = plan(people, PixelEmbedder(), given, settings)
    assert (made.images, made.sampled, made.embedded, made.shards) == (90, 90, 90, 3)
    assert len(made.points) == 3
    assert any(0 < point.truncated < 1 for point in made.points)
    for point in made.points:
        out = tmp_path / f"{point.group_temperature}-{point.threshold}"
        settings_of = settings.partition(point.group_temperature, point.threshold)
        cache_teacher(people, out, PixelEmbedder(), given, replace(config, partition=settings_of))
        check_point(point, out, 0.005)


def test_time_is_that_of_all_images_and_shards_are_shared(people: Records) -> None:
    config = CacheSettings(batch_size=8, shard_samples=10)
    settings = PlanSettings(cache=config, samples=40, group_temperatures=(1.0,), thresholds=(0.9,))
    made = plan(people, PixelEmbedder(seconds=0.1), centers(30), settings)
    (point,) = made.points
    assert made.sampled == made.embedded == 40
    # Two views of eight images take two tenths of a second.
    assert made.teacher_images_per_second == pytest.approx(40, rel=0.3)
    assert point.seconds > 90 / made.teacher_images_per_second
    assert point.images_per_second == pytest.approx(90 / point.seconds)
    assert point.hours == {
        1: pytest.approx(point.seconds / 3600),
        8: pytest.approx(point.seconds / 3600 * 2 / 9),  # nine shards: some device has two
    }


def test_the_error_told_is_that_of_samples_of_identities() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 8, 500)
    labels = np.repeat(np.arange(500), images)
    # Images of one identity have groups of like sizes.
    sizes = np.repeat(rng.lognormal(3, 1, 500), images) * rng.lognormal(0, 0.2, len(labels))
    off = []
    for _ in range(400):
        taken = np.isin(labels, rng.choice(500, 150, replace=False))
        error = sampling_error(sizes[taken], labels[taken], len(labels))
        assert error is not None
        off.append((sizes[taken].mean() / sizes.mean() - 1) / error)
    assert 0.85 < np.std(off) < 1.15
    assert abs(np.mean(off)) < 0.3
    assert sampling_error(sizes, labels, len(sizes)) == 0
    assert sampling_error(sizes[labels == 3], labels[labels == 3], len(sizes)) is None


def test_a_clock_leaves_the_warm_up_out() -> None:
    clock = Clock()
    clock.add(2, 10.0)
    assert clock.per_image == 5
    clock.add(4, 1.0)
    clock.add(4, 3.0)
    assert clock.per_image == 0.5


def people_of(labels: npt.NDArray[np.int64], path: Path) -> Records:
    blank = {key: payload(float(label), b"", key) for key, label in enumerate(labels, 1)}
    return open_records(write_pack(path, blank, classes=int(labels.max()) + 1).parent)


def test_samples_are_of_whole_identities_where_means_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_sample, "FEWEST_IDENTITIES", 3)
    monkeypatch.setattr(plan_sample, "MOST_OF_IDENTITY", 5)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 9 + 1))
    records = people_of(labels, tmp_path)
    counts = np.bincount(labels)
    for asked, least in ((1, 3), (100, 25)):
        rows = identities_rows(records, asked)
        assert (np.diff(rows) > 0).all()
        assert len(rows) >= asked
        classes, found = np.unique(labels[rows], return_counts=True)
        np.testing.assert_array_equal(found, np.minimum(counts[classes], 5))
        assert len(classes) >= least
        assert len(rows) - found.max() < max(asked, 5 * least), "and no more than are needed"
    np.testing.assert_array_equal(identities_rows(records, len(labels)), np.arange(len(labels)))
    rows = random_rows(records, 50)
    assert len(np.unique(rows)) == 50
    assert len(random_rows(records, 10**6)) == len(labels)


def test_stand_ins_are_spread_as_the_known_centres_are() -> None:
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(12, 12)) * np.linspace(0.2, 1, 12)
    known = (rng.normal(size=(600, 12)) @ shape + 0.5).astype(np.float32)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    made = synthetic_centers(known, 70_000, rng)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-5)
    away, of_known = made - made.mean(0), known - known.mean(0)
    np.testing.assert_allclose(made.mean(0), known.mean(0), atol=0.05)
    covariance = of_known.T @ of_known / len(known)
    np.testing.assert_allclose(away.T @ away / len(made), covariance, atol=0.02)
    assert len(np.unique(made, axis=0)) == len(made)


def crowd(classes: int, each: int, rng: np.random.Generator) -> EmbeddedImages:
    """Images of people of whom some look alike, as a teacher might embed them."""
    families = rng.normal(size=(classes // 10, 48))
    people = families[rng.integers(0, len(families), classes)] * 0.6 + rng.normal(
        size=(classes, 48)
    )
    labels = np.repeat(np.arange(classes), each)
    base = people[labels] + 0.8 * rng.normal(size=(len(labels), 48))
    views: dict[View, npt.NDArray[np.float32]] = {
        view: (base + 0.2 * rng.normal(size=base.shape)).astype(np.float32) for view in VIEWS
    }
    return EmbeddedImages(
        views,
        np.zeros((len(labels), 16), np.uint8),
        labels,
    )


def test_half_of_the_means_and_stand_ins_give_the_groups_of_all_means() -> None:
    classes, rng = 3000, np.random.default_rng(0)
    images = crowd(classes, 3, rng)
    truth = torch.from_numpy(class_means([images.batch()], images.labels, classes))
    half = np.sort(rng.permutation(classes)[: classes // 2])
    rows = np.flatnonzero(np.isin(images.labels, half))
    sample = images_of_means(images.take(rows, VIEWS), classes, 1500, VIEWS)
    assert "class means of 1,500 of 3,000 identities (4,500 images)" in sample.basis

    def sizes(part: EmbeddedImages, array: torch.Tensor, temperature: float) -> list[int]:
        settings = PartitionSettings(group_temperature=temperature)
        embeddings, labels = part.embeddings["original"], torch.from_numpy(part.labels)
        found = partition(torch.from_numpy(embeddings), labels, array, settings)
        return [int(size) for size in found.targets.sizes]

    parts = list(sample.parts)
    assert sum(len(part) for part, _ in parts) == 1500
    for temperature in (2.0, 4.0):
        forecast = [
            size
            for part, array in parts
            for size in sizes(part, torch.from_numpy(array), temperature)
        ]
        true = [size for part, _ in parts for size in sizes(part, truth, temperature)]
        assert np.mean(true) > 10
        assert np.mean(forecast) == pytest.approx(np.mean(true), rel=0.1)
    for part, array in parts:
        np.testing.assert_allclose(array[part.labels], truth.numpy()[part.labels], atol=1e-6)
        other = np.setdiff1d(half, part.labels)
        np.testing.assert_allclose(array[other], truth.numpy()[other], atol=1e-6)


def test_what_cannot_be_planned_is_refused(people: Records, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"samples": 0}, "--samples: expected 1 or more, got 0"),
        ({"thresholds": ()}, "--thresholds: expected one or more different numbers, got none"),
        ({"group_temperatures": (1.0, 1.0)}, "--group-temperatures: .* got 1,1"),
        ({"thresholds": (0.5, 1.5)}, "--threshold: expected from 0 to 1, got 1.5"),
        ({"group_temperatures": (0.0,)}, "--group-temperature: expected a finite number above 0"),
    ]
    for wrong, told in refused:
        with pytest.raises(ConfigError, match=told):
            PlanSettings(**wrong)
    blank = people_of(np.arange(4), tmp_path)
    with pytest.raises(ConfigError, match="none of 4 sampled records could be read"):
        plan(blank, PixelEmbedder(), centers(4), PlanSettings())
    wider = Subset(people, np.arange(90), num_classes=31)
    with pytest.raises(ConfigError, match="1 of 31 classes have no image"):
        plan(wider, PixelEmbedder(), CLASS_MEAN, PlanSettings())


def test_one_image_is_enough(people: Records) -> None:
    settings = PlanSettings(samples=1, group_temperatures=(1.0,), thresholds=(0.9,))
    made = plan(people, PixelEmbedder(), CLASS_MEAN, settings)
    assert (made.sampled, made.embedded) == (1, 90), "as many identities as there are"


@needs_shared_data
def test_faces_are_forecast_from_half_of_them(tmp_path: Path) -> None:
    pack = open_records(SHARED_DATA / "lfw")
    records = Subset(pack, np.flatnonzero(pack.labels < 100), num_classes=100)
    teacher = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
    embedder = OnnxEmbedder(teacher, preprocess_preset("imagenet"))
    half = len(records) // 2
    settings = PlanSettings(samples=half, group_temperatures=(4.0,), thresholds=(0.93,))
    made: Plan = plan(records, embedder, CLASS_MEAN, settings)
    assert (made.sampled, made.embedded) == (half, len(records))
    partition = PartitionSettings(group_temperature=4.0)
    out = tmp_path / "faces.gkd"
    cache_teacher(records, out, embedder, CLASS_MEAN, CacheSettings(partition=partition))
    # So few images differ by more than the whole pack's half would.
    assert made.points[0].bytes == pytest.approx(bytes_on_disk(out), rel=0.1)
