"""Caches on their way to real servers and back: S3 and FTP, lost, silent and killed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import (
    ConfigError,
    CorruptShardError,
    GkdError,
    IncompleteCacheError,
)
from gkd.storage.sharing import remote
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.push import push
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import WORKERS, RemoteCache, remote_stats
from tests.caches import contents, make_cache
from tests.s3 import S3Server, rclone, s3_server
from tests.tampering import flip_bit

ADDRESS = "s3://faces/team/cache.gkd"
NO_SHARD_FILES = 13 + WORKERS  # eleven zarr.json, a card, a claim; and on their way into place


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as server:
        yield server


def test_a_cache_goes_to_s3_and_back(cache: Cache, server: S3Server, tmp_path: Path) -> None:
    sent = push(cache.path, ADDRESS)
    assert sent.copied_files == sent.files
    assert contents(server.buckets / "faces/team/cache.gkd") == contents(cache.path)
    assert push(cache.path, f"{ADDRESS}/", read_back=True).copied_files == 0
    assert pull(ADDRESS, tmp_path / "back").id == cache.id
    assert contents(tmp_path / "back") == contents(cache.path)
    pull(ADDRESS, tmp_path / "part", shards=[1], views=["original"])
    assert committed_shards(tmp_path / "part") == [1]
    assert remote_stats(RemoteCache.open(Remote(ADDRESS))).id == cache.id


def test_a_cache_at_an_address_is_no_place_for_another(cache: Cache, server: S3Server) -> None:
    push(cache.path, ADDRESS)
    with pytest.raises(ConfigError, match=rf"original/x: inside the cache {ADDRESS}, which would"):
        push(cache.path, f"{ADDRESS}/original/x")
    assert not (server.buckets / "faces/team/cache.gkd/original/x").exists()
    push(cache.path, f"{ADDRESS}.second")


def test_read_back_finds_and_mends_what_the_size_does_not_tell(
    cache: Cache, server: S3Server, tmp_path: Path
) -> None:
    push(cache.path, ADDRESS)
    server.kill()
    flip_bit(server.buckets / "faces/team/cache.gkd/original/sizes/c/0/0", 40)
    server.start()
    assert push(cache.path, ADDRESS).copied_files == 0
    with pytest.raises(CorruptShardError, match=r"s3://.*/sizes/c/0/0: what came is not .*read-b"):
        pull(ADDRESS, tmp_path / "back")
    assert push(cache.path, ADDRESS, read_back=True).copied_files == 1
    pull(ADDRESS, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache.path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrongsecretkey123"), ("AWS_ACCESS_KEY_ID", "wrongaccesskey123")],
)
def test_a_wrong_key_is_explained(
    cache: Cache,
    server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    refused = rf"{ADDRESS}/\S+: access refused .*AWS_SECRET_ACCESS_KEY"
    with pytest.raises(ConfigError, match=refused):
        push(cache.path, ADDRESS)
    with pytest.raises(ConfigError, match=refused):
        pull(ADDRESS, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_keys_and_endpoint_are_options_too(
    cache: Cache, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(server.environment)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = {
        "key": given["AWS_ACCESS_KEY_ID"],
        "secret": given["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": server.endpoint,
    }
    assert push(cache.path, ADDRESS, options=options).whole


def test_a_vanished_bucket_is_explained(cache: Cache, server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3://voices/c\.gkd/\S+: not there .*bucket does not"):
        push(cache.path, "s3://voices/c.gkd")
    with pytest.raises(ConfigError, match=r"s3://voices/c\.gkd: expected a cache of targets, got"):
        pull("s3://voices/c.gkd", tmp_path / "back")


def test_a_cache_that_vanishes_midway_is_explained(
    cache: Cache, server: S3Server, tmp_path: Path
) -> None:
    push(cache.path, ADDRESS)
    source = RemoteCache.open(Remote(ADDRESS))
    server.kill()
    shutil.rmtree(server.buckets / "faces")
    server.start()
    with pytest.raises(CorruptShardError, match=r"commits/00000\d\.json: missing; ask the cache's"):
        source.commits()
    with pytest.raises(ConfigError, match=r"sizes/c/0/0: not there .*bucket does not exist"):
        source.remote.fetch("original/sizes/c/0/0", tmp_path / "x", 1, lambda amount: None)


def test_a_server_that_goes_silent_is_not_waited_for_long(
    cache: Cache, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(cache.path, ADDRESS)
    server.silence()
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_PATIENCE_SECONDS", 1.0)
        with pytest.raises(IncompleteCacheError, match="took the request and then went silent"):
            push(cache.path, f"{ADDRESS}2")
        with pytest.raises(IncompleteCacheError, match="took the request and then went silent"):
            pull(ADDRESS, tmp_path / "back")
    server.silence(end=True)
    assert pull(ADDRESS, tmp_path / "back").whole


def run(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "gkd.cli", "targets", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of twenty shards, so that there is a middle to be interrupted in."""
    path = tmp_path_factory.mktemp("made") / "many.gkd"
    return make_cache(path, num_samples=200, shard_samples=10)


def wait_for_files(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and sum(p.is_file() for p in folder.rglob("*")) < count:
        time.sleep(0.005)


def way_of(
    direction: str, cache: Cache, server: S3Server, back: Path
) -> tuple[tuple[object, ...], Path]:
    """Arguments of a push, or of a pull of what was pushed, and the folder that it fills."""
    if direction == "push":
        return ("push", cache.path, ADDRESS), server.buckets / "faces/team/cache.gkd"
    push(cache.path, ADDRESS)
    return ("pull", ADDRESS, back), back


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_three_kills_leave_the_same_bytes(
    many: Cache, server: S3Server, tmp_path: Path, direction: str
) -> None:
    rng = random.Random(0)
    back = tmp_path / "back.gkd"
    arguments, target = way_of(direction, many, server, back)
    # Of 180 files of shards; not near the end, so that the process is there when it is killed.
    marks = sorted(rng.sample(range(NO_SHARD_FILES, 130), 3))
    for mark in marks:
        process = run(*arguments)
        wait_for_files(target, mark, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if direction == "push":
            with pytest.raises(GkdError, match=r"push is not finished|nothing with a zarr\.json"):
                pull(ADDRESS, tmp_path / "half")
        else:
            with pytest.raises(IncompleteCacheError, match="0 of 20 shards are written"):
                Cache.open(back)
    process = run(*arguments, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert 0 < summary["copied_files"] <= summary["files"] - (marks[-1] - NO_SHARD_FILES)
    assert summary["id"] == many.id
    pull(ADDRESS, back)
    assert contents(back) == contents(many.path)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_server_that_dies_midway_is_one_message(
    many: Cache, server: S3Server, tmp_path: Path, direction: str
) -> None:
    back = tmp_path / "back.gkd"
    arguments, target = way_of(direction, many, server, back)
    process = run(*arguments)
    wait_for_files(target, 80, process)
    server.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    (message,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert f"{ADDRESS}/" in message
    assert "run the same command again to resume: what was copied stays" in message
    assert "Traceback" not in err
    assert not (target / layout.MANIFEST).exists()

    server.start()
    process = run(*arguments, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["copied_files"] < json.loads(out)["files"]
    pull(ADDRESS, back)
    assert contents(back) == contents(many.path)


def test_a_bucket_deleted_during_a_push_is_one_message_that_names_it(
    many: Cache, server: S3Server, tmp_path: Path
) -> None:
    process = run("push", many.path, ADDRESS)
    wait_for_files(server.buckets / "faces/team/cache.gkd", 80, process)
    owner = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    process.send_signal(signal.SIGSTOP)
    pause = 0.01
    while process.poll() is None and owner.exists("faces"):
        with suppress(OSError):
            owner.rm("faces", recursive=True)
        # The server keeps a bucket with a half-sent file: let it arrive, and try again.
        process.send_signal(signal.SIGCONT)
        time.sleep(pause)
        pause *= 2
        process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    (message,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert message.startswith(f"Error: {ADDRESS}: gone while the cache was sent, with its bucket")
    assert "Traceback" not in err


def test_an_interrupted_pull_says_how_to_go_on(
    many: Cache, server: S3Server, tmp_path: Path
) -> None:
    push(many.path, ADDRESS)
    process = run("pull", ADDRESS, tmp_path / "back")
    wait_for_files(tmp_path / "back", 80, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; run the same command again to resume" in err
    assert "Traceback" not in err
    assert pull(ADDRESS, tmp_path / "back").id == many.id


def test_a_server_with_folders_and_one_connection_a_thread(cache: Cache, tmp_path: Path) -> None:
    """FTP, as SFTP: folders are there only once they are made, and no two threads share a line."""
    (tmp_path / "there").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [rclone(), "serve", "ftp", str(tmp_path / "there"), "--addr", f"127.0.0.1:{port}"]
    serve += ["--user", "me", "--pass", "mine", "--vfs-cache-mode", "writes"]
    serve += ["--cache-dir", str(tmp_path / "cache"), "--config", "/dev/null"]
    options = ("--storage-option", "username=me", "--storage-option", f"port={port}")
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            while "Serving FTP" not in (line := server.stderr.readline()):
                assert line, "it ended"
            address = "ftp://127.0.0.1/team/c.gkd"
            for target in (cache.path, address), (address, tmp_path / "back"):
                words = ("push" if target[0] == cache.path else "pull", *target)
                right = run(*words, *options, "--storage-option", "password=mine")
                told = right.communicate(timeout=60)[1]
                assert right.returncode == 0, told
            wrong = run("info", address, *options, "--storage-option", "password=x")
            told = wrong.communicate(timeout=60)[1]
            assert wrong.returncode == 1
            assert told.startswith(f"Error: {address}: ")
        finally:
            server.kill()
    assert contents(tmp_path / "back") == contents(cache.path)


def test_the_server_is_gone_after_its_tests(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as server:
        assert server._process is not None
        pid = server._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
