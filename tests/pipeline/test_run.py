"""Caches of small records: what they hold, how long their shards are, and damaged records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.centers.means import centers_path
from gkd.pipeline.checks.calibration import MIN_IMAGES
from gkd.pipeline.embed import EmbeddedBatch, join_batches, split_batch
from gkd.pipeline.embedding_store import work_path
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, DrawsSpec, preprocess_preset
from gkd.storage.cache.targets import decode_log_probs
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.images import digest
from gkd.storage.records.open import open_records
from tests.paths import SHARED_DATA, needs_shared_data
from tests.pipeline.faces import SETTINGS, PixelEmbedder, centers, failing, make, write_folder
from tests.reference import dense_group, dense_secondary, log_sum_exp
from tests.storage.records.packs import insightface_records, jpeg, payload, write_pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


def unit(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    exact = embeddings.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return exact


def check_against_dense(
    out: Path,
    embeddings: dict[Any, npt.NDArray[np.float32]],
    labels: npt.NDArray[np.int64],
    class_centers: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
) -> None:
    """Stored groups of some rows equal a dense float64 computation from embeddings."""
    cache = Cache.open(out)
    spec = cache.spec
    for view in spec.views:
        cosines = unit(embeddings[view]) @ class_centers.T.astype(np.float64)
        for row, cosine in zip(rows, cosines, strict=True):
            z = spec.scale * cosine
            z[labels[row]] -= spec.scale * spec.margin
            shard, position = divmod(int(row), spec.shard_samples)
            targets = cache.read_shard(shard, view)
            entries = slice(targets.offsets[position], targets.offsets[position + 1])
            group = targets.indices[entries].astype(np.int64)
            expected, _ = dense_group(
                z,
                int(labels[row]),
                threshold=spec.threshold,
                group_temperature=spec.group_temperature,
                max_group=spec.max_group,
            )
            # As sets: float32 and float64 may order two all but equal cosines differently.
            assert set(group) == set(expected)
            scaled = z / spec.group_temperature
            probs = np.exp(scaled[group] - log_sum_exp(scaled))
            np.testing.assert_allclose(
                np.exp(decode_log_probs(targets.log2_probs[entries])),
                np.maximum(probs, 2.0 ** (-65535 / 1024)),  # the smallest value in the format
                rtol=5e-4,
            )
            secondary = [dense_secondary(z, group, t) for t in spec.temperatures]
            np.testing.assert_allclose(targets.secondary[position], secondary, atol=1e-4)


@pytest.mark.parametrize("class_mean", [False, True])
def test_a_cache_holds_what_the_teacher_says(
    folder: Path, tmp_path: Path, class_mean: bool
) -> None:
    out = tmp_path / "cache.gkd"
    embedder = PixelEmbedder()
    summary = make(folder, out, class_mean=class_mean, embedder=embedder)
    records = open_records(folder)
    images = np.stack([records.image(row) for row in range(len(records))])
    embeddings = {
        "original": PixelEmbedder()(images),
        "flipped": PixelEmbedder()(images[:, :, ::-1]),
    }
    array = centers(records.num_classes).array
    if class_mean:
        both = unit(np.concatenate([embeddings["original"], embeddings["flipped"]]))
        labels = np.tile(records.labels, 2)
        means = np.stack([both[labels == c].sum(0) for c in range(records.num_classes)])
        array = unit(means.astype(np.float32)).astype(np.float32)
        np.testing.assert_allclose(np.load(centers_path(out)), array, atol=1e-6)
        array = np.load(centers_path(out))
    check_against_dense(out, embeddings, records.labels, array, np.arange(len(records)))
    assert not list(verify(out).faults)

    cache = Cache.open(out)
    samples = cache.samples()
    expected = [np.frombuffer(digest(records.encoded(r)), np.uint8) for r in range(len(records))]
    np.testing.assert_array_equal(samples.digests, expected)
    np.testing.assert_array_equal(samples.labels, records.labels)
    assert samples.keys([3]) == [records.key(3)]

    assert summary.cache_id == cache.id
    assert (summary.samples, summary.skipped, summary.images) == (35, 0, 35)
    # Once each view of each image, and without kept embeddings the sample of the calibration.
    assert embedder.images == 2 * 35 + (0 if class_mean else MIN_IMAGES)
    assert summary.bytes > 0
    assert summary.images_per_second > 0
    for view in VIEWS:
        stored = [cache.read_shard(shard, view) for shard in range(4)]
        assert summary.entries[view] == sum(len(t.indices) for t in stored)
        assert summary.mean_group[view] == pytest.approx(summary.entries[view] / 35)
    assert not work_path(out).exists()
    assert {"gkd", "torch", "numpy", "zarr"} <= cache.spec.software.keys()
    assert cache.spec.centers.kind == ("class-mean" if class_mean else "file")


def damaged(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "damaged")
    (folder / "id2" / "1.png").write_bytes(b"no image")
    return folder


def test_a_corrupt_record_ends_the_run(tmp_path: Path) -> None:
    message = (
        r"1\.png: expected an encoded image, got 8 bytes [^;]*; `gkd records verify` lists all "
        r"such records, and --skip-corrupt leaves them out$"
    )
    with pytest.raises(CorruptRecordError, match=message):
        make(damaged(tmp_path), tmp_path / "cache.gkd")


def test_caches_of_damaged_records_do_not_depend_on_their_folder(tmp_path: Path) -> None:
    records = insightface_records([2, 2, 2])
    records[2] = payload(0, b"no image")
    records[4] = payload(1, jpeg(4, (100, 112)))
    ids, reasons = [], []
    for copy in ("here", "there"):
        pack = write_pack(tmp_path / copy / "set", records, classes=3)
        content = bytearray(pack.read_bytes())
        content[40] ^= 1  # the magic of key 1, after the 40 bytes of key 0
        pack.write_bytes(content)
        out = tmp_path / copy / "cache.gkd"
        ids.append(make(pack, out, settings=replace(SETTINGS, skip_corrupt=True)).cache_id)
        reasons.append(Cache.open(out).commit(0).skipped)
    assert ids[0] == ids[1]
    assert reasons[0] == reasons[1]
    assert reasons[0]["1"].startswith("expected magic 0xced7230a, got ")
    assert reasons[0]["4"] == "expected an aligned face of 112x112 pixels, got 100x112"
    assert reasons[0]["2"] == (
        "expected an encoded image, got 8 bytes starting 6e6f20696d616765 (none of JPEG, PNG, BMP, "
        "WEBP, TIFF, PPM, GIF, JPEG2000)"
    )


def test_resuming_without_skip_corrupt_is_refused(tmp_path: Path) -> None:
    folder, out = damaged(tmp_path), tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", failing(0))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True, settings=replace(SETTINGS, skip_corrupt=True))
    message = r"000001\.npz: row 11 of the records: expected an enc.*--skip-corrupt: give that opt"
    with pytest.raises(CorruptRecordError, match=message):
        make(folder, out, class_mean=True)


@pytest.mark.parametrize("class_mean", [False, True])
def test_corrupt_records_are_left_out_on_request(tmp_path: Path, class_mean: bool) -> None:
    out = tmp_path / "cache.gkd"
    settings = replace(SETTINGS, skip_corrupt=True)
    summary = make(damaged(tmp_path), out, class_mean=class_mean, settings=settings)
    assert summary.skipped == 1
    cache = Cache.open(out)
    targets = cache.read_shard(1, "flipped")  # row 11 is the second of shard 1
    assert targets.sizes[1] == 0
    assert (np.delete(targets.sizes, 1) > 0).all()
    np.testing.assert_array_equal(targets.secondary[1], 0)
    (key,) = cache.commit(1).skipped
    assert key == "id2/1.png"
    assert cache.commit(1).skipped[key].startswith("expected an encoded image")
    assert not cache.samples().present[11]
    assert not list(verify(out).faults)


@pytest.mark.parametrize(
    ("max_group", "num_samples", "expected"),
    [(1, 10**7, 65536), (652, 10**7, 32768), (4096, 10**7, 8192), (65535, 10**7, 512), (8, 35, 35)],
)
def test_shards_are_as_large_as_their_bytes_allow(
    max_group: int, num_samples: int, expected: int
) -> None:
    settings = CacheSettings(partition=PartitionSettings(max_group=max_group))
    assert settings.samples_per_shard(num_samples) == expected


def test_draws_make_shards_shorter_as_entries_do() -> None:
    draws = DrawsSpec(3000, 4.0, "all")
    settings = CacheSettings(partition=PartitionSettings(max_group=1000, draws=draws))
    assert settings.samples_per_shard(10**6) == 8192


def test_batches_join_and_split() -> None:
    def batch(start: int, kept: list[int], skipped: dict[int, str]) -> EmbeddedBatch:
        values = np.arange(len(kept), dtype=np.float32)[:, None] + start
        digests = np.full((4, 16), start, np.uint8)
        return EmbeddedBatch(
            range(start, start + 4), np.array(kept), digests, skipped, {"original": values}
        )

    parts = [batch(8, [0, 2, 3], {1: "one"}), batch(12, [0, 1, 2], {3: "two"})]
    joined = join_batches(parts)
    assert joined.rows == range(8, 16)
    np.testing.assert_array_equal(joined.kept, [0, 2, 3, 4, 5, 6])
    assert joined.skipped == {1: "one", 7: "two"}
    for part, again in zip(parts, split_batch(joined, 4), strict=True):
        assert again.rows == part.rows
        assert again.skipped == part.skipped
        np.testing.assert_array_equal(again.kept, part.kept)
        np.testing.assert_array_equal(again.digests, part.digests)
        np.testing.assert_array_equal(again.embeddings["original"], part.embeddings["original"])


@needs_shared_data
def test_real_faces_agree_with_a_dense_recomputation(tmp_path: Path) -> None:
    records = open_records(SHARED_DATA / "lfw")
    chosen = np.flatnonzero(records.labels < 40)
    assert np.array_equal(chosen, np.arange(len(chosen))), "the pack is ordered by identity"
    records.labels, records.sizes = records.labels[chosen], records.sizes[chosen]
    records.num_classes = 40
    embedder = OnnxEmbedder(
        SHARED_DATA / "teachers" / "mobilefacenet.onnx", preprocess_preset("imagenet"), threads=1
    )
    out = tmp_path / "lfw.gkd"
    settings = CacheSettings(partition=PartitionSettings(), batch_size=32, shard_samples=64)
    cache_teacher(records, out, embedder, CLASS_MEAN, settings)
    rows = np.random.default_rng(0).choice(len(records), 30, replace=False)
    images = np.stack([records.image(row) for row in rows])
    embeddings = {"original": embedder(images), "flipped": embedder(images[:, :, ::-1])}
    check_against_dense(out, embeddings, records.labels, np.load(centers_path(out)), rows)
    assert not list(verify(out).faults)
