import os
from pathlib import Path

import pytest

from gkd.storage.errors import ConfigError, CorruptRecordError
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
    assert (records.name, records.label_order, records.num_classes) == ("faces", sort, 4)
    assert [records.key(row) for row in range(len(records))] == expected
    folders = list(dict.fromkeys(name.partition("/")[0] for name in expected))
    assert records.labels.tolist() == [folders.index(name.partition("/")[0]) for name in expected]
    assert records.sizes.tolist() == [len(name) for name in expected]
    assert [bytes(records.encoded(row)).decode() for row in range(5)] == expected
    assert records.where(1) == f"{root}, key {expected[1]}"


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
