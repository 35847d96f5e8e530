"""Caches on their way to a real S3 server and back: killed, resumed, and read back."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError, CorruptShardError, GkdError, IncompleteCacheError
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.push import push
from gkd.storage.sharing.transfer import WORKERS, TransferSummary
from tests.caches import contents, make_cache
from tests.processes import Process, run_command, running
from tests.s3 import Bucket, S3Server, new_bucket, s3_server
from tests.tampering import flip_bit

NO_SHARD_FILES = 13 + WORKERS  # eleven zarr.json, a card, a claim; and temporary files


def test_a_cache_goes_to_s3_and_back(cache: Cache, bucket: Bucket, tmp_path: Path) -> None:
    address = bucket.address
    sent = push(cache.path, address)
    assert sent.copied_files == sent.files
    assert contents(bucket.folder / "team/cache.gkd") == contents(cache.path)
    assert push(cache.path, f"{address}/", read_back=True).copied_files == 0
    assert pull(address, tmp_path / "back").id == cache.id
    assert contents(tmp_path / "back") == contents(cache.path)
    pull(address, tmp_path / "part", shards=[1], views=["original"])
    assert committed_shards(tmp_path / "part") == [1]

    with pytest.raises(ConfigError, match=rf"{address}/original/x: inside the cache {address}"):
        push(cache.path, f"{address}/original/x")
    assert not (bucket.folder / "team/cache.gkd/original/x").exists()
    push(cache.path, f"{address}.second")


def test_read_back_finds_and_repairs_damage_of_the_same_size(
    cache: Cache, bucket: Bucket, tmp_path: Path
) -> None:
    push(cache.path, bucket.address)
    bucket.server.kill()
    flip_bit(bucket.folder / "team/cache.gkd/original/sizes/c/0/0", 40)
    bucket.server.start()
    assert push(cache.path, bucket.address).copied_files == 0
    with pytest.raises(CorruptShardError, match=r"s3://.*/sizes/c/0/0: .*sha256.*--read-back"):
        pull(bucket.address, tmp_path / "back")
    assert push(cache.path, bucket.address, read_back=True).copied_files == 1
    pull(bucket.address, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache.path)


# --- interrupted ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of twelve shards, so that it can be interrupted midway."""
    path = tmp_path_factory.mktemp("made") / "many.gkd"
    return make_cache(path, num_samples=120, shard_samples=10)


@pytest.fixture(scope="module")
def pushed(many: Cache, s3: S3Server) -> Iterator[Bucket]:
    """A bucket that holds ``many``; read only."""
    with new_bucket(s3) as bucket:
        push(many.path, bucket.address)
        yield bucket


@dataclass
class Copy:
    """A push or pull of ``many`` as a command, the folder that it fills, and its resumption."""

    bucket: Bucket
    arguments: tuple[object, ...]
    target: Path
    resume: Callable[[], TransferSummary]


@pytest.fixture(params=["push", "pull"])
def copy(request: pytest.FixtureRequest, many: Cache, tmp_path: Path) -> Copy:
    bucket: Bucket
    arguments: tuple[object, ...]
    if request.param == "push":
        bucket = request.getfixturevalue("bucket")
        arguments = ("targets", "push", many.path, bucket.address)
        target = bucket.folder / "team/cache.gkd"
        return Copy(bucket, arguments, target, lambda: push(many.path, bucket.address))
    bucket = request.getfixturevalue("pushed")
    bucket.server.start()
    target = tmp_path / "target.gkd"
    arguments = ("targets", "pull", bucket.address, target)
    return Copy(bucket, arguments, target, lambda: pull(bucket.address, target))


def wait_for_files(folder: Path, count: int, process: Process) -> None:
    while process.poll() is None and sum(p.is_file() for p in folder.rglob("*")) < count:
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_kills_leave_the_same_bytes(many: Cache, copy: Copy, tmp_path: Path, kills: int) -> None:
    # Of 108 files of shards; not near the end, so that the process still runs when it is killed.
    counts = sorted(random.Random(0).sample(range(NO_SHARD_FILES, 60), kills))
    for count in counts:
        with running(run_command, *copy.arguments) as process:
            wait_for_files(copy.target, count, process)
            process.kill()
        assert process.poll() == -signal.SIGKILL
        if copy.target.is_relative_to(copy.bucket.folder):
            with pytest.raises(
                GkdError, match=r"push of this cache is not finished|got no zarr\.json"
            ):
                pull(copy.bucket.address, tmp_path / "half")
        else:
            with pytest.raises(IncompleteCacheError, match="0 of 12 shards"):
                Cache.open(copy.target)
    summary = copy.resume()
    assert 0 < summary.copied_files <= summary.files - (counts[-1] - NO_SHARD_FILES)
    assert summary.id == many.id
    pull(copy.bucket.address, tmp_path / "back.gkd")
    assert contents(tmp_path / "back.gkd") == contents(many.path)


def test_a_server_that_dies_midway_is_one_message(many: Cache, copy: Copy, tmp_path: Path) -> None:
    with running(run_command, *copy.arguments) as process:
        wait_for_files(copy.target, 50, process)
        copy.bucket.server.kill()
        assert process.wait(120) == 1
    assert "Traceback" not in process.err
    (message,) = [line for line in process.err.splitlines() if line.startswith("Error: ")]
    assert f"{copy.bucket.address}/" in message
    assert "run the same command again to resume" in message
    assert not (copy.target / layout.MANIFEST).exists()

    copy.bucket.server.start()
    resumed = copy.resume()
    assert resumed.copied_files < resumed.files
    pull(copy.bucket.address, tmp_path / "back.gkd")
    assert contents(tmp_path / "back.gkd") == contents(many.path)


def test_an_interrupted_pull_says_how_to_resume(
    many: Cache, pushed: Bucket, tmp_path: Path
) -> None:
    pushed.server.start()
    target = tmp_path / "target"
    with running(run_command, "targets", "pull", pushed.address, target) as process:
        wait_for_files(target, 50, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    assert "interrupted; run the same command again to resume" in process.err
    assert "Traceback" not in process.err
    assert pull(pushed.address, target).id == many.id


def test_the_server_is_gone_after_its_tests(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as server:
        assert server._process is not None
        pid = server._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
