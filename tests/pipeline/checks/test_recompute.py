"""Caches recomputed by their teacher: correct ones pass, and every kind of error is detected."""

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.pipeline.centers.load import Centers
from gkd.pipeline.checks.recompute import AgainstReport, named_centers, verify_against
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.retarget import retarget
from gkd.storage.cache.spec import VIEWS, DrawsSpec
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from tests.pipeline.faces import EMBEDDING_DIM, SETTINGS, PixelEmbedder, centers, make, write_folder
from tests.tampering import rewrite_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a cache and its class means: without draws, and with those of each source."""
    home = tmp_path_factory.mktemp("made")
    settings = {"plain": SETTINGS}
    sources: tuple[Literal["all", "primary"], ...] = ("all", "primary")
    for source in sources:
        draws = DrawsSpec(400, 4.0, source)
        partition = replace(SETTINGS.partition, draws=draws, max_group=3)
        settings[source] = replace(SETTINGS, partition=partition)
    for name, config in settings.items():
        (home / name).mkdir()
        make(folder, home / name / "faces.gkd", class_mean=True, settings=config)
    return {name: home / name for name in settings}


@pytest.fixture
def cache(made: dict[str, Path], tmp_path: Path) -> Cache:
    shutil.copytree(made["plain"], tmp_path, dirs_exist_ok=True)
    return Cache.open(tmp_path / "faces.gkd")


def recompute(cache: Cache, folder: Path, **options: Any) -> AgainstReport:
    own = find_centers(cache, folder)
    return verify_against(cache, open_records(folder), PixelEmbedder(), own, **options)


def find_centers(
    cache: Cache, folder: Path, *files: Path, embedder: PixelEmbedder | None = None
) -> Centers:
    embedder = embedder or PixelEmbedder()
    return named_centers(cache, files, open_records(folder), embedder, workers=1)


def test_a_correct_cache_passes_to_the_stored_precision(folder: Path, cache: Cache) -> None:
    report = recompute(cache, folder, sample=1000)
    assert report.ok
    assert (report.images, report.targets, report.other_groups) == (35, 70, 0)
    assert report.found.membership == 0
    # Half a step of the codes is 3.4e-4; the same machine computes the same cosines again.
    assert 0 < report.found.log_probs < 5e-4
    assert report.found.secondary.keys() == {"1", "2", "4"}
    assert max(report.found.secondary.values()) < 1e-4
    assert report.first_wrong == ""


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_centres_of_half_precision_are_logged_and_recomputed(
    folder: Path, tmp_path: Path, precision: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half.gkd"
    make(folder, out, class_mean=True, settings=replace(SETTINGS, center_precision=precision))
    cache = Cache.open(out)
    assert cache.spec.centers.precision == precision
    array = find_centers(cache, folder).array
    rounded = torch.from_numpy(array).to(getattr(torch, precision)).double().numpy()
    most = np.linalg.norm(rounded - array, axis=1).max()
    assert f"centres in {precision}: no cosine differs by more than {most:.1e}" in (
        capsys.readouterr().err
    )
    assert f"rounded to {precision}" in (out / "README.md").read_text()
    report = recompute(cache, folder, sample=1000)
    assert report.ok
    assert max(report.found.secondary.values()) < 1e-4


def test_the_seed_chooses_the_sample(folder: Path, cache: Cache) -> None:
    first, again, other = (recompute(cache, folder, sample=5, seed=s) for s in (1, 1, 2))
    assert first == again
    assert (first.images, first.targets, other.seed) == (5, 10, 2)
    assert first.found != other.found


@pytest.fixture
def with_draws(made: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Cache:
    shutil.copytree(made[request.param], tmp_path, dirs_exist_ok=True)
    return Cache.open(tmp_path / "faces.gkd")


@pytest.mark.parametrize("with_draws", ["all", "primary"], indirect=True)
def test_correct_draws_pass(folder: Path, with_draws: Cache) -> None:
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
    ("with_draws", "error"),
    [
        *(("all", error) for error in ("class", "code", "frequencies", "order")),
        *(("primary", error) for error in ("class", "code", "mass", "frequencies")),
    ],
    indirect=["with_draws"],
)
def test_wrong_draws_are_detected(folder: Path, with_draws: Cache, error: str) -> None:
    cache = with_draws
    targets = cache.read_shard(1, "flipped")
    assert targets.draws is not None
    draws, codes = targets.draws.classes, targets.draws.log2_probs
    masses = targets.draws.secondary
    sample = int(np.flatnonzero((draws != draws[:, :1]).any(1))[0])
    if error == "class":
        # One class replaced by another, with the probability of the first.
        draws[sample, 0] = draws[sample][draws[sample] != draws[sample, 0]][0]
        rewrite_row(cache, "flipped/draws", 1, draws)
    elif error == "code":
        codes[sample, 0] += 40
        rewrite_row(cache, "flipped/draw_log2_probs", 1, codes)
    elif error == "mass":
        assert masses is not None
        masses[sample] -= np.float32(0.1)
        rewrite_row(cache, "flipped/draw_secondary", 1, masses)
    else:
        for shard, view in itertools.product(range(4), VIEWS):
            stored = Cache.open(cache.path).read_shard(shard, view)
            assert stored.draws is not None
            order = stored.draws.classes.argsort(1, kind="stable")
            for array, values in (
                ("draws", stored.draws.classes),
                ("draw_log2_probs", stored.draws.log2_probs),
            ):
                assert values is not None
                if error == "order":
                    wrong = np.take_along_axis(values, order, 1)
                else:  # half of a sample's draws are copies of the first
                    wrong = np.concatenate([values[:, :200], values[:, :1].repeat(200, 1)], 1)
                rewrite_row(cache, f"{view}/{array}", shard, wrong)
    report = recompute(Cache.open(cache.path), folder, sample=1000)
    assert not report.ok
    assert report.drawn is not None
    assert report.first_drawn is not None
    assert report.wrong == (error not in ("frequencies", "order"))
    assert report.drawn.ok == (error != "frequencies")
    assert report.first_drawn.ok == (error != "order")


@pytest.mark.parametrize("array", ["indices", "log2_probs", "secondary"])
def test_a_wrong_target_with_valid_hashes_is_detected_and_located(
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

    report = recompute(Cache.open(cache.path), folder, sample=1000)
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


def test_a_cache_of_another_teacher_with_the_same_digest_is_detected(
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


def test_a_reshuffled_copy_of_the_records_is_accepted(folder: Path, cache: Cache) -> None:
    records = open_records(folder)
    shuffled = Subset(records, np.random.default_rng(0).permutation(len(records)))
    own = find_centers(cache, folder)
    assert verify_against(cache, shuffled, PixelEmbedder(), own, sample=20).ok


def test_records_without_the_images_are_refused(
    cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = write_folder(tmp_path_factory.mktemp("other") / "set", seed=5)
    message = r"20 of 20 sampled images of .* are not in .*, by key: id\d/\d\.png, .* and 17 more"
    with pytest.raises(SpecMismatchError, match=message):
        recompute(cache, other, sample=20)


def test_another_teacher_and_other_centres_are_refused_by_name(folder: Path, cache: Cache) -> None:
    embedder = PixelEmbedder()
    embedder.sha256, embedder.precision = "1" * 64, "float16"
    with pytest.raises(SpecMismatchError) as caught:
        verify_against(cache, open_records(folder), embedder, centers(7))
    message = str(caught.value)
    assert f"teacher's sha256: expected {'0' * 64}, got {'1' * 64}" in message
    assert "precision: expected float32, got float16" in message
    assert "centres' sha256" in message
    assert "embedding_dim" not in message


def test_class_means_are_found_beside_the_cache_by_what_they_are(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    retarget(cache, tmp_path / "stricter.gkd", threshold=0.5)
    np.save(tmp_path / "another.centers.npy", centers(7).array)
    (tmp_path / "damaged.centers.npy").write_bytes(b"\x93NUMPY")
    embedder = PixelEmbedder()
    stricter = Cache.open(tmp_path / "stricter.gkd")
    assert find_centers(stricter, folder, embedder=embedder).spec == cache.spec.centers
    assert embedder.images == 0
    assert recompute(stricter, folder, sample=20).ok


@pytest.mark.parametrize("damaged", [False, True])
def test_class_means_that_are_gone_are_computed_again_to_the_bit(
    folder: Path, cache: Cache, tmp_path: Path, damaged: bool
) -> None:
    beside = tmp_path / "faces.centers.npy"
    moved = beside.rename(tmp_path / "moved.npy")
    if damaged:
        np.save(beside, centers(7).array)
    embedder = PixelEmbedder()
    assert find_centers(cache, folder, moved, embedder=embedder).spec == cache.spec.centers
    assert embedder.images == 0
    assert find_centers(cache, folder, embedder=embedder).spec == cache.spec.centers
    assert embedder.images == 2 * len(cache.samples().labels)
    assert recompute(cache, folder, sample=20).ok


def test_class_means_that_cannot_be_computed_again_are_asked_for(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    (tmp_path / "faces.centers.npy").unlink()
    other = write_folder(tmp_path / "other", images=4)
    with pytest.raises(ConfigError, match=r"got none; .* differs; give those records, or ask .*"):
        find_centers(cache, other)
    swapped = PixelEmbedder()
    swapped.sha256 = "1" * 64
    with pytest.raises(SpecMismatchError, match="teacher's sha256: expected 0000"):
        find_centers(cache, folder, embedder=swapped)
    assert swapped.images == 0

    class LastBits(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            return super().__call__(images) * np.float32(1 + 1e-6 * np.arange(EMBEDDING_DIM))

    with pytest.raises(SpecMismatchError, match=r"computed again: expected .*--centers FILE"):
        find_centers(cache, folder, embedder=LastBits())
    make(folder, tmp_path / "known.gkd")
    with pytest.raises(ConfigError, match=r"its centres \(file: random\.npy\), got none; ask"):
        find_centers(Cache.open(tmp_path / "known.gkd"), folder)


def test_a_sample_of_nothing_is_refused(folder: Path, cache: Cache) -> None:
    with pytest.raises(ConfigError, match="sample: expected 1 or more, got 0"):
        recompute(cache, folder, sample=0)
