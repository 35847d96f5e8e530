"""Image folders as rows of images: one folder per identity."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import FORMS, Records
from gkd.storage.util.input_files import open_regular, read_small
from gkd.storage.util.progress import progress
from gkd.storage.util.text import first_few

Sort = Literal["natural", "plain"]
# Of images, whether or not they are of a form that can be decoded: none vanishes by its name.
SUFFIXES = frozenset(
    f".{name}"
    for name in re.findall(
        r"\w+",
        "jpg jpeg jpe jfif png bmp dib webp tif tiff ppm pgm pbm pnm gif jp2 j2k heic heif avif "
        "jxl ico svg psd exr hdr raw dng cr2 cr3 nef arw",
    )
)
_MAGICS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|BM.{4}\x00\x00\x00\x00|RIFF.{4}WEBP|II\*\x00|MM\x00\*|P[1-6]\s|GIF8"
    rb"|\x00\x00\x00\x0cjP  |.{4}ftyp(avif|heic|heix|mif1)",
    re.DOTALL,
)
# Names of the folders of a split: they hold identities and are none.
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
# The tables of image folders of a hub, which label the images beside them.
_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
QUIET_FOLDERS = 10_000
Entry = os.DirEntry[str]


class ImageFolder(Records):
    """The images of a folder whose sub-folders are the identities, in sorted order.

    Files are sorted as the folders are: ``natural`` puts 2 before 10 and ignores case (CVLface's
    order), ``plain`` is the order of code points (im2rec's). Identities are numbered from 0; an
    empty folder is none, one whose files are no images keeps its number. An image is a file with
    an image's suffix or, if it has none that is known, an image's first bytes; other files are left
    out and named, names with a leading dot are ignored. A key is the path below the folder, with
    slashes.

    Raises:
        ConfigError: for a folder inside an identity's folder, an image or a table of labels beside
            the identities, folders of splits, a link that leaves the folder, a name that is not
            UTF-8, or a folder without images.
    """

    layout = "folder"

    def __init__(self, path: Path, *, sort: Sort = "natural") -> None:
        self.path = path.absolute()
        self.name = self.path.name
        self.label_order = sort
        root = Path(os.path.realpath(self.path))
        folders, images, others = _entries(self.path, root, sort)
        self._require_identities(folders, images, others)
        empty: list[str] = []
        without: list[str] = []
        names: list[bytes] = []
        sizes: list[int] = []
        counts: list[int] = []
        with progress("list", len(folders), "identities", quiet_below=QUIET_FOLDERS) as advance:
            for folder in folders:
                inner, images, found = _entries(folder, root, sort)
                others += found
                if inner:
                    raise ConfigError(
                        f"{inner[0].path}: expected one folder per identity with its images "
                        "inside, got another folder; move its images up or make it an identity, "
                        f"or name {folder.path} alone if its folders are the identities"
                    )
                try:
                    names.extend(f"{folder.name}/{image.name}".encode() for image in images)
                except UnicodeEncodeError as error:
                    raise ConfigError(
                        f"{os.fsencode(f'{self.path}/{error.object}')!r}: expected a file name in "
                        "UTF-8; rename it"
                    ) from error
                sizes.extend(_size(image) for image in images)
                if images or found:
                    counts.append(len(images))
                if not images:
                    (without if found else empty).append(folder.name)
                advance()
        if not names:
            raise ConfigError(f"{self.path}: expected {FORMS}, got no image; name one of these")
        self.left_out = [*_describe_others(others)]
        if empty:
            self.left_out.append(
                f"{len(empty):,} empty folders, which are no identities: {first_few(empty)}"
            )
        if without:
            self.left_out.append(
                f"{len(without):,} identities without an image, which keep their class numbers: "
                f"{first_few(without)}"
            )
        self.num_classes = len(counts)
        self.labels = np.repeat(np.arange(len(counts)), counts)
        self.sizes = np.array(sizes, np.int64)
        # One block of bytes instead of a string per row: millions of rows stay small, and forked
        # workers share the block without copying it.
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def _require_identities(
        self, folders: Sequence[Entry], images: Sequence[Entry], others: Sequence[Entry]
    ) -> None:
        """Refuse layouts whose folders are no identities."""
        tables = [entry.name for entry in others if entry.name.lower() in _TABLES]
        if tables:
            raise ConfigError(
                "an image folder whose labels are in a table",
                path=self.path,
                expected="one folder per identity",
                got=tables[0],
                remedy="write it as Parquet, which is read: datasets.load_dataset('imagefolder', "
                f"data_dir={str(self.path)!r}, split='train').to_parquet('train.parquet')",
            )
        if images:
            raise ConfigError(
                f"{self.path}: expected one folder per identity, got the image {images[0].name} "
                "beside them; move it into its identity's folder"
            )
        splits = [entry.name for entry in folders if entry.name.lower() in _SPLITS]
        if splits and len(splits) == len(folders):
            raise ConfigError(
                path=self.path,
                expected="one folder per identity",
                got=f"folders of splits: {', '.join(splits)}",
                remedy=f"name one of them: {self.path / splits[0]}",
            )

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


def _entries(
    folder: Path | Entry, root: Path, sort: Sort
) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Sorted sub-folders, images and other files of a folder.

    Links are followed only inside ``root``; one that leads nowhere is an image, which reading
    reports.
    """
    folders: list[Entry] = []
    images: list[Entry] = []
    others: list[Entry] = []
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: SORT_KEYS[sort](entry.name)):
            if entry.name.startswith("."):
                continue
            is_folder = entry.is_dir()
            if not is_folder and not _is_image(entry):
                others.append(entry)
                continue
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(root):
                raise ConfigError(
                    f"{entry.path}: expected links to stay inside {root}, got one to "
                    f"{os.path.realpath(entry)}; copy the file or remove the link"
                )
            (folders if is_folder else images).append(entry)
    return folders, images, others


def _is_image(entry: Entry) -> bool:
    """Whether a file's name, or without a known suffix its first bytes, are those of an image."""
    if Path(entry.name).suffix.lower() in SUFFIXES:
        return True
    try:
        with open_regular(Path(entry.path)) as file:
            return _MAGICS.match(file.read(32)) is not None
    except OSError:
        return entry.is_symlink() and not Path(entry.path).exists()


def _size(entry: Entry) -> int:
    """Bytes of a file; -1 behind a link that leads nowhere."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def _describe_others(others: Sequence[Entry]) -> Iterator[str]:
    kinds: dict[str, list[str]] = {}
    for entry in others:
        kinds.setdefault(Path(entry.name).suffix.lower() or "no suffix", []).append(entry.path)
    for kind, paths in sorted(kinds.items()):
        yield f"{len(paths):,} files that are no images ({kind}): {first_few(paths, 2)}"
