import shutil
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.verify import Level, verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError
from tests.caches import make_cache, make_spec, write_shard
from tests.storage.cache.flips import every_file, make_small_cache, unnoticed_flips
from tests.tampering import flip_bit, rehash, rewrite_row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made") / "c", skipped={41: "no image"})


@pytest.fixture
def path(made: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "faces.gkd"))


@pytest.mark.parametrize("level", ["quick", "hashes", "deep"])
def test_a_whole_cache_has_no_fault(path: Path, level: Level) -> None:
    report = verify(path, level=level)
    assert report.level == level
    assert report.ok
    assert report.faults == ()
    assert report.shards == 3
    shard_files = [file for file in every_file(path) if "json" not in Path(file).name]
    assert report.files == len(shard_files) + 3
    cache = Cache.open(path)
    assert cache.manifest is not None
    assert report.entries == sum(cache.manifest.entries.values())
    assert cache.manifest.bytes == sum(
        (path / file).stat().st_size for file in every_file(path) if file != layout.MANIFEST
    )


@pytest.mark.parametrize("level", ["hashes", "deep"])
def test_any_flipped_bit_is_found_its_file_named_and_training_refused(
    tmp_path: Path, level: Level
) -> None:
    cache = make_small_cache(tmp_path / "faces.gkd")
    flips = 60 if level == "hashes" else 30
    assert len(every_file(cache)) < 60
    assert unnoticed_flips(cache, tmp_path / "work", flips=flips, seed=0, level=level) == []


def test_the_quick_level_reads_no_arrays(path: Path) -> None:
    flip_bit(path / "original/sizes/c/0/0", 99)
    flip_bit(path / "samples/000001.parquet", 99)
    assert verify(path, level="quick").ok
    flip_bit(path / "commits/000002.json", 99)
    assert [fault.file for fault in verify(path, level="quick").faults] == ["commits/000002.json"]


def test_any_missing_file_is_found_and_named(path: Path) -> None:
    for file in every_file(path):
        content = (path / file).read_bytes()
        (path / file).unlink()
        report = verify(path, workers=1)
        assert {fault.file for fault in report.faults} == {file}
        (path / file).write_bytes(content)


@pytest.mark.parametrize("level", ["quick", "hashes"])
def test_any_truncated_file_is_found_and_named(path: Path, level: Level) -> None:
    for file in every_file(path):
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[: len(content) // 2])
        report = verify(path, level=level, workers=1)
        assert {fault.file for fault in report.faults} == {file}
        (path / file).write_bytes(content)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("original/indices/c/0/0", "original/indices/c/1/0"),
        ("original/log2_probs/c/0/0", "flipped/log2_probs/c/0/0"),
        ("original/secondary/c/0/0/0", "flipped/secondary/c/0/0/0"),
        ("samples/000000.parquet", "samples/000001.parquet"),
        ("commits/000000.json", "commits/000001.json"),
    ],
)
def test_swapped_files_are_found_and_both_named(path: Path, left: str, right: str) -> None:
    (path / left).rename(path / "swap")
    (path / right).rename(path / left)
    (path / "swap").rename(path / right)
    assert {fault.file for fault in verify(path).faults} == {left, right}


def test_all_faults_are_listed_together(path: Path) -> None:
    (path / "original/sizes/c/0/0").unlink()
    flip_bit(path / "samples/000002.parquet", 99)
    (path / "flipped/indices/c/1/0").write_bytes(b"")
    report = verify(path)
    assert [fault.file for fault in report.faults] == [
        "flipped/indices/c/1/0",
        "original/sizes/c/0/0",
        "samples/000002.parquet",
    ]
    assert not report.ok
    problems = [str(fault) for fault in report.faults]
    assert "expected" in problems[0]
    assert "missing" in problems[1]
    assert "damaged: expected sha256" in problems[2]


def test_a_link_is_a_fault(path: Path, tmp_path: Path) -> None:
    file = path / "original/sizes/c/0/0"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    (fault,) = verify(path).faults
    assert fault.file == "original/sizes/c/0/0"
    assert "a symbolic link" in fault.problem


def test_a_foreign_file_is_found(path: Path) -> None:
    (path / ".DS_Store").write_bytes(b"of the desktop")
    assert verify(path).ok
    # A Zarr reader would take this for one more shard.
    shutil.copy(path / "original/sizes/c/0/0", path / "original/sizes/c/3")
    (fault,) = verify(path, level="quick").faults
    assert fault.file == "original/sizes/c/3"
    assert "not a part of the cache" in fault.problem


def test_the_manifest_covers_the_card(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec(num_samples=3))
    (writer.path / layout.CARD).write_text("# Faces")
    write_shard(writer, 0)
    writer.finish()
    assert verify(writer.path).ok
    flip_bit(writer.path / layout.CARD, 3)
    assert [fault.file for fault in verify(writer.path).faults] == [layout.CARD]


def test_an_unfinished_cache_reports_its_progress(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 2)
    (fault,) = verify(writer.path).faults
    assert fault.file == layout.MANIFEST
    assert fault.problem == (
        "not finished: 1 of 3 shards are written, no manifest.json; "
        "run the same `gkd cache-teacher` or `gkd targets pull` again to resume"
    )


@pytest.mark.parametrize("level", ["quick", "hashes", "deep"])
def test_a_fault_names_its_file_once_and_no_remedy(path: Path, level: Level) -> None:
    (path / "original/sizes/c/0/0").unlink()
    (path / "commits/000001.json").write_bytes(b"{")
    (path / "original/sizes/zarr.json").unlink()
    faults = verify(path, level=level).faults
    assert len(faults) == 3
    for fault in faults:
        assert str(path) not in str(fault)
        assert str(fault).count(fault.file) == 1
        assert "again" not in str(fault)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a cache of targets"):
        verify(tmp_path)


def test_an_invalid_spec_stops_the_check(path: Path) -> None:
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"max_group": 20', '"max_group": 0'))
    (fault,) = verify(path).faults
    assert fault.file == "zarr.json"
    assert "max_group: expected 1 to 65535, got 0" in fault.problem
    assert "nothing else could be checked" in fault.problem


def test_forged_content_with_correct_hashes_is_found(path: Path) -> None:
    cache = Cache.open(path)
    targets = cache.read_shard(0, "original")
    indices = targets.indices.copy()
    indices[1] = indices[0]
    rewrite_row(cache, "original/indices", 0, indices)
    secondary = cache.read_shard(1, "flipped").secondary.copy()
    secondary[5] = np.nan
    rewrite_row(cache, "flipped/secondary", 1, secondary)
    assert verify(path, level="hashes").ok
    found = {fault.file: fault.problem for fault in verify(path).faults}
    assert found["original/indices/c/0/0"] == "row 0: a class twice in a group"
    assert found["flipped/secondary/c/1/0/0"] == "row 45: a log mass above 0 or not a number"


def test_a_commit_that_skips_other_samples_than_the_table_is_found(path: Path) -> None:
    commit = path / layout.commit_file(1)
    commit.write_text(commit.read_text().replace('"42": "no image"', '"43": "no image"'))
    rehash(path)
    (fault,) = verify(path).faults
    assert fault.file == layout.samples_file(1)
    assert "not those that the commit record skips" in fault.problem
