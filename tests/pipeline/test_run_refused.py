"""What a run refuses: invalid settings, records, centres and embeddings, and a full disk."""

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.pipeline.centers.load import CLASS_MEAN, Centers
from gkd.pipeline.checks.calibration import MIN_IMAGES
from gkd.pipeline.embed import ACCELERATOR_BATCH
from gkd.pipeline.embedding_store import work_path
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings
from gkd.storage.cache.metadata import read_spec
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, GkdError, SpecMismatchError
from gkd.storage.records.open import open_records
from tests.pipeline.faces import SETTINGS, PixelEmbedder, centers, failing, make, write_folder
from tests.storage.records.packs import jpeg, payload, write_pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.mark.parametrize(
    ("existing", "change", "message"),
    [
        ("file", {}, r"cache\.gkd: expected a cache of targets .*, got a file; check the path"),
        ("folder", {}, r"cache\.gkd: expected a cache of targets .*, got another folder"),
        (
            "cache",
            {},
            r"(?s)made with other settings:.*centers\.kind: .* file, this run has class-m",
        ),
        ("", {"shard_samples": 99_999_999}, r"shard_samples: expected 1 to 2\^24, .*got 99999999"),
    ],
)
def test_class_means_refuse_what_cannot_be_written_before_the_teacher_runs(
    folder: Path, tmp_path: Path, existing: str, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "cache.gkd"
    if existing == "cache":
        make(folder, out)
    elif existing == "folder":
        (out / "photos").mkdir(parents=True)
    elif existing == "file":
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
            if self.images > MIN_IMAGES + 8:  # after the sample of the calibration
                embeddings[1] = value
            return embeddings

    message = (
        r"pixels: NaN, infinite or zero embeddings of 1 of 4 images \(original view\), the first "
        r"of .*key id1/0\.png; computed in float32: try --precision float32"
    )
    with pytest.raises(GkdError, match=message):
        make(folder, tmp_path / "cache.gkd", embedder=Faulty())


def test_resuming_with_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    make(folder, out)
    partition = replace(SETTINGS.partition, threshold=0.5)
    with pytest.raises(
        SpecMismatchError, match=r"threshold: the cache has 0\.93, this run has 0\.5"
    ):
        make(folder, out, settings=replace(SETTINGS, partition=partition))


def test_kept_embeddings_of_another_teacher_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", failing(0))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True)
    shutil.rmtree(out)  # as if the run had been killed before it
    other = PixelEmbedder()
    other.sha256 = "1" * 64
    message = (
        r"(?s)keeps embeddings of another run.*teacher\.sha256: kept .*rm -r .*cache\.gkd\.work"
    )
    with pytest.raises(SpecMismatchError, match=message):
        make(folder, out, class_mean=True, embedder=other)
    (work_path(out) / "settings.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match="expected the settings of kept embeddings, got"):
        make(folder, out, class_mean=True)


def test_after_a_wrong_preprocessing_the_command_of_the_message_starts_again(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my cache.gkd"
    wrong, right = PixelEmbedder(), PixelEmbedder()
    wrong.preprocess = preprocess_preset("imagenet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", failing(0))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True, embedder=wrong)
    shutil.rmtree(out)
    with pytest.raises(SpecMismatchError) as caught:
        make(folder, out, class_mean=True, embedder=right)
    message = str(caught.value)
    assert "preprocess.std: kept [58.395, 57.12, 57.375], this run [127.5, 127.5, 127.5]" in message
    subprocess.run(shlex.split(message[message.index("rm -r") :]), check=True)
    assert make(folder, out, class_mean=True, embedder=right).samples == 35


@pytest.mark.parametrize("class_mean", [False, True])
@pytest.mark.parametrize(("begun", "resumed"), [(4, 5), (4, None), (None, 4)])
def test_an_accelerators_batch_size_is_recorded_and_kept(
    folder: Path, tmp_path: Path, class_mean: bool, begun: int | None, resumed: int | None
) -> None:
    out = tmp_path / "cache.gkd"
    accelerator = PixelEmbedder()
    accelerator.device = "accelerator"
    first, second = (replace(SETTINGS, batch_size=size) for size in (begun, resumed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd.pipeline.run.on_device", lambda array, *_: torch.from_numpy(array))
        patch.setattr(CacheWriter, "write_shard", failing(1))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=class_mean, embedder=accelerator, settings=first)
        sizes = begun or ACCELERATOR_BATCH, resumed or ACCELERATOR_BATCH
        message = r"batch_size: the cache has {}, this run has {}(?s:.*)A GPU's results depend on"
        with pytest.raises(SpecMismatchError, match=message.format(*sizes)):
            make(folder, out, class_mean=class_mean, embedder=accelerator, settings=second)
        with pytest.raises(SpecMismatchError, match=message.format(sizes[0], "nothing")):
            make(folder, out, class_mean=class_mean, settings=first)
        if class_mean:  # as if the run had been killed before it
            shutil.rmtree(out)
            message = "batch_size: kept {}, this run {}".format(*sizes)
            with pytest.raises(SpecMismatchError, match=message):
                make(folder, out, class_mean=True, embedder=accelerator, settings=second)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd.pipeline.run.on_device", lambda array, *_: torch.from_numpy(array))
        make(folder, out, class_mean=class_mean, embedder=accelerator, settings=first)
    assert read_spec(out).batch_size == sizes[0]


def test_on_a_cpu_another_batch_size_resumes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    first = make(folder, out)
    assert make(folder, out, settings=replace(SETTINGS, batch_size=7)).cache_id == first.cache_id
    assert b"batch_size" not in (out / "zarr.json").read_bytes()


def test_a_cache_of_the_older_rule_of_pixels_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    make(folder, out)
    metadata = out / "zarr.json"
    content = metadata.read_text()
    metadata.write_text(content.replace('"pixels": "opencv",', ""))
    assert read_spec(out).pixels is msgspec.UNSET
    message = (
        r"(?s)pixels: the cache has nothing, this run has opencv.*older version, which ignored the "
        "EXIF orientation.*choose another folder"
    )
    with pytest.raises(SpecMismatchError, match=message):
        make(folder, out)
    make(folder, tmp_path / "another.gkd")


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
        r"train\.rec: none of 3 records could be read; `gkd records verify` lists what is wrong"
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


def test_a_full_disk_is_reported_beforehand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(ConfigError, match=r"cache\.gkd.*MB of free space, got 0\.0 MB"):
        make(folder, tmp_path / "cache.gkd", class_mean=True)


def test_finished_shards_need_no_room(
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
