import os
import shutil
import signal
import time
from pathlib import Path

import filelock
import pytest

from gkd.storage.cache.reader import Cache
from gkd.storage.reading.gc import DAY, Collected, collect
from gkd.storage.reading.mmap_store import TargetStore, materialise
from tests.caches import make_cache
from tests.processes import running

# Names of a store that a killed process left, and of the digests of a data set.
INCOMPLETE = f".original.{'0123' * 8}"
DIGESTS_FILE = f"{'ab' * 32}.npz"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made") / "c")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def aged(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


@pytest.fixture
def used(made: Cache, tmp_path: Path) -> Path:
    """A folder with two stores, unused for 10 and for 1 days, an incomplete one and digests."""
    both = materialise(made, folder=tmp_path).path
    one = materialise(made, folder=tmp_path, views=["flipped"]).path
    aged(both / "store.json", 10)
    aged(one / "store.json", 1)
    incomplete = both.with_name(INCOMPLETE)
    incomplete.mkdir()
    (incomplete / "indices.npy").write_bytes(b"half")
    aged(incomplete, 3)
    (tmp_path / "digests").mkdir()
    (tmp_path / "digests" / DIGESTS_FILE).write_bytes(b"sixteen bytes...")
    aged(tmp_path / "digests" / DIGESTS_FILE, 8)
    (tmp_path / "notes.txt").write_text("not ours")
    return tmp_path


def states(found: list[Collected]) -> dict[str, tuple[bool, str]]:
    return {item.path.name: (item.removed, item.why) for item in found}


def test_unused_things_are_deleted(made: Cache, used: Path) -> None:
    found = collect(folder=used)
    assert states(found) == dict.fromkeys(
        ["original+flipped", "flipped", INCOMPLETE, DIGESTS_FILE], (True, "")
    )
    assert {item.path.name: round(item.days) for item in found}["original+flipped"] == 10
    assert {item.path.name: item.bytes for item in found}[DIGESTS_FILE] == 16
    assert names(used / made.id) == ["lock"]
    assert names(used) == sorted([made.id, "digests", "notes.txt"])
    assert len(materialise(made, folder=used)) == 100


def test_files_of_others_are_kept(made: Cache, used: Path) -> None:
    home = used / made.id
    foreign = [
        used / "project" / "lock",
        used / "project" / "src" / "main.py",
        used / "project" / "original" / "store.json",
        used / "digests" / "precious" / "a.npz",
        used / "digests" / ("cd" * 32 + ".npz") / "a.npz",
        used / "digests" / "notes.npz",
        used / "digests" / (DIGESTS_FILE + ".old"),
        home / "mine" / "store.json",
        home / "flipped+original" / "store.json",
        home / ".git" / "config",
        home / ".original.0123" / "a.npy",
        used / ("cd" * 32) / "original" / "photo.jpg",
    ]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    (home / f".flipped.{'0' * 32}").symlink_to(used / "project")
    (used / ("ef" * 32)).symlink_to(home)
    shutil.rmtree(home / "original+flipped")
    materialise(made, folder=used)  # deletes the leftovers of killed processes, and nothing else
    assert {item.path.name for item in collect(folder=used)} == {
        "original+flipped",
        "flipped",
        DIGESTS_FILE,
    }
    assert [file for file in foreign if not file.exists()] == []
    assert (home / f".flipped.{'0' * 32}").is_symlink()


def test_an_interrupted_removal_leaves_no_store(
    made: Cache, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        (path / "store.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(folder=used, older_than=9)
    assert "original+flipped" not in names(used / made.id)
    assert collect(folder=used)
    assert names(used / made.id) == ["lock"]


def test_recently_used_things_are_kept(made: Cache, used: Path) -> None:
    found = collect(folder=used, older_than=7)
    assert states(found) == {
        "original+flipped": (True, ""),
        "flipped": (False, "used within 7 days"),
        INCOMPLETE: (False, "used within 7 days"),
        DIGESTS_FILE: (True, ""),
    }
    assert names(used / made.id) == [INCOMPLETE, "flipped", "lock"]


def test_a_dry_run_removes_nothing(made: Cache, used: Path) -> None:
    assert all(item.removed for item in collect(folder=used, dry_run=True))
    assert names(used / made.id) == [INCOMPLETE, "flipped", "lock", "original+flipped"]


def test_finding_a_store_again_counts_as_use(made: Cache, used: Path) -> None:
    materialise(made, folder=used)
    assert not states(collect(folder=used, older_than=7))["original+flipped"][0]


def hold(path: Path) -> None:
    store = TargetStore(path)
    print(len(store), flush=True)
    signal.pause()


def test_a_store_that_another_process_has_open_is_kept(made: Cache, used: Path) -> None:
    path = used / made.id / "flipped"
    with running(hold, path) as process:
        while process.poll() is None and process.out != "100\n":
            time.sleep(0.01)
        assert states(collect(folder=used))["flipped"] == (False, "in use")
        assert path.exists()
    assert states(collect(folder=used))["flipped"] == (True, "")


def test_a_store_that_is_being_made_is_kept(made: Cache, used: Path) -> None:
    with filelock.FileLock(used / made.id / "lock"):
        found = states(collect(folder=used))
    assert found[INCOMPLETE] == (False, "in use")


def test_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert collect(folder=tmp_path / "none") == []


def test_dangling_links_end_nothing(used: Path, made: Cache) -> None:
    (used / made.id / INCOMPLETE / "link").symlink_to("nowhere")
    (used / "digests" / f"{'cd' * 32}.npz").symlink_to("nowhere")
    (used / made.id / "original").symlink_to("nowhere")
    assert states(collect(folder=used))[INCOMPLETE] == (True, "")
