"""Blocks of shards in memory give what the materialised cache gives."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.cache.verify import verify
from gkd.storage.errors import CorruptShardError
from gkd.storage.reading.mmap_store import materialise
from gkd.storage.reading.shard_store import ShardStore
from tests.caches import make_cache
from tests.tampering import FORGERIES, flip_bit, forge


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("made")
    return make_cache(folder / "c", skipped={41: "no image"}, draws=DrawsSpec(4, 4.0, "primary"))


@pytest.mark.parametrize("shards", [[0], [2, 0], [1, 2, 0]])
def test_a_block_gives_each_row_its_view(made: Cache, tmp_path: Path, shards: list[int]) -> None:
    store = materialise(made, folder=tmp_path)
    inside = np.concatenate([list(made.spec.shard_rows(shard)) for shard in shards])
    rng = np.random.default_rng(0)
    rows, flipped = rng.choice(inside, 80), rng.random(80) < 0.5
    block = pickle.loads(pickle.dumps(ShardStore(made))).load(shards)
    got, expected = block.lookup(rows, flipped), store.lookup(rows, flipped)
    np.testing.assert_array_equal(got.offsets, expected.offsets)
    for name, values in expected.arrays().items():
        np.testing.assert_array_equal(got.arrays()[name], values, err_msg=name)
        assert got.arrays()[name].dtype == values.dtype


def test_a_row_of_another_shard_is_refused(made: Cache) -> None:
    block = ShardStore(made).load([0, 2])
    with pytest.raises(IndexError, match="row 41 is in no shard of this block"):
        block.lookup(np.array([3, 41]), np.zeros(2, bool))


def test_a_view_that_was_not_cached_is_refused(tmp_path: Path) -> None:
    block = ShardStore(make_cache(tmp_path / "c", num_samples=10, views=("original",))).load([0])
    assert len(block.lookup(np.arange(10), np.zeros(10, bool))) == 10
    with pytest.raises(IndexError, match="row 3 is in no shard"):
        block.lookup(np.array([3]), np.ones(1, bool))


def test_damage_is_found_before_use(made: Cache, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "c"))
    flip_bit(path / "flipped/log2_probs/c/2/0", 99)
    store = ShardStore(Cache.open(path))
    store.load([0, 1])
    with pytest.raises(CorruptShardError, match="flipped/log2_probs/c/2/0: its sha256 is not"):
        store.load([1, 2])


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_lie_is_refused_before_use(made: Cache, tmp_path: Path, forgery: str) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "c"))
    forge(Cache.open(path), forgery, 1, "original")
    store = ShardStore(Cache.open(path))
    store.load([0, 2])
    with pytest.raises(CorruptShardError) as refused:
        store.load([2, 1])
    assert f"{refused.value.path}: {refused.value.problem}" in [
        f"{path}/{fault}" for fault in verify(path).faults
    ]
