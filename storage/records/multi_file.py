"""Records in several files: which files make up a data set, and opening them when needed."""

import functools
import mmap
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.folder import natural_key
from gkd.storage.records.labels import read_property
from gkd.storage.util.input_files import open_regular, refuse_foreign
from gkd.storage.util.text import first_few

_NUMBERED = re.compile(r"(?P<set>.*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?:-\w+)?")
_OTHER_SPLITS = re.compile(r"(?:.*[^a-z0-9])?(?:val|valid|validation|dev|test)(?:[^a-z0-9].*)?")
T = TypeVar("T")


class Shards:
    """The files of a data set, one after the other.

    ``path`` is a file, a folder with files of this ``suffix``, or a folder whose sub-folder
    ``data`` holds them, as hubs lay them out. They are in natural order of their names. Files whose
    names mark them as validation or test splits are left out, and named in ``left_out``, unless
    there are no others.
    ``num_classes`` is stated by the file ``property`` in the folder or beside the file, or None.

    Raises:
        ConfigError: if files are missing by the numbers in the names (``00003-of-00042``), or
            ``property`` cannot be read.
        CorruptRecordError: if a file cannot be read, or is another file in its place.
    """

    def __init__(self, path: Path, suffix: str) -> None:
        self.root = home = path.absolute()
        self.left_out: list[str] = []
        self.paths, self.name = [home], home.name.removesuffix(suffix)
        if home.is_dir():
            self.paths, self.left_out = find_shards(home, suffix)
            _require_all(self.paths)
        else:
            home = home.parent
            if self.name == "train":
                self.name = home.name
        self.num_classes = read_property(home / "property")
        for shard in self.paths:
            refuse_foreign(
                shard,
                f"a plain {suffix} file",
                error=CorruptRecordError,
                allowed=("empty", "zeros"),  # as an archive without members
                like_it=f"{shlex.quote(str(shard.parent))}/*{shard.suffix}",
            )

    def key(self, number: int, inner: object) -> str:
        """A record's key: prefixed with the file's name if there are several files."""
        return f"{self.paths[number].stem}/{inner}" if len(self.paths) > 1 else str(inner)


class OpenFiles(Generic[T]):
    """Files opened by ``open_file`` when first used; the last ``max_open`` stay open.

    ``get(number)`` is the opened file; it raises a CorruptRecordError if the file is missing or
    changed its size. Can be shared by threads and forks. Pickles by path.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        open_file: Callable[[Path], T],
        max_open: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.sizes = known = [path.stat().st_size for path in paths] if sizes is None else sizes
        self._arguments = paths, open_file, max_open, self.sizes

        def get(number: int) -> T:
            require_unchanged(paths[number], known[number])
            return open_file(paths[number])

        self.get: Callable[[int], T] = functools.lru_cache(max_open)(get)

    def __reduce__(self) -> tuple[object, ...]:
        return OpenFiles, self._arguments


def require_unchanged(path: Path, size: int) -> None:
    """Check that a file still has the ``size`` that it had when the records were opened.

    Raises:
        CorruptRecordError: if it has another size, is missing, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptRecordError(f"{path}: {error.strerror}; put it back") from error
    if found != size:
        raise CorruptRecordError(
            f"{path}: expected {size} bytes as when it was opened, got {found}; the file changed "
            "while a command was reading it: run it again"
        )


def map_file(path: Path) -> memoryview:
    """A read-only memory map of a regular file."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")  # an empty file cannot be mapped
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def find_shards(folder: Path, suffix: str) -> tuple[list[Path], list[str]]:
    """The files of ``suffix`` that make up the data set in ``folder``, and what was left out.

    One rule for packs, tar shards and Parquet files: those of validation and test splits belong to
    it only if there are no others.
    """
    for parent in (folder, folder / "data"):
        found = [path for path in parent.glob(f"*{suffix}") if not path.name.startswith(".")]
        if found:
            found.sort(key=lambda path: natural_key(path.name))
            train = [path for path in found if not _OTHER_SPLITS.fullmatch(path.stem.lower())]
            others = [path.name for path in found if path not in train] if train else []
            left_out = f"{len(others):,} files of other splits: {first_few(others)}"
            return train or found, [left_out] if others else []
    return [], []


def _require_all(paths: Sequence[Path]) -> None:
    """Refuse an incomplete set of numbered files."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := _NUMBERED.fullmatch(path.stem):
            key = found["set"], int(found["count"])
            numbers.setdefault(key, set()).add(int(found["number"]))
    for (name, count), present in numbers.items():
        if missing := sorted(set(range(count)) - present):
            raise ConfigError(
                f"{paths[0].parent}: expected {count} files {name}-*-of-{count:05} by their names, "
                f"got {len(present)}; missing: {first_few(missing)}; fetch them, or name one file "
                "alone"
            )
