import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.images import MAX_PIXELS, conversions, decode, decode_face, digest
from tests.storage.records.packs import jpeg


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_those_of_libjpegs_exact_decoding(
    subsampling: int, progressive: bool
) -> None:
    content = encoded(noise(), "JPEG", subsampling=subsampling, progressive=progressive)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image)
    np.testing.assert_array_equal(decode(content), expected)
    np.testing.assert_array_equal(decode(memoryview(content)), expected)


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    pixels = decode(encoded(noise("L"), "JPEG"))
    assert pixels.shape == (12, 16, 3)
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_pixels_are_exact(mode: str) -> None:
    image = noise(mode)
    pixels = decode(encoded(image, "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_a_transparent_palette_is_decoded_without_alpha() -> None:
    image = noise("P")
    pixels = decode(encoded(image, "PNG", transparency=b"\x00\x80\xff"))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["BMP", "WEBP"])
def test_other_lossless_formats(kind: str) -> None:
    pixels = decode(encoded(noise(), kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(pixels, np.asarray(noise()))


def test_every_pixel_is_that_of_opencv() -> None:
    """``opencv.npz`` holds the files of ``make_opencv_pixels.py`` and what OpenCV decoded."""
    with np.load(Path(__file__).with_name("opencv.npz")) as archive:
        names = [name.removesuffix(".file") for name in archive if name.endswith(".file")]
        assert len(names) > 40
        for name in names:
            content = archive[f"{name}.file"].tobytes()
            np.testing.assert_array_equal(decode(content), archive[name], err_msg=name)


def test_what_is_done_to_an_image_is_named() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert conversions(encoded(noise(), "JPEG")) == []
    assert conversions(encoded(noise(), "JPEG", exif=exif)) == ["turned by its EXIF orientation"]
    assert conversions(encoded(noise(), "TIFF", tiffinfo={274: 3})) == [
        "turned by its EXIF orientation"
    ]
    assert conversions(encoded(noise("L"), "PNG")) == ["grey to RGB"]
    assert conversions(encoded(noise("CMYK"), "JPEG")) == ["CMYK to RGB"]


@pytest.mark.parametrize("cut", [2, 1])
def test_a_jpeg_is_whole_without_its_end_marker(cut: int) -> None:
    content = encoded(noise(), "JPEG")
    np.testing.assert_array_equal(decode(content[:-cut]), decode(content))
    with pytest.raises(CorruptRecordError, match="starting ffd8ffe0"):
        decode(content[: -cut - 40])


def test_stray_bytes_before_a_scan_do_not_hide_a_bomb_of_scans() -> None:
    content = encoded(noise(), "JPEG", progressive=True)
    first, last = content.index(b"\xff\xda"), content.rindex(b"\xff\xda")
    bomb = content[:first] + bytes(3) + content[first:-2] + content[last:-2] * 600 + b"\xff\xd9"
    with pytest.raises(CorruptRecordError, match="expected at most 500 scans"):
        decode(bomb)


@pytest.mark.parametrize("lost", [20, 200])
def test_scan_data_that_end_early_before_the_end_marker_are_read_as_by_opencv(lost: int) -> None:
    content = jpeg(0)
    whole, pixels = decode(content), decode(content[: -lost - 2] + content[-2:])
    np.testing.assert_array_equal(pixels[:8], whole[:8])
    assert (pixels != whole).any()


def test_a_damaged_exif_block_turns_nothing() -> None:
    content = encoded(noise(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    np.testing.assert_array_equal(decode(content), decode(encoded(noise(), "JPEG")))


def test_the_size_of_a_face_is_read_before_its_pixels() -> None:
    with pytest.raises(CorruptRecordError, match=r"expected an aligned face .*, got 8000x8000$"):
        decode_face(png_claiming(8000, 8000))  # there are no pixels behind the header


def test_endless_scans_are_refused() -> None:
    content = encoded(noise(), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    bomb = content[:-2] + content[start:-2] * 600 + b"\xff\xd9"
    with pytest.raises(CorruptRecordError, match="expected at most 500 scans, got a JPEG of 6"):
        decode(bomb)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def jpeg_claiming(width: int, height: int) -> bytes:
    content = jpeg(0)
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected an encoded image, got 0 bytes starting nowhere"),
        (
            b"no image at all",
            r"got 15 bytes starting 6e6f20696d616765 \(none of JPEG, PNG, .*\)$",
        ),
        (jpeg(0)[:400], r"expected an encoded image, got 400 bytes starting ffd8ffe0"),
        (jpeg(0)[:-200], r"expected an encoded image, .* starting ffd8ffe0"),
        (encoded(noise(), "PNG")[:-300], r"expected an encoded image, .* starting 89504e47"),
        (encoded(noise(), "ICO"), r"expected an encoded image, .* starting 000001"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"expected an encoded image"),
        (
            encoded(noise().quantize(16), "GIF", transparency=3),
            r"expected 8 bits a channel, .*, and no transparent palette, got GIF of transparency",
        ),
        (jpeg_claiming(65000, 65000), rf"at most {MAX_PIXELS} pixels, got an image of 65000x65000"),
        (png_claiming(9000, 9000), rf"at most {MAX_PIXELS} pixels, got an image of 9000x9000"),
        (png_claiming(60000, 60000), r"expected an encoded image, .* decompression bomb"),
    ],
)
def test_invalid_images_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(CorruptRecordError, match=message):
        decode(content)


def test_errors_of_a_face_name_its_location() -> None:
    assert decode_face(jpeg(3), "here").shape == (112, 112, 3)
    with pytest.raises(
        CorruptRecordError, match=r"^here: expected an aligned face of 112x112 pixels, got 96x112$"
    ):
        decode_face(jpeg(3, (96, 112)), "here")
    with pytest.raises(CorruptRecordError, match=r"^here: expected an encoded image, got 4 bytes"):
        decode_face(b"junk", "here")


def test_digest_is_blake2b_of_sixteen_bytes() -> None:
    assert digest(memoryview(b"x")) == hashlib.blake2b(b"x", digest_size=16).digest()
