import errno
import os
from pathlib import Path

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.util.files import (
    delete_temporaries,
    disk_errors,
    make_below,
    publish_dir,
    publish_file,
    remove_dir,
    require_room,
    temporary_path,
    write_file,
)


def test_a_file_appears_when_its_block_ends_and_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with publish_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "made") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"content")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "inner" / "file").read_bytes() == b"content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("publish", [publish_file, publish_dir])
def test_a_failed_block_leaves_nothing(tmp_path: Path, publish: object) -> None:
    def fail() -> None:
        with publish(tmp_path / "target") as temporary:  # type: ignore[operator]
            (temporary / "x" if temporary.is_dir() else temporary).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_published_onto_another(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "first").touch()
    with pytest.raises(OSError, match="not empty"), publish_dir(tmp_path / "target") as temporary:
        (temporary / "second").touch()
    assert [entry.name for entry in tmp_path.rglob("*")] == ["target", "first"]


def test_temporaries_of_one_name_or_of_all_are_deleted(tmp_path: Path) -> None:
    for name in ("a", "a", "b"):
        temporary_path(tmp_path / name).mkdir()
    (tmp_path / ".a.0").touch()
    delete_temporaries(tmp_path, "a")
    assert len(list(tmp_path.iterdir())) == 2
    delete_temporaries(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".a.0"]


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "made" / "inner").mkdir(parents=True)
    remove_dir(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_copy_names_the_file_that_was_written(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    message = rf"^{copy}: the disk or the quota is full"
    with pytest.raises(ConfigError, match=message), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(copy))


def test_room_is_checked_on_the_disk_of_the_nearest_folder(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there", 1)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/new: expected about .* of {tmp_path};"):
        require_room(tmp_path / "new", 1 << 60)


def test_nothing_is_written_through_links_below_the_own_folder(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    write_file(make_below(mine, "a/b/new"), b"x")
    assert (mine / "a" / "b" / "new").read_bytes() == b"x"
    other.mkdir()
    (other / "kept").write_bytes(b"kept")
    (mine / "linked").symlink_to(other)
    (mine / "a" / "dangling").symlink_to(tmp_path / "absent")
    (mine / "file").touch()
    for name in ("linked/kept", "linked/deeper/kept", "a/dangling/kept", "file/kept"):
        with pytest.raises(ConfigError, match=r"expected a folder of .*mine, got a (link|file)"):
            make_below(mine, name)
    (mine / "kept").symlink_to(other / "kept")
    write_file(make_below(mine, "kept"), b"new")
    assert (other / "kept").read_bytes() == b"kept"
    assert [path.name for path in other.iterdir()] == ["kept"]
    assert not (tmp_path / "absent").exists()
