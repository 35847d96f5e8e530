import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError
from gkd.storage.records import parquet, parquet_blocks
from gkd.storage.records.check import records_info, verify_records
from gkd.storage.records.open import open_records
from gkd.storage.records.parquet import ParquetRecords
from tests.storage.records.forms import (
    BODIES,
    IMAGE,
    LABELS,
    bodies,
    class_label,
    features,
    image_column,
    write_parquet,
)


def opened(path: Path) -> ParquetRecords:
    records = open_records(path)
    assert isinstance(records, ParquetRecords)
    return records


def faces(labels: Any = None, **others: Any) -> dict[str, Any]:
    found = pa.array(LABELS, pa.int64()) if labels is None else labels
    return {"image": image_column(BODIES[: len(found)]), "label": found, **others}


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd", "gzip"])
def test_a_file_is_read_in_order(tmp_path: Path, compression: str) -> None:
    path = write_parquet(tmp_path / "faces.parquet", faces(), compression=compression)
    records = opened(path)
    assert records.labels.tolist() == LABELS
    assert bodies(records) == BODIES
    assert records.sizes.tolist() == list(map(len, BODIES))
    assert (records.name, records.path, records.num_classes) == ("faces", path, 3)
    assert (records.layout, records.label_order, records.group_rows) == ("parquet", "recordio", 3)
    assert (records.key(7), records.where(7)) == ("7", f"{path}, row 7 in row group 2")
    assert records.image(2).shape == (112, 112, 3)
    assert [name for name, _ in records.stamps()] == ["faces.parquet"]
    info = records_info(records)
    assert (info.layout, info.images, info.image_size) == ("parquet", 8, (112, 112))


def published(folder: Path, *, metadata: dict[bytes, bytes] | None = None) -> Path:
    """Three numbered files, one of them empty, and one of a test split, as a hub lays them out."""
    for number, part in enumerate([slice(0, 3), slice(3, 3), slice(3, 8)]):
        columns = {"image": image_column(BODIES[part]), "label": pa.array(LABELS[part], pa.int64())}
        name = f"data/train-{number:05}-of-00003.parquet"
        write_parquet(folder / name, columns, metadata=metadata, group_rows=2)
    write_parquet(folder / "data/test-00000-of-00001.parquet", faces(), metadata=metadata)
    return folder


def test_files_of_a_hub_are_one_data_set(tmp_path: Path) -> None:
    records = opened(published(tmp_path / "ms1m"))
    assert records.labels.tolist() == LABELS
    assert bodies(records) == BODIES
    assert (records.name, records.path) == ("ms1m", tmp_path / "ms1m")
    keys = [records.key(row) for row in (0, 2, 3, 7)]
    assert keys == [
        f"train-0000{file}-of-00003/{row}" for file, row in [(0, 0), (0, 2), (2, 0), (2, 4)]
    ]
    where = records.where(7)
    assert where == f"{tmp_path}/ms1m/data/train-00002-of-00003.parquet, row 4 in row group 2"
    (tmp_path / "ms1m/data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(
        ConfigError, match=r"expected 3 files train-\*-of-00003 .* missing: 1; fetch"
    ):
        opened(tmp_path / "ms1m")


def test_the_number_of_classes_follows_from_their_names(tmp_path: Path) -> None:
    named = features(image=IMAGE, label=class_label("anna", "ben", "carl", "dora"))
    assert opened(published(tmp_path / "a", metadata=named)).num_classes == 4
    (tmp_path / "a/property").write_text("9,112,112\n")
    assert opened(tmp_path / "a").num_classes == 9
    few = features(image=IMAGE, label=class_label("anna", "ben"))
    records = opened(published(tmp_path / "b", metadata=few))
    assert (records.num_classes, records.labels.tolist()) == (2, [1, 0, -1, 1, 1, 0, -1, 0])
    with pytest.raises(
        CorruptRecordError, match=r"row 2 in .*: expected a class from 0 to 1, got la"
    ):
        records.encoded(2)


def test_files_with_different_classes_or_columns_are_refused(tmp_path: Path) -> None:
    for name in ("anna", "ben"):
        metadata = features(image=IMAGE, label=class_label("zoe", name, "x"))
        write_parquet(tmp_path / f"{name}.parquet", faces(), metadata=metadata)
    with pytest.raises(
        ConfigError, match=r"ben\.parquet: expected the names of the classes of anna"
    ):
        opened(tmp_path)
    write_parquet(tmp_path / "ben.parquet", {"image": image_column(BODIES), "class": LABELS})
    with pytest.raises(
        ConfigError, match=r"ben\.parquet: expected the .* of anna\.parquet, got ot"
    ):
        opened(tmp_path)


TWO_IMAGES = {"first": image_column(BODIES), "second": image_column(BODIES)}


@pytest.mark.parametrize(
    ("columns", "metadata"),
    [
        (faces(), None),
        (faces(pa.array(LABELS, pa.uint8())), None),
        (faces(pa.array(LABELS, pa.uint64())), None),
        (faces(id=pa.array(range(8))), None),
        ({"image": image_column(BODIES), "id": LABELS}, None),
        ({"img": pa.array(BODIES, pa.large_binary()), "Identity": LABELS}, None),
        ({"jpg": pa.array(BODIES, pa.binary_view()), "labels": LABELS}, None),
        ({"photo": pa.array(BODIES), "target": LABELS, "other": list("abcdefgh")}, None),
        ({"thumb": image_column(BODIES[::-1]), "image": pa.array(BODIES), "class": LABELS}, None),
        (TWO_IMAGES | {"label": LABELS}, features(first=IMAGE, label={"dtype": "int64"})),
        (faces(**{"class": range(8)}), features(label=class_label("a", "b", "c"))),
        (faces(), {b"huggingface": b"{"}),
        (faces(), {b"huggingface": b'{"info": {"features": []}}'}),
        (faces(), {b"huggingface": b"[]"}),
        (faces(), features(other=class_label("a"))),
    ],
)
def test_columns_are_found(
    tmp_path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None
) -> None:
    records = opened(write_parquet(tmp_path / "x.parquet", columns, metadata=metadata))
    assert records.labels.tolist() == LABELS
    assert bodies(records) == BODIES


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": image_column(BODIES), "name": list("abcdefgh")},
            r"expected one column of class numbers, .*, got none among image \(.* name \(string\)",
        ),
        (
            faces(identity=LABELS),
            r"expected one column of class numbers, .* got label and identity",
        ),
        ({"label": LABELS}, r"expected one column of image bytes, got none among label \(int64\)"),
        ({"label": LABELS, "image": list("abcdefgh")}, "of image bytes, got none among label"),
        (TWO_IMAGES | {"label": LABELS}, "of image bytes, got first and second among"),
        (faces(pa.array(list("abcdefgh"))), "expected integers in the column label, got stri"),
        (faces(pa.array([0.0] * 8)), "expected integers in the column label, got double"),
        (faces(pa.array([], pa.int64())), "expected rows with images, got none"),
        (
            {"image": image_column([None] * 8, list("abcdefgh")), "label": LABELS},
            r"expected the images in image\.bytes, got no bytes in the first 3 rows; .* name",
        ),
        (faces(pa.array([2, 3_000_000_000])), r"row 1 in .*: expected a label below 1,000,000 amo"),
    ],
)
def test_unclear_columns_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(ConfigError, match=rf"x\.parquet.*{message}"):
        opened(path)


@pytest.mark.parametrize(
    ("kind", "strange", "statistics"),
    [(pa.int64(), [-2, 2**40, 2**62], True), (pa.uint64(), [2**32, 2**40, 2**63 + 1], False)],
)
def test_a_row_without_image_or_label_stays_a_row(
    tmp_path: Path, kind: Any, strange: list[int], statistics: bool
) -> None:
    images = [BODIES[0], None, None, *BODIES[3:7]]
    columns = {
        "image": image_column(images, [None, "b.jpg", *[None] * 5]),
        "label": pa.array([5, 4, 3, None, *strange], kind),
    }
    path = write_parquet(tmp_path / "x.parquet", columns, write_statistics=statistics)
    records = opened(path)
    assert records.labels.tolist() == [5, 4, 3, -1, -1, -1, -1]
    assert records.sizes.tolist() == [len(body) if body else -1 for body in images]
    assert bytes(records.encoded(0)) == BODIES[0]
    faults = [str(fault) for fault in verify_records(records, workers=2).faults]
    got = [fault.partition(", got ")[2].partition(";")[0] for fault in faults]
    assert got == ["null", "null", "label None", *(f"label {value}" for value in strange)]
    first = f"{path}, row 1 in row group 0: expected the image's bytes in image.bytes, got null"
    assert faults[0].startswith(first)


def test_threads_read_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_blocks, "BLOCK_ROWS", 4)
    monkeypatch.setattr(parquet_blocks, "MAX_BYTES", 3 * 4 * 50)
    monkeypatch.setattr(parquet, "MAX_FILES", 1)
    monkeypatch.setattr(parquet_blocks, "MAX_CURSORS", 2)
    rng = np.random.default_rng(0)
    expected = [rng.bytes(int(rng.integers(30, 70))) for _ in range(200)]
    for number, rows in enumerate([slice(0, 90), slice(90, 200)]):
        part = expected[rows]
        columns = {"image": pa.array(part), "label": pa.array([number] * len(part))}
        write_parquet(tmp_path / f"{number}.parquet", columns, group_rows=23)
    records = opened(tmp_path)
    assert bodies(records) == expected
    rows = rng.integers(0, 200, 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: bytes(records.encoded(row)), rows))
    assert read == [expected[row] for row in rows]
    kept = records._blocks._kept
    assert sum(block.nbytes for block in kept.values()) == records._blocks._bytes <= 3 * 4 * 80
    assert len(records._blocks._cursors) <= 2


def test_in_order_every_block_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_blocks, "BLOCK_ROWS", 4)
    monkeypatch.setattr(parquet_blocks, "MAX_BYTES", 1)
    columns = {"image": pa.array([b"%d" % row for row in range(100)]), "label": [0] * 100}
    records = opened(write_parquet(tmp_path / "x.parquet", columns, group_rows=30))
    decoded: list[tuple[int, int]] = []
    begin = records._blocks.blocks

    def counted(file: int, group: int) -> Any:
        for number, block in enumerate(begin(file, group)):
            decoded.append((group, number))
            yield block

    monkeypatch.setattr(records._blocks, "blocks", counted)
    assert bodies(records) == [b"%d" % row for row in range(100)]
    assert decoded == [(g, n) for g in range(4) for n in range(8)][: 8 * 3 + 3]


def test_records_pickle_by_path(tmp_path: Path) -> None:
    records = opened(published(tmp_path))
    pickled = pickle.dumps(records)
    assert len(pickled) < 3000
    copy = pickle.loads(pickled)
    assert bodies(copy) == BODIES
    assert copy.fingerprint == records.fingerprint
    (tmp_path / "data/train-00000-of-00003.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        CorruptRecordError, match=r"expected \d+ bytes as when it was opened, got 4;"
    ):
        pickle.loads(pickled).encoded(0)
    (tmp_path / "data/train-00000-of-00003.parquet").unlink()
    with pytest.raises(CorruptRecordError, match=r"parquet: No such file .*; put it back"):
        pickle.loads(pickled).encoded(0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"", "expected a Parquet file, got"),
        (
            lambda content: content[: len(content) // 2],
            "expected a Parquet file, got: Parquet magic",
        ),
        (lambda content: b"x" * 500, "expected a Parquet file, got: Parquet magic bytes not found"),
        (
            lambda content: content[:-300] + bytes(292) + content[-8:],
            "expected a Parquet file",
        ),
        (
            lambda content: b"version https://git-lfs.github.com/spec/v1\n",
            "got a Git-LFS pointer to",
        ),
    ],
)
def test_files_that_are_not_parquet_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", faces())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CorruptRecordError, match=rf"x\.parquet: .*{message}"):
        opened(path)


def spoil_page(path: Path, column: int, group: int) -> None:
    """Zeros in place of a page's header."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)


def test_a_damaged_row_group_loses_only_its_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", faces())
    spoil_page(path, 0, 1)
    records = opened(path)
    assert records.labels.tolist() == LABELS
    assert (records.sizes >= 0).tolist() == [True] * 3 + [False] * 3 + [True] * 2
    faults = [str(fault) for fault in verify_records(records, workers=2).faults]
    assert [fault.partition(": ")[0] for fault in faults] == [records.where(r) for r in (3, 4, 5)]
    assert all("expected a row group that can be decoded, got: " in fault for fault in faults)
    assert bytes(records.encoded(7)) == BODIES[7]


def test_damaged_labels_lose_only_their_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", faces())
    spoil_page(path, 2, 0)
    records = opened(path)
    assert records.labels.tolist() == [-1] * 3 + LABELS[3:]
    with pytest.raises(
        CorruptRecordError, match=r"row 1 in .*: expected labels that can be decoded"
    ):
        records.encoded(1)


def test_a_footer_with_too_many_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", faces())
    blocks = opened(path)._blocks
    for row in (3, 4 * parquet_blocks.BLOCK_ROWS):
        with pytest.raises(
            CorruptRecordError, match="as many rows as the file's footer says, got f"
        ):
            blocks.get(0, 1, row)


def test_page_checksums_are_verified(tmp_path: Path) -> None:
    options: dict[str, Any] = {"write_page_checksum": True, "compression": "none"}
    path = write_parquet(tmp_path / "x.parquet", faces(), **options)
    content = bytearray(path.read_bytes())
    content[content.index(BODIES[0]) + 300] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CorruptRecordError, match=r"row 0 in row group 0: .*decoded, got: .*(?i:crc)"
    ):
        opened(path).encoded(0)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_raises_only_documented_errors(position: int, bit: int) -> None:
    drawn = [b"%d" % row * (row % 7) for row in range(1, 9)]
    with tempfile.TemporaryDirectory() as folder:
        columns = {"image": pa.array(drawn), "label": LABELS}
        path = write_parquet(Path(folder) / "x.parquet", columns)
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= 1 << bit
        path.write_bytes(content)
        try:
            records = opened(path)
            assert len(records.fingerprint) == 64
        except GkdError:
            return
        for row in range(len(records)):
            try:
                records.encoded(row)
            except CorruptRecordError:
                continue


@pytest.mark.parametrize("nested", [False, True])
def test_one_value_that_many_rows_refer_to_is_bounded(
    tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_blocks, "MAX_BLOCK_BYTES", 1 << 20)
    images = pa.array([bytes(50_000)] * 64, pa.binary())
    column = pa.StructArray.from_arrays([images], ["bytes"]) if nested else images
    table = pa.table({"image": column, "label": pa.array([0] * 64)})
    path = tmp_path / "bomb.parquet"
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 10_000
    with pytest.raises(
        CorruptRecordError, match=r"at most 1048576 bytes in 128 images, got 12\d* in 24;"
    ):
        ParquetRecords(path).encoded(0)


def test_rows_that_no_file_of_this_size_can_hold_are_refused(tmp_path: Path) -> None:
    count = 1 << 20
    path = tmp_path / "nulls.parquet"
    table = pa.table({"image": pa.nulls(count, pa.binary()), "label": pa.nulls(count, pa.int64())})
    pq.write_table(table, path)
    with pytest.raises(CorruptRecordError, match=rf"got {count} rows in \d+ bytes"):
        ParquetRecords(path)
