from pathlib import Path

import numpy as np
import pytest

from gkd.storage.records.base import Subset
from gkd.storage.records.check import records_info, verify_records
from gkd.storage.records.open import open_records
from tests.paths import SHARED_DATA, needs_shared_data
from tests.storage.records.packs import insightface_records, jpeg, payload, write_folder, write_pack


@needs_shared_data
def test_the_lfw_pack_has_no_fault() -> None:
    sample = Subset(open_records(SHARED_DATA / "lfw"), np.arange(0, 10_562, 20))
    report = verify_records(sample, workers=2)
    assert (report.images, report.faults) == (529, ())
    assert report.identities == len(np.unique(sample.labels))


@needs_shared_data
def test_facts_of_the_lfw_pack() -> None:
    info = records_info(open_records(SHARED_DATA / "lfw"))
    assert (info.layout, info.indexed, info.label_order) == ("insightface", True, "recordio")
    assert (info.images, info.num_classes, info.identities) == (10_562, 4_859, 4_859)
    assert (info.labels, info.unreadable, info.image_size) == ((0, 4_858), 0, (112, 112))
    assert 0 < info.bytes < (SHARED_DATA / "lfw/train.rec").stat().st_size
    assert info.images_per_identity[0] == 1
    assert info.images_per_identity[50] == 1


def test_every_fault_of_a_pack_is_listed(tmp_path: Path) -> None:
    packed = insightface_records([2, 1, 3])
    packed[2] = payload(0, b"no image")
    packed[3] = payload(5, jpeg(3))
    packed[4] = payload(2, jpeg(4, (100, 112)))
    packed[5] = payload(2, b"")
    pack = write_pack(tmp_path, packed, classes=3)
    content = bytearray(pack.read_bytes())
    content[40] ^= 1  # the magic of key 1, after the 40 bytes of key 0
    pack.write_bytes(content)
    report = verify_records(open_records(tmp_path), workers=3)
    assert (report.images, report.identities) == (6, 2)
    expected = [
        "key 1, offset 40: expected magic",
        "key 2, ",
        "key 3, ",
        "key 4, ",
        "key 5, ",
    ]
    assert len(report.faults) == 5
    for fault, start in zip(report.faults, expected, strict=True):
        assert str(fault).startswith(f"{pack}, {start}")
    reasons = ["magic", "got 8 bytes", "from 0 to 2, got label 5", "got 100x112", "got 0 bytes"]
    for fault, reason in zip(report.faults, reasons, strict=True):
        assert reason in str(fault)
        assert "records verify" not in str(fault), "this is that command's own list"
    info = records_info(open_records(tmp_path))
    assert (info.unreadable, info.image_size, info.identities) == (2, None, 2)


def test_every_fault_of_a_folder_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"a/1.jpg": jpeg(1), "a/2.jpg": b"junk", "b/1.jpg": jpeg(2), "b/2.jpg": jpeg(3, (8, 8))}
    records = open_records(write_folder(tmp_path, files))
    (tmp_path / "b/1.jpg").unlink()
    report = verify_records(records, workers=2)
    assert (report.images, report.identities, len(report.faults)) == (4, 2, 3)
    junk, missing, small = map(str, report.faults)
    assert "key a/2.jpg: expected an encoded image, got 4 bytes" in junk
    assert "key b/1.jpg: expected a readable file" in missing
    assert "key b/2.jpg: expected an aligned face of 112x112 pixels, got 8x8" in small
    assert "verify records: 4/4" in capsys.readouterr().err


def test_facts_of_a_folder(tmp_path: Path) -> None:
    files = {f"a/{key}.jpg": jpeg(key) for key in range(9)} | {"b/1.jpg": jpeg(0)}
    records = open_records(write_folder(tmp_path / "faces", files), sort="plain")
    info = records_info(records)
    assert (info.name, info.layout, info.indexed) == ("faces", "folder", True)
    assert (info.label_order, info.labels, info.bytes) == (
        "plain",
        (0, 1),
        sum(map(len, files.values())),
    )
    assert info.images_per_identity == {0: 1, 5: 1.4, 25: 3, 50: 5, 75: 7, 95: 8.6, 100: 9}
    assert info.fingerprint == records.fingerprint
