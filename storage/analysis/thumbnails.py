"""Faces of a cache's samples for a page, found in records by their content."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import simplejpeg

from gkd.storage.cache.reader import Samples
from gkd.storage.errors import CorruptRecordError, SpecMismatchError
from gkd.storage.reading.join import match
from gkd.storage.records.base import Records, kept_digests
from gkd.storage.records.images import JPEG_START, digest
from gkd.storage.util.progress import progress

MOST_BYTES = 8192
_QUALITY = 85


def thumbnails(
    records: Records, samples: Samples, rows: Iterable[int], folder: Path, *, workers: int
) -> dict[int, bytes]:
    """JPEGs of some samples, by row of the cache; those that the records do not have are left out.

    A JPEG of at most ``MOST_BYTES`` is given as it is stored, anything else encoded anew. Labels do
    not matter, so records whose labels were mended since serve as well. Where a sample stands in
    the row that it had, nothing else is read for it; for any that does not, the digests of all
    records are needed, which ``folder`` keeps.

    Raises:
        SpecMismatchError: where none of the samples is in the records.
    """
    wanted = sorted(set(rows))
    places = {row: row for row in wanted if _stands_at(records, row, samples)}
    moved = np.array([row for row in wanted if row not in places], np.int64)
    if len(moved):
        known = kept_digests(records, folder, workers=workers)
        found = match(samples.digests[moved], samples.labels[moved], known, records.labels)
        places |= {
            row: place
            for row, place in zip(moved.tolist(), found.tolist(), strict=True)
            if place >= 0
        }
    if wanted and not places:
        raise SpecMismatchError(
            f"{records.path}: has none of the {len(wanted):,} images of the cache "
            f"{samples.cache.path} that are to be shown; give the records that it was made from "
            f"({samples.cache.spec.dataset.name})"
        )
    faces: dict[int, bytes] = {}
    with progress("faces", len(places), "images", quiet_below=10_000) as advance:
        for row, place in sorted(places.items()):
            faces[row] = _jpeg(records, place)
            advance()
    return faces


def _stands_at(records: Records, row: int, samples: Samples) -> bool:
    if row >= len(records):
        return False
    try:
        return digest(records.encoded(row)) == bytes(samples.digests[row])
    except CorruptRecordError:
        return False


def _jpeg(records: Records, row: int) -> bytes:
    """The face as it is stored where it is a small JPEG, which decodes."""
    encoded, pixels = bytes(records.encoded(row)), records.image(row)
    if encoded.startswith(JPEG_START) and len(encoded) <= MOST_BYTES:
        return encoded
    jpeg: bytes = simplejpeg.encode_jpeg(pixels, quality=_QUALITY)
    return jpeg
