"""Caches sent to folders and got from there: whole, in parts, and damaged on the way."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.analysis.stats import stats
from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DerivedSpec, DrawsSpec
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import (
    ConfigError,
    CorruptShardError,
    IncompleteCacheError,
    SpecMismatchError,
)
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.push import push
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import RemoteCache, remote_stats
from tests.caches import contents, make_cache, make_spec, write_shard
from tests.tampering import flip_bit


def test_a_cache_goes_to_a_folder_and_back(cache: Cache, tmp_path: Path) -> None:
    there, back = tmp_path / "there.gkd", tmp_path / "back.gkd"
    sent = push(cache.path, str(there))
    assert contents(there) == contents(cache.path)
    files = len(contents(cache.path)) - 1  # the manifest
    assert (sent.id, sent.whole, sent.files, sent.copied_files) == (cache.id, True, files, files)
    assert cache.manifest is not None
    assert sent.bytes == sent.copied_bytes == cache.manifest.bytes
    assert Cache.open(there).id == cache.id

    got = pull(f"file://{there}", back)
    assert contents(back) == contents(cache.path)
    assert got.id == cache.id
    assert verify(back).ok


def test_draws_travel_whole_and_by_view(tmp_path: Path) -> None:
    draws = DrawsSpec(5, 2.0, "primary")
    cache = make_cache(tmp_path / "c.gkd", draws=draws, max_group=50)
    push(cache.path, str(tmp_path / "there.gkd"))
    pull(str(tmp_path / "there.gkd"), tmp_path / "back.gkd")
    assert contents(tmp_path / "back.gkd") == contents(cache.path)
    pull(str(tmp_path / "there.gkd"), tmp_path / "one.gkd", views=["flipped"])
    one = Cache.open(tmp_path / "one.gkd")
    assert one.spec.draws == draws
    assert verify(one.path, level="deep").ok
    for name in ("draws", "draw_log2_probs", "draw_secondary"):
        got, expected = (each.read_shard(1, "flipped").arrays()[name] for each in (one, cache))
        np.testing.assert_array_equal(got, expected)


def test_what_stands_is_not_copied_again(cache: Cache, tmp_path: Path) -> None:
    there, back = tmp_path / "there.gkd", tmp_path / "back.gkd"
    push(cache.path, str(there))
    assert push(cache.path, str(there)).copied_files == 0
    (there / "samples/000001.parquet").unlink()
    again = push(cache.path, str(there))
    size = (cache.path / "samples/000001.parquet").stat().st_size
    assert (again.copied_files, again.copied_bytes) == (1, size)

    pull(str(there), back)
    assert pull(str(there), back).copied_files == 0


def test_a_pull_mends_a_damaged_copy(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    pull(str(folder), back)
    flip_bit(back / "original/sizes/c/0/0", 40)
    (back / "flipped/indices/c/2/0").unlink()
    flip_bit(back / "commits/000001.json", 300)
    flip_bit(back / layout.CARD, 3)
    flip_bit(back / "original/indices/zarr.json", 90)
    assert len(verify(back).faults) == 5
    assert pull(str(folder), back).copied_files == 5
    assert contents(back) == contents(cache.path)


@pytest.mark.parametrize(
    ("files", "place"),
    [(["manifest.json"], 2), ([layout.METADATA], 0), (["commits/000001.json", "manifest.json"], 0)],
)
def test_a_pull_mends_records_that_nobody_can_read(
    cache: Cache, folder: Path, tmp_path: Path, files: list[str], place: int
) -> None:
    back = tmp_path / "back.gkd"
    pull(str(folder), back)
    for file in files:
        flip_bit(back / file, 8 * place)
    assert pull(str(folder), back).copied_files == len(files)
    assert contents(back) == contents(cache.path)
    for record in (back / layout.MANIFEST, *(back / "commits").iterdir()):
        record.unlink()
    flip_bit(back / layout.METADATA, 0)
    with pytest.raises(SpecMismatchError, match=r"zarr\.json: of another cache, or damaged"):
        pull(str(folder), back)


def test_shards_of_two_caches_do_not_mix(cache: Cache, folder: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other.gkd", seed=1)
    assert other.spec == cache.spec
    back = tmp_path / "back.gkd"
    pull(str(folder), back, shards=[0])
    for shards in ([1], None):
        with pytest.raises(SpecMismatchError, match=r"commits/000000\.json: of another cache"):
            pull(str(other.path), back, shards=shards)
    pull(str(folder), back, shards=[1])
    pull(str(folder), back)
    assert contents(back) == contents(cache.path)


def test_a_copy_that_no_push_made_is_pushed_to(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    pull(str(folder), back)
    assert push(cache.path, str(back)).copied_files == 0
    (back / "original/sizes/c/0/0").unlink()
    assert push(cache.path, str(back)).copied_files == 1
    assert contents(back) == contents(cache.path)
    shutil.rmtree(back)
    pull(str(folder), back)
    (back / "original/sizes/c/0/0").unlink()
    flip_bit(folder / "original/sizes/c/0/0", 40)
    with pytest.raises(CorruptShardError, match=r"original/sizes/c/0/0: .* so it is not sent"):
        push(folder, str(back))


def test_a_damaged_file_is_not_sent(cache: Cache, folder: Path, tmp_path: Path) -> None:
    flip_bit(folder / "original/sizes/c/0/0", 40)
    with pytest.raises(CorruptShardError, match=r"original/sizes/c/0/0: .* so it is not sent"):
        push(folder, str(tmp_path / "there"))
    assert not (tmp_path / "there" / layout.MANIFEST).exists()
    with pytest.raises(IncompleteCacheError, match="whose push is not finished"):
        pull(str(tmp_path / "there"), tmp_path / "back")
    push(cache.path, str(tmp_path / "there"))
    assert contents(tmp_path / "there") == contents(cache.path)


@pytest.mark.parametrize("file", ["original/sizes/c/0/0", "samples/000002.parquet"])
def test_damage_on_the_way_is_found_on_arrival(folder: Path, tmp_path: Path, file: str) -> None:
    flip_bit(folder / file, 40)
    back = tmp_path / "back.gkd"
    with pytest.raises(CorruptShardError, match=rf"{file}: what came is not what its commit"):
        pull(str(folder), back)
    assert not (back / file).exists()
    with pytest.raises(IncompleteCacheError, match="`gkd targets pull` again"):
        Cache.open(back)


def test_a_longer_or_missing_file_is_found(folder: Path, tmp_path: Path) -> None:
    place = folder / "original/sizes/c/0/0"
    place.write_bytes(place.read_bytes() + b"more")
    with pytest.raises(CorruptShardError, match=r"original/sizes/c/0/0: what came is not"):
        pull(str(folder), tmp_path / "back")
    place.unlink()
    with pytest.raises(ConfigError, match=r"original/sizes/c/0/0: not there"):
        pull(str(folder), tmp_path / "back")


def test_an_unfinished_cache_is_not_sent(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    with pytest.raises(IncompleteCacheError, match="1 of 3 shards"):
        push(writer.path, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


# ------------------------------------------------------------------------ parts


def test_some_shards_are_an_unfinished_cache(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    got = pull(str(folder), back, shards=[2, 0])
    assert (got.whole, got.id) == (False, None)
    assert committed_shards(back) == [0, 2]
    with pytest.raises(IncompleteCacheError, match="2 of 3 shards are written"):
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


def test_one_view_is_a_cache_of_its_own(cache: Cache, folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gkd"
    got = pull(str(folder), back, views=["flipped"])
    assert verify(back).ok
    flipped = Cache.open(back)
    assert got.id == flipped.id != cache.id
    assert flipped.spec.views == ("flipped",)
    assert flipped.spec.derived == DerivedSpec("views", (cache.id,))
    for shard in range(3):
        for field in ("offsets", "indices", "log2_probs", "secondary"):
            np.testing.assert_array_equal(
                getattr(flipped.read_shard(shard, "flipped"), field),
                getattr(cache.read_shard(shard, "flipped"), field),
            )
    assert f"the flipped view of the cache {cache.id} alone" in (back / "README.md").read_text()
    assert not (back / "original").exists()

    # The same for everybody, and finished in parts too.
    pull(str(folder), tmp_path / "again", views=["flipped"], shards=[1])
    pull(str(folder), tmp_path / "again", views=["flipped"])
    assert contents(tmp_path / "again") == contents(back)
    with pytest.raises(SpecMismatchError, match="or other views of it"):
        pull(str(folder), back)


def test_parts_that_are_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    one_view = make_cache(tmp_path / "one", views=("original",))
    with pytest.raises(ConfigError, match="shards: expected some of 0 to 2, got 3, 7"):
        pull(str(folder), tmp_path / "back", shards=[0, 3, 7])
    with pytest.raises(ConfigError, match="got 3, 4, 5 and 95 more"):
        pull(str(folder), tmp_path / "back", shards=range(101))
    with pytest.raises(ConfigError, match="got none"):
        pull(str(folder), tmp_path / "back", shards=[])
    with pytest.raises(ConfigError, match="some of original, each once, got flipped"):
        pull(str(one_view.path), tmp_path / "back", views=["flipped"])
    with pytest.raises(ConfigError, match="original, flipped, each once, got flopped"):
        pull(str(folder), tmp_path / "back", views=["flopped"])  # type: ignore[list-item]
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "an empty address: names no bucket or folder; expected the path of"),
        ("/", "/: names no bucket or folder"),
        ("s3://", "s3://: names no bucket or folder"),
        ("file:///", "file:///: names no bucket or folder"),
        ("nowhere://faces", "nowhere://faces: Protocol not known: nowhere; expected the path of"),
        ("s3://faces", "unexpected keyword argument 'secrett'; give --storage-option only as"),
    ],
)
def test_a_wrong_address_is_explained(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pull(address, tmp_path / "back", options={"secrett": "x"})


def test_a_missing_backend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://faces/c\.gkd: .*gcsfs.*; addresses of this"):
        pull("gs://faces/c.gkd", tmp_path / "back")


def test_figures_need_no_array(cache: Cache, folder: Path) -> None:
    for shard in range(3):
        for view in cache.spec.views:
            for file in layout.view_files(cache.spec, shard, view, 1):
                (folder / file).unlink()
        (folder / layout.samples_file(shard)).unlink()
    told, measured = remote_stats(RemoteCache.open(Remote(str(folder)))), stats(cache)
    for field in ("id", "num_samples", "num_classes", "bytes", "bytes_per_sample"):
        assert getattr(told, field) == getattr(measured, field)
    for found, exact in zip(told.views, measured.views, strict=True):
        for each in dataclasses.fields(found):
            assert getattr(found, each.name) == getattr(exact, each.name), each.name
