import os
import resource
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.open import open_records
from gkd.storage.records.pack import RecordFile
from gkd.storage.records.recordio import RecordReader, read_index
from gkd.storage.records.write_pack import Packed, pack
from gkd.storage.util.lock import WriteLock
from tests.paths import SHARED_DATA, needs_shared_data
from tests.storage.records.forms import samples, write_tar
from tests.storage.records.packs import insightface_records, jpeg, write_folder, write_pack

# Keys 1 to 6 of insightface_records([2, 1, 3]).
FILES = {
    "2/a.jpg": jpeg(1),
    "2/b.jpg": jpeg(2),
    "10/a.jpg": jpeg(3),
    "11/1.jpg": jpeg(4),
    "11/2.jpg": jpeg(5),
    "11/10.jpg": jpeg(6),
}


def test_a_folder_becomes_a_pack_of_insightfaces_layout(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "faces", FILES)
    out = tmp_path / "new" / "pack"
    packed = pack(folder, out, workers=3)
    written = sum(file.stat().st_size for file in out.iterdir())
    assert packed == Packed(out, images=6, identities=3, bytes=written)
    expected = write_pack(tmp_path / "expected", insightface_records([2, 1, 3]))
    for name in ("train.rec", "train.idx"):
        assert (out / name).read_bytes() == expected.with_name(name).read_bytes()
    assert (out / "property").read_text() == "3,112,112\n"
    records = open_records(out)
    assert isinstance(records, RecordFile)
    assert (records.layout, records.num_classes) == ("insightface", 3)
    assert records.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert [bytes(records.encoded(row)) for row in range(6)] == list(FILES.values())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["expected", "faces", "new"]


def test_plain_order_numbers_identities_by_code_points(tmp_path: Path) -> None:
    pack(write_folder(tmp_path / "faces", FILES), tmp_path / "pack", sort="plain")
    records = open_records(tmp_path / "pack")
    assert records.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert bytes(records.encoded(0)) == FILES["10/a.jpg"]


@needs_shared_data
def test_packing_the_lfw_pack_reproduces_mxnets_bytes(tmp_path: Path) -> None:
    source = SHARED_DATA / "lfw"
    pack(source, tmp_path / "pack", workers=2)
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "pack" / name).read_bytes() == (source / name).read_bytes()


def test_identity_records_bound_the_keys_of_each_identity(tmp_path: Path) -> None:
    pack(write_folder(tmp_path / "faces", FILES), tmp_path / "pack")
    reader = RecordReader(tmp_path / "pack/train.rec")
    _, offsets = read_index(tmp_path / "pack/train.idx")
    labels = [reader.read(offset).labels.tolist() for offset in offsets.tolist()]
    assert labels[0] == [7, 10]
    assert labels[7:] == [[1, 3], [3, 4], [4, 7]]
    np.testing.assert_array_equal(labels[1:7], [[0], [0], [1], [2], [2], [2]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", r"faces, key 10/bad\.jpg: expected an encoded image, got 8 bytes"),
        (jpeg(0)[:-100], r"key 10/bad\.jpg: expected an encoded image"),
        (
            jpeg(0, (96, 112)),
            r"bad\.jpg: expected an aligned face of 112x112 pixels, got 96x112; align or",
        ),
    ],
)
def test_an_invalid_face_stops_packing_and_leaves_nothing(
    tmp_path: Path, content: bytes, message: str
) -> None:
    folder = write_folder(tmp_path / "faces", FILES | {"10/bad.jpg": content})
    with pytest.raises(CorruptRecordError, match=message):
        pack(folder, tmp_path / "pack", workers=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["faces"]


def test_leftovers_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "faces", FILES)
    for name in ("pack", "other"):
        (tmp_path / f".{name}.{'0' * 32}").mkdir()
        (tmp_path / f".{name}.{'0' * 32}" / "train.rec").write_bytes(b"half")
    pack(folder, tmp_path / "pack")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        f".other.{'0' * 32}",
        "faces",
        "pack",
    ]


def test_a_second_run_on_the_same_pack_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "faces", FILES)
    with (
        WriteLock(tmp_path / "pack"),
        pytest.raises(ConfigError, match=f"pack: .*process {os.getpid()} "),
    ):
        pack(folder, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "faces", FILES)
    (tmp_path / "pack").mkdir()
    with pytest.raises(ConfigError, match=r"pack: exists already; remove it or choose another"):
        pack(folder, tmp_path / "pack")
    assert list((tmp_path / "pack").iterdir()) == []


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing: expected a folder with .* got nothing there"):
        pack(tmp_path / "missing", tmp_path / "pack")


def test_more_classes_than_float32_labels_represent_are_refused(tmp_path: Path) -> None:
    """float32 cannot represent every class beyond 2^24."""
    tar = write_tar(tmp_path / "x.tar", samples([0], [jpeg(0)]))
    (tmp_path / "property").write_text(f"{2**24},112,112\n")
    assert open_records(tar).num_classes == 2**24
    (tmp_path / "property").write_text(f"{2**24 + 1},112,112\n")
    with pytest.raises(ConfigError, match=r"at most 16,777,216 identities, .* got 16,777,217; use"):
        pack(tar, tmp_path / "pack")


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    write_folder(tmp_path / "faces", FILES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        message = f"{tmp_path}/pack: the disk or the quota is full .*; free some space"
        with pytest.raises(ConfigError, match=message):
            pack(tmp_path / "faces", tmp_path / "pack")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]
