"""Caches recomputed by their teacher: true ones pass, and every kind of lie is seen."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gkd.pipeline.checks.draw_test import DrawCounts
from gkd.pipeline.checks.recompute import (
    AgainstReport,
    allowed_differences,
    group_gap,
    load_named_centers,
    verify_against,
)
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, DrawsSpec
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from tests.pipeline.faces import SETTINGS, PixelEmbedder, centers, make, write_folder
from tests.reference import dense_group
from tests.tampering import rewrite_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Cache:
    make(folder, tmp_path / "faces.gkd", class_mean=True)
    return Cache.open(tmp_path / "faces.gkd")


def recompute(cache: Cache, folder: Path, **options: Any) -> AgainstReport:
    own = load_named_centers(cache, [])
    return verify_against(cache, open_records(folder), PixelEmbedder(), own, **options)


def test_a_true_cache_passes_to_the_stored_precision(folder: Path, cache: Cache) -> None:
    report = recompute(cache, folder, sample=1000)
    assert report.ok
    assert (report.images, report.targets, report.other_groups) == (35, 70, 0)
    assert report.found.membership == 0
    # Half a step of the codes is 3.4e-4; this machine computes the same again.
    assert 0 < report.found.log_probs < 5e-4
    assert report.found.secondary.keys() == {"1", "2", "4"}
    assert max(report.found.secondary.values()) < 1e-4
    assert report.first_wrong == ""


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_centres_of_half_precision_are_told_and_recomputed(
    folder: Path, tmp_path: Path, precision: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half.gkd"
    make(folder, out, class_mean=True, settings=replace(SETTINGS, center_precision=precision))
    cache = Cache.open(out)
    assert cache.spec.centers.precision == precision
    array = load_named_centers(cache, []).array
    rounded = torch.from_numpy(array).to(getattr(torch, precision)).double().numpy()
    most = np.linalg.norm(rounded - array, axis=1).max()
    assert f"centres in {precision}: no cosine differs by more than {most:.1e}" in (
        capsys.readouterr().err
    )
    assert f"rounded to {precision}" in (out / "README.md").read_text()
    report = recompute(cache, folder, sample=1000)
    assert report.ok
    assert max(report.found.secondary.values()) < 1e-4


def test_the_sample_is_drawn_by_its_seed(folder: Path, cache: Cache) -> None:
    first, again, other = (recompute(cache, folder, sample=5, seed=s) for s in (1, 1, 2))
    assert first == again
    assert (first.images, first.targets, other.seed) == (5, 10, 2)
    assert first.found != other.found


@pytest.fixture
def with_draws(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Cache:
    draws = DrawsSpec(400, 4.0, request.param)
    settings = replace(SETTINGS, partition=replace(SETTINGS.partition, draws=draws, max_group=3))
    make(folder, tmp_path / "faces.gkd", class_mean=True, settings=settings)
    return Cache.open(tmp_path / "faces.gkd")


@pytest.mark.parametrize("with_draws", ["all", "primary"], indirect=True)
def test_true_draws_pass(folder: Path, with_draws: Cache) -> None:
    report = recompute(with_draws, folder, sample=1000)
    assert report.ok
    assert 0 < report.found.draws < 5e-4
    assert report.drawn is not None
    assert report.drawn.draws == 70 * 400
    assert report.drawn.degrees > 3
    assert report.drawn.p_value > 1e-3
    assert report.first_drawn is not None
    assert report.first_drawn.draws == 70 * 100
    assert report.first_drawn.p_value > 1e-3


@pytest.mark.parametrize(
    ("with_draws", "lie"),
    [
        *(("all", lie) for lie in ("class", "code", "frequencies", "order")),
        *(("primary", lie) for lie in ("class", "code", "mass", "frequencies")),
    ],
    indirect=["with_draws"],
)
def test_lies_about_draws_are_seen(folder: Path, with_draws: Cache, lie: str) -> None:
    cache = with_draws
    targets = cache.read_shard(1, "flipped")
    assert targets.draws is not None
    draws, codes = targets.draws.classes, targets.draws.log2_probs
    masses = targets.draws.secondary
    sample = int(np.flatnonzero((draws != draws[:, :1]).any(1))[0])
    if lie == "class":
        # A class in the place of another, under the other's probability.
        draws[sample, 0] = draws[sample][draws[sample] != draws[sample, 0]][0]
        rewrite_row(cache, "flipped/draws", 1, draws)
    elif lie == "code":
        codes[sample, 0] += 40
        rewrite_row(cache, "flipped/draw_log2_probs", 1, codes)
    elif lie == "mass":
        assert masses is not None
        masses[sample] -= np.float32(0.1)
        rewrite_row(cache, "flipped/draw_secondary", 1, masses)
    else:
        for shard, view in itertools.product(range(4), VIEWS):
            whole = Cache.open(cache.path).read_shard(shard, view)
            assert whole.draws is not None
            order = whole.draws.classes.argsort(1, kind="stable")
            for array, values in (
                ("draws", whole.draws.classes),
                ("draw_log2_probs", whole.draws.log2_probs),
            ):
                assert values is not None
                if lie == "order":
                    told = np.take_along_axis(values, order, 1)
                else:  # half of a sample's draws again the first
                    told = np.concatenate([values[:, :200], values[:, :1].repeat(200, 1)], 1)
                rewrite_row(cache, f"{view}/{array}", shard, told)
    report = recompute(Cache.open(cache.path), folder, sample=1000)
    assert not report.ok
    assert report.drawn is not None
    assert report.first_drawn is not None
    assert report.wrong == (lie not in ("frequencies", "order"))
    assert report.drawn.ok == (lie != "frequencies")
    assert report.first_drawn.ok == (lie != "order")


def test_the_chi_square_test_is_the_known_one() -> None:
    # Two classes of equal mass: 60 and 40 of 100 give 4 with one degree, above which is 0.0455.
    counts = DrawCounts()
    counts.add(np.repeat([0, 1], [60, 40]), np.log([0.5, 0.5]))
    found = counts.test()
    assert (found.draws, found.degrees) == (100, 1)
    assert found.statistic == pytest.approx(4)
    assert found.p_value == pytest.approx(0.0455, abs=1e-4)


def test_p_values_of_true_draws_of_many_samples_are_not_small() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(40):
        counts = DrawCounts()
        for _ in range(30):
            logits = rng.normal(0, rng.uniform(0.1, 4), 200)
            log_probs = logits - np.logaddexp.reduce(logits)
            counts.add(rng.choice(200, 64, p=np.exp(log_probs)), log_probs)
        p_values.append(counts.test().p_value)
    assert min(p_values) > 1e-3
    assert np.mean(p_values) > 0.4


@pytest.mark.parametrize("array", ["indices", "log2_probs", "secondary"])
def test_a_lie_with_true_hashes_is_seen_with_its_place(
    folder: Path, cache: Cache, array: str
) -> None:
    targets = cache.read_shard(1, "flipped")
    values = getattr(targets, array).copy()
    sample = int(np.flatnonzero((targets.sizes > 1) & (targets.sizes < 7))[0])
    row = 10 + sample
    start = int(targets.offsets[sample])
    if array == "indices":
        group = values[start : int(targets.offsets[sample + 1])]
        absent = np.setdiff1d(np.arange(7), group)[0]
        group[np.flatnonzero(group != cache.samples().labels[row])[0]] = absent
    elif array == "log2_probs":
        values[start] += 40
    else:
        values[sample, 2] += np.float32(0.1)
    rewrite_row(cache, f"flipped/{array}", 1, values)

    lying = Cache.open(cache.path)
    report = recompute(lying, folder, sample=1000)
    assert not report.ok
    assert report.wrong == 1
    assert f"id{row // 5}/{row % 5}.png" in report.first_wrong
    assert report.first_wrong.endswith(f"row {row} of the cache, flipped view")
    if array == "secondary":
        assert report.found.secondary["4"] == pytest.approx(0.1, abs=1e-3)
        assert report.found.secondary["1"] < 1e-4
    if array == "log2_probs":
        assert report.found.log_probs == pytest.approx(40 * math.log(2) / 1024, abs=5e-4)
    if array == "indices":
        assert report.found.membership > report.allowed.membership


def test_a_cache_of_another_teacher_under_the_name_of_this_one_is_seen(
    folder: Path, tmp_path: Path
) -> None:
    class Other(PixelEmbedder):
        def __init__(self) -> None:
            super().__init__()
            self._matrix = np.random.default_rng(9).normal(size=self._matrix.shape)

    make(folder, tmp_path / "c.gkd", embedder=Other())
    cache = Cache.open(tmp_path / "c.gkd")
    report = verify_against(cache, open_records(folder), PixelEmbedder(), centers(7))
    assert report.wrong > 0.9 * report.targets


def test_a_reshuffled_copy_of_the_records_will_do(folder: Path, cache: Cache) -> None:
    records = open_records(folder)
    shuffled = Subset(records, np.random.default_rng(0).permutation(len(records)))
    own = load_named_centers(cache, [])
    assert verify_against(cache, shuffled, PixelEmbedder(), own, sample=20).ok


def test_records_without_the_images_are_refused(
    cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = write_folder(tmp_path_factory.mktemp("other") / "set", seed=5)
    message = r"20 of 20 sampled images of .* are not in .*, the first by key: id\d/\d\.png"
    with pytest.raises(SpecMismatchError, match=message):
        recompute(cache, other, sample=20)


def test_another_teacher_and_other_centres_are_refused_by_name(folder: Path, cache: Cache) -> None:
    embedder = PixelEmbedder()
    embedder.sha256, embedder.precision = "1" * 64, "float16"
    with pytest.raises(SpecMismatchError) as caught:
        verify_against(cache, open_records(folder), embedder, centers(7))
    told = str(caught.value)
    assert f"teacher's sha256: the cache names {'0' * 64}, given is {'1' * 64}" in told
    assert "precision: the cache names float32, given is float16" in told
    assert "centres' sha256" in told
    assert "embedding_dim" not in told


def test_centres_must_be_given_where_none_stand_beside(cache: Cache, tmp_path: Path) -> None:
    beside = tmp_path / "faces.centers.npy"
    moved = beside.rename(tmp_path / "moved.npy")
    with pytest.raises(ConfigError, match=r"expected its centres \(class-mean: class-mean\).*none"):
        load_named_centers(cache, [])
    found = load_named_centers(cache, [moved])
    assert found.spec == cache.spec.centers


def test_a_sample_of_nothing_is_refused(folder: Path, cache: Cache) -> None:
    with pytest.raises(ConfigError, match="sample: expected 1 or more, got 0"):
        recompute(cache, folder, sample=0)


def test_what_is_allowed_grows_with_the_rounding_and_falls_with_the_temperature(
    cache: Cache,
) -> None:
    allowed = allowed_differences(cache.spec)
    step = math.log(2) / 1024
    assert allowed.log_probs == pytest.approx(step / 2 + 2 * 64 * 1e-4)
    assert allowed.secondary["4"] == pytest.approx(step / 2 + 2 * 64 * 1e-4 / 4)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("max_group", [1, 2, 5, 40])
def test_the_true_group_has_no_gap_and_another_one_has(threshold: float, max_group: int) -> None:
    rng = np.random.default_rng(int(threshold * 100) + max_group)
    for _ in range(50):
        logits = rng.normal(0, 2, 40)
        log_probs = logits - np.logaddexp.reduce(logits)
        label = int(rng.integers(40))
        group, _ = dense_group(
            logits, label, threshold=threshold, group_temperature=1.0, max_group=max_group
        )
        group = np.asarray(group, np.int64)
        sizes: dict[str, Any] = {"threshold": threshold, "max_group": max_group}
        assert group_gap(log_probs, group, label, **sizes) <= 1e-12
        outside = np.setdiff1d(np.arange(40), group)
        others = group[group != label]
        if len(outside) and len(others):
            swapped = np.append(
                np.setdiff1d(group, others[:1]), outside[log_probs[outside].argmin()]
            )
            assert group_gap(log_probs, swapped, label, **sizes) > 1e-3
        if len(outside):
            assert group_gap(log_probs, outside[outside != label], label, **sizes) == math.inf


def test_a_group_that_is_too_long_or_too_short_has_the_mass_that_is_missing() -> None:
    log_probs = np.log([0.5, 0.3, 0.15, 0.05])
    sizes: dict[str, Any] = {"threshold": 0.75, "max_group": 4}
    assert group_gap(log_probs, np.array([0, 1]), 0, **sizes) == 0
    assert group_gap(log_probs, np.array([0]), 0, **sizes) == pytest.approx(0.25)
    assert group_gap(log_probs, np.array([0, 1, 2]), 0, **sizes) == pytest.approx(0.05)
    assert group_gap(log_probs, np.array([0, 1, 3]), 3, **sizes) == 0
    assert group_gap(log_probs, np.array([0, 3]), 3, **sizes) == pytest.approx(0.2)
