"""Headers of a tar file, read without its data: nothing is extracted.

A member is a header of 512 bytes and its data, padded to 512; two headers of zeros end the file.
Names and sizes of ustar, GNU (long names, base-256 sizes; sparse members are skipped) and pax
(``path`` and ``size``) are read. The header's checksum is the sum of its bytes; the lower half of
Adler-32 is that sum modulo 65521, computed in C. Several times as fast as the standard library,
which makes an object of each member, and unlike it this reports damage.

Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from gkd.storage.errors import CorruptRecordError

BLOCK = 512
_END = bytes(BLOCK)
_PADDING = b" \0"
_U = ord("u")  # of the magic ustar
_CHECKSUM = slice(148, 156)
_ADLER_BASE = 65521
_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_DATA = frozenset(b"%d" % kind for kind in range(1, 7))  # links, devices, folders
_PAX, _PAX_GLOBAL = frozenset((b"x", b"X")), b"g"
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX_FIELD = re.compile(rb"(\d{1,9}) ([^=]+)=")
# Names and pax headers are far smaller; a damaged size could include the whole file.
_MAX_EXTENDED = 1 << 20


class Member(NamedTuple):
    """A regular file of the archive: offsets of its first header and of its data."""

    name: bytes
    start: int
    data: int
    size: int


class TarFault(CorruptRecordError):
    """Damage at ``offset``, where the headers of a member start; the caller knows the file.

    ``reached``: the header that does not fit. To search from there on, and not from ``offset``,
    keeps the walk linear where thousands of extended headers stand before it.
    """

    def __init__(self, offset: int, reached: int, reason: str) -> None:
        super().__init__(reason)
        self.offset, self.reached = offset, reached


def members(view: memoryview, position: int = 0) -> Iterator[Member]:
    """The regular files from the header at ``position`` to the end of the archive.

    Links, folders, devices and sparse files are skipped.

    Raises:
        TarFault: at the first damage; ``next_header`` finds where to resume.
    """
    end = len(view)
    start, name, size, sparse = position, b"", -1, False
    while True:
        if position + BLOCK > end:
            raise TarFault(
                start, position, f"expected a tar header, got the file's end {end}: truncated"
            )
        header = view[position : position + BLOCK].tobytes()
        if header == _END:
            if position == start:
                return
            raise TarFault(
                start, position, "expected a member after its extended header, got the end"
            )
        if not _is_header(header):
            raise TarFault(
                start, position, "expected a tar header with its checksum, got other bytes"
            )
        kind = header[156:157]
        reached, data = position, position + BLOCK
        length = _number(header[124:136])
        extended = kind in _PAX or kind in (_PAX_GLOBAL, _LONG_NAME, _LONG_LINK)
        if not extended and size >= 0:
            length = size
        if length < 0:
            raise TarFault(start, position, "expected a size in the tar header, got none")
        if kind in _WITHOUT_DATA:
            length = 0
        if kind == _SPARSE:
            more = header[482]  # the rest of the member's map of holes
            while more and data + BLOCK <= end:
                more = view[data + 504]
                reached, data = data, data + BLOCK
        position = data + (length + BLOCK - 1) // BLOCK * BLOCK
        if data + length > end:
            raise TarFault(
                start,
                reached,
                f"expected {length} bytes from offset {data}, got {max(end - data, 0)}: the file "
                "is truncated or the size is damaged",
            )
        if not extended:
            if kind in _REGULAR and not sparse:
                yield Member(name or _name(header), start, data, length)
            start, name, size, sparse = position, b"", -1, False
            continue
        if length > _MAX_EXTENDED:
            raise TarFault(start, reached, f"expected a short extended header, got {length} bytes")
        content = view[data : data + length].tobytes()
        if kind == _LONG_NAME:
            name = content.partition(b"\0")[0]
        elif kind in _PAX:
            fields = _pax_fields(content)
            name = fields.get(b"path", name)
            sparse = any(key.startswith(b"GNU.sparse.") for key in fields)
            size = int(fields[b"size"]) if fields.get(b"size", b"").isdigit() else size
        elif kind == _PAX_GLOBAL:
            start = position  # belongs to no member


def next_header(view: memoryview, position: int) -> int:
    """The next offset after ``position`` that holds a header, or the file's end."""
    for at in range((position // BLOCK + 1) * BLOCK, len(view) - BLOCK + 1, BLOCK):
        if view[at + 257] == _U and _is_header(view[at : at + BLOCK].tobytes()):
            return at
    return len(view)


def _is_header(header: bytes) -> bool:
    stated = header[_CHECKSUM]
    try:
        total = int(stated.strip(_PADDING), 8)
    except ValueError:
        return False
    # The checksum's own eight bytes count as spaces; Adler-32 begins with 1.
    others = total - 8 * 32 + sum(stated)
    return zlib.adler32(header) & 0xFFFF == (others + 1) % _ADLER_BASE


def _number(field: bytes) -> int:
    """An octal number, or GNU's base-256; -1 for neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    text = field.strip(_PADDING)
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax_fields(content: bytes) -> dict[bytes, bytes]:
    """Fields ``LENGTH KEY=VALUE LF``, as far as they can be read."""
    fields = {}
    position = 0
    while found := _PAX_FIELD.match(content, position):
        stop = position + int(found[1])
        if stop <= found.end():
            break
        fields[found[2]] = content[found.end() : stop - 1]
        position = stop
    return fields
