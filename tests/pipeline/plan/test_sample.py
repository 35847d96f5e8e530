"""Samples of a plan, and the centres that replace those it does not know."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.pipeline.centers.means import class_means
from gkd.pipeline.checks.sample import random_rows
from gkd.pipeline.groups.partition import partition
from gkd.pipeline.plan import sample as plan_sample
from gkd.pipeline.plan.sample import (
    Clock,
    EmbeddedImages,
    identities_rows,
    images_of_means,
    synthetic_centers,
)
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.spec import VIEWS, View
from tests.pipeline.faces import records_of


def test_a_clock_ignores_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.accumulate([0.0, 10.0, 0.0, 1.0, 0.0, 3.0, 0.0])
    fake = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(plan_sample, "time", fake)
    clock = Clock()
    clock.stop(2)
    assert clock.per_image == 5
    clock.stop(4)
    clock.stop(4)
    assert clock.per_image == 0.5


def test_samples_for_class_means_are_complete_identities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_sample, "MIN_IDENTITIES", 3)
    monkeypatch.setattr(plan_sample, "MAX_OF_IDENTITY", 5)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 9 + 1))
    records = records_of(labels, tmp_path)
    counts = np.bincount(labels)
    for asked, fewest in ((1, 3), (100, 25)):
        rows = identities_rows(records, asked)
        assert (np.diff(rows) > 0).all()
        assert len(rows) >= asked
        classes, found = np.unique(labels[rows], return_counts=True)
        np.testing.assert_array_equal(found, np.minimum(counts[classes], 5))
        assert len(classes) >= fewest
        assert len(rows) - found.max() < max(asked, 5 * fewest), "and no more than needed"
    np.testing.assert_array_equal(identities_rows(records, len(labels)), np.arange(len(labels)))
    rows = random_rows(records, 50)
    assert len(np.unique(rows)) == 50
    assert len(random_rows(records, 10**6)) == len(labels)


def test_synthetic_centres_have_the_distribution_of_the_known_ones() -> None:
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(12, 12)) * np.linspace(0.2, 1, 12)
    known = (rng.normal(size=(600, 12)) @ shape + 0.5).astype(np.float32)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    made = synthetic_centers(known, 70_000, rng)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-5)
    around, around_known = made - made.mean(0), known - known.mean(0)
    np.testing.assert_allclose(made.mean(0), known.mean(0), atol=0.05)
    covariance = around_known.T @ around_known / len(known)
    np.testing.assert_allclose(around.T @ around / len(made), covariance, atol=0.02)
    assert len(np.unique(made, axis=0)) == len(made)


def crowd(classes: int, images: int, rng: np.random.Generator) -> EmbeddedImages:
    """Embeddings of identities some of which look alike."""
    families = rng.normal(size=(classes // 10, 48))
    people = families[rng.integers(0, len(families), classes)] * 0.6 + rng.normal(
        size=(classes, 48)
    )
    labels = np.repeat(np.arange(classes), images)
    base = people[labels] + 0.8 * rng.normal(size=(len(labels), 48))
    views: dict[View, npt.NDArray[np.float32]] = {
        view: (base + 0.2 * rng.normal(size=base.shape)).astype(np.float32) for view in VIEWS
    }
    return EmbeddedImages(
        views,
        np.zeros((len(labels), 16), np.uint8),
        labels,
    )


def test_half_of_the_means_and_synthetic_centres_give_the_groups_of_all_means() -> None:
    classes, rng = 2000, np.random.default_rng(0)
    images = crowd(classes, 3, rng)
    truth = torch.from_numpy(class_means([images.batch()], images.labels, classes))
    half = np.sort(rng.permutation(classes)[: classes // 2])
    rows = np.flatnonzero(np.isin(images.labels, half))
    halves, basis = images_of_means(images.take(rows, VIEWS), classes, 1000, VIEWS)
    assert "class means of 1,000 of 2,000 identities (3,000 images)" in basis

    def sizes(part: EmbeddedImages, array: torch.Tensor, temperature: float) -> list[int]:
        settings = PartitionSettings(group_temperature=temperature)
        embeddings, labels = part.embeddings["original"], torch.from_numpy(part.labels)
        found = partition(torch.from_numpy(embeddings), labels, array, settings)
        return [int(size) for size in found.targets.sizes]

    parts = list(halves)
    assert sum(len(part) for part, _ in parts) == 1000
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
