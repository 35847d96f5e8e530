"""Whether what an earlier run wrote is of the images that this one reads."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.records.images import digest

LOOKED_AT_SHARDS, LOOKED_AT_IMAGES = 4, 16  # images of each shard

Seen = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]


def require_same_images(
    records: Records, written: Path, shards: Sequence[int], seen: Callable[[int], Seen]
) -> None:
    """Compare a few images with the digests that an earlier run wrote of them.

    A data set's fingerprint is of labels and sizes alone: images that were swapped for others of
    the same sizes show here. ``seen`` gives the rows of a shard that had an image, int64 [n], and
    their digests, uint8 [n, 16]; ``shards``, ascending, stand in ``written``.

    Raises:
        SpecMismatchError: where an image is another one now, naming the first.
        CorruptRecordError: where one cannot be read any more.
    """
    rng = np.random.default_rng(0)
    places = np.linspace(0, len(shards) - 1, min(len(shards), LOOKED_AT_SHARDS)).astype(int)
    for place in places.tolist():
        rows, digests = seen(shards[place])
        some = np.sort(rng.choice(len(rows), min(len(rows), LOOKED_AT_IMAGES), replace=False))
        for row, expected in zip(rows[some].tolist(), digests[some], strict=True):
            found = digest(records.encoded(row))
            if found != expected.tobytes():
                raise SpecMismatchError(
                    f"{records.where(row)}: expected the image that {written} was begun with, of "
                    f"digest {expected.tobytes().hex()}, got one of the same size and digest "
                    f"{found.hex()}; give the records that it was begun with, or start again in "
                    "another folder"
                )
