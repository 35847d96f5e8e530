"""Faces of a cache's samples, found in records by the digest of the encoded image."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import simplejpeg

from gkd.storage.cache.reader import Samples
from gkd.storage.errors import CorruptRecordError, SpecMismatchError
from gkd.storage.reading.join import match
from gkd.storage.records.base import Records
from gkd.storage.records.digests import cached_digests
from gkd.storage.records.images import JPEG_START, digest
from gkd.storage.util.progress import progress

MAX_BYTES = 8192
_QUALITY = 85


def thumbnails(
    records: Records, samples: Samples, rows: Iterable[int], folder: Path, *, workers: int
) -> dict[int, bytes]:
    """JPEGs of samples, by row of the cache; samples that are not in the records are left out.

    A JPEG of at most ``MAX_BYTES`` is used as stored, anything else is encoded again. Labels are
    not compared, so records whose labels were corrected since serve as well. A sample that is
    still in its own row needs no other record; otherwise the digests of all records are needed,
    which ``folder`` caches.

    Raises:
        SpecMismatchError: if none of the samples is in the records.
    """
    wanted = sorted(set(rows))
    record_rows = {row: row for row in wanted if _is_in_own_row(records, row, samples)}
    moved = np.array([row for row in wanted if row not in record_rows], np.int64)
    if len(moved):
        known = cached_digests(records, folder, workers=workers)
        found = match(samples.digests[moved], samples.labels[moved], known, records.labels)
        pairs = zip(moved.tolist(), found.tolist(), strict=True)
        record_rows |= {row: record_row for row, record_row in pairs if record_row >= 0}
    if wanted and not record_rows:
        raise SpecMismatchError(
            f"{records.path}: contains none of the {len(wanted):,} images of the cache "
            f"{samples.cache.path} to be shown; give the records that the cache was made from "
            f"({samples.cache.spec.dataset.name})"
        )
    faces: dict[int, bytes] = {}
    with progress("faces", len(record_rows), "images", quiet_below=10_000) as advance:
        for row, record_row in sorted(record_rows.items()):
            faces[row] = _jpeg(records, record_row)
            advance()
    return faces


def _is_in_own_row(records: Records, row: int, samples: Samples) -> bool:
    if row >= len(records):
        return False
    try:
        return digest(records.encoded(row)) == bytes(samples.digests[row])
    except CorruptRecordError:
        return False


def _jpeg(records: Records, row: int) -> bytes:
    encoded, pixels = bytes(records.encoded(row)), records.image(row)  # fails if it is damaged
    if encoded.startswith(JPEG_START) and len(encoded) <= MAX_BYTES:
        return encoded
    jpeg: bytes = simplejpeg.encode_jpeg(pixels, quality=_QUALITY)
    return jpeg
