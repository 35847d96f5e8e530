import json
import os
import pickle
import shutil
import zlib
from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, DrawsSpec
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import (
    ConfigError,
    CorruptDataError,
    CorruptShardError,
    IncompleteCacheError,
)
from gkd.storage.reading.mmap_store import TargetStore, _allocate, default_folder, materialise
from tests.caches import make_cache, make_spec
from tests.processes import finished, running
from tests.tampering import FORGERIES, flip_bit, forge


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    draws = DrawsSpec(4, 4.0, "primary")
    folder = tmp_path_factory.mktemp("made")
    return make_cache(folder / "c", skipped={41: "no image"}, draws=draws)


@pytest.fixture(scope="module")
def store(made: Cache, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    return materialise(made, folder=tmp_path_factory.mktemp("stores"))


DENSE = ("secondary", "draws", "draw_log2_probs", "draw_secondary")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sample_by_sample(cache: Cache, rows: np.ndarray, flipped: np.ndarray) -> list[list[np.ndarray]]:
    """Each sample's own slices of the shard that holds it."""
    shards = {(s, v): cache.read_shard(s, v) for s in range(cache.spec.num_shards) for v in VIEWS}
    samples: list[list[np.ndarray]] = []
    for row, is_flipped in zip(rows, flipped, strict=True):
        shard, sample = divmod(int(row), cache.spec.shard_samples)
        targets = shards[shard, VIEWS[int(is_flipped)]]
        group = slice(targets.offsets[sample], targets.offsets[sample + 1])
        arrays = targets.arrays()
        packed: list[np.ndarray] = [targets.indices[group], targets.log2_probs[group]]
        samples.append(packed + [arrays[name][sample] for name in DENSE])
    return samples


def assert_equals(targets: SparseTargets, samples: list[list[np.ndarray]]) -> None:
    assert targets.offsets.tolist() == [0, *np.cumsum([len(s[0]) for s in samples]).tolist()]
    for number, field in enumerate(["indices", "log2_probs", *DENSE]):
        join = np.concatenate if number < 2 else np.stack
        expected, got = join([sample[number] for sample in samples]), targets.arrays()[field]
        np.testing.assert_array_equal(got, expected, err_msg=field)
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("slice_entries", [0, 256])
def test_lookup_gives_each_row_its_view(
    made: Cache, store: TargetStore, slice_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkd.storage.cache.targets._SLICED_GROUP", slice_entries)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 100, 60), [0, 99, 41, 41, 0]])
    flipped = np.concatenate([rng.random(60) < 0.5, [True, True, True, False, False]])
    targets = store.lookup(rows, flipped)
    assert_equals(targets, sample_by_sample(made, rows, flipped))
    assert targets.sizes[-3:-1].tolist() == [0, 0]


def test_a_store_knows_its_cache(made: Cache, store: TargetStore) -> None:
    assert store.cache_id == made.id
    assert store.spec == made.spec
    assert len(store) == 100


def test_an_empty_batch_is_an_empty_batch(store: TargetStore) -> None:
    targets = store.lookup(np.zeros(0, np.int64), np.zeros(0, bool))
    assert len(targets) == len(targets.indices) == 0
    assert targets.secondary.shape == (0, 3)


@pytest.mark.parametrize("rows", [[-1], [0, 100]])
def test_rows_out_of_range_are_refused(store: TargetStore, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="of a cache of 100 samples"):
        store.lookup(np.array(rows), np.zeros(len(rows), bool))


def test_a_store_is_found_again_by_the_id(made: Cache, tmp_path: Path) -> None:
    first = materialise(made, folder=tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in first.path.glob("*.npy")}
    second = materialise(made, folder=tmp_path)
    assert second.path == first.path == tmp_path / made.id / "original+flipped"
    assert {file: file.stat().st_mtime_ns for file in second.path.glob("*.npy")} == stamps


def test_a_single_view(made: Cache, tmp_path: Path) -> None:
    store = materialise(made, folder=tmp_path, views=["flipped"])
    rows = np.array([3, 88])
    assert_equals(
        store.lookup(rows, np.ones(2, bool)), sample_by_sample(made, rows, np.ones(2, bool))
    )
    with pytest.raises(ConfigError, match="targets of the flipped view only"):
        store.lookup(rows, np.array([True, False]))


def test_a_view_that_was_not_cached_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_samples=5, views=("original",))
    with pytest.raises(
        ConfigError, match="expected views original, flipped, got a cache of original"
    ):
        materialise(cache, folder=tmp_path / "stores", views=VIEWS)


def test_the_default_folder_is_the_users(
    made: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path / "chosen"))
    assert materialise(made).path.is_relative_to(tmp_path / "chosen" / made.id)
    monkeypatch.delenv("GKD_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert materialise(made).path.is_relative_to(tmp_path / "home/.cache/gkd" / made.id)


def test_damage_is_found_while_copying_and_nothing_is_left(made: Cache, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "c"))
    flip_bit(path / "flipped/secondary/c/1/0/0", 200)
    with pytest.raises(CorruptShardError, match="flipped/secondary/c/1/0/0: its sha256 is not"):
        materialise(Cache.open(path), folder=tmp_path / "stores")
    assert names(tmp_path / "stores" / made.id) == ["lock"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def overwrite(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, empty, lengthen, overwrite, Path.unlink])
@pytest.mark.parametrize("file", ["offsets.npy", "indices.npy", "draws.npy", "store.json"])
def test_a_damaged_store_is_made_again(
    made: Cache, store: TargetStore, tmp_path: Path, damage: Callable[[Path], None], file: str
) -> None:
    damaged = Path(shutil.copytree(store.path, tmp_path / made.id / store.path.name)) / file
    damage(damaged)
    if damage is not lengthen or file != "store.json":
        with pytest.raises(CorruptDataError, match=r"flipped: damaged .*; remove it"):
            TargetStore(damaged.parent)
    again = materialise(made, folder=tmp_path)
    assert names(tmp_path / made.id) == ["lock", "original+flipped"]
    for path in store.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes()
    rows, flipped = np.arange(100), np.zeros(100, bool)
    assert_equals(again.lookup(rows, flipped), sample_by_sample(made, rows, flipped))


def made_by_a_stranger(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change an array so that the store's own description agrees with it."""
    array = np.load(folder / name, mmap_mode="r+")
    change(array)
    array.flush()
    description = json.loads((folder / "store.json").read_text())
    description["checksums"][name] = zlib.crc32((folder / name).read_bytes())
    (folder / "store.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: flip_bit(folder / "draws.npy", 1500), "draws.npy is not what was written"),
        (lambda folder: flip_bit(folder / "log2_probs.npy", 1500), "log2_probs.npy is not what"),
        (
            lambda folder: made_by_a_stranger(
                folder, "indices.npy", lambda a: a.__setitem__(-1, 2_000_000_000)
            ),
            "class 2000000000 of",
        ),
        (
            lambda folder: made_by_a_stranger(
                folder, "offsets.npy", lambda a: a.__setitem__(7, a[8] + 1)
            ),
            "a group beyond",
        ),
        (
            lambda folder: made_by_a_stranger(
                folder, "offsets.npy", lambda a: a.__setitem__(-1, a[-1] - 1)
            ),
            "do not cover its entries",
        ),
    ],
)
def test_a_store_that_is_not_what_was_made_is_made_again_and_told(
    made: Cache,
    store: TargetStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    told: str,
) -> None:
    spoilt = Path(shutil.copytree(store.path, tmp_path / made.id / store.path.name))
    spoil(spoilt)
    again = materialise(made, folder=tmp_path)
    output = capsys.readouterr()
    assert told in " ".join((output.out + output.err).split())
    for path in store.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes()


def test_a_store_takes_its_room_before_it_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    _allocate(path)
    assert path.stat().st_blocks * 512 >= 1 << 20 == path.stat().st_size


def test_a_store_of_another_cache_under_this_name_is_made_again(
    made: Cache, tmp_path: Path
) -> None:
    other = materialise(make_cache(tmp_path / "c", seed=1), folder=tmp_path)
    shutil.copytree(other.path, tmp_path / made.id / other.path.name)
    assert materialise(made, folder=tmp_path).cache_id == made.id


def test_a_read_only_folder_is_reported(made: Cache) -> None:
    with pytest.raises(
        ConfigError, match=r"/sys/gkd.*: cannot be read or written .*; set GKD_CACHE_DIR"
    ):
        materialise(made, folder=Path("/sys/gkd"))


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_a_deep_verify_finds_is_refused(made: Cache, tmp_path: Path, forgery: str) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "c"))
    forge(Cache.open(path), forgery, 2, "flipped")
    assert verify(path, level="hashes").ok
    faults = verify(path).faults
    with pytest.raises(CorruptShardError) as refused:
        materialise(Cache.open(path), folder=tmp_path / "stores")
    assert f"{refused.value.path}: {refused.value.problem}" in [
        f"{path}/{fault}" for fault in faults
    ]
    assert names(tmp_path / "stores" / Cache.open(path).id) == ["lock"]


def test_a_full_disk_is_reported_before_anything_is_copied(
    made: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2000, 1000, 1000))
    with pytest.raises(ConfigError, match=r"MB of free space, got 0\.0 MB .* GKD_CACHE_DIR"):
        materialise(made, folder=tmp_path)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    with pytest.raises(IncompleteCacheError, match="0 of 3 shards"):
        materialise(Cache.open(writer.path, complete=False), folder=tmp_path)


def test_leftovers_of_a_killed_process_are_deleted(made: Cache, tmp_path: Path) -> None:
    leftover = tmp_path / made.id / f".original+flipped.{'0' * 32}"
    leftover.mkdir(parents=True)
    (leftover / "indices.npy").write_bytes(b"half")
    materialise(made, folder=tmp_path)
    assert names(tmp_path / made.id) == ["lock", "original+flipped"]


def lookup_in_process(path: Path, folder: Path) -> None:
    store = materialise(Cache.open(path), folder=folder)
    again: TargetStore = pickle.loads(pickle.dumps(store))
    targets = again.lookup(np.arange(100), np.arange(100) % 2 == 0)
    print(again.path, targets.indices.tolist(), float(targets.secondary.sum()))


def test_concurrent_processes_make_one_store(
    made: Cache, store: TargetStore, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(running(lookup_in_process, made.path, tmp_path)) for _ in range(3)
        ]
        found = finished(processes)
    expected = store.lookup(np.arange(100), np.arange(100) % 2 == 0)
    path, total = tmp_path / made.id / "original+flipped", float(expected.secondary.sum())
    assert found == [f"{path} {expected.indices.tolist()} {total}\n"] * 3


def test_a_store_of_another_user_is_read_where_nothing_can_be_written(
    made: Cache, tmp_path: Path
) -> None:
    first = materialise(made, folder=tmp_path)
    lock = tmp_path / made.id / "lock"
    lock.unlink()
    lock.mkdir()  # no process can take it, the superuser's neither
    assert materialise(made, folder=tmp_path).path == first.path
    first.path.joinpath("store.json").unlink()
    with pytest.raises(ConfigError, match=f"{lock}"):
        materialise(made, folder=tmp_path)


def test_a_user_without_a_home_folder_is_told_of_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GKD_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # without an entry in passwd
    with pytest.raises(ConfigError, match="no home folder; set GKD_CACHE_DIR to a folder"):
        default_folder()
