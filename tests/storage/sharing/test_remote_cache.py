"""Caches at an address: sizes without arrays, and hostile metadata that names other files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from gkd.storage.analysis.stats import sizes, stats
from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import CorruptShardError, GkdError
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import RemoteCache
from tests.tampering import edit_json, rehash


def test_sizes_need_no_array(cache: Cache, folder: Path) -> None:
    for shard in range(3):
        for view in cache.spec.views:
            for file in layout.view_files(cache.spec, shard, view, 1):
                (folder / file).unlink()
        (folder / layout.samples_file(shard)).unlink()
    remote, expected = RemoteCache.open(Remote(str(folder))), stats(cache)
    found = sizes(remote.id, remote.spec, remote.manifest, remote.commits().values())
    for field in ("id", "num_samples", "num_classes", "bytes", "bytes_per_sample"):
        assert getattr(found, field) == getattr(expected, field)
    for view_sizes, view_stats in zip(found.views, expected.views, strict=True):
        for each in dataclasses.fields(view_sizes):
            assert getattr(view_sizes, each.name) == getattr(view_stats, each.name), each.name


def add_a_codec(path: Path) -> None:
    edit_json(path / "original/indices/zarr.json", lambda m: m["codecs"].append({"name": "pickle"}))
    rehash(path)


def drop_a_shard(path: Path) -> None:
    edit_json(path / layout.MANIFEST, lambda m: m["shards"].pop())


def leave_the_folder(path: Path) -> None:
    commit = path / "commits/000001.json"
    text = commit.read_text().replace("samples/000001.parquet", "../../000001.parquet")
    commit.write_text(text)


def change_the_spec(path: Path) -> None:
    edit_json(path / "zarr.json", lambda m: m["attributes"].update(max_group=0))


def change_the_format(path: Path) -> None:
    edit_json(path / "zarr.json", lambda m: m["attributes"].update(format=2))


def nest_deeply(path: Path) -> None:
    (path / "zarr.json").write_text("[" * 100_000)


def be_huge(path: Path) -> None:
    (path / "zarr.json").write_bytes(bytes(2_000_000))


@pytest.mark.parametrize(
    ("tamper", "file", "facts"),
    [
        (add_a_codec, "manifest.json", "original/indices/zarr.json"),
        (drop_a_shard, "manifest.json", "sha256"),
        (leave_the_folder, "commits/000001.json", "sha256"),
        (change_the_spec, "zarr.json", "max_group"),
        (change_the_format, "", "expected a cache of format 1, got 2"),
        (nest_deeply, "zarr.json", "JSON"),
        (be_huge, "zarr.json", "expected at most 1,048,576 bytes, got 2,000,000"),
    ],
)
def test_hostile_metadata_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, tamper: Callable[[Path], None], file: str, facts: str
) -> None:
    tamper(folder)
    with pytest.raises(GkdError) as refused:
        pull(str(folder), tmp_path / "back")
    assert str(refused.value).startswith(str(folder / file))
    assert facts in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_commit_record_cannot_name_files(folder: Path, tmp_path: Path) -> None:
    """Even if all hashes are right: names come from the spec, never from the address."""
    leave_the_folder(folder)
    manifest = msgspec.json.decode((folder / layout.MANIFEST).read_bytes(), type=layout.Manifest)
    commits = []
    for shard in range(3):
        path = folder / layout.commit_file(shard)
        commit = msgspec.json.decode(path.read_bytes(), type=layout.Commit)
        commits.append((commit, layout.file_record(path)))
    spec = RemoteCache.open(Remote(str(folder))).spec
    (folder / layout.MANIFEST).write_bytes(layout.manifest_content(spec, manifest.files, commits))
    with pytest.raises(CorruptShardError, match=r"commits/000001\.json: its list of files"):
        pull(str(folder), tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
