"""Image folders as rows of images: one folder per identity."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import FORMS, Records
from gkd.storage.util.input_files import read_small
from gkd.storage.util.progress import progress

Sort = Literal["natural", "plain"]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
QUIET_FOLDERS = 10_000


class ImageFolder(Records):
    """The images of a folder whose sub-folders are the identities, in sorted order.

    Files are sorted as the folders are: ``natural`` puts 2 before 10 and ignores case (CVLface's
    order), ``plain`` is the order of code points (im2rec's). Identities are numbered from 0; a
    folder without an image gets no number. Files without an image suffix and names with a leading
    dot are ignored. A key is the path below the folder, with slashes.

    Raises:
        ConfigError: for a folder inside an identity's folder, an image beside the identities, a
            link that leaves the folder, a name that is not UTF-8, or a folder without images.
    """

    layout = "folder"

    def __init__(self, path: Path, *, sort: Sort = "natural") -> None:
        self.path = path.absolute()
        self.name = self.path.name
        self.label_order = sort
        root = Path(os.path.realpath(self.path))
        folders, images = _entries(self.path, root, sort)
        if images:
            raise ConfigError(
                f"{self.path}: expected one folder per identity, got the image {images[0].name} "
                "beside them; move it into its identity's folder"
            )
        names: list[bytes] = []
        sizes: list[int] = []
        counts: list[int] = []
        with progress("list", len(folders), "identities", quiet_below=QUIET_FOLDERS) as advance:
            for folder in folders:
                inner, images = _entries(folder, root, sort)
                if inner:
                    raise ConfigError(
                        f"{inner[0].path}: expected one folder per identity with its images "
                        "inside, got another folder; move its images up or make it an identity"
                    )
                try:
                    names.extend(f"{folder.name}/{image.name}".encode() for image in images)
                except UnicodeEncodeError as error:
                    raise ConfigError(
                        f"{os.fsencode(f'{self.path}/{error.object}')!r}: expected a file name in "
                        "UTF-8; rename it"
                    ) from error
                sizes.extend(image.stat().st_size for image in images)
                if images:
                    counts.append(len(images))
                advance()
        if not names:
            raise ConfigError(f"{self.path}: expected {FORMS}, got no image; name one of these")
        self.num_classes = len(counts)
        self.labels = np.repeat(np.arange(len(counts)), counts)
        self.sizes = np.array(sizes, np.int64)
        # One block of bytes instead of a string per row: millions of rows stay small, and forked
        # workers share the block without copying it.
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def _identify(self, row: int) -> tuple[str, str]:
        key = self._names[self._ends[row] : self._ends[row + 1]].decode()
        return key, f"{self.path}, key {key}"

    def _read(self, row: int) -> memoryview:
        try:
            content = read_small(self.path / self.key(row))
        except OSError as error:
            raise CorruptRecordError(
                f"expected a readable file, got: {error.strerror}; put it back or list the folder "
                "again by running the command again"
            ) from error
        if len(content) != self.sizes[row]:
            raise CorruptRecordError(
                f"expected {self.sizes[row]} bytes as listed, got {len(content)}; the folder "
                "changed under a running command: run it again"
            )
        return memoryview(content)

    def _files(self) -> Iterator[tuple[str, str]]:
        for row in range(len(self)):
            key = self.key(row)
            yield key, f"{self.path}/{key}"


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares digits as numbers and ignores case; ties are in plain order.

    >>> sorted(["10", "b", "9", "A1"], key=natural_key)
    ['9', '10', 'A1', 'b']
    """
    # The pattern's group makes text and digits alternate, so like is compared with like.
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], name


SORT_KEYS: dict[Sort, Callable[[str], Any]] = {"natural": natural_key, "plain": str}

Entry = os.DirEntry[str]


def _entries(folder: Path | Entry, root: Path, sort: Sort) -> tuple[list[Entry], list[Entry]]:
    """Sorted sub-folders and images of a folder; links are followed only inside ``root``."""
    folders: list[Entry] = []
    images: list[Entry] = []
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: SORT_KEYS[sort](entry.name)):
            if entry.name.startswith("."):
                continue
            is_folder = entry.is_dir()
            if not is_folder and Path(entry.name).suffix.lower() not in SUFFIXES:
                continue
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(root):
                raise ConfigError(
                    f"{entry.path}: expected links to stay inside {root}, got one to "
                    f"{os.path.realpath(entry)}; copy the file or remove the link"
                )
            (folders if is_folder else images).append(entry)
    return folders, images
