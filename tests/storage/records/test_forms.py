"""One data set in every form has the same rows, so a cache of one serves the others."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gkd.storage.records.base import Records, Subset
from gkd.storage.records.digests import digests
from gkd.storage.records.open import open_records
from gkd.storage.records.pack import RecordFile
from gkd.storage.records.write_pack import pack
from tests.paths import SHARED_DATA, needs_shared_data
from tests.storage.records.forms import (
    BODIES,
    IMAGE,
    LABELS,
    class_label,
    features,
    image_column,
    samples,
    write_parquet,
    write_tar,
)
from tests.storage.records.packs import jpeg, payload, write_pack

FORMS = ("parquet", "parquets", "tar", "tars", "parts")


def write_form(form: str, records: Records, folder: Path) -> Path:
    """A copy of ``records`` in another form, by independent writers."""
    bodies = [bytes(records.encoded(row)) for row in range(len(records))]
    labels = [int(label) for label in records.labels]
    half = len(bodies) // 2
    halves = [slice(0, half), slice(half, None)]
    names = class_label(*map(str, range(records.num_classes)))
    metadata = features(image=IMAGE, label=names)
    match form:
        case "parquet":
            columns = {"image": pa.array(bodies), "identity": labels}
            return write_parquet(folder / "one.parquet", columns, group_rows=100)
        case "parquets":
            for number, part in enumerate(halves):
                columns = {"image": image_column(bodies[part]), "label": labels[part]}
                path = folder / f"data/train-{number:05}-of-00002.parquet"
                write_parquet(path, columns, metadata=metadata, group_rows=7, compression="none")
            return folder
        case "tar":
            return write_tar(folder / "one.tar", samples(labels, bodies))
        case "tars":
            for number, part in enumerate(halves):
                path = folder / f"train-{number}.tar"
                write_tar(path, samples(labels[part], bodies[part]), format=tarfile.GNU_FORMAT)
            return folder
    for number, part in enumerate(halves):
        held = zip(labels[part], bodies[part], strict=True)
        packed = {key: payload(label, body) for key, (label, body) in enumerate(held)}
        for file in write_pack(folder, packed).parent.glob("train.*"):
            file.rename(folder / f"part_{number}{file.suffix}")
    return folder


def require_same(copy: Records, records: Records) -> None:
    assert copy.fingerprint == records.fingerprint
    assert copy.label_order == records.label_order
    np.testing.assert_array_equal(digests(copy, workers=2), digests(records, workers=2))
    for row in (0, len(records) - 1):
        np.testing.assert_array_equal(copy.image(row), records.image(row))


@needs_shared_data
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["recordio/im2rec", "lfw"])
def test_a_pack_reads_the_same_in_every_form(tmp_path: Path, form: str, source: str) -> None:
    source_records = open_records(SHARED_DATA / source)
    records = Subset(source_records, np.arange(min(300, len(source_records))))
    path = write_form(form, records, tmp_path / form)
    copy = open_records(path)
    require_same(copy, records)
    pack(path, tmp_path / "pack", workers=2)
    require_same(open_records(tmp_path / "pack"), records)


@pytest.mark.parametrize("form", FORMS)
def test_packing_keeps_the_order_of_rows(tmp_path: Path, form: str) -> None:
    packed = {key: payload(label, BODIES[key]) for key, label in enumerate(LABELS)}
    original = open_records(write_pack(tmp_path / "pack", packed))
    path = write_form(form, original, tmp_path / form)
    result = pack(path, tmp_path / "again", workers=2)
    assert (result.images, result.identities) == (8, 3)
    again = open_records(tmp_path / "again")
    require_same(again, original)
    # Rows are not sorted by identity, so there are no identity records: im2rec's layout.
    assert isinstance(again, RecordFile)
    assert (again.layout, again.num_classes) == ("im2rec", 3)
    assert [again.key(row) for row in range(8)] == [str(row) for row in range(8)]
    index = tmp_path / "again/train.idx"
    assert index.read_bytes() == (tmp_path / "pack/train.idx").read_bytes()
    assert (tmp_path / "again/property").read_text() == "3,112,112\n"


def test_sorted_rows_are_packed_in_insightfaces_layout(tmp_path: Path) -> None:
    labels, bodies = [0, 0, 1, 3], BODIES[:4]
    pack(write_tar(tmp_path / "x.tar", samples(labels, bodies)), tmp_path / "pack")
    records = open_records(tmp_path / "pack")
    assert (records.layout, records.labels.tolist()) == ("insightface", labels)
    assert records.num_classes == 4


@pytest.mark.parametrize(("form", "suffix"), [("parquet", "parquet"), ("tar", "tar")])
def test_a_folder_may_hold_several_forms(tmp_path: Path, form: str, suffix: str) -> None:
    """Tar shards are published with Parquet files of metadata."""
    packed = {0: payload(0, jpeg(0)), 1: payload(1, jpeg(1))}
    original = open_records(write_pack(tmp_path / "pack", packed))
    home = tmp_path / "home"
    written = {kind: write_form(kind, original, tmp_path / kind) for kind in ("parquet", "tar")}
    home.mkdir()
    shutil.copy(written[form], home)
    assert open_records(home).path == home
    for path in written.values():
        shutil.copy(path, home)
    assert open_records(home).layout == "webdataset"
    shutil.copy(tmp_path / "pack/train.rec", home)
    assert open_records(home).layout == "im2rec"
