import io
import os
from pathlib import Path

import pytest
from PIL import Image

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.check import verify_records
from gkd.storage.records.folder import ImageFolder, Sort
from gkd.storage.records.open import open_records
from tests.storage.records.packs import jpeg, write_folder

NAMES = ["10/b10.jpg", "10/b9.jpg", "9/x.PNG", "B/1.jpeg", "a/1.webp", "a/1.txt", "empty/readme"]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("natural", ["9/x.PNG", "10/b9.jpg", "10/b10.jpg", "a/1.webp", "B/1.jpeg"]),
        ("plain", ["10/b10.jpg", "10/b9.jpg", "9/x.PNG", "B/1.jpeg", "a/1.webp"]),
    ],
)
def test_identities_and_files_are_sorted(tmp_path: Path, sort: Sort, expected: list[str]) -> None:
    root = write_folder(tmp_path / "faces", {name: name.encode() for name in NAMES})
    (root / ".hidden").mkdir()
    (root / "list.txt").write_text("")
    records = open_records(root, sort=sort)
    assert isinstance(records, ImageFolder)
    assert (records.name, records.label_order, records.num_classes) == ("faces", sort, 5)
    assert [records.key(row) for row in range(len(records))] == expected
    folders = list(dict.fromkeys(name.partition("/")[0] for name in expected))
    assert records.labels.tolist() == [folders.index(name.partition("/")[0]) for name in expected]
    assert records.sizes.tolist() == [len(name) for name in expected]
    assert [bytes(records.encoded(row)).decode() for row in range(5)] == expected
    assert records.where(1) == f"{root}, key {expected[1]}"
    assert records.left_out == [
        f"2 files that are no images (.txt): {root}/list.txt, {root}/a/1.txt",
        f"1 files that are no images (no suffix): {root}/empty/readme",
        "1 identities without an image, which keep their class numbers: empty",
    ]


def test_names_beyond_ascii(tmp_path: Path) -> None:
    records = open_records(write_folder(tmp_path, {"Zoë/Å².jpg": jpeg(0), "李/1.jpg": jpeg(1)}))
    assert [records.key(0), records.key(1)] == ["Zoë/Å².jpg", "李/1.jpg"]
    assert records.image(1).shape == (112, 112, 3)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.jpg")).write_bytes(jpeg(0))
    with pytest.raises(ConfigError, match=r"a/\\xff\.jpg': expected a file name in UTF-8; rename"):
        open_records(tmp_path)


def test_a_folder_inside_an_identity_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.jpg": b"", "a/day/2.jpg": b""})
    with pytest.raises(ConfigError, match=r"a/day: expected one folder per identity .* move its"):
        open_records(tmp_path)


def test_an_image_beside_the_identities_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.jpg": b"", "stray.jpg": b""})
    with pytest.raises(ConfigError, match=r"one folder per identity, got the image stray\.jpg"):
        open_records(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "secret", {"1.jpg": b""})
    root = write_folder(tmp_path / "faces", {"a/1.jpg": b""})
    if kind == "file":
        (root / "a/2.jpg").symlink_to(tmp_path / "secret/1.jpg")
    else:
        (root / "b").symlink_to("../secret")
    with pytest.raises(ConfigError, match=r"expected links to stay inside .*, got one to .*secret"):
        open_records(root)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "faces", {"a/1.jpg": jpeg(1)})
    (root / "a/2.jpg").symlink_to("1.jpg")
    (tmp_path / "link").symlink_to("faces")
    records = open_records(tmp_path / "link")
    assert bytes(records.encoded(1)) == jpeg(1)
    assert records.sizes.tolist() == [len(jpeg(1))] * 2


def test_a_changed_or_missing_file_is_reported(tmp_path: Path) -> None:
    records = open_records(write_folder(tmp_path, {"a/1.jpg": b"one", "a/2.jpg": b"two"}))
    (tmp_path / "a/1.jpg").unlink()
    (tmp_path / "a/2.jpg").write_bytes(b"three")
    with pytest.raises(
        CorruptRecordError, match=r"key a/1\.jpg: expected a readable file, got: No such file"
    ):
        records.encoded(0)
    with pytest.raises(CorruptRecordError, match=r"2\.jpg: expected 3 bytes as listed, got 5;"):
        records.encoded(1)


def test_no_image_vanishes_by_its_name(tmp_path: Path) -> None:
    face = Image.open(io.BytesIO(jpeg(0)))
    names = ["a/1.jfif", "a/2", "b/1.tif", "c/1.ppm", "d/1.data", "e/1.heic", "f/1.jpg"]
    root = write_folder(tmp_path / "faces", {name: jpeg(0) for name in names})
    face.save(root / "b/1.tif")
    face.save(root / "c/1.ppm")
    (root / "f/1.jpg").unlink()
    (root / "f/1.jpg").symlink_to("nowhere.jpg")
    (root / "g").mkdir()
    records = open_records(root)
    assert [records.key(row) for row in range(len(records))] == names
    assert records.labels.tolist() == [0, 0, 1, 2, 3, 4, 5]
    report = verify_records(records, workers=1)
    assert [str(fault.path) for fault in report.faults] == [f"{root}, key f/1.jpg"]
    assert records.left_out == ["1 empty folders, which are no identities: g"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], "got folders of splits: train, val; name one of them: "),
        (["Test/1.jpg"], "got folders of splits: Test; name one"),
        (
            ["metadata.csv", "1.jpg"],
            r"whose labels are in a table: .*to_parquet\('train.parquet'\)",
        ),
        (["metadata.jsonl", "00/1.jpg", "01/2.jpg"], "expected one folder .*, got metadata.jsonl"),
        (["data-00000-of-00001.arrow", "state.json"], "got Arrow files of `datasets`; write them"),
        (["train/data-00000-of-00001.arrow"], "got Arrow files of `datasets`"),
        (["faces_lmdb/data.mdb", "faces_lmdb/lock.mdb"], "got an LMDB database"),
        (["ms1m-00000.tfrecord"], "got TFRecord files"),
        (["faces.h5"], "got an HDF5 file"),
        (["lfw/data/__1.blp", "lfw/meta/sizes"], "expected one folder per identity"),
        (["lfw.bin", "cfp_fp.bin"], "got a verification set; evaluate on it"),
    ],
)
def test_other_layouts_are_never_taken_for_identities(
    tmp_path: Path, files: list[str], message: str
) -> None:
    contents = {name: jpeg(0) if name.endswith("jpg") else b"no image" for name in files}
    write_folder(tmp_path, contents)
    with pytest.raises(ConfigError, match=message):
        open_records(tmp_path)
