"""Verification sets: files of other programs are read, hostile ones refused without running."""

import io
import os
import pickle
import re
import resource
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.trainer.evaluation.bin_file import load_verification_set, write_verification_set
from tests.paths import SHARED_DATA, needs_shared_data

ISSAME = np.arange(10) % 3 == 0


def encoded(seed: int, size: int = 112, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


IMAGES = [encoded(seed) for seed in range(20)]


def save(folder: Path, content: Any, protocol: int = 2) -> Path:
    path = folder / "set.bin"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def test_a_written_set_reads_back_and_is_what_arcface_torch_reads(tmp_path: Path) -> None:
    path = tmp_path / "faces.bin"
    write_verification_set(path, IMAGES, ISSAME)
    read = load_verification_set(path)
    assert (read.name, list(read.images), read.issame.tolist()) == (
        "faces",
        IMAGES,
        ISSAME.tolist(),
    )
    assert read.image(3).shape == (112, 112, 3)
    bins, issame = pickle.loads(path.read_bytes(), encoding="bytes")  # as arcface_torch does
    assert (bins, issame) == (IMAGES, ISSAME.tolist())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["bytes", "arrays"])
def test_every_protocol_is_read(tmp_path: Path, protocol: int, kind: str) -> None:
    bins: list[Any] = list(IMAGES)
    truths: Any = ISSAME.tolist()
    if kind == "arrays":
        bins = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
        truths = [np.bool_(same) for same in ISSAME] if protocol % 2 else ISSAME
    read = load_verification_set(save(tmp_path, (bins, truths), protocol))
    assert list(read.images) == IMAGES
    np.testing.assert_array_equal(read.issame, ISSAME)


@pytest.mark.parametrize("protocol", [2, 4])
def test_module_names_of_numpy_1_are_read(tmp_path: Path, protocol: int) -> None:
    path = save(tmp_path, ([np.frombuffer(i, np.uint8).copy() for i in IMAGES], ISSAME), protocol)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    content = path.read_bytes()
    assert new in content
    if protocol == 4:  # strings carry their length
        new, old = b"\x8c\x16" + new, b"\x8c\x15" + old
        content = b"\x80\x04" + content[11:]  # without the frame, whose length changes
    path.write_bytes(content.replace(new, old))
    assert list(load_verification_set(path).images) == IMAGES


def python_2_pickle(images: list[bytes], issame: list[bool]) -> bytes:
    """Opcodes that Python 2 writes: byte strings as BINSTRING, truths as NEWTRUE and NEWFALSE."""
    bins = b"".join(b"T" + struct.pack("<I", len(image)) + image for image in images)
    truths = b"".join(b"\x88" if same else b"\x89" for same in issame)
    return b"\x80\x02](" + bins + b"e](" + truths + b"e\x86."


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float32", ">i4"])
def test_truths_of_any_number(tmp_path: Path, dtype: str, protocol: int) -> None:
    truths = ISSAME.astype(dtype)
    for given in (truths, list(truths), truths.tolist()):
        read = load_verification_set(save(tmp_path, (IMAGES, given), protocol))
        np.testing.assert_array_equal(read.issame, ISSAME)


def test_images_as_columns_and_decoded(tmp_path: Path) -> None:
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in IMAGES]
    read = load_verification_set(save(tmp_path, (pixels, ISSAME), 4))
    np.testing.assert_array_equal(read.image(7), pixels[7])
    columns = [np.frombuffer(image, np.uint8).reshape(-1, 1).copy() for image in IMAGES]
    assert list(load_verification_set(save(tmp_path, (columns, ISSAME), 4)).images) == IMAGES


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}(K\x01\x85" + b"2\x86" * 60 + b"K\x00u.",
        b"\x80\x02N" + b"\x85" * 2_000_000 + b".",
        b"\x80\x02c_codecs\nencode\nX\x00\x01\x00\x00"
        + b"a" * 256
        + b"q\x00\x85R"
        + b"c_codecs\nencode\n("
        + b"h\x00" * 100_000
        + b"tR.",
    ],
)
def test_pickles_that_cost_more_than_their_size(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "bomb.bin"
    path.write_bytes(pickled)
    with pytest.raises(CorruptRecordError, match=r"one that (refers|nests)"):
        load_verification_set(path)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    path.write_bytes(python_2_pickle(IMAGES, ISSAME.tolist()))
    read = load_verification_set(path)
    assert list(read.images) == IMAGES
    np.testing.assert_array_equal(read.issame, ISSAME)


PYTHON_2 = Path.home() / ".pyenv/versions/2.7.18/bin/python2.7"


@pytest.mark.skipif(not PYTHON_2.exists(), reason="no Python 2.7 on this machine")
@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_an_installed_python_2_are_read(tmp_path: Path, protocol: int) -> None:
    for number, image in enumerate(IMAGES):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    script = (
        "import pickle; bins = [open('%d.jpg' % i, 'rb').read() for i in range(20)]\n"
        f"pickle.dump((bins, {ISSAME.tolist()}), open('old.bin', 'wb'), {protocol})"
    )
    subprocess.run([PYTHON_2, "-c", script], cwd=tmp_path, check=True)
    read = load_verification_set(tmp_path / "old.bin")
    assert list(read.images) == IMAGES
    np.testing.assert_array_equal(read.issame, ISSAME)


class Call:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    """Pickles that would create ``marker`` or run code, by the name that must be refused."""
    code = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": pickle.dumps(Call(os.system, f"touch {marker}"), 2),
        "builtins.eval": pickle.dumps(([Call(eval, code)], [True]), 4),
        "builtins.exec": pickle.dumps(([Call(exec, code)], [True]), 4),
        "builtins.getattr": pickle.dumps(Call(getattr, "", "format"), 4),
        "numpy.load": b"cnumpy\nload\n(S'" + str(marker).encode() + b"'\ntR.",
        "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n(tR.",
        "numpy.f2py.diagnose.run": b"cnumpy.f2py.diagnose\nrun\n(tR.",
        # A dotted name would be resolved by attributes: in protocol 4 find_class may do that.
        "_codecs.encode.__self__": b"\x80\x04\x8c\x07_codecs\x8c\x0fencode.__self__\x93.",
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        # The INST opcode looks up its class in the same way.
        "os.system": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n(tR.",
        "_codecs.encode to 'rot13'": b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR.",
        "a numpy array of dtype 'O8'": pickle.dumps(([], np.array([{}, None])), 2),
        "a numpy array of dtype 'c16'": pickle.dumps(([], np.zeros(3, complex)), 5),
        "a numpy array of objects": b"\x80\x02cnumpy\nndarray\n)\x81"
        b"(K\x01)cnumpy\ndtype\nU\x02u1\x85R\x89]tb.",
        "a numpy scalar of objects": b"cnumpy.core.multiarray\nscalar\n(NNtR.",
    }


@pytest.mark.parametrize("forbidden", hostile(Path("/marker")))
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path: Path, forbidden: str) -> None:
    marker = tmp_path / "broken-in"
    path = tmp_path / "hostile.bin"
    path.write_bytes(hostile(marker)[forbidden])
    with pytest.raises(CorruptRecordError, match=re.escape(f"asks for {forbidden}, ")) as caught:
        load_verification_set(path)
    assert str(path) in str(caught.value)
    assert "nothing of it was run; " in str(caught.value)
    runs_code = forbidden.startswith(("os.", "posix.", "builtins."))
    assert ("would have run code" in str(caught.value)) == runs_code
    assert ("write it as pickle.dump((images, truths), file)" in str(caught.value)) != runs_code
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"c_codecs\nencode\n}X\x0c\0\0\0__defaults__NsNtb.",
        b"\x80\x02cnumpy\ndtype\n}X\x07\0\0\0__new__Nsb.",
        b"\x80\x02cnumpy\nndarray\n)\x81N}X\x05\0\0\0_fillNs\x86b.",
    ],
)
def test_state_cannot_change_the_reader(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "hostile.bin"
    path.write_bytes(pickled)
    with pytest.raises(CorruptRecordError, match="expected a pickle of"):
        load_verification_set(path)
    write_verification_set(tmp_path / "good.bin", IMAGES, ISSAME)
    assert len(load_verification_set(tmp_path / "good.bin")) == 10


@pytest.mark.parametrize("pickled", [b"\x80\x02Nr\0\0\0\x400.", b"Np1073741824\n0."])
def test_a_high_memo_slot_allocates_no_memory(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "hostile.bin"
    path.write_bytes(pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptRecordError, match="expected a pickle of"):
        load_verification_set(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bins": []}, "expected a pair of .images, truth values., got dict"),
        ((IMAGES, {}), "expected a list of truth values, got dict"),
        ((IMAGES, [True, 2] * 5), "expected a truth value .*for pair 1, got int"),
        (([*IMAGES[:19], "text"], [True] * 10), "expected image 19 as bytes, got str"),
        (([*IMAGES[:19], np.zeros(2, bool)], [True] * 10), "expected image 19 as bytes, got array"),
        ((IMAGES[:18], ISSAME), "expected 2 images per pair, got 18 images for 10 pairs"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CorruptRecordError, match=message) as caught:
        load_verification_set(save(tmp_path, content))
    assert "pickle.dump((images, truths), file)" in str(caught.value) or "pairs" in message


@pytest.mark.parametrize(
    "content",
    [
        {"bins": IMAGES, "issame": ISSAME.tolist()},
        (ISSAME.tolist(), IMAGES),
        (IMAGES, ISSAME.tolist(), ["name"] * len(ISSAME)),
        ([io.BytesIO(image) for image in IMAGES], ISSAME.tolist()),
    ],
    ids=["dict", "swapped", "with names", "BytesIO"],
)
def test_other_arrangements_are_read(tmp_path: Path, content: Any) -> None:
    found = load_verification_set(save(tmp_path, content))
    assert list(found.images) == IMAGES
    assert found.issame.tolist() == ISSAME.tolist()


@pytest.mark.parametrize("issame", [np.ones(10, bool), np.zeros(10, bool), ISSAME[:9]])
def test_too_few_pairs_are_refused(tmp_path: Path, issame: Any) -> None:
    images = IMAGES[: 2 * len(issame)]
    with pytest.raises(
        ConfigError, match=r"at least 10 pairs .one per fold., both genuine and impostor ones, got"
    ):
        load_verification_set(save(tmp_path, (images, issame)))
    with pytest.raises(ConfigError, match="use a larger verification set"):
        write_verification_set(tmp_path / "out.bin", images, issame)
    assert not (tmp_path / "out.bin").exists()


def test_writer_refuses_counts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 2 images per pair, got 19 images for 10 pairs"):
        write_verification_set(tmp_path / "out.bin", IMAGES[:19], ISSAME)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lfw.bin: expected a verification set .*check the path"):
        load_verification_set(tmp_path / "lfw.bin")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    full = python_2_pickle(IMAGES, ISSAME.tolist())
    path = tmp_path / "short.bin"
    for length in [1, 5, len(full) // 2, len(full) - 3, len(full) - 1]:
        path.write_bytes(full[:length])
        with pytest.raises(CorruptRecordError, match=r"short.bin: .*the file is damaged"):
            load_verification_set(path)


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    images = [encoded(0, kind="PNG"), *IMAGES[1:4], b"no image", encoded(5, size=96), *IMAGES[6:]]
    read = load_verification_set(save(tmp_path, (images, ISSAME)))
    assert read.image(0).shape == (112, 112, 3)
    with pytest.raises(CorruptRecordError, match=r"set.bin, image 4 of 20 \(pair 2\): "):
        read.image(4)
    with pytest.raises(CorruptRecordError, match=r"image 5 .*expected .*112x112 pixels, got 96x96"):
        read.image(5)


@needs_shared_data
def test_a_real_set_is_read() -> None:
    read = load_verification_set(SHARED_DATA / "lfw/lfw_fold9.bin")
    assert (read.name, len(read), len(read.images)) == ("lfw_fold9", 600, 1200)
    assert read.issame.sum() == 300
    assert read.image(1199).shape == (112, 112, 3)


def test_an_address_in_the_settings_is_no_local_path() -> None:
    with pytest.raises(ConfigError, match="expected a local path, got the address s3:/b/lfw"):
        load_verification_set(Path("s3://b/lfw.bin"))
