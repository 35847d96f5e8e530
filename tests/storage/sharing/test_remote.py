"""Addresses, credentials and servers that do not work: one message with the address and cause."""

import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError, CorruptShardError, GkdError, IncompleteCacheError
from gkd.storage.sharing import remote
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.push import push
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import RemoteCache
from tests.caches import contents, make_cache
from tests.s3 import Bucket, rclone


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "an empty address: names no bucket or folder; give the path of"),
        ("/", "/: names no bucket or folder"),
        ("s3://", "s3://: names no bucket or folder"),
        ("file:///", "file:///: names no bucket or folder"),
        ("nowhere://faces", "nowhere://faces: Protocol not known: nowhere; give the path of"),
        ("s3://faces", "unexpected keyword argument 'secrett'; check .* --storage-option values"),
    ],
)
def test_a_wrong_address_is_refused(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pull(address, tmp_path / "back", options={"secrett": "x"})


def test_a_missing_backend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://faces/c\.gkd: .*gcsfs.* Python package"):
        pull("gs://faces/c.gkd", tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrongsecretkey123"), ("AWS_ACCESS_KEY_ID", "wrongaccesskey123")],
)
def test_wrong_credentials_are_named(
    cache: Cache,
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    Remote(bucket.address)._files.clear_instance_cache()
    refused = rf"{bucket.address}/\S+: access refused .*AWS_SECRET_ACCESS_KEY"
    with pytest.raises(ConfigError, match=refused):
        push(cache.path, bucket.address)
    with pytest.raises(ConfigError, match=refused):
        pull(bucket.address, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_missing_bucket_is_named(cache: Cache, bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3://voices/c\.gkd/\S+: .*bucket does not"):
        push(cache.path, "s3://voices/c.gkd")
    with pytest.raises(ConfigError, match=r"s3://voices/c\.gkd: expected a target cache, got no"):
        pull("s3://voices/c.gkd", tmp_path / "back")


def test_a_cache_that_vanishes_midway_is_named(
    cache: Cache, bucket: Bucket, tmp_path: Path
) -> None:
    push(cache.path, bucket.address)
    source = RemoteCache.open(Remote(bucket.address))
    bucket.server.kill()
    shutil.rmtree(bucket.folder)
    bucket.server.start()
    with pytest.raises(CorruptShardError, match=r"commits/00000\d\.json: missing; ask the cache's"):
        source.commits()
    with pytest.raises(ConfigError, match=r"sizes/c/0/0: .*bucket does not exist"):
        source.remote.fetch("original/sizes/c/0/0", tmp_path / "x", 1, lambda count: None)


def test_a_server_that_goes_silent_is_given_up(
    cache: Cache, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(cache.path, bucket.address)
    with bucket.server.silent(), monkeypatch.context() as patch:
        patch.setattr(remote, "_ANSWER_SECONDS", 0.2)
        with pytest.raises(IncompleteCacheError, match=f"{bucket.address}2/.*: no answer;"):
            push(cache.path, f"{bucket.address}2")
        with pytest.raises(IncompleteCacheError, match=f"{bucket.address}/.*: no answer;"):
            pull(bucket.address, tmp_path / "back")
    assert pull(bucket.address, tmp_path / "back").whole


def wait_for_port(port: int, server: "subprocess.Popen[bytes]") -> None:
    while True:
        assert server.poll() is None
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)


def test_a_server_with_folders_and_one_connection_a_thread(tmp_path: Path) -> None:
    """FTP, like SFTP: folders must be created, and threads cannot share a connection."""
    cache = make_cache(tmp_path / "cache.gkd", num_samples=10, views=("original",))
    (tmp_path / "there").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [rclone(), "serve", "ftp", str(tmp_path / "there"), "--addr", f"127.0.0.1:{port}"]
    serve += ["--user", "me", "--pass", "mine", "--vfs-cache-mode", "writes"]
    serve += ["--cache-dir", str(tmp_path / "cache"), "--config", "/dev/null"]
    address = "ftp://127.0.0.1/team/c.gkd"
    options: dict[str, object] = {"username": "me", "port": port, "password": "mine"}
    with subprocess.Popen(serve, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_port(port, server)
            assert push(cache.path, address, options=options).whole
            assert pull(address, tmp_path / "back", options=options).whole
            with pytest.raises(GkdError, match=f"^{address}: .*Incorrect password"):
                pull(address, tmp_path / "wrong", options=options | {"password": "x"})
        finally:
            server.kill()
    assert contents(tmp_path / "back") == contents(cache.path)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(GkdError) as error:
        Remote("ftp://alice:secret@127.0.0.1:9/x").names()
    assert "secret" not in str(error.value)
    assert "alice:***@" in str(error.value)
