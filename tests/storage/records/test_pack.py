import pickle
from pathlib import Path

import pytest

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.check import records_info, verify_records
from gkd.storage.records.open import RecordFile, RecordParts, digests, open_records
from tests.storage.records.packs import jpeg, payload, write_pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Packs 1, 2 and 10 of one numbering; the last without an index."""
    folder = tmp_path / "webface"
    for place, (name, keys) in enumerate({"1": [7, 8], "2": [3], "10": [5, 6, 9]}.items()):
        packed = {key: payload(10 * place + key, jpeg(key)) for key in keys}
        made = write_pack(folder, packed, index=name != "10")
        made.rename(folder / f"part_{name}.rec")
        if name != "10":
            made.with_suffix(".idx").rename(folder / f"part_{name}.idx")
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
    whole = open_records(
        write_pack(
            tmp_path / "whole",
            {
                place: payload(int(label), bytes(parts.encoded(place)))
                for place, label in enumerate(parts.labels)
            },
        )
    )
    assert whole.fingerprint == parts.fingerprint
    assert (digests(whole, workers=1) == digests(parts, workers=2)).all()


def test_property_beside_the_parts_names_the_classes(folder: Path) -> None:
    (folder / "property").write_text("50,112,112\n")
    assert open_records(folder).num_classes == 50


def test_one_pack_of_another_name_is_the_data_set(folder: Path) -> None:
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
