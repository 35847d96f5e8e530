"""Encoded images to pixels, and to digests that name them."""

import hashlib
import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from gkd.storage.errors import CorruptRecordError
from gkd.storage.util.input_files import describe_foreign

FACE_SHAPE = (112, 112, 3)
DIGEST_BYTES = 16
# An image of a few kilobytes can claim gigabytes of pixels; faces are far smaller.
MAX_PIXELS = 1 << 26
JPEG_START = b"\xff\xd8\xff"
# Only these: Pillow's decoders of other formats are far less guarded.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


def decode(encoded: bytes | memoryview) -> npt.NDArray[np.uint8]:
    """Pixels of an encoded image, RGB uint8 [H, W, 3]; grey images are repeated over channels.

    JPEG as libjpeg decodes it by default (exact DCT, smooth chroma), so pixels equal those that
    MXNet, OpenCV and Pillow see; PNG, BMP and WebP by Pillow. Alpha is dropped.

    Raises:
        CorruptRecordError: for anything else, a damaged image, more than 8 bits per channel, or
            more than ``MAX_PIXELS``. The message does not name the location: the caller knows it.
    """
    try:
        if bytes(encoded[:3]) == JPEG_START:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
            _check_pixels(int(width), int(height))
            if colorspace not in ("CMYK", "YCCK"):  # only Pillow converts these two to RGB
                pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
                return pixels
        return _decode_by_pillow(encoded)
    except CorruptRecordError:
        raise
    # Pillow's decoders raise almost any exception on damaged bytes.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
            reason = f"none of {', '.join(PILLOW_FORMATS)}"
        if encoded and (foreign := describe_foreign(bytes(encoded[:512]))):
            raise CorruptRecordError(
                expected="an encoded image",
                got=foreign.found,
                remedy=foreign.remedy,
            ) from error
        raise CorruptRecordError(
            f"expected an encoded image, got {len(encoded)} bytes starting "
            f"{bytes(encoded[:8]).hex() or 'nowhere'} ({reason})"
        ) from error


def decode_face(encoded: bytes | memoryview, where: str | None = None) -> npt.NDArray[np.uint8]:
    """Pixels of an aligned face, RGB uint8 [112, 112, 3]; ``where`` is its location for errors.

    Raises:
        CorruptRecordError: if the image cannot be decoded or has another size; the caller may add
            a remedy.
    """
    try:
        pixels = decode(encoded)
    except CorruptRecordError as error:
        error.path = where
        raise
    if pixels.shape != FACE_SHAPE:
        height, width, _ = pixels.shape
        raise CorruptRecordError(
            path=where, expected="an aligned face of 112x112 pixels", got=f"{width}x{height}"
        )
    return pixels


def digest(encoded: bytes | memoryview) -> bytes:
    """The blake2b digest of an encoded image, 16 bytes, by which caches know it."""
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).digest()


def _decode_by_pillow(encoded: bytes | memoryview) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
        _check_pixels(*image.size)
        if image.mode not in EIGHT_BIT_MODES:
            raise CorruptRecordError(
                f"expected at most 8 bits a channel, got {image.format} of mode {image.mode}"
            )
        if "transparency" in image.info:
            # Pillow warns if a transparent palette is converted to RGB directly.
            return np.asarray(image.convert("RGBA").convert("RGB"))
        return np.asarray(image.convert("RGB"))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise CorruptRecordError(
            f"expected at most {MAX_PIXELS} pixels, got an image of {width}x{height}"
        )
