import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.check import records_info, verify_records
from gkd.storage.records.digests import digests
from gkd.storage.records.open import open_records
from gkd.storage.records.pack import RecordFile, RecordParts
from tests.paths import SHARED_DATA, needs_shared_data
from tests.storage.records.packs import insightface_records, jpeg, part, payload, write_pack

IDENTITIES = [2, 1, 3]
LABELS = [0, 0, 1, 2, 2, 2]


def opened(path: Path) -> RecordFile:
    records = open_records(path)
    assert isinstance(records, RecordFile)
    return records


@needs_shared_data
def test_the_lfw_pack() -> None:
    records = opened(SHARED_DATA / "lfw")
    assert (len(records), records.num_classes, records.layout) == (10_562, 4_859, "insightface")
    assert (records.name, records.label_order) == ("lfw", "recordio")
    assert records.path == (SHARED_DATA / "lfw/train.rec").absolute()
    assert records.key(0) == "1"
    assert records.key(10_561) == "10562"
    np.testing.assert_array_equal(np.unique(records.labels), np.arange(4_859))
    assert all(len(records.encoded(row)) == records.sizes[row] for row in range(0, 10_562, 50))
    assert records.image(77).shape == (112, 112, 3)


@needs_shared_data
def test_the_lfw_pack_without_its_index(tmp_path: Path) -> None:
    (tmp_path / "train.rec").symlink_to((SHARED_DATA / "lfw/train.rec").resolve())
    scanned, indexed = opened(tmp_path), opened(SHARED_DATA / "lfw")
    assert (scanned.indexed, scanned.layout, scanned.num_classes) == (False, "insightface", 4_859)
    assert scanned.fingerprint == indexed.fingerprint
    assert scanned.encoded(4_321) == indexed.encoded(4_321)


@needs_shared_data
def test_an_im2rec_pack_has_the_labels_of_its_list() -> None:
    folder = SHARED_DATA / "recordio/im2rec"
    lines = (line.split("\t") for line in (folder / "train.lst").read_text().splitlines())
    expected = {key: int(label) for key, label, _ in lines}
    records = opened(folder)
    assert (len(records), records.num_classes, records.layout) == (8, 2, "im2rec")
    keys = [records.key(row) for row in range(8)]
    assert keys == sorted(expected, key=int)
    assert records.labels.tolist() == [expected[key] for key in keys]
    assert records.image(0).shape == (112, 112, 3)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("header_position", ["first", "last", "middle"])
def test_insightface_header_and_identities_are_left_out(
    tmp_path: Path, index: bool, header_position: str
) -> None:
    packed = insightface_records(IDENTITIES)
    order = sorted(packed)
    if header_position != "first":
        order.insert(len(order) if header_position == "last" else 4, order.pop(0))
    write_pack(tmp_path, packed, order=order, index=index)
    records = opened(tmp_path)
    assert (records.layout, records.indexed) == ("insightface", index)
    assert records.labels.tolist() == LABELS
    assert records.num_classes == 3
    # The key without an index is the number in the file.
    expected = range(1, 7) if index else [order.index(key) for key in range(1, 7)]
    assert [records.key(row) for row in range(6)] == [str(key) for key in expected]


def test_rows_are_in_numeric_order_of_keys(tmp_path: Path) -> None:
    packed = {key: payload(key, jpeg(key)) for key in [10, 9, 100, 0, 2]}
    records = open_records(write_pack(tmp_path, packed))
    assert [records.key(row) for row in range(5)] == ["0", "2", "9", "10", "100"]
    assert records.labels.tolist() == [0, 2, 9, 10, 100]
    assert records.encoded(3) == jpeg(10)


def test_images_with_label_arrays_are_images(tmp_path: Path) -> None:
    packed = {key: payload([key + 4, 9, 8][: key + 1], jpeg(key)) for key in range(3)}
    records = opened(write_pack(tmp_path, packed))
    assert records.layout == "im2rec"
    assert records.labels.tolist() == [4, 5, 6]
    assert [bytes(records.encoded(row)) for row in range(3)] == [jpeg(0), jpeg(1), jpeg(2)]


def test_a_lost_image_with_two_labels_stays_a_row(tmp_path: Path) -> None:
    packed = {0: payload([0, 5], jpeg(0)), 1: payload([1, 5], b""), 2: payload([1, 6], jpeg(2))}
    records = opened(write_pack(tmp_path, packed))
    assert (records.layout, len(records)) == ("im2rec", 3)
    with pytest.raises(CorruptRecordError, match=r"key 1, offset \d+: expected an encoded image"):
        records.image(1)


def test_multi_part_images_read_whole(tmp_path: Path) -> None:
    # The payload's header is 24 bytes, so a multiple of 4 in the body is one of the payload.
    magic = struct.pack("<I", 0xCED7230A)
    content = part(payload(3, b"head"), 1) + part(b"", 2) + part(b"tail!", 3)
    (tmp_path / "train.rec").write_bytes(content)
    records = open_records(tmp_path)
    assert records.labels.tolist() == [3]
    assert records.sizes.tolist() == [4 + 4 + 4 + 5]
    assert bytes(records.encoded(0)) == b"head" + magic + magic + b"tail!"


def test_property_names_the_number_of_classes(tmp_path: Path) -> None:
    records = open_records(write_pack(tmp_path, insightface_records(IDENTITIES), classes=50))
    assert records.num_classes == 50


@pytest.mark.parametrize("content", ["", "many,112,112\n", "0,112,112", "-3,112,112", "²,1"])
def test_a_property_without_a_count_is_refused(tmp_path: Path, content: str) -> None:
    write_pack(tmp_path, insightface_records(IDENTITIES))
    (tmp_path / "property").write_text(content)
    with pytest.raises(
        ConfigError, match=r"property: expected a first line like 93431,112,112 .*, got '.*'; corr"
    ):
        open_records(tmp_path)


def test_labels_outside_the_classes_are_faults(tmp_path: Path) -> None:
    records = open_records(write_pack(tmp_path, insightface_records(IDENTITIES), classes=2))
    assert records.labels.tolist() == [0, 0, 1, -1, -1, -1]
    with pytest.raises(
        CorruptRecordError,
        match=r"train\.rec, key 4, offset \d+: expected a class from 0 to 1, got label 2; correct",
    ):
        records.encoded(3)


@pytest.mark.parametrize("label", [-1.0, 2.5, float("nan"), float("inf")])
def test_labels_that_are_no_integers_from_0_are_faults(tmp_path: Path, label: float) -> None:
    packed = {0: payload(0, b"a"), 1: payload(label, b"b")}
    records = open_records(write_pack(tmp_path, packed, classes=2))
    with pytest.raises(CorruptRecordError) as error:
        records.encoded(1)
    assert f"expected a class from 0 to 1, got label {label:g}; write this" in str(error.value)


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), 2.0**32])
def test_labels_that_name_no_class_are_faults(tmp_path: Path, label: float) -> None:
    records = open_records(write_pack(tmp_path, {0: payload(7, b"a"), 1: payload(label, b"b")}))
    assert (records.labels.tolist(), records.num_classes) == ([7, -1], 8)
    with pytest.raises(CorruptRecordError, match=r"key 1, .*: expected a whole number .*, got lab"):
        records.encoded(1)


def test_labels_are_float32(tmp_path: Path) -> None:
    packed = {0: payload(2**24 - 1, b"a"), 1: payload(42_474_558, b"b")}
    records = open_records(write_pack(tmp_path, packed, classes=42_474_561))
    assert records.labels.tolist() == [2**24 - 1, 42_474_560]


def test_an_implausibly_large_label_is_refused(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, {0: payload(7, b"a"), 1: payload(3e9, b"b")})
    message = (
        r"key 1, offset 36: expected a label below 1,000,000 among 2 images, got 3,000,000,000; "
        r"correct this record, or .* a file named property .* IDENTITIES,112,112$"
    )
    with pytest.raises(ConfigError, match=message):
        open_records(pack)
    (tmp_path / "property").write_text("3000000001,112,112\n")
    assert open_records(pack).num_classes == 3_000_000_001
    (tmp_path / "property").unlink()
    largest = write_pack(tmp_path, {0: payload(7, b"a"), 1: payload(999_999, b"b")})
    assert open_records(largest).num_classes == 1_000_000


def test_a_rounded_count_in_the_header_record_is_accepted(tmp_path: Path) -> None:
    # 3 identities after 42,474,557 images, header elsewhere than key 0: 42,474,558 rounds.
    packed = {
        0: payload(0, b"image"),
        1: payload([42_474_558.0, 42_474_561.0], b""),
        2: payload([1.0, 2.0], b""),
        3: payload([2.0, 3.0], b""),
        4: payload([3.0, 4.0], b""),
    }
    records = opened(write_pack(tmp_path, packed, index=False))
    assert (records.layout, len(records)) == ("insightface", 1)


def test_damaged_records_stay_rows_with_an_error(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, insightface_records(IDENTITIES))
    index = [line.split("\t") for line in (tmp_path / "train.idx").read_text().splitlines()]
    offsets = {int(key): int(offset) for key, offset in index}
    content = bytearray(pack.read_bytes())
    content[offsets[2]] ^= 0xFF
    pack.write_bytes(content)
    offsets[5] = len(content) + 400
    (tmp_path / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in offsets.items()))
    records = open_records(tmp_path)
    assert records.labels.tolist() == [0, -1, 1, 2, -1, 2]
    assert (records.sizes >= 0).tolist() == [True, False, True, True, False, True]
    assert records.where(1) == f"{pack}, key 2, offset {offsets[2]}"
    message = rf"rec, key 2, offset {offsets[2]}: expected magic 0xced7230a, got 0xced723f5$"
    with pytest.raises(CorruptRecordError, match=message):
        records.encoded(1)
    with pytest.raises(
        CorruptRecordError,
        match=rf"key 5, offset {offsets[5]}: expected a record .* below the file's end .*; write "
        "this record again or leave it out: `gkd records verify` lists all such records$",
    ):
        records.image(4)
    assert (digests(records, workers=2).any(axis=1) == (records.labels >= 0)).all()


@pytest.mark.parametrize("index", [True, False])
def test_a_truncated_pack_keeps_its_intact_records(tmp_path: Path, index: bool) -> None:
    packed = {key: payload(key, jpeg(key), key) for key in range(4)}
    pack = write_pack(tmp_path, packed, index=index)
    pack.write_bytes(pack.read_bytes()[:-100])
    records = open_records(tmp_path)
    assert records.labels.tolist() == [0, 1, 2, -1]
    with pytest.raises(CorruptRecordError, match=r"key 3, .* bytes from .*: the file is truncated"):
        records.encoded(3)


def test_a_damaged_header_record_does_not_turn_identities_into_images(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, insightface_records(IDENTITIES))
    content = bytearray(pack.read_bytes())
    content[0] ^= 0xFF
    pack.write_bytes(content)
    assert open_records(pack).labels.tolist() == [-1, *LABELS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Packs 1, 2 and 10 of one numbering; the last without an index."""
    folder = tmp_path / "webface"
    for number, (name, keys) in enumerate({"1": [7, 8], "2": [3], "10": [5, 6, 9]}.items()):
        packed = {key: payload(10 * number + key, jpeg(key)) for key in keys}
        path = write_pack(folder, packed, index=name != "10")
        path.rename(folder / f"part_{name}.rec")
        if name != "10":
            path.with_suffix(".idx").rename(folder / f"part_{name}.idx")
    return folder


def test_packs_of_a_folder_are_one_data_set_in_natural_order(folder: Path) -> None:
    records = open_records(folder)
    assert isinstance(records, RecordParts)
    assert (records.name, records.path, records.num_classes) == ("webface", folder.absolute(), 30)
    assert records.labels.tolist() == [7, 8, 13, 25, 26, 29]
    keys = [records.key(row) for row in range(6)]
    assert keys == ["part_1/7", "part_1/8", "part_2/3", "part_10/0", "part_10/1", "part_10/2"]
    bodies = [bytes(records.encoded(row)) for row in range(6)]
    assert bodies == [jpeg(key) for key in (7, 8, 3, 5, 6, 9)]
    assert records.where(2).startswith(f"{folder}/part_2.rec, key 3,")
    assert [name for name, _ in records.stamps()] == [
        "part_1.rec",
        "part_1.idx",
        "part_2.rec",
        "part_2.idx",
        "part_10.rec",
    ]
    info = records_info(records)
    assert (info.layout, info.indexed, info.images) == ("im2rec", False, 6)


def test_parts_are_the_same_data_as_one_pack(folder: Path, tmp_path: Path) -> None:
    parts = open_records(folder)
    single = open_records(
        write_pack(
            tmp_path / "single",
            {
                number: payload(int(label), bytes(parts.encoded(number)))
                for number, label in enumerate(parts.labels)
            },
        )
    )
    assert single.fingerprint == parts.fingerprint
    assert (digests(single, workers=1) == digests(parts, workers=2)).all()


def test_property_beside_the_parts_names_the_classes(folder: Path) -> None:
    (folder / "property").write_text("50,112,112\n")
    assert open_records(folder).num_classes == 50


def test_a_single_pack_of_any_name_is_the_data_set(folder: Path) -> None:
    for name in ("part_2.rec", "part_10.rec"):
        (folder / name).unlink()
    assert isinstance(open_records(folder), RecordFile)


def test_parts_pickle(folder: Path) -> None:
    copy = pickle.loads(pickle.dumps(open_records(folder)))
    assert bytes(copy.encoded(3)) == jpeg(5)


def test_a_fault_names_its_pack(folder: Path) -> None:
    content = bytearray((folder / "part_10.rec").read_bytes())
    content[32:42] = bytes(10)
    (folder / "part_10.rec").write_bytes(bytes(content))
    (fault,) = verify_records(open_records(folder), workers=1).faults
    assert isinstance(fault, CorruptRecordError)
    assert str(fault).startswith(f"{folder}/part_10.rec, key 0,")
