"""Image folders as rows of images: one folder an identity."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import KINDS, Records
from gkd.storage.util.progress import progress

Sort = Literal["natural", "plain"]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
QUIET_FOLDERS = 10_000


class ImageFolder(Records):
    """The images of a folder whose sub-folders are the identities, in their sorted order.

    Files are sorted as the folders are: ``natural`` puts 2 before 10 and ignores case (CVLface's
    order), ``plain`` is the order of code points (im2rec's). Identities are numbered from 0;
    a folder without an image gets no number. Files that are no images by suffix, and names with a
    leading dot, are passed over. A key is the path below the folder, with slashes.

    Raises:
        ConfigError: for a folder inside an identity's, an image beside the identities, a link
            that leaves the folder, a name that is not UTF-8, or no image at all.
    """

    def __init__(self, path: Path, *, sort: Sort = "natural") -> None:
        self.path = path.absolute()
        self.name = self.path.name
        self.layout, self.indexed = "folder", True
        self.label_order = sort
        key = SORT_KEYS[sort]
        root = Path(os.path.realpath(self.path))
        folders, loose = _entries(self.path, root)
        if loose:
            raise ConfigError(
                f"{self.path}: expected one folder an identity, got the image {loose[0].name} "
                "beside them; move it into its identity's folder"
            )
        folders.sort(key=lambda entry: key(entry.name))
        names: list[bytes] = []
        sizes: list[int] = []
        counts: list[int] = []
        with progress("list", len(folders), "identities", quiet_below=QUIET_FOLDERS) as advance:
            for folder in folders:
                images = _identity_images(folder, root)
                images.sort(key=lambda entry: key(entry.name))
                names.extend(_encoded_key(folder, image) for image in images)
                sizes.extend(image.stat().st_size for image in images)
                if images:
                    counts.append(len(images))
                advance()
        if not names:
            raise ConfigError(f"{self.path}: expected {KINDS}, got no image; name one of these")
        self.num_classes = len(counts)
        self.labels = np.repeat(np.arange(len(counts)), counts)
        self.sizes = np.array(sizes, np.int64)
        # One block of bytes instead of a string a row: millions of rows stay small, and forked
        # workers share the block without copying it.
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def key(self, row: int) -> str:
        """Path below the folder, with slashes."""
        return self._names[self._ends[row] : self._ends[row + 1]].decode()

    def where(self, row: int) -> str:
        """The file in words."""
        return f"{self.path}, key {self.key(row)}"

    def encoded(self, row: int) -> memoryview:
        """The file's bytes.

        Raises:
            CorruptRecordError: where the file cannot be read, or is not as it was listed.
        """
        try:
            content = (self.path / self.key(row)).read_bytes()
        except OSError as error:
            raise CorruptRecordError(
                f"{self.where(row)}: expected a readable file, got: {error.strerror}; "
                "put it back or list the folder again by running the command again"
            ) from error
        if len(content) != self.sizes[row]:
            raise CorruptRecordError(
                f"{self.where(row)}: expected {self.sizes[row]} bytes as listed, "
                f"got {len(content)}; the folder changed under a running command: run it again"
            )
        return memoryview(content)

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Key of every image, and what the system says now of its file.

        Raises:
            CorruptRecordError: where a file is gone.
        """
        root = os.fspath(self.path)
        for row in range(len(self)):
            key = self.key(row)
            try:
                yield key, os.stat(f"{root}/{key}")  # noqa: PTH116
            except OSError as error:
                raise CorruptRecordError(
                    f"{self.where(row)}: {error.strerror}; put it back or run the command again"
                ) from error


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that counts digits as numbers and ignores case; equal names in plain order.

    >>> sorted(["10", "b", "9", "A1"], key=natural_key)
    ['9', '10', 'A1', 'b']
    """
    # The pattern's group makes text and digits alternate, so like is compared with like.
    parts = re.split("([0-9]+)", name)
    return [int(part) if at % 2 else part.lower() for at, part in enumerate(parts)], name


SORT_KEYS: dict[Sort, Callable[[str], Any]] = {"natural": natural_key, "plain": str}

Entry = os.DirEntry[str]


def _entries(folder: Path | Entry, root: Path) -> tuple[list[Entry], list[Entry]]:
    """Sub-folders and images of a folder; links are followed inside ``root``, refused elsewhere."""
    folders: list[Entry] = []
    images: list[Entry] = []
    with os.scandir(folder) as found:
        for entry in found:
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


def _identity_images(folder: Entry, root: Path) -> list[Entry]:
    inner, images = _entries(folder, root)
    if inner:
        raise ConfigError(
            f"{inner[0].path}: expected one folder an identity with its images inside, got another "
            "folder; move its images up or make it an identity"
        )
    return images


def _encoded_key(folder: Entry, image: Entry) -> bytes:
    try:
        return f"{folder.name}/{image.name}".encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{os.fsencode(image.path)!r}: expected a file name in UTF-8; rename it"
        ) from error
