"""Writers that race, are killed, or meet damage or a full disk leave only complete shards."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards, read_commit
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, GkdError, IncompleteCacheError
from tests.caches import contents, make_cache, make_spec, write_shard
from tests.processes import finished, running

LARGE = make_spec(num_samples=4000, num_classes=100, shard_samples=1000)


@pytest.mark.parametrize("left", [b"", b'{"format": 1, "shard"', b"{}", b"\xff"])
def test_a_shard_with_a_damaged_commit_record_is_written_again(tmp_path: Path, left: bytes) -> None:
    cache = make_cache(tmp_path / "c")
    (cache.path / "commits" / "000001.json").write_bytes(left)
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == [1]
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards .* first is 1"):
        writer.finish()
    write_shard(writer, 1)
    assert writer.finish() == cache.id


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_a_shard_with_damaged_files_is_written_again(tmp_path: Path, damage: str) -> None:
    """As long as there is no manifest."""
    cache = make_cache(tmp_path / "c")
    (cache.path / "manifest.json").unlink()
    path = cache.path / "original/indices/c/1/0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "truncated" else content + b"x")
    if damage == "missing":
        path.unlink()
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == [1]
    write_shard(writer, 1)
    assert writer.finish() == cache.id
    assert path.read_bytes() == content


def test_the_record_of_another_shard_does_not_count(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    commits = cache.path / "commits"
    (commits / "000000.json").write_bytes((commits / "000001.json").read_bytes())
    assert CacheWriter(cache.path, cache.spec).pending() == [0]


def test_leftovers_of_a_shard_do_not_change_its_bytes(tmp_path: Path) -> None:
    full = make_cache(tmp_path / "full")
    writer = CacheWriter(tmp_path / "c", full.spec)
    write_shard(writer, 1, seed=5)
    (writer.path / layout.commit_file(1)).unlink()
    for array in layout.arrays(full.spec, "flipped").values():
        leftover = writer.path / array.path / "c" / "0"
        leftover.mkdir(parents=True)
        (leftover / "0.partial").write_bytes(b"half")
    (writer.path / layout.samples_file(2)).write_bytes(b"half")
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()
    assert contents(writer.path) == contents(full.path)


def write_as_rank(path: Path, spec: CacheSpec, rank: int, world_size: int) -> None:
    writer = CacheWriter(path, spec)
    for shard in writer.pending(rank, world_size):
        write_shard(writer, shard)


def test_ranks_that_race_to_create_write_one_cache(tmp_path: Path) -> None:
    full = make_cache(tmp_path / "full", num_samples=60, shard_samples=10)
    path = tmp_path / "c"
    with ExitStack() as stack:
        finished(
            [
                stack.enter_context(running(write_as_rank, path, full.spec, rank, 3))
                for rank in range(3)
            ]
        )
    assert CacheWriter(path, full.spec).finish() == full.id
    assert contents(path) == contents(full.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "full"]


def write_cache(path: Path, spec: CacheSpec) -> None:
    write_as_rank(path, spec, 0, 1)
    CacheWriter(path, spec).finish()


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    full = make_cache(tmp_path / "full", num_samples=120, shard_samples=6)
    path = tmp_path / "c"
    rng = np.random.default_rng(7)
    kills = 0
    while not (path / layout.MANIFEST).exists():
        done = len(list((path / "commits").glob("0*.json"))) if path.exists() else 0
        goal = path / layout.commit_file(min(done + int(rng.integers(2, 7)), 18))
        with running(write_cache, path, full.spec) as process:
            while process.poll() is None:
                if kills < 3 and goal.exists():
                    time.sleep(float(rng.uniform(0, 0.02)))
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.001)
            assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 2
    # A temporary file that the kill left does not belong to the cache.
    found = contents(path)
    assert {n: c for n, c in found.items() if not Path(n).name.startswith(".")} == contents(
        full.path
    )
    assert Cache.open(path).id == full.id


def test_temporary_records_are_deleted(tmp_path: Path) -> None:
    full = make_cache(tmp_path / "full")
    writer = CacheWriter(tmp_path / "c", full.spec)
    for file in (writer.path / layout.commit_file(1), writer.path / layout.MANIFEST):
        file.with_name(f".{file.name}.{'0' * 32}").write_text("half")
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()
    assert contents(writer.path) == contents(full.path)


def test_a_guard_is_asked_before_a_shard_and_before_its_commit(tmp_path: Path) -> None:
    calls = 0

    def guard() -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise GkdError("another run")

    writer = CacheWriter(tmp_path / "c", make_spec(), guard=guard)
    for written in (False, True):
        with pytest.raises(GkdError, match="another run"):
            write_shard(writer, 0)
        assert writer.pending() == [0, 1, 2]
        assert (writer.path / layout.samples_file(0)).exists() == written
    write_shard(writer, 0)
    assert writer.pending() == [1, 2]


def test_a_cache_that_is_moved_away_is_not_created_again(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    writer.path.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"/c: expected the cache that was begun here, got no"):
        write_shard(writer, 1)
    assert not writer.path.exists()
    (tmp_path / "moved").rename(writer.path)
    write_shard(writer, 1)
    assert writer.pending() == [2]


def fill_up(path: Path, limit: int | None) -> None:
    """Write a cache in this process, after the first shard with files of ``limit`` bytes."""
    writer = CacheWriter(path, LARGE)
    write_shard(writer, 0)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        for shard in (1, 2, 3):
            write_shard(writer, shard)
    except ConfigError as error:
        print(error, flush=True)


def output_of_filling_up(path: Path, limit: int | None) -> str:
    with running(fill_up, path, limit) as process:
        return finished([process])[0]


def require_complete_shards_only(path: Path, output: str) -> None:
    assert "free some space and run the same command again" in output
    committed = committed_shards(path)
    assert 0 in committed
    assert len(committed) < 4
    found = {name for name in contents(path) if "/c/" in name or name.startswith("samples/")}
    assert found == {file for n in committed for file in read_commit(path, LARGE, n).files}


def test_a_limit_on_files_ends_in_one_message_and_leaves_complete_shards(tmp_path: Path) -> None:
    output = output_of_filling_up(tmp_path / "c", 4000)
    assert "File too large" in output
    require_complete_shards_only(tmp_path / "c", output)


def test_a_full_disk_ends_in_one_message_and_leaves_complete_shards(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        output = output_of_filling_up(disk / "c", None)
        assert "No space left on device" in output
        require_complete_shards_only(disk / "c", output)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ConfigError, match=rf"cannot be read or written \({os.strerror(code)}\); choose a"
    ):
        CacheWriter(tmp_path / "c", make_spec())


def test_other_errors_of_the_disk_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"Input/output error; .* is mounted and healthy"):
        CacheWriter(tmp_path / "c", make_spec())
