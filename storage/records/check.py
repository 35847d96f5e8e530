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
from gkd.storage.util.torchrun_env import log_rank0

LOOKED_AT = 8
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
    left_out: tuple[str, ...]  # what lies among the data and is no record
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
        left_out=tuple(records.left_out),
        fingerprint=records.fingerprint,
    )


def log_left_out(records: Records) -> None:
    """Say what lies among the data and is no record."""
    for line in records.left_out:
        log_rank0(f"{records.path}: left out: {line}")


def require_faces(records: Records) -> None:
    """Look at a few images before long work, for a fault of them all.

    Raises:
        CorruptRecordError: of the whole data set, if each has the same fault.
    """
    problems = set()
    for row in np.unique(np.linspace(0, len(records) - 1, LOOKED_AT).astype(int)).tolist():
        try:
            records.face(row)
            return
        except CorruptRecordError as error:
            problems.add(error.problem)
    if len(problems) == 1 and len(records) > 1:
        raise CorruptRecordError(
            f"every image that was looked at: {problems.pop()}",
            path=records.path,
            remedy="if they are faces of another size, `gkd records pack RECORDS OUT --resize` "
            "makes a pack of them",
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
