"""Caches received from folders: complete, in parts, repaired, and refused if they do not fit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DerivedSpec, DrawsSpec
from gkd.storage.cache.verify import verify
from gkd.storage.errors import (
    ConfigError,
    CorruptShardError,
    IncompleteCacheError,
    SpecMismatchError,
)
from gkd.storage.sharing.pull import pull
from gkd.storage.util.lock import WriteLock
from tests.caches import contents, make_cache
from tests.tampering import flip_bit


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of the same spec and sizes as ``cache``, with other bytes."""
    return make_cache(tmp_path_factory.mktemp("made") / "other.gkd", seed=1)


def test_draws_are_copied_in_full_and_by_view(tmp_path: Path) -> None:
    draws = DrawsSpec(5, 2.0, "primary")
    cache = make_cache(tmp_path / "c.gkd", draws=draws, max_group=50)
    pull(str(cache.path), tmp_path / "back.gkd")
    assert contents(tmp_path / "back.gkd") == contents(cache.path)
    pull(str(cache.path), tmp_path / "one.gkd", views=["flipped"])
    one = Cache.open(tmp_path / "one.gkd")
    assert one.spec.draws == draws
    assert verify(one.path, level="deep").ok


def test_a_pull_repairs_a_damaged_copy(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    pull(str(folder), back)
    assert pull(str(folder), back).copied_files == 0
    flip_bit(back / "original/sizes/c/0/0", 40)
    (back / "flipped/indices/c/2/0").unlink()
    flip_bit(back / "commits/000001.json", 300)
    flip_bit(back / layout.CARD, 3)
    flip_bit(back / "original/indices/zarr.json", 90)
    assert len(verify(back).faults) == 5
    assert pull(str(folder), back).copied_files == 5
    assert contents(back) == contents(cache.path)


@pytest.mark.parametrize(
    ("files", "byte"),
    [(["manifest.json"], 2), ([layout.METADATA], 0), (["commits/000001.json", "manifest.json"], 0)],
)
def test_a_pull_repairs_unreadable_records(
    cache: Cache, folder: Path, tmp_path: Path, files: list[str], byte: int
) -> None:
    back = tmp_path / "back.gkd"
    pull(str(folder), back)
    for file in files:
        flip_bit(back / file, 8 * byte)
    assert pull(str(folder), back).copied_files == len(files)
    assert contents(back) == contents(cache.path)


def test_a_folder_without_a_readable_record_is_refused(folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    pull(str(folder), back)
    for record in (back / layout.MANIFEST, *(back / "commits").iterdir()):
        record.unlink()
    flip_bit(back / layout.METADATA, 0)
    with pytest.raises(SpecMismatchError, match=r"zarr\.json: damaged, or from another cache"):
        pull(str(folder), back)


@pytest.mark.parametrize("file", ["original/sizes/c/0/0", "samples/000002.parquet"])
def test_damage_on_the_way_is_found(folder: Path, tmp_path: Path, file: str) -> None:
    flip_bit(folder / file, 40)
    back = tmp_path / "back.gkd"
    with pytest.raises(CorruptShardError, match=rf"{file}: its size or sha256 is not that"):
        pull(str(folder), back)
    assert not (back / file).exists()
    with pytest.raises(IncompleteCacheError, match="`gkd targets pull` again"):
        Cache.open(back)


def test_a_longer_or_missing_file_is_found(folder: Path, tmp_path: Path) -> None:
    file = folder / "original/sizes/c/0/0"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CorruptShardError, match=r"original/sizes/c/0/0: its size or sha256"):
        pull(str(folder), tmp_path / "back")
    file.unlink()
    with pytest.raises(ConfigError, match=rf"{file}: FileNotFoundError: .*{file}"):
        pull(str(folder), tmp_path / "back")


def test_a_link_in_the_target_is_not_followed(cache: Cache, folder: Path, tmp_path: Path) -> None:
    pull(str(folder), tmp_path / "back")
    file, outside = tmp_path / "back" / "original/sizes/c/0/0", tmp_path / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    before = outside.stat()
    pull(str(folder), tmp_path / "back")
    assert not file.is_symlink()
    assert outside.stat().st_mtime_ns == before.st_mtime_ns
    assert contents(tmp_path / "back") == contents(cache.path)


# --- parts ----------------------------------------------------------------------------------------


def test_some_shards_are_an_unfinished_cache(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    received = pull(str(folder), back, shards=[2, 0])
    assert (received.whole, received.id) == (False, None)
    assert committed_shards(back) == [0, 2]
    with pytest.raises(IncompleteCacheError, match="2 of 3 shards"):
        Cache.open(back)
    part = Cache.open(back, complete=False)
    np.testing.assert_array_equal(
        part.read_shard(2, "flipped").indices, cache.read_shard(2, "flipped").indices
    )
    with pytest.raises(CorruptShardError, match=r"commits/000001\.json: missing"):
        part.read_shard(1, "flipped")

    rest = pull(str(folder), back)
    assert rest.whole
    assert rest.copied_files == 11  # arrays, table and record of shard 1, and the manifest
    assert contents(back) == contents(cache.path)


def test_one_view_is_a_separate_cache(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    received = pull(str(folder), back, views=["flipped"])
    assert verify(back).ok
    flipped = Cache.open(back)
    assert received.id == flipped.id != cache.id
    assert flipped.spec.views == ("flipped",)
    assert flipped.spec.derived == DerivedSpec("views", (cache.id,))
    arrays = [file for file in contents(cache.path) if file.startswith("flipped/")]
    assert {file: contents(back)[file] for file in arrays} == {
        file: contents(cache.path)[file] for file in arrays
    }
    assert f"the flipped view of the cache {cache.id} alone" in (back / "README.md").read_text()
    assert not (back / "original").exists()

    # Everybody gets the same bytes, in one pull or in parts.
    pull(str(folder), tmp_path / "again", views=["flipped"], shards=[1])
    pull(str(folder), tmp_path / "again", views=["flipped"])
    assert contents(tmp_path / "again") == contents(back)
    with pytest.raises(SpecMismatchError, match="from another cache or other views of it"):
        pull(str(folder), back)


def test_parts_that_do_not_exist_are_refused(folder: Path, tmp_path: Path) -> None:
    one_view = make_cache(tmp_path / "one", views=("original",))
    with pytest.raises(ConfigError, match="shards: expected one or more of 0 to 2, got 3, 7"):
        pull(str(folder), tmp_path / "back", shards=[0, 3, 7])
    with pytest.raises(ConfigError, match="got none"):
        pull(str(folder), tmp_path / "back", shards=[])
    with pytest.raises(ConfigError, match="one or more of original, each once, got flipped"):
        pull(str(one_view.path), tmp_path / "back", views=["flipped"])
    with pytest.raises(ConfigError, match="original, flipped, each once, got flopped"):
        pull(str(folder), tmp_path / "back", views=["flopped"])  # type: ignore[list-item]
    assert not (tmp_path / "back").exists()


# --- folders with something else ------------------------------------------------------------------


def test_shards_of_two_caches_do_not_mix(
    cache: Cache, other: Cache, folder: Path, tmp_path: Path
) -> None:
    assert other.spec == cache.spec
    back = tmp_path / "back.gkd"
    pull(str(folder), back, shards=[0])
    for shards in ([1], None):
        with pytest.raises(SpecMismatchError, match=r"commits/000000\.json: .* from another cache"):
            pull(str(other.path), back, shards=shards)
    pull(str(folder), back, shards=[1])
    pull(str(folder), back)
    assert contents(back) == contents(cache.path)


def test_other_caches_are_left_alone(folder: Path, tmp_path: Path) -> None:
    settings = make_cache(tmp_path / "settings", max_group=10)
    with pytest.raises(SpecMismatchError, match=r"settings/zarr\.json: .* from another cache"):
        pull(str(folder), settings.path)
    teacher = make_cache(tmp_path / "teacher", seed=1)
    before = contents(teacher.path)
    with pytest.raises(SpecMismatchError, match=r"manifest\.json: .* from another cache"):
        pull(str(folder), teacher.path)
    assert contents(teacher.path) == before


def test_other_files_are_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.tex"):
        with pytest.raises(ConfigError, match=f"{path}: expected an empty or new folder"):
            pull(str(folder), path)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_a_folder_that_another_run_writes_is_refused(folder: Path, tmp_path: Path) -> None:
    # A process that lives, as this machine knows another run.
    script = (
        "import sys; from pathlib import Path; from gkd.storage.util.lock import WriteLock\n"
        "with WriteLock(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "back")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(
            ConfigError, match=f"another run is writing it: .*process {process.pid}"
        ):
            pull(str(folder), tmp_path / "back")
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    assert pull(str(folder), tmp_path / "back").whole
    with WriteLock(tmp_path / "back"):
        pass
