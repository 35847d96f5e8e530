"""Cached digests, and every change that invalidates them."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.records import digests as digests_module
from gkd.storage.records.base import Records
from gkd.storage.records.digests import cached_digests, digests
from gkd.storage.records.open import open_records
from gkd.storage.records.write_pack import pack
from tests.storage.records.packs import jpeg, write_folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``faces`` and a pack ``pack`` of the same images."""
    folder = tmp_path_factory.mktemp("drawn")
    files = {f"{row // 3}/{row % 3}.jpg": jpeg(row) for row in range(9)}
    write_folder(folder / "faces", files)
    pack(folder / "faces", folder / "pack", sort="natural", workers=1)
    return folder


@pytest.fixture(params=["faces", "pack"])
def home(
    request: pytest.FixtureRequest, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Records whose digests are cached, unchanged for a while."""
    monkeypatch.setattr(digests_module, "MIN_CACHED_BYTES", 1)
    home = Path(shutil.copytree(drawn / request.param, tmp_path / "records"))
    for path in home.rglob("*"):
        settle(path)
    return home


def settle(path: Path, seconds: float = 100.0) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def load_digests(home: Path, folder: Path) -> np.ndarray:
    return cached_digests(open_records(home), folder, workers=1)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time images are hashed."""
    calls: list[int] = []

    def count(records: Records, *, workers: int) -> np.ndarray:
        calls.append(len(records))
        return digests(records, workers=workers)

    monkeypatch.setattr(digests_module, "digests", count)
    return calls


def test_a_second_call_hashes_nothing(home: Path, tmp_path: Path, hashed: list[int]) -> None:
    first = load_digests(home, tmp_path / "digests")
    np.testing.assert_array_equal(first, digests(open_records(home), workers=1))
    second = load_digests(home, tmp_path / "digests")
    np.testing.assert_array_equal(first, second)
    assert hashed == [9]


def change_content(home: Path) -> None:
    """Other bytes of the same length."""
    path = next(path for path in sorted(home.rglob("*")) if path.suffix in (".jpg", ".rec"))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    settle(path, 50)


def swap_names(home: Path) -> None:
    """Two images change names; in a pack, two lines of the index change places."""
    if (home / "train.idx").exists():
        lines = (home / "train.idx").read_text().splitlines()
        offsets = [line.split("\t")[1] for line in lines]
        offsets[1], offsets[2] = offsets[2], offsets[1]
        keys = [line.split("\t")[0] for line in lines]
        text = "".join(f"{k}\t{o}\n" for k, o in zip(keys, offsets, strict=True))
        (home / "train.idx").write_text(text)
        settle(home / "train.idx", 50)
    else:
        one, other = sorted(home.rglob("*.jpg"))[:2]
        swapped = one.rename(home / "swapped")
        other.rename(one)
        swapped.rename(other)


@pytest.mark.parametrize("change", [change_content, swap_names])
def test_a_change_is_noticed(
    home: Path, tmp_path: Path, hashed: list[int], change: Callable[[Path], None]
) -> None:
    load_digests(home, tmp_path / "digests")
    change(home)
    found = load_digests(home, tmp_path / "digests")
    np.testing.assert_array_equal(found, digests(open_records(home), workers=1))
    assert len(hashed) == 2


def test_digests_of_files_changed_just_now_are_not_cached(
    home: Path, tmp_path: Path, hashed: list[int]
) -> None:
    for path in home.rglob("*"):
        settle(path, 0)
    load_digests(home, tmp_path / "digests")
    assert not list((tmp_path / "digests").glob("*.npz"))


@pytest.mark.parametrize("spoil", [b"", b"PK\x03\x04 no archive"])
def test_a_damaged_cache_file_is_replaced(
    home: Path, tmp_path: Path, hashed: list[int], spoil: bytes
) -> None:
    first = load_digests(home, tmp_path / "digests")
    (file,) = (tmp_path / "digests").glob("*.npz")
    file.write_bytes(spoil)
    np.testing.assert_array_equal(load_digests(home, tmp_path / "digests"), first)
    np.testing.assert_array_equal(load_digests(home, tmp_path / "digests"), first)
    assert len(hashed) == 2


def test_a_flipped_bit_is_noticed(home: Path, tmp_path: Path, hashed: list[int]) -> None:
    first = load_digests(home, tmp_path / "digests")
    (file,) = (tmp_path / "digests").glob("*.npz")
    content = file.read_bytes()
    position = content.index(first[4].tobytes())
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    np.testing.assert_array_equal(load_digests(home, tmp_path / "digests"), first)
    assert len(hashed) == 2


def test_digests_of_a_small_data_set_are_not_cached(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "MIN_CACHED_BYTES", 1 << 28)
    load_digests(home, tmp_path / "digests")
    assert not list((tmp_path / "digests").glob("*.npz"))


def test_one_of_several_concurrent_calls_reads_the_images(
    home: Path, tmp_path: Path, hashed: list[int]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_digests(home, tmp_path / "digests"), range(4)))
    assert len(hashed) == 1
    for result in found:
        np.testing.assert_array_equal(result, found[0])
