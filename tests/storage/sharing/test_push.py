"""Caches sent to folders: complete, resumed, and refused if something else is there."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
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
from tests.caches import contents, make_cache, make_spec, write_shard
from tests.tampering import flip_bit


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of the same spec and sizes as ``cache``, with other bytes."""
    return make_cache(tmp_path_factory.mktemp("made") / "other.gkd", seed=1)


def test_a_cache_goes_to_a_folder_and_back(cache: Cache, tmp_path: Path) -> None:
    there, back = tmp_path / "there.gkd", tmp_path / "back.gkd"
    sent = push(cache.path, str(there))
    assert contents(there) == contents(cache.path)
    files = len(contents(cache.path)) - 1  # the manifest
    assert (sent.id, sent.whole, sent.files, sent.copied_files) == (cache.id, True, files, files)
    assert cache.manifest is not None
    assert sent.bytes == sent.copied_bytes == cache.manifest.bytes
    assert Cache.open(there).id == cache.id

    received = pull(f"file://{there}", back)
    assert contents(back) == contents(cache.path)
    assert received.id == cache.id
    assert verify(back).ok


def test_a_second_push_copies_only_what_is_missing(cache: Cache, tmp_path: Path) -> None:
    there = tmp_path / "there.gkd"
    push(cache.path, str(there))
    assert push(cache.path, str(there)).copied_files == 0
    (there / "samples/000001.parquet").unlink()
    again = push(cache.path, str(there))
    size = (cache.path / "samples/000001.parquet").stat().st_size
    assert (again.copied_files, again.copied_bytes) == (1, size)


def test_a_copy_that_no_push_made_can_be_pushed_to(cache: Cache, folder: Path) -> None:
    assert push(cache.path, str(folder)).copied_files == 0
    (folder / "original/sizes/c/0/0").unlink()
    assert push(cache.path, str(folder)).copied_files == 1
    assert contents(folder) == contents(cache.path)


def test_a_damaged_file_is_not_sent(cache: Cache, folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    flip_bit(folder / "original/sizes/c/0/0", 40)
    with pytest.raises(CorruptShardError, match=r"original/sizes/c/0/0: not sent"):
        push(folder, str(there))
    assert not (there / layout.MANIFEST).exists()
    with pytest.raises(IncompleteCacheError, match="push of this cache is not finished"):
        pull(str(there), tmp_path / "back")
    push(cache.path, str(there))
    assert contents(there) == contents(cache.path)


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


# --- addresses with something else ----------------------------------------------------------------


def test_an_address_with_another_cache_is_refused(
    cache: Cache, other: Cache, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    push(other.path, str(there))
    with pytest.raises(SpecMismatchError, match=f"{there}: .* got the cache {other.id};"):
        push(cache.path, str(there))
    assert contents(there) == contents(other.path)
    # An unfinished push: a mixture of both would pass for the second cache.
    (there / layout.MANIFEST).unlink()
    with pytest.raises(SpecMismatchError, match=f"{there}: .* got a push of the cache {other.id};"):
        push(cache.path, str(there))


def test_a_cache_being_written_is_refused(cache: Cache, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    before = contents(writer.path)
    with pytest.raises(SpecMismatchError, match="expected an empty folder or a push of the cache"):
        push(cache.path, str(writer.path))
    assert contents(writer.path) == before


@pytest.mark.parametrize("file", ["README.md", "zarr.json", "data/notes.txt"])
def test_a_folder_with_other_files_is_refused(cache: Cache, tmp_path: Path, file: str) -> None:
    there = tmp_path / "there"
    (there / file).parent.mkdir(parents=True)
    (there / file).write_text("{}")
    for address, name in ((there, file.partition("/")[0]), (there / file, Path(file).name)):
        with pytest.raises(SpecMismatchError) as refused:
            push(cache.path, str(address))
        assert str(refused.value) == (
            f"{address}: expected an empty folder or a push of the cache {cache.id}, got {name}; "
            "choose another address, or delete what is there"
        )
        assert contents(there) == {file: b"{}"}


def test_hidden_files_do_not_make_a_folder_full(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".DS_Store").write_bytes(b"of the system")
    assert push(cache.path, str(tmp_path / "there")).whole


def test_a_cache_cannot_go_inside_another(
    cache: Cache, other: Cache, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(other.path)
    for inside in (other.path / "inner", other.path / "samples/deep/inner", tmp_path / "link/in"):
        with pytest.raises(ConfigError, match=f"inside the cache {other.path}"):
            push(cache.path, str(inside))
        with pytest.raises(ConfigError, match=f"inside the cache {other.path}"):
            pull(str(folder), inside)
    assert verify(other.path).ok
    # Another Zarr store may contain caches.
    (tmp_path / "store").mkdir()
    (tmp_path / "store/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert pull(str(folder), tmp_path / "store/inner").whole


@pytest.mark.parametrize("folder", ["commits", "samples", "original/indices"])
@pytest.mark.parametrize("direction", ["push", "pull", "write"])
def test_no_writer_follows_a_link_out_of_its_folder(
    cache: Cache, other: Cache, tmp_path: Path, folder: str, direction: str
) -> None:
    out, before = tmp_path / "out.gkd", contents(other.path)
    (out / folder).parent.mkdir(parents=True)
    (out / folder).symlink_to(other.path / folder)
    if direction == "push":
        (out / ".cache-id").write_text(cache.id)
    else:
        shutil.copy(cache.path / layout.METADATA, out)
    writers: dict[str, Any] = {
        "push": lambda: push(cache.path, str(out)),
        "pull": lambda: pull(str(cache.path), out),
        "write": lambda: CacheWriter(out, cache.spec),
    }
    with pytest.raises((ConfigError, CorruptShardError), match=f"{folder}: .*(link to|a symbolic)"):
        writers[direction]()
    assert contents(other.path) == before


def test_a_killed_push_leaves_nothing_after_the_next(cache: Cache, tmp_path: Path) -> None:
    part = tmp_path / "there/samples" / f".000000.parquet.{'0' * 32}"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    (tmp_path / "there/.cache-id").write_text(cache.id)
    push(cache.path, str(tmp_path / "there"))
    assert not part.exists()
