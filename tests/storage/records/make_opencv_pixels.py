"""Writes opencv.npz beside it: images of every form, and the pixels that OpenCV 5.0 decodes.

python make_opencv_pixels.py        needs Pillow and opencv-python-headless>=5.0
"""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 24, 32
COARSE = np.kron(RNG.integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1)))
PIXELS = np.clip(COARSE + RNG.normal(0, 6, COARSE.shape), 0, 255).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
RGB = Image.fromarray(PIXELS)
RGBA = Image.fromarray(np.concatenate([PIXELS, ALPHA], axis=2))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(bits: int, colours: int, channels: int, extra: bytes = b"") -> bytes:
    """A PNG of random samples, of forms that Pillow does not write."""
    row = WIDTH * channels * bits // 8
    raw = b"".join(b"\0" + RNG.bytes(row) for _ in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colours, 0, 0, 0)
    parts = (b"IHDR" + header, extra, b"IDAT" + zlib.compress(raw), b"IEND")
    chunks = (
        struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts if p
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def images() -> Iterator[tuple[str, bytes]]:
    plain = saved(RGB, "JPEG", quality=90)
    scan = plain.index(b"\xff\xda")
    yield "plain.jpg", plain
    yield "progressive.jpg", saved(RGB, "JPEG", progressive=True)
    yield "subsampled.jpg", saved(RGB, "JPEG", subsampling=2)
    yield "grey.jpg", saved(RGB.convert("L"), "JPEG")
    yield "cmyk.jpg", saved(RGB.convert("CMYK"), "JPEG", quality=95)
    yield "rgb.jpg", saved(RGB, "JPEG", keep_rgb=True)
    yield "stray_before_end.jpg", plain[:-2] + b"\x00\x11\x22\xff\xd9"
    yield "stray_before_scan.jpg", plain[:scan] + bytes(3) + plain[scan:]
    yield "more_after_end.jpg", plain + b"more" * 9
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        yield f"turned{orientation}.jpg", saved(RGB, "JPEG", exif=exif)
        yield f"turned{orientation}.png", saved(RGB, "PNG", exif=exif)
        yield f"turned{orientation}.webp", saved(RGB, "WEBP", lossless=True, exif=exif)
        yield f"turned{orientation}.tif", saved(RGB, "TIFF", tiffinfo={274: orientation})
    yield "turned_progressive.jpg", saved(RGB, "JPEG", progressive=True, exif=exif)
    for bits in (1, 2, 4, 8, 16):
        yield f"grey{bits}.png", png(bits, 0, 1)
    yield "rgb16.png", png(16, 2, 3)
    yield "grey_alpha16.png", png(16, 4, 2)
    yield "rgba16.png", png(16, 6, 4)
    yield "transparent_colour.png", png(8, 2, 3, b"tRNS" + bytes(6))
    yield "rgba.png", saved(RGBA, "PNG")
    yield "palette.png", saved(RGB.quantize(40), "PNG")
    yield "transparent_palette.png", saved(RGB.quantize(40), "PNG", transparency=3)
    for mode in ("RGB", "L", "1", "P"):
        image = RGB.quantize(40) if mode == "P" else RGB.convert(mode)
        yield f"{mode}.bmp", saved(image, "BMP")
        yield f"{mode}.tif", saved(image, "TIFF")
    yield "rgba.bmp", saved(RGBA, "BMP")
    yield "cmyk.tif", saved(RGB.convert("CMYK"), "TIFF")
    yield "lzw.tif", saved(RGB, "TIFF", compression="tiff_lzw")
    yield "grey16.tif", saved(Image.fromarray(RNG.integers(0, 65536, (24, 32), np.uint16)), "TIFF")
    yield "lossy.webp", saved(RGB, "WEBP", quality=80)
    yield "transparent.webp", saved(RGBA, "WEBP", quality=80)
    yield "rgb.ppm", saved(RGB, "PPM")
    yield "grey.pgm", saved(RGB.convert("L"), "PPM")
    yield "one.pbm", saved(RGB.convert("1"), "PPM")
    yield "palette.gif", saved(RGB, "GIF")
    yield "lossless.jp2", saved(RGB, "JPEG2000", irreversible=False)


if __name__ == "__main__":
    arrays: dict[str, Any] = {}
    for name, content in images():
        encoded = np.frombuffer(content, np.uint8)
        decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        assert decoded is not None, name
        arrays |= {f"{name}.file": encoded, name: decoded[..., ::-1]}
    np.savez_compressed(Path(__file__).with_name("opencv.npz"), **arrays)
