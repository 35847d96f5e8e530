"""Labels of records: which numbers name a class, and how many classes there are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import open_regular, refuse_foreign

# How the identities got their numbers: stored in the records, or by the order of their names.
LabelOrder = Literal["recordio", "natural", "plain"]
# A cache stores classes as uint32.
MAX_CLASSES = 2**32
# Without a stated number of classes, a larger label is taken for damage: classes that do not exist
# would cost gigabytes.
MAX_UNSTATED_CLASSES = 1_000_000
MAX_UNSTATED_CLASSES_PER_IMAGE = 16
_LINE = 1 << 10
# Names of a column or a field that holds the class number.
LABEL_NAMES = ("label", "labels", "identity", "class", "cls", "target")


def class_numbers(
    values: npt.NDArray[Any], stated: int | None, valid: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Labels of any numeric type [n] as class numbers, int64 [n]; -1 for what names no class.

    A class is an integer from 0 to below ``stated``, or below ``MAX_CLASSES`` if that is None.
    ``valid`` marks the labels that could be read, bool [n].
    """
    exact = values.astype(np.float64)
    bound = MAX_CLASSES if stated is None else stated
    named = (exact >= 0) & (exact < bound) & (exact == np.floor(exact))
    if valid is not None:
        named &= valid
    return np.where(named, exact, -1).astype(np.int64)


def count_classes(labels: npt.NDArray[np.int64], locate: Callable[[int], str]) -> int:
    """The largest label + 1; ``locate`` describes a row's location.

    Raises:
        ConfigError: if that is implausibly large for so few images.
    """
    row = int(labels.argmax())
    count = int(labels[row]) + 1
    limit = max(MAX_UNSTATED_CLASSES, MAX_UNSTATED_CLASSES_PER_IMAGE * len(labels))
    if count > limit:
        raise ConfigError(
            f"{locate(row)}: expected a label below {limit:,} among {len(labels):,} images, got "
            f"{count - 1:,}; correct this record, or if there are so many identities, state their "
            "number in a file named property beside it, with the line IDENTITIES,112,112"
        )
    return count


def read_property(path: Path) -> int | None:
    """The number of classes by the first line ``classes,height,width`` of a ``property`` file.

    Raises:
        ConfigError: if the first line is anything else.
    """
    if not path.exists():
        return None
    expected = "a first line like 93431,112,112 (classes, height, width)"
    refuse_foreign(path, expected, allowed=("empty",))
    with open_regular(path) as file:
        line = file.read(_LINE).decode(errors="replace").partition("\n")[0].strip()
    count = line.partition(",")[0].strip()
    if not (count.isascii() and count.isdigit() and 0 < int(count) <= MAX_CLASSES):
        raise ConfigError(
            f"{path}: expected {expected}, got {line[:80]!r}; correct or remove the file"
        )
    return int(count)


def label_fault(label: object, stated: int | None, remedy: str = "") -> str:
    """Why ``label`` names no class, and what to do; ``stated`` is the number of classes, if any.

    The text becomes part of a cache that skips the record: its wording is fixed.
    """
    if stated is None:
        remedy = remedy or "write class numbers"
        return f"expected a whole number from 0, got label {label}; {remedy}"
    remedy = remedy or ("write this record again or leave it out, or correct the number of classes")
    return f"expected a class from 0 to {stated - 1}, got label {label}; {remedy}"
