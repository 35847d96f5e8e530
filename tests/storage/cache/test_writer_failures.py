"""Writers that race, are killed, find damage or a full disk: what they leave is whole shards."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards, read_commit
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.writer import CacheWriter, delete_leftovers
from gkd.storage.errors import ConfigError, GkdError, IncompleteCacheError
from tests.caches import contents, make_cache, make_spec, write_shard
from tests.paths import ROOT


@pytest.mark.parametrize("left", [b"", b'{"format": 1, "shard"', b"{}", b"\xff"])
def test_a_shard_whose_commit_record_is_damaged_is_written_again(
    tmp_path: Path, left: bytes
) -> None:
    cache = make_cache(tmp_path / "c")
    (cache.path / "commits" / "000001.json").write_bytes(left)
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == [1]
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards .* first is 1"):
        writer.finish()
    write_shard(writer, 1)
    assert writer.finish() == cache.id


@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_shard_whose_files_are_not_there_is_written_again(tmp_path: Path, damage: str) -> None:
    """Before the manifest vouches for them."""
    cache = make_cache(tmp_path / "c")
    (cache.path / "manifest.json").unlink()
    path = cache.path / "original/indices/c/1/0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    if damage == "gone":
        path.unlink()
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == [1]
    write_shard(writer, 1)
    assert writer.finish() == cache.id
    assert path.read_bytes() == content


def test_the_record_of_another_shard_is_no_commit(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    commits = cache.path / "commits"
    (commits / "000000.json").write_bytes((commits / "000001.json").read_bytes())
    assert CacheWriter(cache.path, cache.spec).pending() == [0]


def test_leftovers_of_a_shard_do_not_reach_its_bytes(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole")
    writer = CacheWriter(tmp_path / "c", whole.spec)
    write_shard(writer, 1, seed=5)
    (writer.path / layout.commit_file(1)).unlink()
    for array in layout.arrays(whole.spec, "flipped").values():
        leftover = writer.path / array.path / "c" / "0"
        leftover.mkdir(parents=True)
        (leftover / "0.partial").write_bytes(b"half")
    (writer.path / layout.samples_file(2)).write_bytes(b"half")
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()
    assert contents(writer.path) == contents(whole.path)


def write_as_rank(path: Path, spec: CacheSpec, rank: int, world_size: int) -> None:
    writer = CacheWriter(path, spec)
    for shard in writer.pending(rank, world_size):
        write_shard(writer, shard)


def test_ranks_that_race_to_create_write_one_cache(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole", num_samples=60, shard_samples=10)
    path = tmp_path / "c"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=write_as_rank, args=(path, whole.spec, rank, 3)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 3
    assert CacheWriter(path, whole.spec).finish() == whole.id
    assert contents(path) == contents(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]


def test_killed_and_gone_on_with_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole", num_samples=120, shard_samples=6)
    path = tmp_path / "c"
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.caches import make_spec, write_shard\n"
        "from gkd.storage.cache.writer import CacheWriter\n"
        "writer = CacheWriter(Path(sys.argv[1]), make_spec(num_samples=120, shard_samples=6))\n"
        "for shard in writer.pending(): write_shard(writer, shard)\n"
        "writer.finish()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    rng = np.random.default_rng(7)
    kills = 0
    while not (path / layout.MANIFEST).exists():
        done = len(list((path / "commits").glob("0*.json"))) if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
        goal = done + int(rng.integers(2, 7))
        while process.poll() is None:
            if kills < 3 and (path / layout.commit_file(min(goal, 18))).exists():
                time.sleep(float(rng.uniform(0, 0.02)))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 2
    # A file that the kill left on its way into place is no part of the cache.
    on_the_way = {name for name in contents(path) if Path(name).name.startswith(".")}
    left = {name: content for name, content in contents(path).items() if name not in on_the_way}
    assert left == contents(whole.path)
    assert Cache.open(path).id == whole.id


def test_what_killed_writers_left_beside_a_cache_is_deleted(tmp_path: Path) -> None:
    name = "0" * 32
    for left in (f".c.{name}", f".other.{name}", ".c.lock", ".c.notes"):
        (tmp_path / left / "samples").mkdir(parents=True)
    (tmp_path / f".c.{'1' * 32}").write_text("half")
    delete_leftovers(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", ".c.notes", f".other.{name}"]


def test_records_on_their_way_into_place_are_deleted(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole")
    writer = CacheWriter(tmp_path / "c", whole.spec)
    for place in (writer.path / layout.commit_file(1), writer.path / layout.MANIFEST):
        place.with_name(f".{place.name}.{'0' * 32}").write_text("half")
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()
    assert contents(writer.path) == contents(whole.path)


def test_a_guard_stops_the_writing_before_anything_and_before_the_commit(tmp_path: Path) -> None:
    calls = 0

    def guard() -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise GkdError("another is at work")

    writer = CacheWriter(tmp_path / "c", make_spec(), guard=guard)
    for written in (False, True):
        with pytest.raises(GkdError, match="another is at work"):
            write_shard(writer, 0)
        assert writer.pending() == [0, 1, 2]
        assert (writer.path / layout.samples_file(0)).exists() == written
    write_shard(writer, 0)
    assert writer.pending() == [1, 2]


def test_a_cache_that_is_moved_away_is_not_begun_anew_without_its_beginning(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    writer.path.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"/c: expected the cache that was begun here, found it"):
        write_shard(writer, 1)
    assert not writer.path.exists()
    (tmp_path / "moved").rename(writer.path)
    write_shard(writer, 1)
    assert writer.pending() == [2]


def fill_up(place: Path, limit: int | None) -> subprocess.CompletedProcess[str]:
    """Write a cache in a process of its own, whose files may have ``limit`` bytes."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from gkd.storage.errors import ConfigError\n"
        "from gkd.storage.cache.writer import CacheWriter\n"
        "from tests.caches import make_spec, write_shard\n"
        "spec = make_spec(num_samples=4000, num_classes=100, shard_samples=1000)\n"
        "writer = CacheWriter(Path(sys.argv[1]), spec)\n"
        "write_shard(writer, 0)\n"
        "limit = int(sys.argv[2])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    for shard in (1, 2, 3): write_shard(writer, shard)\n"
        "except ConfigError as error: print(error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(place), str(limit or 0)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
        capture_output=True,
        text=True,
    )


def require_whole_shards_only(path: Path, told: str) -> None:
    assert "free some space and run the same command again to resume" in told
    spec = make_spec(num_samples=4000, num_classes=100, shard_samples=1000)
    committed = committed_shards(path)
    assert 0 in committed
    assert len(committed) < 4
    found = {name for name in contents(path) if "/c/" in name or name.startswith("samples/")}
    assert found == {file for n in committed for file in read_commit(path, spec, n).files}


def test_a_limit_on_files_ends_in_one_message_and_leaves_whole_shards(tmp_path: Path) -> None:
    done = fill_up(tmp_path / "c", 4000)
    assert "File too large" in done.stdout
    require_whole_shards_only(tmp_path / "c", done.stdout)


def test_a_full_disk_ends_in_one_message_and_leaves_whole_shards(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        done = fill_up(disk / "c", None)
        assert "No space left on device" in done.stdout
        require_whole_shards_only(disk / "c", done.stdout)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=rf"cannot be written \({os.strerror(code)}\); choose a"):
        CacheWriter(tmp_path / "c", make_spec())


def test_other_errors_of_a_disk_pass_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        CacheWriter(tmp_path / "c", make_spec())
