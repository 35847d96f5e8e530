"""The small data set and a run on it, made once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.trainer.faces import make, run


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with faces/, targets.gkd and pairs.bin."""
    folder = tmp_path_factory.mktemp("faces")
    make(folder)
    return folder


@contextmanager
def on_one_thread() -> Iterator[None]:
    """As the runs in processes of their own, which must agree to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with on_one_thread():
        yield


@pytest.fixture(scope="session")
def unbroken(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 15 steps from start to end."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    with on_one_thread():
        run(faces, out, f'evaluation.sets=["{faces}/pairs.bin"]')
    return out
