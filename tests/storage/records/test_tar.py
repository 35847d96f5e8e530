"""The reader of tar headers against tarfile and GNU tar."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.records import tar
from gkd.storage.records.tar import BLOCK, Member, TarFault, members, next_header
from tests.storage.records.forms import write_tar

FORMATS: list[Literal[0, 1, 2]] = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def walked(path: Path) -> list[Member]:
    return list(members(memoryview(path.read_bytes())))


def expected(path: Path) -> list[tuple[bytes, int, int]]:
    """Name, offset and size of the regular members by tarfile."""
    with tarfile.open(path) as archive:
        return [
            (os.fsencode(member.name), member.offset_data, member.size)
            for member in archive
            if member.isreg()
        ]


def test_members_of_every_kind_are_those_of_tarfile(tmp_path: Path) -> None:
    for format in FORMATS:
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format) as archive:
            for name, kind, size in [
                ("folder", tarfile.DIRTYPE, 0),
                ("folder/a.jpg", tarfile.REGTYPE, 1000),
                ("old.jpg", tarfile.AREGTYPE, 512),
                ("contiguous.jpg", tarfile.CONTTYPE, 3),
                ("link.jpg", tarfile.SYMTYPE, 0),
                ("hard.jpg", tarfile.LNKTYPE, 0),
                ("pipe", tarfile.FIFOTYPE, 0),
                ("d" * 90 + "/" + "n" * 90 + ".jpg", tarfile.REGTYPE, 5),
                ("../up.cls", tarfile.REGTYPE, 1),
                ("empty.cls", tarfile.REGTYPE, 0),
            ]:
                member = tarfile.TarInfo(name)
                member.type, member.size, member.linkname = kind, size, "folder/a.jpg"
                archive.addfile(member, io.BytesIO(bytes(size)))
        found = walked(path)
        assert [(m.name, m.data, m.size) for m in found] == expected(path)
        assert len(found) == 6
        # The start of a member is enough to read its name again.
        content = memoryview(path.read_bytes())
        assert [next(members(content, m.start)) for m in found] == found


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)


@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5), st.sampled_from(FORMATS[1:])
)
def test_any_name_and_content(files: list[tuple[str, bytes]], format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    view = memoryview(buffer.getvalue())
    found = [(m.name, bytes(view[m.data : m.data + m.size])) for m in members(view)]
    assert found == [(name.encode(), content) for name, content in files]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("format", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_what_the_tar_program_writes(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "files"
    (folder / "in").mkdir(parents=True)
    (folder / "in/a.jpg").write_bytes(b"a" * 700)
    (folder / "in/b.cls").write_bytes(b"7")
    (folder / "link.jpg").symlink_to("in/a.jpg")
    (folder / "zhard.jpg").hardlink_to(folder / "in/a.jpg")
    with (folder / "hole.jpg").open("wb") as file:
        # Ten pieces of data and holes: the map of an old sparse member needs another block.
        for piece in range(10):
            file.seek(piece << 20)
            file.write(b"data" * 1024)
    path = tmp_path / "x.tar"
    sparse = ["--sparse"] if format in ("gnu", "oldgnu", "posix") else []
    version = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True)
    if "GNU tar" not in version.stdout:
        pytest.skip("not GNU's")
    command: list[str | Path] = [
        "tar",
        f"--format={format}",
        *sparse,
        "--sort=name",
        "-cf",
        path,
        "-C",
        folder,
        ".",
    ]
    subprocess.run(command, check=True)
    found = {m.name: m.size for m in walked(path)}
    assert found.pop(b"./in/a.jpg") == 700
    assert found.pop(b"./in/b.cls") == 1
    assert found == ({} if sparse else {b"./hole.jpg": (9 << 20) + 4096})


def test_a_size_beyond_octal(tmp_path: Path) -> None:
    # GNU's base-256 and pax' decimal number; the file is too short for so much data.
    for format in FORMATS[1:]:
        member = tarfile.TarInfo("big.jpg")
        member.size = 9 << 30
        header = member.tobuf(format)
        with pytest.raises(TarFault, match=rf"expected {9 << 30} bytes from offset {len(header)}"):
            list(members(memoryview(header + bytes(1024))))


def content_of(tmp_path: Path) -> bytes:
    files = [("a.jpg", b"x" * 600), ("b" * 120 + ".jpg", b"y" * 100), ("c.jpg", b"z" * 100)]
    return write_tar(tmp_path / "x.tar", files).read_bytes()


def test_every_flipped_bit_of_a_header_is_detected(tmp_path: Path) -> None:
    content = bytearray(content_of(tmp_path))
    for position in range(BLOCK):
        if position == 148:  # the checksum's leading zero, which becomes a space
            continue
        content[position] ^= 1 << position % 8
        with pytest.raises(TarFault) as fault:
            list(members(memoryview(content)))
        content[position] ^= 1 << position % 8
        assert fault.value.offset == 0
    assert len(list(members(memoryview(content)))) == 3


@pytest.mark.parametrize(
    ("cut", "found", "message"),
    [
        (0, 0, "expected a tar header, got the file's end 0: truncated"),
        (100, 0, "expected a tar header, got the file's end 100: truncated"),
        (700, 0, "expected 600 bytes from offset 512, got 188: the file is truncated"),
        (1536, 1, "expected a tar header, got the file's end 1536: truncated"),
        (2048, 1, "expected .* bytes from offset 2048, got 0: the file is truncated"),
        (2560, 1, "expected a tar header, got the file's end 2560: truncated"),
    ],
)
def test_a_truncated_archive(tmp_path: Path, cut: int, found: int, message: str) -> None:
    walk = members(memoryview(content_of(tmp_path)[:cut]))
    for _ in range(found):
        next(walk)
    with pytest.raises(TarFault, match=message) as fault:
        next(walk)
    assert fault.value.offset == (1536 if found else 0)


def header(kind: bytes, content: bytes, *, size: bytes | None = None) -> bytes:
    """A header with its checksum, and padded content."""
    block = bytearray(BLOCK)
    block[:5] = b"a.jpg"
    block[124:136] = size or b"%011o\0" % len(content)
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % BLOCK)


END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"x", b"12 path=b.jp\n") + END, "expected a member after its extended header"),
        (header(b"x", b"") + b"\1" * BLOCK, "expected a tar header with its checksum, got other"),
        (header(b"0", b"", size=b"\xff" * 12) + END, "expected a size in the tar header, got none"),
        (header(b"0", b"", size=b"9bytes     \0") + END, "expected a size in the tar header"),
        (header(b"L", bytes(2 << 20)) + END, "expected a short extended header, got 2097152 bytes"),
    ],
)
def test_invalid_headers(content: bytes, message: str) -> None:
    with pytest.raises(TarFault, match=message):
        list(members(memoryview(content)))


def test_odd_pax_headers_are_read_as_far_as_possible() -> None:
    for fields, name in {
        b"no field": b"a.jpg",
        b"2 path=b.jpg\n": b"a.jpg",
        b"14 path=b.jpg\ngarbage": b"b.jpg",
        b"11 size=xy\n": b"a.jpg",
        b"9 size=2\n14 path=b.jpg\n": b"b.jpg",
    }.items():
        (member,) = members(memoryview(header(b"x", fields) + header(b"0", b"hi") + END))
        assert (member.name, member.start, member.size) == (name, 0, 2)
    global_first = header(b"g", b"14 path=b.jpg\n") + header(b"0", b"hi") + END
    (member,) = members(memoryview(global_first))
    assert (member.name, member.start) == (b"a.jpg", 2 * BLOCK)


def test_the_next_header_after_damage(tmp_path: Path) -> None:
    content = bytearray(content_of(tmp_path))
    third = [m.start for m in members(memoryview(content))][2]
    content[1536] ^= 1  # the second member's extended header
    # The header behind it is intact, with a name cut to 100 bytes.
    at = next_header(memoryview(content), 1536)
    assert at == third - 1024
    assert next_header(memoryview(content), at) == third
    assert next_header(memoryview(content), third) == len(content)


@pytest.mark.parametrize("kind", [b"x", b"L", b"g", b"S"])
def test_thousands_of_headers_without_a_member_are_walked_in_linear_time(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 500
    block = bytearray(header(kind, b"")[:BLOCK])
    if kind == b"S":  # each is a further map of holes of those before it
        block[482] = block[504] = 1
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    content = memoryview(bytes(block) * count)
    looked_at = 0

    def counted(header: bytes) -> bool:
        nonlocal looked_at
        looked_at += 1
        return is_header(header)

    is_header = tar._is_header
    monkeypatch.setattr(tar, "_is_header", counted)
    position, faults = 0, 0
    while position < len(content):
        try:
            assert not list(members(content, position))
            break
        except TarFault as fault:
            faults += 1
            position = next_header(content, fault.reached)
    assert faults == 1
    assert looked_at <= 2 * count
