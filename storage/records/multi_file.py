"""Data sets published as shards: the files of a folder in their order, and the rows in each."""

import bisect
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.folder import natural_key

_NUMBERED = re.compile(r"(?P<set>.*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?:-\w+)?")
_OTHER_SPLITS = re.compile(r"(?:.*[^a-z0-9])?(?:val|valid|validation|dev|test)(?:[^a-z0-9].*)?")
_EXAMPLES = 3
# What a checkout of a hub holds in the place of a file that was not fetched.
_POINTER = b"version https://git-lfs"


class Shards:
    """The files of a data set, one after the other, and which rows each holds.

    A path is a file, or a folder with files of this ``suffix``, or one whose folder ``data`` holds
    them, as hubs lay them out. They are in natural order of their names. Those whose names say
    that they are for validation or for tests are left out where there are others.

    Raises:
        ConfigError: where files are missing that the others' names (``00003-of-00042``) promise.
    """

    def __init__(self, path: Path, suffix: str) -> None:
        self.root = path.absolute()
        self.paths = [self.root]
        if self.root.is_dir():
            self.paths = find_shards(self.root, suffix)
            _require_all(self.paths)
        alone = self.root.is_file() and self.root.stem == "train"
        self.name = self.root.parent.name if alone else self.root.name.removesuffix(suffix)
        self.property_path = (
            self.root / "property" if self.root.is_dir() else self.root.with_name("property")
        )
        self.ends: list[int] = []

    def append(self, rows: int) -> None:
        """Say how many rows the next file holds."""
        self.ends.append((self.ends[-1] if self.ends else 0) + rows)

    def place(self, row: int) -> tuple[int, int]:
        """Number of the file that holds ``row``, and the row within it."""
        number = bisect.bisect_right(self.ends, row)
        return number, row - (self.ends[number - 1] if number else 0)

    def key(self, number: int, inside: str) -> str:
        """The key of a record: with the file's name in front where there are several."""
        return f"{self.paths[number].stem}/{inside}" if len(self.paths) > 1 else inside

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name of every file, and what the system says now of it.

        Raises:
            CorruptRecordError: where a file is gone.
        """
        for path in self.paths:
            try:
                yield path.name, path.stat()
            except OSError as error:
                raise CorruptRecordError(f"{path}: {error.strerror}; put it back") from error


def find_shards(folder: Path, suffix: str) -> list[Path]:
    """The files of ``suffix`` that make up the data set in ``folder``; none where it has none."""
    for place in (folder, folder / "data"):
        found = [path for path in place.glob(f"*{suffix}") if not path.name.startswith(".")]
        if found:
            found.sort(key=lambda path: natural_key(path.name))
            kept = [path for path in found if not _OTHER_SPLITS.fullmatch(path.stem.lower())]
            return kept or found
    return []


def require_fetched(path: Path) -> None:
    """Refuse the pointer that stands where a large file was not fetched.

    Raises:
        CorruptRecordError: for one, or a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise CorruptRecordError(
            f"{path}: expected a readable file, got: {error.strerror}; put it back"
        ) from error
    if start == _POINTER:
        raise CorruptRecordError(
            f"{path}: expected the file itself, got a Git LFS pointer to it; fetch it by "
            "`git lfs pull`"
        )


def _require_all(paths: Sequence[Path]) -> None:
    """Refuse a set of numbered files that is not whole."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := _NUMBERED.fullmatch(path.stem):
            of = found["set"], int(found["count"])
            numbers.setdefault(of, set()).add(int(found["number"]))
    for (name, count), present in numbers.items():
        missing = [number for number in range(count) if number not in present]
        if missing:
            few = ", ".join(map(str, missing[:_EXAMPLES]))
            raise ConfigError(
                f"{paths[0].parent}: expected {count} files {name}-*-of-{count:05} by their names, "
                f"got {len(present)}; missing: {few}{', ...' if len(missing) > _EXAMPLES else ''}; "
                "fetch them, or name one file alone"
            )
