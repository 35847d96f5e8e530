"""Checks of preprocessing, centres and groups before a long run, and what they log."""

import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.checks import calibration
from gkd.pipeline.checks.calibration import (
    PRESETS,
    check_presets,
    describe_preset,
    pairs_to_score,
    report_group_sizes,
    sample_images,
    score,
)
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.spec import DrawsSpec, Preprocess, preprocess_preset
from gkd.storage.errors import GkdError
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from tests.caches import contents
from tests.paths import SHARED_DATA, needs_shared_data
from tests.pipeline.faces import EMBEDDING_DIM, PixelEmbedder, centers, write_folder
from tests.reference import dense_group
from tests.storage.records.packs import insightface_records, payload, write_pack

ENOUGH = 10**6
VIEW = ("original",)


class ToneEmbedder(PixelEmbedder):
    """Sensitive to colour and brightness as preprocessed; raw input gives NaN."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.images += len(images)
        pixels = self.preprocess.apply(images)[:, :, ::16, ::16]
        if self.preprocess.name == "raw":
            return np.full((len(images), EMBEDDING_DIM), np.nan, np.float32)
        # Only red distinguishes identities, and very dark or light values are clipped.
        seen = np.clip(pixels[:, 0], -1, 1).reshape(len(images), -1)
        return np.asarray(seen @ self._matrix[: seen.shape[1]], np.float32)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return open_records(write_folder(tmp_path_factory.mktemp("people") / "set", 40, 2))


def test_pairs_are_two_images_of_different_identities() -> None:
    labels = np.repeat(np.arange(300), np.arange(300) % 5)
    labels[np.flatnonzero(labels == 4)] = -1
    pairs = pairs_to_score(np.random.default_rng(0).permutation(labels), ENOUGH)
    shuffled = np.random.default_rng(0).permutation(labels)[pairs]
    assert pairs.shape == (calibration.MAX_PAIRS, 2)
    assert (shuffled[:, 0] == shuffled[:, 1]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(set(shuffled[:, 0].tolist())) == len(pairs)
    assert shuffled.min() >= 0


def test_the_check_adds_at_most_its_share_of_passes() -> None:
    labels = np.repeat(np.arange(500), 2)
    for passes in (300, 384, 8_000, 15_000, 40_000):
        added = pairs_to_score(labels, passes).size * len(PRESETS)
        assert added <= max(512, passes * calibration.PAIRS_SHARE)
        assert (added > 0) == (passes >= 384)
    assert not len(pairs_to_score(np.arange(1_000), ENOUGH)), "no identity has two images"


def test_scores_match_their_definition() -> None:
    embeddings = np.random.default_rng(0).normal(size=(8, 5)) + np.repeat(np.eye(4, 5), 2, 0) * 4
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = score(PRESETS[0], embeddings)
    between = [
        [
            float(embeddings[i] @ embeddings[j])
            for i in (2 * p, 2 * p + 1)
            for j in range(8)
            if j // 2 != p
        ]
        for p in range(4)
    ]
    deviation = np.std(np.concatenate(between))
    for pair in range(4):
        genuine = float(embeddings[2 * pair] @ embeddings[2 * pair + 1])
        assert math.isclose(found.scores[pair], (genuine - np.mean(between[pair])) / deviation)
    assert math.isclose(found.impostor, float(np.mean(between)))


def test_the_right_preprocessing_is_found(people: Records) -> None:
    embedder = ToneEmbedder()
    pairs = pairs_to_score(people.labels, ENOUGH)
    assert len(pairs) == 40
    embedder.preprocess = preprocess_preset("arcface")
    right = check_presets(people, embedder, pairs, workers=2)
    assert right is not None
    assert not right.doubtful
    assert len(describe_preset(right)) == 1
    assert embedder.preprocess == preprocess_preset("arcface"), "the embedder is not changed"

    embedder.preprocess = Preprocess("odd", (250.0, 250.0, 250.0), (20.0, 20.0, 20.0))
    wrong = check_presets(people, embedder, pairs, workers=2)
    assert wrong is not None
    assert wrong.doubtful
    assert "arcface" in wrong.best.preprocess.name
    warning = describe_preset(wrong)[1]
    assert warning.startswith(
        "warning: --mean 250,250,250 --std 20,20,20 looks wrong for this teacher"
    )
    assert f"d' = {wrong.best.mean:.2f}, better by {wrong.gain:.2f}" in warning


def test_embeddings_without_direction_are_an_error_for_the_given_preprocessing_only(
    people: Records,
) -> None:
    embedder = ToneEmbedder()
    embedder.preprocess = preprocess_preset("raw")
    with pytest.raises(GkdError, match="NaN, infinite or zero embeddings of 20 of 20"):
        check_presets(people, embedder, pairs_to_score(people.labels, ENOUGH), workers=1)


def test_a_network_that_does_not_separate_identities_is_reported() -> None:
    noise = np.random.default_rng(0).normal(size=(80, 16))
    blind = score(PRESETS[0], noise / np.linalg.norm(noise, axis=1, keepdims=True))
    lines = describe_preset(calibration.PresetCheck(blind, blind, 0.0, 0.0))
    assert "this teacher does not separate identities with any preprocessing" in lines[-1]


def test_unreadable_images_are_skipped(tmp_path: Path) -> None:
    content = insightface_records([2] * 40)
    content[2] = payload(0, b"no image", 2)
    records = open_records(write_pack(tmp_path, content, classes=40).parent)
    rows, embeddings = sample_images(records, PixelEmbedder(), ("original",) * 40, workers=2)
    assert len(rows) == len(embeddings) == 79
    assert 1 not in rows
    check = check_presets(
        records, PixelEmbedder(), pairs_to_score(records.labels, ENOUGH), workers=1
    )
    assert check is not None
    assert len(check.given.scores) == 39
    for key in range(1, 20):
        content[key] = payload((key - 1) // 2, b"no image", key)
    records = open_records(write_pack(tmp_path, content, classes=40).parent)
    pairs = pairs_to_score(records.labels, ENOUGH)
    assert check_presets(records, PixelEmbedder(), pairs, workers=1) is None


def test_cosines_and_groups_are_those_of_dense_logits(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(30, EMBEDDING_DIM)), rng.integers(0, 20, 30)
    array = centers(20).array
    embeddings += 3 * array[labels]
    draws = DrawsSpec(4, 1.0, "all")
    settings = PartitionSettings(group_temperature=8.0, max_group=11, draws=draws)
    report_group_sizes(
        embeddings.astype(np.float32), labels, torch.from_numpy(array), settings, own_means=False
    )
    (line,) = capsys.readouterr().err.splitlines()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ array.T
    own = np.arange(20) == labels[:, None]
    nearest = np.where(own, -1, cosines).max(1)
    logits = settings.scale * (cosines - settings.margin * own)
    dense = [
        dense_group(row, int(label), threshold=0.93, group_temperature=8.0, max_group=11)
        for row, label in zip(logits, labels, strict=True)
    ]
    sizes = [len(group) for group, _ in dense]
    truncated = float(np.mean([truncates for _, truncates in dense]))
    assert 0 < truncated < 1
    assert line == (
        f"calibration, 30 images: cosine to the own centre: mean {cosines[own].mean():.3f}, median "
        f"{np.median(cosines[own]):.3f}; to the nearest other: mean {nearest.mean():.3f}, median "
        f"{np.median(nearest):.3f}; own centre nearest: {np.mean(cosines[own] > nearest):.1%}; "
        f"classes in a primary group: median {np.median(sizes):,.0f}, mean {np.mean(sizes):,.1f}, "
        f"95th percentile {np.quantile(sizes, 0.95):,.0f}; groups of one class: "
        f"{np.mean(np.array(sizes) == 1):.1%}; truncated groups: {truncated:.1%}"
    )


def test_groups_that_hardly_teach_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    array = torch.from_numpy(centers(20).array)
    labels = np.arange(20)

    def lines(settings: PartitionSettings, *, shift: int = 0, own_means: bool = False) -> list[str]:
        own = np.roll(labels, shift)
        report_group_sizes(array.numpy(), own, array, settings, own_means=own_means)
        return capsys.readouterr().err.splitlines()

    sharp = PartitionSettings(group_temperature=0.01, margin=0.0)
    found = lines(sharp, own_means=True)
    assert "groups of one class: 100.0%" in found[0]
    assert "own centre (a mean that includes the image): mean 1.000" in found[0]
    assert "raise --group-temperature (now 0.01), or use --draws" in found[1]
    drawn = replace(sharp, draws=DrawsSpec(8, 1.0, "all"))
    assert "train from the draws" in lines(drawn)[1]
    drawn = replace(sharp, draws=DrawsSpec(8, 1.0, "primary"))
    assert "or use --draw-from all" in lines(drawn)[1]

    flat = PartitionSettings(group_temperature=64.0, max_group=3)
    assert "--max-group 3 truncates 100.0% of the groups" in lines(flat)[1]

    found = lines(sharp, shift=1)
    assert "own centre nearest: 0.0%" in found[0]
    assert "for only 0.0% of the images" in found[1]


def test_a_run_logs_its_checks_once_and_its_bytes_do_not_change(
    people: Records,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = CacheSettings(partition=PartitionSettings(max_group=8), shard_samples=50)
    for kind in (CLASS_MEAN, centers(40)):
        cache_teacher(people, tmp_path / f"{kind == CLASS_MEAN}", ToneEmbedder(), kind, settings)
        logged = capsys.readouterr().err
        assert "calibration: the preprocessing was not checked" in logged, "80 images are too few"
        assert logged.count("images: cosine to the own centre") == 1
    silent = contents(tmp_path / "True")

    monkeypatch.setattr(calibration, "MIN_PASSES", 160)
    embedder = ToneEmbedder()
    embedder.preprocess = preprocess_preset("imagenet", bgr=True)
    cache_teacher(people, tmp_path / "bgr", embedder, CLASS_MEAN, settings)
    logged = capsys.readouterr().err
    assert logged.index("calibration: cosines") < logged.index("run teacher")
    assert logged.index("run teacher") < logged.index("images: cosine to the own centre")
    cache_teacher(people, tmp_path / "checked", ToneEmbedder(), centers(40), settings)
    logged = capsys.readouterr().err
    assert logged.index("calibration: cosines") < logged.index("images: cosine to the own")
    cache_teacher(people, tmp_path / "again", ToneEmbedder(), CLASS_MEAN, settings)
    assert silent == contents(tmp_path / "again")
    capsys.readouterr()

    for name in ("manifest.json", "commits/000001.json"):
        (tmp_path / "checked" / name).unlink()
    cache_teacher(people, tmp_path / "checked", ToneEmbedder(), centers(40), settings)
    assert "calibration" not in capsys.readouterr().err, "a resumed run does not repeat the checks"


class RememberingEmbedder(OnnxEmbedder):
    """Computes the same images with the same preprocessing only once."""

    seen: ClassVar[dict[tuple[Preprocess, bytes], npt.NDArray[np.float32]]] = {}

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        key = self.preprocess, images.tobytes()
        if key not in self.seen:
            self.seen[key] = super().__call__(images)
        return self.seen[key]


@needs_shared_data
@pytest.mark.parametrize("given", PRESETS[:4], ids=lambda p: p.name + "-bgr" * p.bgr)
def test_the_shared_teacher_takes_imagenet_in_rgb(given: Preprocess) -> None:
    records = open_records(SHARED_DATA / "lfw")
    embedder = RememberingEmbedder(SHARED_DATA / "teachers" / "mobilefacenet.onnx", given)
    # As many pairs as for 10,562 images.
    pairs = pairs_to_score(records.labels, 2 * 10_562)[:64]
    check = check_presets(records, embedder, pairs, workers=2)
    assert check is not None
    assert check.best.preprocess == preprocess_preset("imagenet")
    assert check.doubtful == (given != preprocess_preset("imagenet"))
