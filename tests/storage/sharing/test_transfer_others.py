"""What stands already where a cache is sent or got: no push and no pull harms it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.sharing.pull import pull
from gkd.storage.sharing.push import push
from gkd.storage.util.lock import WriteLock
from tests.caches import contents, make_cache, make_spec, write_shard


def test_an_address_with_another_cache_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    push(other.path, str(tmp_path / "there"))
    with pytest.raises(SpecMismatchError, match=f"holds another cache, with id {other.id}"):
        push(cache.path, str(tmp_path / "there"))
    assert contents(tmp_path / "there") == contents(other.path)


def test_a_push_that_another_cache_began_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    """The same spec and sizes, other bytes: a mixture would pass for the second cache."""
    other = make_cache(tmp_path / "other", seed=1)
    push(other.path, str(tmp_path / "there"))
    (tmp_path / "there" / layout.MANIFEST).unlink()
    with pytest.raises(SpecMismatchError, match=f"one of the cache {other.id} begun there"):
        push(cache.path, str(tmp_path / "there"))


def test_a_cache_being_written_is_no_place_for_a_push(cache: Cache, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    before = contents(writer.path)
    with pytest.raises(SpecMismatchError, match=r"expected nothing, or what a push .* put there"):
        push(cache.path, str(writer.path))
    assert contents(writer.path) == before


@pytest.mark.parametrize("file", ["README.md", "zarr.json", "data/notes.txt"])
def test_a_folder_with_files_of_others_is_left_alone(
    cache: Cache, tmp_path: Path, file: str
) -> None:
    there = tmp_path / "there"
    (there / file).parent.mkdir(parents=True)
    (there / file).write_text("{}")
    with pytest.raises(SpecMismatchError) as refused:
        push(cache.path, str(there))
    assert str(refused.value) == (
        f"{there}: expected nothing, or what a push of this cache put there, got "
        f"{file.partition('/')[0]}; choose another address, or delete what is there"
    )
    assert contents(there) == {file: b"{}"}
    with pytest.raises(SpecMismatchError, match=f"{file.rpartition('/')[2]}: expected nothing"):
        push(cache.path, str(there / file))
    assert contents(there) == {file: b"{}"}


def test_an_empty_folder_is_a_place_for_a_push(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".DS_Store").write_bytes(b"nobody's data")
    assert push(cache.path, str(tmp_path / "there")).whole


def test_a_cache_is_no_place_for_another(cache: Cache, folder: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    (tmp_path / "link").symlink_to(other.path)
    for inside in (other.path / "inner", other.path / "samples/deep/inner", tmp_path / "link/in"):
        with pytest.raises(ConfigError, match=f"inside the cache {other.path}, which would not"):
            push(cache.path, str(inside))
        with pytest.raises(ConfigError, match=f"inside the cache {other.path}, which would not"):
            pull(str(folder), inside)
    assert verify(other.path).ok
    # A folder of another Zarr store is none of our business.
    (tmp_path / "store").mkdir()
    (tmp_path / "store/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert pull(str(folder), tmp_path / "store/inner").whole


def test_a_pull_leaves_other_caches_alone(folder: Path, tmp_path: Path) -> None:
    other_settings = make_cache(tmp_path / "settings", max_group=10)
    with pytest.raises(SpecMismatchError, match="holds another cache"):
        pull(str(folder), other_settings.path)
    other_teacher = make_cache(tmp_path / "teacher", seed=1)
    with pytest.raises(SpecMismatchError, match=r"manifest\.json: of another cache, or damaged"):
        pull(str(folder), other_teacher.path)
    (other_teacher.path / layout.MANIFEST).unlink()
    with pytest.raises(SpecMismatchError, match=r"commits/000000\.json: of another cache"):
        pull(str(folder), other_teacher.path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.tex"):
        with pytest.raises(ConfigError, match="expected a folder for the cache"):
            pull(str(folder), place)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_two_runs_do_not_write_one_folder(folder: Path, tmp_path: Path) -> None:
    # Another run as this machine knows one: a process that lives.
    script = (
        "import sys; from pathlib import Path; from gkd.storage.util.lock import WriteLock\n"
        "with WriteLock(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "back")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match=f"another run is writing it: process {other.pid}"):
            pull(str(folder), tmp_path / "back")
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    assert pull(str(folder), tmp_path / "back").whole
    with WriteLock(tmp_path / "back"):
        pass
