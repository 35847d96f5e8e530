"""Whether what an earlier run wrote was made of the images that this run reads."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.records.images import digest

CHECKED_SHARDS, CHECKED_IMAGES = 4, 16  # images of each shard

# Rows int64 [n] that had an image, and its digests uint8 [n, 16].
ImageDigests = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]


def require_same_images(
    records: Records, written: Path, shards: Sequence[int], read: Callable[[int], ImageDigests]
) -> None:
    """Compare a few images with the digests that an earlier run wrote of them.

    A data set's fingerprint covers labels and sizes alone: this finds images that were replaced by
    others of the same size. ``read`` gives what was written of one of ``shards``, which are
    ascending and of the folder ``written``.

    Raises:
        SpecMismatchError: if an image has changed, naming the first.
        CorruptRecordError: if an image cannot be read any more.
    """
    rng = np.random.default_rng(0)
    chosen = np.linspace(0, len(shards) - 1, min(len(shards), CHECKED_SHARDS)).astype(int)
    for index in chosen.tolist():
        rows, digests = read(shards[index])
        sample = np.sort(rng.choice(len(rows), min(len(rows), CHECKED_IMAGES), replace=False))
        for row, expected in zip(rows[sample].tolist(), digests[sample], strict=True):
            found = digest(records.encoded(row))
            if found != expected.tobytes():
                raise SpecMismatchError(
                    f"{records.where(row)}: expected the image that {written} was begun with, of "
                    f"digest {expected.tobytes().hex()}, got one of the same size and digest "
                    f"{found.hex()}; give the records that it was begun with, or start again in "
                    "another folder"
                )
