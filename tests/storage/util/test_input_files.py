"""Files in place of the expected ones are named, and none is waited for or read without bound."""

import errno
import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.util.input_files import (
    describe_foreign,
    open_regular,
    read_small,
    refuse_foreign,
    resolve_below,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 38696353\n"
FOREIGN = {
    "lfs": POINTER,
    "html": b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Sign in</title></html>",
    "xml": b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
    "text": b'{"error":"Repository not found"}',
    "gzip": gzip.compress(b"x"),
    "zip": b"PK\x03\x04....",
    "zeros": bytes(600),
    "empty": b"",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_people_get_in_place_of_a_file_is_recognised(kind: str, tmp_path: Path) -> None:
    foreign = describe_foreign(FOREIGN[kind][:512])
    assert foreign is not None
    assert foreign.kind == kind
    assert describe_foreign(FOREIGN[kind][:512], allowed=(kind,)) is None
    path = tmp_path / "a b.onnx"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(CorruptRecordError, match=r"b\.onnx: expected a thing, got .*; .") as error:
        refuse_foreign(path, "a thing", error=CorruptRecordError)
    if kind == "gzip":
        assert f"`mv '{path}' '{path}.gz' && gunzip '{path}.gz'`" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"\x08\x07\x12\x04", b"\x80\x02]q\x00", b"\x93NUMPY", b"{}", b"3,112,112\n", b"\x00" * 9],
)
def test_other_content_is_left_to_its_reader(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    refuse_foreign(tmp_path / "a", "anything")


def socket_at(path: Path) -> None:
    os.chdir(path.parent)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "a named pipe"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (socket_at, "not a regular file"),
    ],
    ids=["fifo", "folder", "device", "socket"],
)
def test_only_regular_files_are_read(
    make: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a")
    with pytest.raises(OSError, match=words):
        read_small(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"a: expected a file, got .*{words}"):
        refuse_foreign(tmp_path / "a", "a file")


def test_links_are_followed_unless_they_must_not_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert read_small(tmp_path / "b") == b"x"
    with pytest.raises(OSError, match="a symbolic link"):
        open_regular(tmp_path / "b", follow_links=False)


def test_no_more_is_read_than_such_a_file_can_have(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="expected at most 4 in such a file") as error:
        read_small(tmp_path / "sparse", 4)
    assert error.value.errno == errno.EINVAL
    (tmp_path / "a").write_bytes(b"abcd")
    assert read_small(tmp_path / "a", 4) == b"abcd"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b", "a\0b", "."])
def test_names_in_lists_stay_below_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="below"):
        resolve_below(tmp_path, name)
    assert resolve_below(tmp_path, "a/b..jpg") == tmp_path / "a" / "b..jpg"
