"""Encoded images to pixels, and to digests that name them."""

import hashlib
import io
import re
from collections.abc import Callable

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
# Pillow's decoders of other formats are far less guarded.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000")
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
# Progressive encoders write about ten; each costs time for the full image.
MAX_SCANS = 500
MAX_SCAN_PIXELS = 1 << 30
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_EXIF = b"Exif\x00\x00"
_ORIENTATION = 274
_UPRIGHT = 1
# Of libjpeg, which has every pixel then.
_STRAY = re.compile(r"extraneous bytes before marker")
_TURNS: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90,
}


def decode(
    encoded: bytes | memoryview, shape: tuple[int, int, int] | None = None
) -> npt.NDArray[np.uint8]:
    """Pixels of an encoded image, RGB uint8 [H, W, 3], equal to OpenCV's (``IMREAD_COLOR``).

    So it is turned upright by its EXIF orientation, grey is repeated over the channels, alpha is
    dropped, CMYK becomes RGB by OpenCV's formula, and of 16 bits the upper 8 stay. A JPEG without
    its end marker or with stray bytes between its segments is whole; one that lacks data is not.

    Raises:
        CorruptRecordError: for anything else, a damaged image, one that is not of ``shape`` if that
            is given, or one of more than ``MAX_PIXELS``. The message does not name the location:
            the caller knows it.
    """
    try:
        if bytes(encoded[:3]) != JPEG_START:
            return _decode_by_pillow(encoded, shape)
        try:
            return _decode_jpeg(bytes(encoded), shape)
        except ValueError as error:
            if not _STRAY.search(str(error)):
                raise
            return _decode_by_pillow(encoded, shape)  # its libjpeg skips them
    except CorruptRecordError:
        raise
    # Pillow's decoders raise almost any exception on damaged bytes.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
            reason = f"none of {', '.join(PILLOW_FORMATS)}"
        if encoded and (foreign := describe_foreign(bytes(encoded[:512]))):
            raise CorruptRecordError(
                expected="an encoded image", got=foreign.found, remedy=foreign.remedy
            ) from error
        raise CorruptRecordError(
            f"expected an encoded image, got {len(encoded)} bytes starting "
            f"{bytes(encoded[:8]).hex() or 'nowhere'} ({reason})"
        ) from error


def conversions(encoded: bytes | memoryview) -> list[str]:
    """What ``decode`` does to an image that it can decode, beside decoding; for people."""
    found = []
    with Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
        if _orientation(bytes(encoded), image) != _UPRIGHT:
            found.append("turned by its EXIF orientation")
        if image.mode in ("CMYK", "YCbCr"):
            found.append(f"{image.mode} to RGB")
        elif image.mode.startswith("I"):
            found.append("16 to 8 bits, grey to RGB")
        elif image.mode in ("1", "L", "LA"):
            found.append("grey to RGB")
        elif image.mode in ("P", "PA"):
            found.append("palette to RGB")
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            found.append("transparency dropped")
    if bytes(encoded[:3]) == JPEG_START and bytes(encoded[-2:]) != _END:
        found.append("bytes after its end, or no end marker")
    return found


def decode_face(encoded: bytes | memoryview, where: str | None = None) -> npt.NDArray[np.uint8]:
    """Pixels of an aligned face, RGB uint8 [112, 112, 3]; ``where`` is its location for errors.

    Raises:
        CorruptRecordError: if the image cannot be decoded or has another size; the caller may add
            a remedy.
    """
    try:
        return decode(encoded, FACE_SHAPE)
    except CorruptRecordError as error:
        error.path = where
        raise


def digest(encoded: bytes | memoryview) -> bytes:
    """The blake2b digest of an encoded image, 16 bytes, by which caches know it."""
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).digest()


def _decode_jpeg(encoded: bytes, shape: tuple[int, int, int] | None) -> npt.NDArray[np.uint8]:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    orientation = _orientation(encoded)
    _check_size(int(width), int(height), orientation, shape)
    _check_scans(encoded, int(width), int(height))
    space = "CMYK" if colorspace in ("CMYK", "YCCK") else "RGB"
    # What libjpeg warns of is no damage: OpenCV reads it. But without an end marker behind its last
    # scan an image may be cut short, and libjpeg would fill it up with grey.
    ended = encoded.rfind(_END) > encoded.rfind(_SCAN)
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
        encoded if ended else encoded + _END, space, strict=not ended
    )
    if space == "CMYK":
        pixels = _cmyk_to_rgb(pixels)
    return _turned(pixels, orientation)


def _decode_by_pillow(
    encoded: bytes | memoryview, shape: tuple[int, int, int] | None
) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
        # Pillow turns TIFFs itself.
        orientation = _UPRIGHT if image.format == "TIFF" else _orientation(b"", image)
        _check_size(*image.size, orientation, shape)
        if image.format == "JPEG":
            _check_scans(bytes(encoded), *image.size)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return _turned(np.repeat(grey[..., None], 3, axis=2), orientation)
        if image.format == "TIFF" and image.mode == "RGBA":  # libtiff multiplies by its alpha
            rgba = np.asarray(image).astype(np.uint16)
            return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
        alpha = (image.format == "TIFF" and image.mode == "PA") or (
            image.format == "GIF" and "transparency" in image.info
        )
        deep = image.format == "PPM" and b"65535" in bytes(encoded[:64])
        if image.mode not in EIGHT_BIT_MODES or alpha or deep:
            got = "transparency" if alpha else "16 bits" if deep else f"mode {image.mode}"
            raise CorruptRecordError(
                expected="8 bits a channel, or 16 of grey, and no transparent palette",
                got=f"{image.format} of {got}",
            )
        if image.mode == "CMYK":  # as libtiff converts it
            inks, black = np.split(255 - np.asarray(image, np.int32), [3], axis=2)
            return (inks * black // 255).astype(np.uint8)
        if "transparency" in image.info:
            # Pillow warns if a transparent palette is converted to RGB directly.
            return _turned(np.asarray(image.convert("RGBA").convert("RGB")), orientation)
        return _turned(np.asarray(image.convert("RGB")), orientation)


def _check_scans(encoded: bytes, width: int, height: int) -> None:
    """Refuse a JPEG of kilobytes whose scans each pass over all pixels again, for minutes."""
    scans = encoded.count(_SCAN)
    if scans > MAX_SCANS or scans * width * height > MAX_SCAN_PIXELS:
        raise CorruptRecordError(
            f"expected at most {MAX_SCANS} scans, got a JPEG of {scans} over "
            f"{width}x{height} pixels"
        )


def _orientation(encoded: bytes, image: Image.Image | None = None) -> int:
    """The EXIF orientation, 1 to 8, of a JPEG or of an ``image`` that Pillow opened."""
    if image is not None and image.format == "TIFF":
        return int(image.getexif().get(_ORIENTATION, _UPRIGHT))
    block = image.info.get("exif", b"") if image is not None else _exif_block(encoded)
    if not block:
        return _UPRIGHT
    try:
        exif = Image.Exif()
        exif.load(block)
        orientation = exif.get(_ORIENTATION, _UPRIGHT)
    except Exception:  # whatever a damaged block makes Pillow raise: it turns nothing
        return _UPRIGHT
    return orientation if orientation in _TURNS else _UPRIGHT


def _exif_block(encoded: bytes) -> bytes:
    """The EXIF segment of a JPEG; empty if it has none."""
    if _EXIF not in encoded:
        return b""
    position = 2
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker, length = encoded[position + 1], int.from_bytes(encoded[position + 2 : position + 4])
        segment = encoded[position + 4 : position + 2 + length]
        if marker == 0xE1 and segment.startswith(_EXIF):
            return segment
        if marker == _SCAN[1]:
            break
        position += 2 + length
    return b""


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _cmyk_to_rgb(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Inverted CMYK uint8 [H, W, 4], as Adobe writes it, to RGB in OpenCV's integer arithmetic."""
    inks, black = pixels[..., :3].astype(np.int32), pixels[..., 3:].astype(np.int32)
    return (black - ((255 - inks) * black >> 8)).astype(np.uint8)


def _check_size(
    width: int, height: int, orientation: int, shape: tuple[int, int, int] | None
) -> None:
    """Look at the size in the header, before memory is taken for pixels."""
    if orientation > 4:  # turned by a quarter
        width, height = height, width
    if shape is not None and (height, width) != shape[:2]:
        raise CorruptRecordError(
            expected=f"an aligned face of {shape[1]}x{shape[0]} pixels", got=f"{width}x{height}"
        )
    if width * height > MAX_PIXELS:
        raise CorruptRecordError(
            f"expected at most {MAX_PIXELS} pixels, got an image of {width}x{height}"
        )
