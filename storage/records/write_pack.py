"""Writing records of any form as a record pack, which MXNet can read too."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.base import Records
from gkd.storage.records.check import log_left_out, require_faces
from gkd.storage.records.folder import Sort
from gkd.storage.records.images import FACE_SHAPE, decode
from gkd.storage.records.open import open_records
from gkd.storage.records.pack import EXACT_FLOAT32
from gkd.storage.records.recordio import encode_record, record_writer
from gkd.storage.util.files import delete_temporaries, disk_errors, publish_dir
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.parallel import map_rows
from gkd.storage.util.progress import progress


@dataclass(frozen=True)
class Packed:
    """Result of ``pack``: the folder and its content."""

    path: Path
    images: int
    identities: int
    bytes: int


def pack(
    source: Path, out: Path, *, sort: Sort = "natural", resize: bool = False, workers: int = 1
) -> Packed:
    """Pack records of any form into ``out/train.rec``, ``train.idx`` and ``property``.

    If rows are sorted by identity, as in an image folder, the layout is InsightFace's:

        key 0                 labels [N + 1, N + 1 + C], no image: the keys of the identity records
        keys 1..N             the images in their order, label c
        keys N + 1..N + C     labels [first, last + 1], no image: the image keys of identity c

    Otherwise it is im2rec's, keys 0..N - 1, so that the order of the images is kept. ``property``
    is ``C,112,112``. Key 0 counts in float32, as the layout requires: beyond 2^24 images it is
    rounded, and readers count by the index.

    Images are copied byte for byte; ``workers`` threads decode them to check that each is an
    aligned face. Only with ``resize`` are images of another size brought to 112x112 (Lanczos) and
    encoded again, as JPEG of quality 95 without subsampling. ``out`` appears when everything is
    written; temporary folders of killed runs with the same ``out`` are deleted.

    Raises:
        ConfigError: if ``out`` exists or another run is writing it, or ``source`` holds no records
            or more classes than float32 labels can represent.
        CorruptRecordError: for the first record that is no labelled image of 112x112 pixels.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already; remove it or choose another name")
    records = open_records(source, sort=sort)
    log_left_out(records)
    if not resize:
        require_faces(records)
    if records.num_classes > EXACT_FLOAT32:
        raise ConfigError(
            f"{source}: expected at most {EXACT_FLOAT32:,} identities, which the float32 labels of "
            f"a pack can represent, got {records.num_classes:,}; use these records as they are"
        )
    with disk_errors(out), WriteLock(out):
        delete_temporaries(out.parent, out.name)
        with publish_dir(out) as folder:
            with record_writer(folder / "train.rec") as write:
                _write_records(records, write, workers, resize)
            height, width, _ = FACE_SHAPE
            (folder / "property").write_text(f"{records.num_classes},{height},{width}\n")
    size = sum(file.stat().st_size for file in out.iterdir())
    return Packed(out, len(records), records.num_classes, size)


def _write_records(
    records: Records, write: Callable[[int, bytes], None], workers: int, resize: bool
) -> None:
    count, classes, labels = len(records), records.num_classes, records.labels
    by_identity = bool((labels[1:] >= labels[:-1]).all())

    def read_face(row: int) -> bytes | memoryview:
        try:
            return _resized(records.encoded(row)) if resize else records.face(row)[0]
        except CorruptRecordError as error:
            error.remedy = "align or write this image again, or leave it out"
            raise

    first_key = int(by_identity)
    if by_identity:
        write(0, encode_record([count + 1, count + 1 + classes], b"", id=0))
    with progress("pack images", count, "images") as advance:
        for row, encoded in enumerate(map_rows(read_face, count, workers=workers)):
            key = first_key + row
            write(key, encode_record(float(labels[row]), encoded, id=key))
            advance()
    if by_identity:
        # The first row of each class bounds its keys.
        bounds = np.searchsorted(labels, np.arange(classes + 1)) + 1
        for key, (first, end) in enumerate(itertools.pairwise(bounds), count + 1):
            write(key, encode_record([float(first), float(end)], b"", id=key))


def _resized(encoded: memoryview) -> bytes | memoryview:
    """An image of 112x112 pixels: the same bytes if it is one."""
    pixels = decode(encoded)
    if pixels.shape == FACE_SHAPE:
        return encoded
    height, width, _ = FACE_SHAPE
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    content: bytes = simplejpeg.encode_jpeg(np.asarray(image), 95, colorsubsampling="444")
    return content
