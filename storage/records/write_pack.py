"""Records of any kind to record packs, which MXNet reads too."""

import itertools
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gkd.storage.cache.writer import delete_leftovers
from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.folder import Sort
from gkd.storage.records.images import FACE_SHAPE, decode_face
from gkd.storage.records.open import Records, open_records
from gkd.storage.records.pack import EXACT_FLOAT32
from gkd.storage.records.recordio import RecordWriter, encode_record
from gkd.storage.util.files import sync_file, sync_folder
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.parallel import ordered_map, row_blocks
from gkd.storage.util.progress import progress


@dataclass(frozen=True)
class Packed:
    """What ``pack`` wrote: the folder, and how much of what stands in it."""

    path: Path
    images: int
    identities: int
    bytes: int


def pack(source: Path, out: Path, *, sort: Sort = "natural", workers: int = 1) -> Packed:
    """Pack records of any kind into ``out/train.rec``, ``train.idx`` and ``property``.

    Where one identity stands after the other, as in an image folder, in the layout of InsightFace:

        key 0                 labels [N + 1, N + 1 + C], no image: where the identity records stand
        keys 1..N             the images in their order, label c
        keys N + 1..N + C     labels [first, last + 1], no image: the image keys of identity c

    Otherwise in that of im2rec, keys 0..N - 1, so that images are read and stay in their order.
    ``property`` is ``C,112,112``.

    Images are copied byte for byte, never encoded again; ``workers`` threads decode them to see
    that each is an aligned face. ``out`` appears when all is written; what a killed run of the
    same name left beside it is deleted. Key 0 counts in float32, as
    the layout wants: beyond 2^24 images it is rounded, and readers count by the index.

    Raises:
        ConfigError: where ``out`` exists or another run is writing it, ``source`` is no records,
            or has classes that float32 labels cannot tell apart.
        CorruptRecordError: for the first record that is no labelled image of 112x112 pixels.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already; remove it or choose another name")
    records = open_records(source, sort=sort)
    if records.num_classes > EXACT_FLOAT32:
        raise ConfigError(
            f"{source}: expected at most {EXACT_FLOAT32:,} identities, which the float32 labels of "
            f"a pack can tell apart, got {records.num_classes:,}; use these records as they are"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with WriteLock(out):
        delete_leftovers(out)
        _write_pack(records, out, workers)
    sync_folder(out.parent)
    size = sum(file.stat().st_size for file in out.iterdir())
    return Packed(out, len(records), records.num_classes, size)


def _write_pack(records: Records, out: Path, workers: int) -> None:
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        with RecordWriter(aside / "train.rec") as writer:
            _write_records(records, writer, workers)
        height, width, _ = FACE_SHAPE
        properties = aside / "property"
        properties.write_text(f"{records.num_classes},{height},{width}\n")
        sync_file(properties)
        sync_folder(aside)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_records(records: Records, writer: RecordWriter, workers: int) -> None:
    count, classes, labels = len(records), records.num_classes, records.labels
    by_identity = bool((labels[1:] >= labels[:-1]).all())

    def checked(rows: range) -> list[memoryview]:
        images = [records.encoded(row) for row in rows]
        for row, encoded in zip(rows, images, strict=True):
            try:
                decode_face(encoded, records.where(row))
            except CorruptRecordError as error:
                raise CorruptRecordError(
                    f"{error}; align or write this image again, or leave it out"
                ) from error
        return images

    if by_identity:
        writer.write(0, encode_record([count + 1, count + 1 + classes], b"", id=0))
    key = first = int(by_identity)
    with progress("pack images", count, "images") as advance:
        for images in ordered_map(checked, row_blocks(count), workers=workers):
            for encoded in images:
                label = float(labels[key - first])
                writer.write(key, encode_record(label, encoded, id=key))
                key += 1
            advance(len(images))
    if not by_identity:
        return
    # The first row of each class bounds its keys.
    firsts = np.searchsorted(labels, np.arange(classes + 1)) + 1
    for first, end in itertools.pairwise(firsts):
        writer.write(key, encode_record([float(first), float(end)], b"", id=key))
        key += 1
