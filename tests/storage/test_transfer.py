"""Caches sent to folders and got from there, whatever happens."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gkd.storage import layout
from gkd.storage.cache import Cache
from gkd.storage.errors import (
    ConfigError,
    CorruptShardError,
    GkdError,
    IncompleteCacheError,
    SpecMismatchError,
)
from gkd.storage.lock import WriteLock
from gkd.storage.metadata import committed_shards
from gkd.storage.pull import pull
from gkd.storage.push import push
from gkd.storage.remote import Remote
from gkd.storage.remote_cache import RemoteCache, remote_stats
from gkd.storage.spec import DerivedSpec, DrawsSpec
from gkd.storage.stats import stats
from gkd.storage.verify import verify
from gkd.storage.writer import CacheWriter
from tests.caches import contents, make_cache, make_cache_with_card, make_spec, write_shard
from tests.tampering import edit_json, flip_bit, rehash


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache_with_card(tmp_path_factory.mktemp("made") / "cache.gkd")


@pytest.fixture
def folder(cache: Cache, tmp_path: Path) -> Path:
    """A copy of the cache, as an address."""
    return Path(shutil.copytree(cache.path, tmp_path / "shared" / "cache.gkd"))


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
        got = getattr(one.read_shard(1, "flipped"), name)
        np.testing.assert_array_equal(got, getattr(cache.read_shard(1, "flipped"), name))


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


def test_a_manifest_cannot_name_files_to_send(cache: Cache, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    manifest = msgspec.json.decode((folder / layout.MANIFEST).read_bytes(), type=layout.Manifest)
    files = manifest.files | {"../../secret": layout.file_record(secret)}
    commits = [
        (cache.commit(k), layout.file_record(folder / layout.commit_file(k))) for k in range(3)
    ]
    (folder / layout.MANIFEST).write_bytes(layout.manifest_content(cache.spec, files, commits))
    push(folder, str(tmp_path / "other" / "there" / "cache.gkd"))
    assert not list((tmp_path / "other").rglob("secret"))


def test_an_unfinished_cache_is_not_sent(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    with pytest.raises(IncompleteCacheError, match="1 of 3 shards"):
        push(writer.path, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


# ------------------------------------------------------------------------ other caches


def test_an_address_with_another_cache_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    push(other.path, str(tmp_path / "there"))
    with pytest.raises(SpecMismatchError, match=f"holds another cache, with id {other.id}"):
        push(cache.path, str(tmp_path / "there"))
    assert contents(tmp_path / "there") == contents(other.path)


def test_a_push_that_another_cache_began_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    """The same spec and sizes, other bytes: a mixture would pass for the second cache."""
    other = make_cache(tmp_path / "other", seed=1)
    push(other.path, str(tmp_path / "there"))
    (tmp_path / "there" / layout.MANIFEST).unlink()
    with pytest.raises(SpecMismatchError, match=f"one of the cache {other.id} begun there"):
        push(cache.path, str(tmp_path / "there"))


def test_a_cache_being_written_is_no_place_for_a_push(cache: Cache, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    before = contents(writer.path)
    with pytest.raises(SpecMismatchError, match=r"expected nothing, or what a push .* put there"):
        push(cache.path, str(writer.path))
    assert contents(writer.path) == before


@pytest.mark.parametrize("file", ["README.md", "zarr.json", "data/notes.txt"])
def test_a_folder_with_files_of_others_is_left_alone(
    cache: Cache, tmp_path: Path, file: str
) -> None:
    there = tmp_path / "there"
    (there / file).parent.mkdir(parents=True)
    (there / file).write_text("{}")
    with pytest.raises(SpecMismatchError) as refused:
        push(cache.path, str(there))
    assert str(refused.value) == (
        f"{there}: expected nothing, or what a push of this cache put there, got "
        f"{file.partition('/')[0]}; choose another address, or delete what is there"
    )
    assert contents(there) == {file: b"{}"}
    with pytest.raises(SpecMismatchError, match=f"{file.rpartition('/')[2]}: expected nothing"):
        push(cache.path, str(there / file))
    assert contents(there) == {file: b"{}"}


def test_an_empty_folder_is_a_place_for_a_push(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".DS_Store").write_bytes(b"nobody's data")
    assert push(cache.path, str(tmp_path / "there")).whole


def test_a_cache_is_no_place_for_another(cache: Cache, folder: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    (tmp_path / "link").symlink_to(other.path)
    for inside in (other.path / "inner", other.path / "samples/deep/inner", tmp_path / "link/in"):
        with pytest.raises(ConfigError, match=f"inside the cache {other.path}, which would not"):
            push(cache.path, str(inside))
        with pytest.raises(ConfigError, match=f"inside the cache {other.path}, which would not"):
            pull(str(folder), inside)
    assert verify(other.path).ok
    # A folder of another Zarr store is none of our business.
    (tmp_path / "store").mkdir()
    (tmp_path / "store/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert pull(str(folder), tmp_path / "store/inner").whole


def test_a_pull_leaves_other_caches_alone(folder: Path, tmp_path: Path) -> None:
    other_settings = make_cache(tmp_path / "settings", max_group=10)
    with pytest.raises(SpecMismatchError, match="holds another cache"):
        pull(str(folder), other_settings.path)
    other_teacher = make_cache(tmp_path / "teacher", seed=1)
    with pytest.raises(SpecMismatchError, match=r"manifest\.json: of another cache, or damaged"):
        pull(str(folder), other_teacher.path)
    (other_teacher.path / layout.MANIFEST).unlink()
    with pytest.raises(SpecMismatchError, match=r"commits/000000\.json: of another cache"):
        pull(str(folder), other_teacher.path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.tex"):
        with pytest.raises(ConfigError, match="expected a folder for the cache"):
            pull(str(folder), place)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_two_runs_do_not_write_one_folder(folder: Path, tmp_path: Path) -> None:
    # Another run as this machine knows one: a process that lives.
    script = (
        "import sys; from pathlib import Path; from gkd.storage.lock import WriteLock\n"
        "with WriteLock(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "back")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match=f"another run is writing it: .*process {other.pid}"):
            pull(str(folder), tmp_path / "back")
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    assert pull(str(folder), tmp_path / "back").whole
    with WriteLock(tmp_path / "back"):
        pass


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


# ------------------------------------------------------------------------ hostile addresses


def lie_about_the_codec(path: Path) -> None:
    edit_json(path / "original/indices/zarr.json", lambda m: m["codecs"].append({"name": "pickle"}))
    rehash(path)


def lie_about_the_shards(path: Path) -> None:
    edit_json(path / layout.MANIFEST, lambda m: m["shards"].pop())


def leave_the_folder(path: Path) -> None:
    commit = path / "commits/000001.json"
    text = commit.read_text().replace("samples/000001.parquet", "../../000001.parquet")
    commit.write_text(text)


def have_another_spec(path: Path) -> None:
    edit_json(path / "zarr.json", lambda m: m["attributes"].update(max_group=0))


def be_of_the_future(path: Path) -> None:
    edit_json(path / "zarr.json", lambda m: m["attributes"].update(format=2))


def be_no_cache(path: Path) -> None:
    (path / "zarr.json").write_text("[" * 100_000)


def be_huge(path: Path) -> None:
    (path / "zarr.json").write_bytes(bytes(2_000_000))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lie_about_the_codec, r"manifest\.json: original/indices/zarr\.json is not what the spec"),
        (lie_about_the_shards, r"manifest\.json: its sha256 is not the one that it names"),
        (leave_the_folder, r"commits/000001\.json: its sha256 is not the one in manifest"),
        (have_another_spec, r"zarr\.json: its spec cannot be: .*max_group: expected 1 to 65535"),
        (be_of_the_future, r"expected a cache of format 1, got 2; update gkd"),
        (be_no_cache, r"zarr\.json: no such JSON"),
        (be_huge, r"zarr\.json: expected at most 1,048,576 bytes, got 2,000,000"),
    ],
)
def test_a_lying_cache_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, lie: Callable[[Path], None], message: str
) -> None:
    lie(folder)
    with pytest.raises(GkdError, match=message):
        pull(str(folder), tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]


def test_a_commit_record_cannot_name_files(folder: Path, tmp_path: Path) -> None:
    """Even where all hashes fit: names come from the spec, never from the address."""
    leave_the_folder(folder)
    record = layout.file_record(folder / "commits/000001.json")
    manifest = msgspec.json.decode((folder / layout.MANIFEST).read_bytes(), type=layout.Manifest)
    commits = []
    for shard, entry in enumerate(manifest.shards):
        place = folder / layout.commit_file(shard)
        commit = msgspec.json.decode(place.read_bytes(), type=layout.Commit)
        found = record if shard == 1 else layout.FileRecord(place.stat().st_size, entry.commit)
        commits.append((commit, found))
    spec = RemoteCache.open(Remote(str(folder))).spec
    (folder / layout.MANIFEST).write_bytes(layout.manifest_content(spec, manifest.files, commits))
    with pytest.raises(CorruptShardError, match=r"000001\.json: its list of files is not that of"):
        pull(str(folder), tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]


def test_a_link_in_the_target_is_not_written_through(
    cache: Cache, folder: Path, tmp_path: Path
) -> None:
    pull(str(folder), tmp_path / "back")
    place = tmp_path / "back" / "original/sizes/c/0/0"
    outside = tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    pull(str(folder), tmp_path / "back")
    assert not place.is_symlink()
    assert contents(tmp_path / "back") == contents(cache.path)


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
