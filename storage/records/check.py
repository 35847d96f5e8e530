"""Facts about records, and a check of every one of them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.base import Layout, Records
from gkd.storage.records.images import conversions, decode
from gkd.storage.records.labels import LabelOrder
from gkd.storage.util.parallel import map_rows
from gkd.storage.util.progress import progress

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class RecordsInfo:
    """Facts about records from their headers; the first image is decoded for its size."""

    path: Path
    name: str
    layout: Layout
    indexed: bool
    label_order: LabelOrder
    images: int
    num_classes: int  # stated by a file or the folders, else by the largest label
    identities: int  # different labels that occur
    labels: tuple[int, int]  # smallest and largest
    unreadable: int  # records whose header is broken or whose label names no class
    image_size: tuple[int, int] | None  # width and height; None if it cannot be read
    bytes: int  # of all encoded images
    images_per_identity: dict[int, float]  # by percentile, over the identities that occur
    fingerprint: str


def records_info(records: Records) -> RecordsInfo:
    """Facts about records from their headers, and the size of the first image."""
    readable = records.labels[records.labels >= 0]
    identities, counts = np.unique(readable, return_counts=True)
    try:
        height, width, _ = decode(records.encoded(0)).shape
        image_size = width, height
    except CorruptRecordError:
        image_size = None
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
        image_size=image_size,
        bytes=int(records.sizes[records.sizes > 0].sum()),
        images_per_identity={
            percent: float(np.percentile(counts, percent)) if len(counts) else 0.0
            for percent in PERCENTILES
        },
        fingerprint=records.fingerprint,
    )


@dataclass(frozen=True)
class RecordsReport:
    """Result of ``verify_records``.

    faults       in row order, each naming its location
    conversions  what was done to images beside decoding them, and to how many
    """

    images: int
    identities: int
    faults: tuple[CorruptRecordError, ...]
    conversions: dict[str, int]


def verify_records(records: Records, *, workers: int) -> RecordsReport:
    """Read and decode every image in ``workers`` threads and collect every fault.

    A fault is a record with broken framing, a header that does not fit, a label that names no
    class, a missing file, bytes that are no image, or an image that is not 112x112.
    """

    def check(row: int) -> CorruptRecordError | list[str]:
        try:
            encoded, _ = records.face(row)
        except CorruptRecordError as error:
            return error
        return conversions(encoded)

    faults, converted = [], Counter[str]()
    with progress("verify records", len(records), "images") as advance:
        for found in map_rows(check, len(records), workers=workers):
            if isinstance(found, CorruptRecordError):
                faults.append(found)
            else:
                converted.update(found)
            advance(1, f"{len(faults)} faults" if faults else "")
    identities = np.unique(records.labels[records.labels >= 0])
    return RecordsReport(len(records), len(identities), tuple(faults), dict(converted))
