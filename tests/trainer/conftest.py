"""The small data set, made once."""

from pathlib import Path

import pytest

from tests.trainer.faces import make


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with faces/, targets.gkd and pairs.bin."""
    folder = tmp_path_factory.mktemp("faces")
    make(folder)
    return folder
