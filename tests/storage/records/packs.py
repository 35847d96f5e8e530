"""Small packs and folders of images for tests, framed by hand so that they can be damaged."""

import functools
import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MAGIC = 0xCED7230A
Label = float | Sequence[float]


@functools.cache
def jpeg(seed: int, size: tuple[int, int] = (112, 112)) -> bytes:
    """A smooth random JPEG of (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def payload(label: Label, body: bytes, id: int = 0, id2: int = 0) -> bytes:
    """Data of an image record, packed as MXNet's Python code does."""
    if isinstance(label, Sequence):
        labels = struct.pack(f"<{len(label)}f", *label)
        return struct.pack("<IfQQ", len(label), 0, id, id2) + labels + body
    return struct.pack("<IfQQ", 0, label, id, id2) + body


def part(data: bytes, flag: int = 0, magic: int = MAGIC) -> bytes:
    """One framed part, padded."""
    return struct.pack("<II", magic, flag << 29 | len(data)) + data + bytes(-len(data) % 4)


def write_pack(
    folder: Path,
    records: Mapping[int, bytes],
    *,
    order: Sequence[int] | None = None,
    index: bool = True,
    classes: int | None = None,
) -> Path:
    """Write ``records`` {key: data} to ``folder/train.rec`` in the given order of keys."""
    folder.mkdir(parents=True, exist_ok=True)
    content, lines = b"", ""
    for key in order or list(records):
        lines += f"{key}\t{len(content)}\n"
        content += part(records[key])
    (folder / "train.rec").write_bytes(content)
    if index:
        (folder / "train.idx").write_text(lines)
    if classes is not None:
        (folder / "property").write_text(f"{classes},112,112\nsecond line\n")
    return folder / "train.rec"


def insightface_records(identities: Sequence[int]) -> dict[int, bytes]:
    """Records of a pack in InsightFace's layout with the given number of images per identity."""
    count = sum(identities)
    records = {0: payload([count + 1, count + 1 + len(identities)], b"")}
    for label, images in enumerate(identities):
        for _ in range(images):
            key = len(records)
            records[key] = payload(label, jpeg(key), key)
    first = 1
    for images in identities:
        key = len(records)
        records[key] = payload([first, first + images], b"", key)
        first += images
    return records


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files {relative path: content}."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root
