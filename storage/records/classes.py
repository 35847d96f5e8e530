"""Class numbers: how records of every kind name them, and how many there can be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError

# Classes are stored as uint32 in a cache.
MAX_CLASSES = 2**32
# More classes than this, and than so many an image, no labels prove: a part of a large data set
# numbers far fewer, and one damaged label would cost gigabytes for classes that are not there.
MOST_UNPROVED_CLASSES = 1_000_000
MOST_CLASSES_AN_IMAGE = 16
# What a column or a field with the class's number is called.
LABEL_NAMES = ("label", "labels", "identity", "class", "cls", "target")


def labelled_classes(labels: npt.NDArray[np.int64], where: Callable[[int], str]) -> int:
    """The largest label + 1; ``where`` tells a row's place.

    Raises:
        ConfigError: where that is far more than so many images prove.
    """
    row = int(labels.argmax())
    classes = int(labels[row]) + 1
    most = max(MOST_UNPROVED_CLASSES, MOST_CLASSES_AN_IMAGE * len(labels))
    if classes > most:
        raise ConfigError(
            f"{where(row)}: expected a label below {most:,} among {len(labels):,} images, "
            f"got {classes - 1:,}; correct this record, or if there are so many identities say "
            "so in a file named property beside it, with the line IDENTITIES,112,112"
        )
    return classes


def read_property(path: Path) -> int | None:
    """The number of classes by the first line ``classes,height,width`` of a ``property`` file.

    Raises:
        ConfigError: for another first line.
    """
    if not path.exists():
        return None
    first = path.read_text(errors="replace").partition("\n")[0].strip()
    count = first.partition(",")[0].strip()
    if not (count.isascii() and count.isdigit() and 0 < int(count) <= MAX_CLASSES):
        raise ConfigError(
            f"{path}: expected a first line like 93431,112,112 (classes, height, width), "
            f"got {first[:80]!r}; correct or remove the file"
        )
    return int(count)


def label_fault(label: object, count: int | None) -> str:
    """Why ``label`` is no class, and what to do; ``count`` classes were promised, if any."""
    if count is None:
        return f"expected a whole number from 0, got label {label}; write class numbers"
    return (
        f"expected a class from 0 to {count - 1}, got label {label}; write this record again or "
        "leave it out, or correct the number of classes"
    )
