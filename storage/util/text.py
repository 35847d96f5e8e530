"""Parts of messages: names that are not trusted, many items, fields in which values differ."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec

_ABSENT = object()


def printable(text: str) -> str:
    r"""Replace control characters, but for ends of lines and tabs, and what UTF-8 cannot hold.

    Names in files of others could otherwise move the cursor, set the window's title or reverse
    the direction of the text.

    >>> printable("a\x1b[2J")
    'a\ufffd[2J'
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def without_password(address: str) -> str:
    """An address for a message.

    >>> without_password("ftp://user:password@host/x")
    'ftp://user:***@host/x'
    """
    return re.sub(r"(:/+[^/@]*?):[^/]*@", r"\1:***@", address)


def first_few(items: Sequence[object], n: int = 3, *, count: int | None = None) -> str:
    """``a, b, c and 4 more``; ``none`` for no items.

    ``count`` is the number of all items if ``items`` holds only the first of them.

    >>> first_few(range(7))
    '0, 1, 2 and 4 more'
    """
    more = (len(items) if count is None else count) - n
    shown = ", ".join(str(item) for item in items[:n]) or "none"
    return f"{shown} and {more:,} more" if more > 0 else shown


def describe_differences(
    old: object,
    new: object,
    *,
    old_name: str = "expected",
    new_name: str = "got",
    ignore: Collection[str] = (),
) -> list[str]:
    """``field: expected A, got B`` for each field in which two values differ.

    The values are mappings, data classes or msgspec structs; fields inside them are compared one
    by one and named ``outer.inner``. Fields in ``ignore`` are not compared, nor those inside them.

    >>> describe_differences({"scale": 64.0, "views": {"flipped": 1}}, {"scale": 32, "views": {}})
    ['scale: expected 64, got 32', 'views.flipped: expected 1, got nothing']
    """
    ours, theirs = (dict(_flatten(msgspec.to_builtins(value), ignore)) for value in (old, new))
    lines = []
    for field in ours | theirs:
        pair = ours.get(field, _ABSENT), theirs.get(field, _ABSENT)
        if pair[0] != pair[1]:
            written = (tuple(_format(v, digits) for v in pair) for digits in (6, 9, 17))
            first, second = next((w for w in written if w[0] != w[1]), tuple(map(repr, pair)))
            lines.append(f"{field}: {old_name} {first}, {new_name} {second}")
    return lines


def _flatten(value: Any, ignore: Collection[str], name: str = "") -> Iterator[tuple[str, Any]]:
    if name in ignore:
        return
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, ignore, f"{name}.{key}" if name else str(key))


def _format(value: object, digits: int) -> str:
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_format(item, digits) for item in value)}]"
    return str(value)
