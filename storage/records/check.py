"""What records hold, and every fault in them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gkd.storage.cache.spec import LabelOrder
from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.base import Layout, Records
from gkd.storage.records.images import decode, decode_face
from gkd.storage.util.parallel import ordered_map, row_blocks
from gkd.storage.util.progress import progress

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class RecordsInfo:
    """What records hold, by their headers; no image but the first is decoded.

    layout, indexed       as of ``Records``
    num_classes           by the property file, the names of classes, the labels or the folders
    identities            different labels that occur
    labels                smallest and largest label
    unreadable            records whose header is broken or whose label is no class
    image_size            (width, height) of the first image, None where it cannot be read
    bytes                 of all encoded images
    images_per_identity   {percentile: images}, over the identities that occur
    """

    path: Path
    name: str
    layout: Layout
    indexed: bool
    label_order: LabelOrder
    images: int
    num_classes: int
    identities: int
    labels: tuple[int, int]
    unreadable: int
    image_size: tuple[int, int] | None
    bytes: int
    images_per_identity: dict[int, float]
    fingerprint: str


@dataclass(frozen=True)
class RecordsReport:
    """What ``verify_records`` found; ``faults`` in row order, each naming its place."""

    images: int
    identities: int
    faults: tuple[CorruptRecordError, ...]


def records_info(records: Records) -> RecordsInfo:
    """Facts about records, from headers, and the size of one image."""
    readable = records.labels[records.labels >= 0]
    identities, counts = np.unique(readable, return_counts=True)
    percentiles = np.percentile(counts, PERCENTILES) if len(counts) else np.zeros(len(PERCENTILES))
    return RecordsInfo(
        path=records.path,
        name=records.name,
        layout=records.layout,
        indexed=records.indexed,
        label_order=records.label_order,
        images=len(records),
        num_classes=records.num_classes,
        identities=len(identities),
        labels=(int(identities[0]), int(identities[-1])) if len(identities) else (-1, -1),
        unreadable=len(records) - len(readable),
        image_size=_first_size(records),
        bytes=int(records.sizes[records.sizes > 0].sum()),
        images_per_identity=dict(zip(PERCENTILES, percentiles.tolist(), strict=True)),
        fingerprint=records.fingerprint,
    )


def verify_records(records: Records, *, workers: int) -> RecordsReport:
    """Read and decode every image in ``workers`` threads and gather every fault.

    A fault is a record that is not framed as one, a header that does not fit, a label that is no
    class, a file that is gone, bytes that are no image, or an image that is not 112x112.
    """

    def faults_of(rows: range) -> list[CorruptRecordError]:
        found = []
        for row in rows:
            try:
                decode_face(records.encoded(row), records.where(row))
            except CorruptRecordError as error:
                found.append(error)
        return found

    faults: list[CorruptRecordError] = []
    blocks = row_blocks(len(records))
    with progress("verify records", len(records), "images") as advance:
        results = ordered_map(faults_of, row_blocks(len(records)), workers=workers)
        for rows, found in zip(blocks, results, strict=True):
            faults.extend(found)
            advance(len(rows), f"{len(faults)} faults" if faults else "")
    identities = np.unique(records.labels[records.labels >= 0])
    return RecordsReport(len(records), len(identities), tuple(faults))


def _first_size(records: Records) -> tuple[int, int] | None:
    try:
        height, width, _ = decode(records.encoded(0)).shape
    except CorruptRecordError:
        return None
    return width, height
