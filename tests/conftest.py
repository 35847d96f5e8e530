"""Settings of the whole suite, and fixtures that several folders share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.processes import stop_server
from tests.s3 import S3Server, s3_server

# `make check` tries the same examples every time; `make nightly` tries many others.
settings.register_profile("check", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("check")

# The tests' processes share the cores already; torch.compile needs no pool of its own.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# torch.compile would take what it kept for one processor's kernels for another's.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    kept = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))


@pytest.fixture(scope="session", autouse=True)
def _processes_end() -> Iterator[None]:
    yield
    stop_server()


@pytest.fixture(scope="session")
def drawn_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of eight people, a verification set of six others, and a teacher; read only."""
    from tests.home import write_home  # tests of storage alone run without torch

    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def home(drawn_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``drawn_home`` that the tests of a module may add to."""
    return Path(shutil.copytree(drawn_home, tmp_path_factory.mktemp("home") / "home"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server without buckets; ``new_bucket`` makes one."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def materialised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the copies of targets."""
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path / "materialised"))
    return tmp_path / "materialised"
