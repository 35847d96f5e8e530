"""Caches of small records: content, resuming, world sizes, damaged records and every refusal."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from gkd.pipeline import shards
from gkd.pipeline.calibration import FEWEST_IMAGES
from gkd.pipeline.centers import CLASS_MEAN, Centers, centers_path
from gkd.pipeline.embed import EmbeddedBatch, join_batches, split_batch
from gkd.pipeline.embedding_store import work_path
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.teacher import OnnxEmbedder
from gkd.storage.cache import Cache
from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError, SpecMismatchError
from gkd.storage.records import digest, open_records
from gkd.storage.spec import VIEWS, DrawsSpec, preprocess_preset
from gkd.storage.targets import decode_log_probs
from gkd.storage.verify import verify
from gkd.storage.writer import CacheWriter
from tests.paths import ROOT, SHARED_DATA, needs_shared_data
from tests.pipeline.faces import SETTINGS, PixelEmbedder, centers, make, write_folder
from tests.reference import dense_group, dense_secondary, log_sum_exp
from tests.storage.packs import insightface_records, jpeg, payload, write_pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "cache.gkd"
    make(folder, out, class_mean=True)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a cache and its centres."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if centers_path(out).exists():
        files["centers"] = centers_path(out).read_bytes()
    return files


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
            shard, place = divmod(int(row), spec.shard_samples)
            targets = cache.read_shard(shard, view)
            entries = slice(targets.offsets[place], targets.offsets[place + 1])
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
                np.maximum(probs, 2.0 ** (-65535 / 1024)),  # the least that the format holds
                rtol=5e-4,
            )
            secondary = [dense_secondary(z, group, t) for t in spec.temperatures]
            np.testing.assert_allclose(targets.secondary[place], secondary, atol=1e-4)


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
    assert embedder.images == 2 * 35 + (0 if class_mean else FEWEST_IMAGES)
    assert summary.bytes > 0
    assert summary.images_per_second > 0
    for view in VIEWS:
        stored = [cache.read_shard(shard, view) for shard in range(4)]
        assert summary.entries[view] == sum(len(t.indices) for t in stored)
        assert summary.mean_group[view] == pytest.approx(summary.entries[view] / 35)
    assert not work_path(out).exists()
    assert {"gkd", "torch", "numpy", "zarr"} <= cache.spec.software.keys()
    assert cache.spec.centers.kind == ("class-mean" if class_mean else "file")


def test_a_finished_cache_is_not_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    first = make(folder, out, class_mean=True)
    before = contents(out)
    embedder = PixelEmbedder()
    again = make(folder, out, class_mean=True, embedder=embedder)
    assert embedder.images == 0
    assert again.cache_id == first.cache_id
    assert contents(out) == before


def start(
    folder: Path, out: Path, rank: int, world_size: int, seconds: float, mode: str = CLASS_MEAN
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.pipeline.faces", str(folder), str(out)]
    return subprocess.Popen(
        [*command, str(rank), str(world_size), str(seconds), mode],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def test_three_processes_write_what_one_writes(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "cache.gkd"
    processes = [start(folder, out, rank, 3, 0.0) for rank in range(3)]
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told.decode()
    assert contents(out) == unbroken
    assert not work_path(out).exists()


@pytest.mark.parametrize("source", ["all", "primary"])
def test_draws_do_not_depend_on_batches_ranks_or_interruptions(
    folder: Path, tmp_path: Path, source: Literal["all", "primary"]
) -> None:
    draws = DrawsSpec(16, 4.0, source, seed=3)
    settings = replace(SETTINGS, partition=replace(SETTINGS.partition, draws=draws))
    whole = tmp_path / "whole.gkd"
    make(folder, whole, settings=settings)
    assert not verify(whole).faults

    batches = tmp_path / "batches.gkd"
    make(folder, batches, settings=replace(settings, batch_size=7))
    found, expected = contents(batches), contents(whole)
    drawn = [name for name in expected if "/draws/" in name or "/draw_log2_probs/" in name]
    assert len(drawn) == 2 * 2 * (1 + 4)
    assert {name: found[name] for name in drawn} == {name: expected[name] for name in drawn}

    # The second half of a run, of one rank and of two that come after it.
    halves = tmp_path / "halves.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", _failing(1))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, halves, settings=settings)
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(make, folder, halves, settings=settings, rank=rank, world_size=2)
            for rank in range(2)
        ]
        for rank in ranks:
            rank.result()
    assert contents(halves) == contents(whole)

    original, flipped = (Cache.open(whole).read_shard(0, view).draws for view in VIEWS)
    assert original is not None
    assert flipped is not None
    assert not np.array_equal(original, flipped)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_teacher_pass_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes], how: signal.Signals
) -> None:
    out = tmp_path / "cache.gkd"
    process = start(folder, out, 0, 1, 0.2)
    wait_for(work_path(out) / "000000.npz")
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not out.exists()
    embedder = PixelEmbedder()
    make(folder, out, class_mean=True, embedder=embedder)
    assert embedder.images < 2 * 35, "what was kept is not computed again"
    assert contents(out) == unbroken


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    process = start(folder, out, 0, 1, 0.2, "file")
    wait_for(out / "commits" / "000000.json")
    process.kill()
    process.communicate(timeout=60)
    assert not (out / "manifest.json").exists()
    embedder = PixelEmbedder()
    make(folder, out, embedder=embedder)
    assert embedder.images < 2 * 35
    whole = tmp_path / "whole.gkd"
    make(folder, whole)
    assert contents(out) == contents(whole)


def test_a_partition_pass_goes_on_from_kept_embeddings(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", _failing(2))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True)
    assert sorted(p.name for p in (out / "commits").iterdir()) == ["000000.json", "000001.json"]
    embedder = PixelEmbedder()
    make(folder, out, class_mean=True, embedder=embedder)
    assert embedder.images == 0
    assert contents(out) == unbroken


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def _failing(after: int) -> Any:
    write = CacheWriter.write_shard
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError("the disk is gone")
        write(*args, **kwargs)

    return fail


def test_an_interrupt_passes_through_and_leaves_whole_shards(folder: Path, tmp_path: Path) -> None:
    class Interrupted(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            if self.images >= FEWEST_IMAGES + 50:  # after the sample of the calibration
                raise KeyboardInterrupt
            return super().__call__(images)

    out = tmp_path / "cache.gkd"
    with pytest.raises(KeyboardInterrupt):
        make(folder, out, embedder=Interrupted())
    assert [p.name for p in sorted((out / "commits").iterdir())] == ["000000.json", "000001.json"]
    make(folder, out)
    whole = tmp_path / "whole.gkd"
    make(folder, whole)
    assert contents(out) == contents(whole)


def test_a_failing_writer_thread_ends_the_run_with_its_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheWriter, "write_shard", _failing(0))
    with pytest.raises(OSError, match="the disk is gone"):
        make(folder, tmp_path / "cache.gkd")


def test_a_second_error_of_the_writer_is_noted_on_the_first() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    def run() -> None:
        with shards.Background() as background:
            background.start(fail)
            raise ValueError("teacher")

    with pytest.raises(ValueError, match="teacher") as caught:
        run()
    assert caught.value.__notes__ == ["and the shard being written failed: the disk is gone"]


def test_a_failing_teacher_ends_the_run_with_its_error(folder: Path, tmp_path: Path) -> None:
    class Failing(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make(folder, tmp_path / "cache.gkd", embedder=Failing())


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
        "WEBP)"
    )


def test_going_on_without_skip_corrupt_is_refused(tmp_path: Path) -> None:
    folder, out = damaged(tmp_path), tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", _failing(0))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True, settings=replace(SETTINGS, skip_corrupt=True))
    message = (
        r"000001\.npz: row 11 of the records: expected an enc.*--skip-corrupt: give that again"
    )
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
    ("place", "change", "message"),
    [
        ("file", {}, r"cache\.gkd: expected a cache of targets .*, got a file; check the path"),
        ("folder", {}, r"cache\.gkd: expected a cache of targets .*, got another folder"),
        (
            "cache",
            {},
            r"(?s)made with other settings:.*centers\.kind: .* 'file', this run 'class-m",
        ),
        ("", {"shard_samples": 99_999_999}, r"shard_samples: expected 1 to 2\^24, .*got 99999999"),
    ],
)
def test_class_means_refuse_what_cannot_be_written_before_the_teacher_runs(
    folder: Path, tmp_path: Path, place: str, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "cache.gkd"
    if place == "cache":
        make(folder, out)
    elif place == "folder":
        (out / "photos").mkdir(parents=True)
    elif place == "file":
        out.write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    embedder = PixelEmbedder()
    settings = replace(SETTINGS, **change)
    with pytest.raises(GkdError, match=message):
        make(folder, out, class_mean=True, embedder=embedder, settings=settings)
    assert embedder.images == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_embeddings_without_direction_are_refused(
    folder: Path, tmp_path: Path, value: float
) -> None:
    class Faulty(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            embeddings = super().__call__(images)
            if self.images > FEWEST_IMAGES + 8:  # after the sample of the calibration
                embeddings[1] = value
            return embeddings

    message = (
        r"pixels: NaN, infinite or zero embeddings of 1 of 4 images \(original view\), the first "
        r"of .*key id1/0\.png; computed in float32: try --precision float32"
    )
    with pytest.raises(GkdError, match=message):
        make(folder, tmp_path / "cache.gkd", embedder=Faulty())


def test_going_on_with_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    make(folder, out)
    partition = replace(SETTINGS.partition, threshold=0.5)
    with pytest.raises(SpecMismatchError, match=r"threshold: the cache has 0\.93, this run 0\.5"):
        make(folder, out, settings=replace(SETTINGS, partition=partition))


def test_kept_embeddings_of_another_teacher_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", _failing(0))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True)
    shutil.rmtree(out)  # as where the run was killed before it
    other = PixelEmbedder()
    other.sha256 = "1" * 64
    message = r"(?s)keeps embeddings of another run.*teacher: kept .*delete .*cache\.gkd\.work"
    with pytest.raises(SpecMismatchError, match=message):
        make(folder, out, class_mean=True, embedder=other)
    (work_path(out) / "settings.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match="expected the settings of kept embeddings, got"):
        make(folder, out, class_mean=True)


def test_centres_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    other = Centers(np.eye(9, dtype=np.float32), "file", "eye.npy")
    message = (
        r"eye\.npy: expected centres of 7 identities and embeddings of length 16, got \[9, 9\]"
    )
    with pytest.raises(ConfigError, match=message):
        cache_teacher(
            open_records(folder), tmp_path / "cache.gkd", PixelEmbedder(), other, SETTINGS
        )


def test_labels_beyond_the_identities_are_refused(folder: Path, tmp_path: Path) -> None:
    records = open_records(folder)
    records.num_classes = 4
    with pytest.raises(ConfigError, match="labels go up to 6, but there are 4 identities"):
        cache_teacher(records, tmp_path / "c.gkd", PixelEmbedder(), centers(4), SETTINGS)


def test_no_images_are_refused(folder: Path, tmp_path: Path) -> None:
    records = open_records(folder)
    records.labels = records.labels[:0]
    with pytest.raises(ConfigError, match="expected images, got none"):
        cache_teacher(records, tmp_path / "c.gkd", PixelEmbedder(), centers(7), SETTINGS)


def test_records_of_which_none_can_be_read_are_refused(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, {key: payload(-1, jpeg(key)) for key in range(3)})
    settings = replace(SETTINGS, skip_corrupt=True)
    message = (
        r"train\.rec: none of 3 records could be read; `gkd records verify` says what is wrong"
    )
    with pytest.raises(ConfigError, match=message):
        make(pack, tmp_path / "cache.gkd", class_mean=True, settings=settings)


def test_class_means_of_more_classes_than_images_are_refused(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, {0: payload(3e9, jpeg(0))}, classes=2**32)
    embedder = PixelEmbedder()
    message = "class-mean centres: 4,294,967,296 classes, but only 1 images, .*--centers FILE, or"
    with pytest.raises(ConfigError, match=message):
        make(pack, tmp_path / "cache.gkd", class_mean=True, embedder=embedder)
    assert embedder.images == 0


def test_class_means_of_classes_without_images_are_refused_at_once(
    folder: Path, tmp_path: Path
) -> None:
    records = open_records(folder)
    records.num_classes = 9
    embedder = PixelEmbedder()
    with pytest.raises(ConfigError, match="2 of 9 classes have no image, such as 7, 8"):
        cache_teacher(records, tmp_path / "c.gkd", embedder, CLASS_MEAN, SETTINGS)
    assert embedder.images == 0


def test_a_full_disk_is_told_beforehand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(ConfigError, match=r"cache\.gkd.*MB are needed, 0\.0 MB are free"):
        make(folder, tmp_path / "cache.gkd", class_mean=True)


def test_what_stands_already_needs_no_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(folder, tmp_path / "cache.gkd")
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    assert make(folder, tmp_path / "cache.gkd").cache_id == first.cache_id


class _Usage:
    free = 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size: expected 1 or more, got 0; give another number"),
        ({"workers": 0}, "--workers: expected 1 or more, got 0;"),
        ({"shard_samples": 0}, "--shard-samples: expected 1 or more, got 0;"),
        ({"views": ("flipped", "original")}, "--views: expected .*, got flipped,original; give"),
        ({"views": ()}, "--views: expected original, flipped or both .*, got none;"),
    ],
)
def test_settings_outside_their_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheSettings(**change)


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
            range(start, start + 4), np.array(kept), {"original": values}, digests, skipped
        )

    parts = [batch(8, [0, 2, 3], {1: "one"}), batch(12, [0, 1, 2], {3: "two"})]
    whole = join_batches(parts)
    assert whole.rows == range(8, 16)
    np.testing.assert_array_equal(whole.kept, [0, 2, 3, 4, 5, 6])
    assert whole.skipped == {1: "one", 7: "two"}
    for part, again in zip(parts, split_batch(whole, 4), strict=True):
        assert again.rows == part.rows
        assert again.skipped == part.skipped
        np.testing.assert_array_equal(again.kept, part.kept)
        np.testing.assert_array_equal(again.digests, part.digests)
        np.testing.assert_array_equal(again.embeddings["original"], part.embeddings["original"])


@needs_shared_data
def test_real_faces_agree_with_a_dense_recomputation(tmp_path: Path) -> None:
    records = open_records(SHARED_DATA / "lfw")
    chosen = np.flatnonzero(records.labels < 140)
    assert np.array_equal(chosen, np.arange(len(chosen))), "the pack is ordered by identity"
    records.labels, records.sizes = records.labels[chosen], records.sizes[chosen]
    records.num_classes = 140
    embedder = OnnxEmbedder(
        SHARED_DATA / "teachers" / "mobilefacenet.onnx", preprocess_preset("imagenet"), threads=1
    )
    out = tmp_path / "lfw.gkd"
    settings = CacheSettings(partition=PartitionSettings(), batch_size=64, shard_samples=128)
    cache_teacher(records, out, embedder, CLASS_MEAN, settings)
    rows = np.random.default_rng(0).choice(len(records), 60, replace=False)
    images = np.stack([records.image(row) for row in rows])
    embeddings = {"original": embedder(images), "flipped": embedder(images[:, :, ::-1])}
    check_against_dense(out, embeddings, records.labels, np.load(centers_path(out)), rows)
    assert not list(verify(out).faults)
