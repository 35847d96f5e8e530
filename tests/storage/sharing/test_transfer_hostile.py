"""Addresses that lie: no file but a cache's own is read, sent or written."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import CorruptShardError, GkdError
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.push import push
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import RemoteCache
from tests.caches import contents
from tests.tampering import edit_json, rehash


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
