"""Records in several files: which files make up a data set, and opening them when needed."""

import bisect
import functools
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.folder import natural_key
from gkd.storage.util.text import first_few

_NUMBERED = re.compile(r"(?P<set>.*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?:-\w+)?")
_OTHER_SPLITS = re.compile(r"(?:.*[^a-z0-9])?(?:val|valid|validation|dev|test)(?:[^a-z0-9].*)?")
# The content of a file that a checkout of a hub did not fetch.
_LFS_POINTER = b"version https://git-lfs"
T = TypeVar("T")


class Shards:
    """The files of a data set, one after the other, and which rows each holds.

    ``path`` is a file, a folder with files of this ``suffix``, or a folder whose sub-folder
    ``data`` holds them, as hubs lay them out. They are in natural order of their names. Files whose
    names mark them as validation or test splits are left out unless there are no others.

    Raises:
        ConfigError: if files are missing by the numbers in the names (``00003-of-00042``).
        CorruptRecordError: if a file cannot be read, or is a Git LFS pointer.
    """

    def __init__(self, path: Path, suffix: str) -> None:
        self.root = path.absolute()
        is_folder = self.root.is_dir()
        self.paths = find_shards(self.root, suffix) if is_folder else [self.root]
        if is_folder:
            _require_all(self.paths)
        for shard in self.paths:
            _require_fetched(shard)
        in_folder = not is_folder and self.root.stem == "train"
        self.name = self.root.parent.name if in_folder else self.root.name.removesuffix(suffix)
        self.property_path = (self.root if is_folder else self.root.parent) / "property"
        self.ends: list[int] = []

    def append(self, rows: int) -> None:
        """Add the number of rows in the next file."""
        self.ends.append((self.ends[-1] if self.ends else 0) + rows)

    def locate(self, row: int) -> tuple[int, int]:
        """Number of the file that holds ``row``, and the row within it."""
        number = bisect.bisect_right(self.ends, row)
        return number, row - (self.ends[number - 1] if number else 0)

    def key(self, number: int, inner: str) -> str:
        """A record's key: prefixed with the file's name if there are several files."""
        return f"{self.paths[number].stem}/{inner}" if len(self.paths) > 1 else inner

    def files(self) -> Iterator[tuple[str, Path]]:
        """Name and path of every file."""
        return ((path.name, path) for path in self.paths)


class OpenFiles(Generic[T]):
    """Files opened by ``open_file`` when first used; the last ``max_open`` stay open.

    Can be shared by threads and forks. Pickles by path.

    Raises:
        CorruptRecordError: on access, if a file is missing or changed its size.
    """

    def __init__(self, paths: Sequence[Path], open_file: Callable[[Path], T], max_open: int):
        sizes = [path.stat().st_size for path in paths]
        self.__setstate__((paths, sizes, open_file, max_open))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.paths, self.sizes, self._open_file, self._max_open

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.paths, self.sizes, self._open_file, self._max_open = state
        opened = functools.partial(_open_unchanged, self._open_file, self.paths, self.sizes)
        self._opened: Callable[[int], T] = functools.lru_cache(self._max_open)(opened)

    def __getitem__(self, number: int) -> T:
        return self._opened(number)


def _open_unchanged(
    open_file: Callable[[Path], T], paths: Sequence[Path], sizes: Sequence[int], number: int
) -> T:
    require_unchanged(paths[number], sizes[number])
    return open_file(paths[number])


def require_unchanged(path: Path, size: int) -> None:
    """Check that a file still has the ``size`` that it had when the records were opened.

    Raises:
        CorruptRecordError: if it has another size, is missing, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptRecordError(f"{path}: {error.strerror}; put it back") from error
    if found != size:
        raise CorruptRecordError(
            f"{path}: expected {size} bytes as when it was opened, got {found}; the file changed "
            "while a command was reading it: run it again"
        )


def map_file(path: Path) -> memoryview:
    """A read-only memory map of a file."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")  # an empty file cannot be mapped
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def find_shards(folder: Path, suffix: str) -> list[Path]:
    """The files of ``suffix`` that make up the data set in ``folder``; empty if it has none."""
    for parent in (folder, folder / "data"):
        found = [path for path in parent.glob(f"*{suffix}") if not path.name.startswith(".")]
        if found:
            found.sort(key=lambda path: natural_key(path.name))
            train = [path for path in found if not _OTHER_SPLITS.fullmatch(path.stem.lower())]
            return train or found
    return []


def _require_fetched(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CorruptRecordError(
            f"{path}: expected a readable file, got: {error.strerror}; put it back"
        ) from error
    if start == _LFS_POINTER:
        raise CorruptRecordError(
            f"{path}: expected the file itself, got a Git LFS pointer to it; fetch it by "
            "`git lfs pull`"
        )


def _require_all(paths: Sequence[Path]) -> None:
    """Refuse an incomplete set of numbered files."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := _NUMBERED.fullmatch(path.stem):
            key = found["set"], int(found["count"])
            numbers.setdefault(key, set()).add(int(found["number"]))
    for (name, count), present in numbers.items():
        missing = sorted(set(range(count)) - present)
        if missing:
            raise ConfigError(
                f"{paths[0].parent}: expected {count} files {name}-*-of-{count:05} by their names, "
                f"got {len(present)}; missing: {first_few(missing)}; fetch them, or name one file "
                "alone"
            )
