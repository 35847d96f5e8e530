"""What the tests of commands start from."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of eight people, a verification set of six others, and a teacher."""
    from tests.home import write_home  # tests of storage alone run without torch

    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def materialised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the copies of targets."""
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path / "materialised"))
    return tmp_path / "materialised"
