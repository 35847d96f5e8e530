"""A small cache, made once, and copies of it."""

import shutil
from pathlib import Path

import pytest

from gkd.storage.cache.reader import Cache
from tests.caches import make_cache_with_card


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache_with_card(tmp_path_factory.mktemp("made") / "cache.gkd")


@pytest.fixture
def folder(cache: Cache, tmp_path: Path) -> Path:
    """A copy of the cache, as an address."""
    return Path(shutil.copytree(cache.path, tmp_path / "shared" / "cache.gkd"))
