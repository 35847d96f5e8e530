import hashlib
import json
import pickle
import struct
import tempfile
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.errors import ConfigError, CorruptDataError, CorruptRecordError
from gkd.storage.records.recordio import (
    MAX_LENGTH,
    Record,
    RecordReader,
    encode_record,
    frame,
    read_index,
    record_writer,
)
from tests.paths import SHARED_DATA, needs_shared_data
from tests.storage.records.packs import MAGIC, part, payload

MAGIC_BYTES = struct.pack("<I", MAGIC)
# Magics at every alignment, repeated and single.
pieces = st.sampled_from([MAGIC_BYTES, MAGIC_BYTES[:1], MAGIC_BYTES[1:], b"abcd", b"x", b""])
payloads = st.lists(pieces, max_size=12).map(b"".join)


def rec(tmp_path: Path, content: bytes) -> RecordReader:
    path = tmp_path / "x.rec"
    path.write_bytes(content)
    return RecordReader(path)


def dmlc_frame(data: bytes) -> bytes:
    """RecordIOWriter::WriteRecord of dmlc-core's src/recordio.cc, line by line."""
    out = b""
    position = 0
    for at in range(0, len(data) // 4 * 4, 4):
        if data[at : at + 4] == MAGIC_BYTES:
            flag = 1 if position == 0 else 2
            out += struct.pack("<II", MAGIC, flag << 29 | at - position) + data[position:at]
            position = at + 4
    flag = 3 if position != 0 else 0
    out += struct.pack("<II", MAGIC, flag << 29 | len(data) - position) + data[position:]
    return out + bytes((len(data) + 3) // 4 * 4 - len(data))


@needs_shared_data
@pytest.mark.parametrize("indexed", [True, False])
def test_corner_cases_read_as_mxnet_reads_them(indexed: bool) -> None:
    folder = SHARED_DATA / "recordio"
    expected = json.loads((folder / "odd.json").read_text())
    reader = RecordReader(folder / "odd.rec")
    keys, offsets = read_index(folder / "odd.idx")
    if not indexed:
        offsets, order = reader.scan(), np.argsort(offsets)
        keys = keys[order]
    assert len(keys) == len(offsets) == len(expected) == 112
    for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True):
        record = reader.read(offset)
        assert {
            "flag": record.flag,
            "label": record.labels.tolist(),
            "id": record.id,
            "id2": record.id2,
            "bytes": len(record.body),
            "sha256": hashlib.sha256(record.body).hexdigest(),
        } == expected[str(key)]


@needs_shared_data
def test_corner_cases_are_written_as_mxnet_writes_them(tmp_path: Path) -> None:
    source = SHARED_DATA / "recordio/odd.rec"
    reader = RecordReader(source)
    with record_writer(tmp_path / "odd.rec") as write:
        keys, offsets = read_index(source.with_suffix(".idx"))
        for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True):
            write(key, reader.payload(offset))
    for suffix in (".rec", ".idx"):
        copy = (tmp_path / "odd.rec").with_suffix(suffix)
        assert copy.read_bytes() == source.with_suffix(suffix).read_bytes()


@needs_shared_data
@pytest.mark.parametrize("name", ["recordio/odd", "recordio/im2rec/train", "lfw/train"])
def test_headers_gathered_at_once_equal_records_read_one_by_one(name: str) -> None:
    reader = RecordReader(SHARED_DATA / f"{name}.rec")
    _, offsets = read_index(SHARED_DATA / f"{name}.idx")
    headers = reader.headers(offsets)
    for row, offset in enumerate(offsets[:500].tolist()):
        record = reader.read(offset)
        assert headers["flag"][row] == record.flag
        assert headers["label"][row] == record.labels[0]
        assert headers["second"][row] == (record.labels[1] if record.flag > 1 else 0)
        assert headers["size"][row] == len(record.body)


@given(st.lists(payloads, max_size=6))
def test_written_records_read_back(datas: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.rec"
        with record_writer(path) as write:
            for key, data in enumerate(datas):
                write(key * 10, data)
        assert path.read_bytes() == b"".join(map(dmlc_frame, datas))
        reader = RecordReader(path)
        keys, offsets = read_index(path.with_suffix(".idx"))
        assert keys.tolist() == [key * 10 for key in range(len(datas))]
        assert offsets.tolist() == reader.scan().tolist()
        assert [bytes(reader.payload(offset)) for offset in offsets.tolist()] == datas


@given(st.one_of(st.floats(width=32, allow_nan=False), st.just([7.0, 8.0, 9.5])), payloads)
def test_headers_are_mxnets(label: float | list[float], body: bytes) -> None:
    data = encode_record(label, body, id=3, id2=2**63)
    assert data == payload(label, body, 3, 2**63)


def test_a_record_is_parsed(tmp_path: Path) -> None:
    reader = rec(tmp_path, part(b"skipped") + part(payload([5, 6], b"image", 7, 8)))
    record = reader.read(16)
    assert isinstance(record, Record)
    assert (record.flag, record.id, record.id2, bytes(record.body)) == (2, 7, 8, b"image")
    assert record.labels.tolist() == [5.0, 6.0]


def test_a_record_of_one_part_is_not_copied(tmp_path: Path) -> None:
    reader = rec(tmp_path, part(payload(1, b"image")))
    first, second = (np.frombuffer(reader.body(0), np.uint8) for _ in range(2))
    assert np.shares_memory(first, second)


def test_a_reader_pickles_by_path(tmp_path: Path) -> None:
    reader = rec(tmp_path, part(payload(1, b"x" * 5000)))
    pickled = pickle.dumps(reader)
    assert len(pickled) < 500
    assert pickle.loads(pickled).body(0) == b"x" * 5000
    reader.path.write_bytes(part(b""))
    with pytest.raises(CorruptRecordError, match=r"x\.rec: expected 5032 bytes .*, got 8;"):
        pickle.loads(pickled)


WRONG = part(payload(1, b"image"))  # 40 bytes


@pytest.mark.parametrize(
    ("content", "offset", "message"),
    [
        (WRONG, 40, r"expected a record at a multiple of 4 below the file's end 40, got offset 40"),
        (WRONG, 36, r"below the file's end 40, got offset 36"),
        (WRONG, -8, r"below the file's end 40, got offset -8"),
        (WRONG, 2, r"a multiple of 4 below the file's end 40, got offset 2"),
        (WRONG, 4, r"expected magic 0xced7230a, got 0x0000001d"),
        (WRONG[:30], 0, r"expected 29 bytes from offset 8, got 22: the file is truncated"),
        (part(b"tiny"), 0, r"expected a header of 24 bytes, got 4"),
        (part(struct.pack("<I", 9) + bytes(30)), 0, r"expected 9 labels .*, got 34 bytes"),
        (part(b"body", 3), 0, r"expected the start of a record, got part flag 3"),
        (part(b"body", 1), 0, r"expected a record at a multiple of 4 .*, got offset 12"),
        (part(b"body", 1) + WRONG, 0, r"expected a later part at offset 12, got flag 0"),
        (part(b"body", 1) + part(b"", 3, 77), 0, r"magic 0xced7230a at offset 12, got 0x0000004d"),
        (b"", 0, r"below the file's end 0, got offset 0"),
    ],
)
def test_damage_is_described(tmp_path: Path, content: bytes, offset: int, message: str) -> None:
    reader = rec(tmp_path, content)
    with pytest.raises(CorruptRecordError, match=message):
        reader.read(offset)
    headers = reader.headers(np.array([offset]))
    assert headers["size"].tolist() == headers["flag"].tolist() == [-1]


def test_a_scan_reports_damage_and_resumes(tmp_path: Path) -> None:
    good = part(payload(1, b"0123"))
    split = b"".join(frame(payload(2, MAGIC_BYTES + b"4567")))
    first_part = split[:32]
    pieces = {
        "first": (good, True),
        "garbage": (b"\x01" * 20, False),
        "whole": (good, True),
        "split": (split, True),
        "stray middle part": (part(b"lost", 2), False),
        "first part alone": (first_part, False),
        "after it": (good, True),
        "cut by the end": (good[:-4], False),
    }
    reader = rec(tmp_path, b"".join(content for content, _ in pieces.values()))
    starts = list(accumulate((len(content) for content, _ in pieces.values()), initial=0))[:-1]
    assert reader.scan().tolist() == starts
    readable = reader.headers(np.array(starts))["size"] >= 0
    assert dict(zip(pieces, readable.tolist(), strict=True)) == {
        name: good for name, (_, good) in pieces.items()
    }


@given(st.data())
def test_a_scan_finds_every_intact_record(data: st.DataObject) -> None:
    bodies = data.draw(st.lists(payloads, min_size=1, max_size=6))
    framed = [b"".join(frame(payload(1, body))) for body in bodies]
    starts = np.cumsum([0, *map(len, framed)])
    content = bytearray(b"".join(framed))
    hit = data.draw(st.integers(0, len(framed) - 1))
    # If its magic is damaged, only this record is lost.
    at = int(starts[hit]) + data.draw(st.integers(0, 3))
    content[at] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        reader = rec(Path(folder), bytes(content))
        found = reader.scan().tolist()
        assert set(starts[:-1].tolist()) <= set(found)
        assert reader.headers(np.array(found))["size"][found.index(starts[hit])] == -1


def test_an_index_of_many_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    keys = np.random.default_rng(0).permutation(100_000)
    path.write_text("".join(f"{key}\t{key * 4}\n" for key in keys))
    read = read_index(path)
    np.testing.assert_array_equal(read[0], keys)
    np.testing.assert_array_equal(read[1], keys * 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\t0\nx\t40\n", r"x\.idx: expected lines of key, tab, offset, got: .*'x'"),
        ("1 0\n", r"expected lines of key, tab, offset, got: .*Expected 2 columns, got 1"),
        ("1\t0\n2\t\n", r"expected lines of key, tab, offset, got: "),
        ("7\t0\n8\t4\n7\t8\n", r"expected every key once, got key 7 again \(1 such lines\)"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.idx"
    path.write_text(content)
    with pytest.raises(CorruptRecordError, match=message) as raised:
        read_index(path)
    assert "write the index again, or remove it" in str(raised.value)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def write_and_stop() -> None:
        with record_writer(tmp_path / "x.rec") as write:
            write(0, b"data")
            assert not (tmp_path / "x.rec").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", ["x.rec", "x.idx"])
def test_a_writer_refuses_existing_files(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match=rf"{existing}: exists already; remove it or choose"):
        record_writer(tmp_path / "x.rec").__enter__()


def test_a_record_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 536870911 bytes, got 536870912"):
        next(frame(np.zeros(MAX_LENGTH + 1, np.uint8).data))


@pytest.mark.parametrize("last", [struct.pack("<II", MAGIC, 2 << 29 | 9999), b"", bytes(8)])
def test_thousands_of_records_that_share_a_broken_end_are_walked_in_linear_time(
    tmp_path: Path, last: bytes
) -> None:
    count = 1000
    # Each start's data reach to the chain of empty middle parts that never ends.
    starts = b"".join(
        struct.pack("<III", MAGIC, 1 << 29 | 12 * (count - number) - 8, 0)
        for number in range(count)
    )
    reader = rec(tmp_path, starts + struct.pack("<II", MAGIC, 2 << 29) * count + last)
    calls = 0
    part = reader._part

    def counted(position: int, location: str = "") -> tuple[int, int, int]:
        nonlocal calls
        calls += 1
        return part(position, location)

    reader._part = counted  # type: ignore[method-assign]
    offsets = reader.scan()
    assert set(reader.headers(offsets)["flag"]) == {-1}
    assert calls < 10 * count
    messages = set()
    for offset in offsets[:count]:
        with pytest.raises(CorruptRecordError) as caught:
            reader.read(int(offset))
        messages.add(str(caught.value))
    assert len(messages) == 1  # what is wrong is said of each


@pytest.mark.parametrize("size", [0, 8192])
def test_a_file_that_is_cut_while_it_is_mapped_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "train.rec"
    path.write_bytes(b"".join(part(payload(0, b"x" * 9000)) for _ in range(3)))
    reader = RecordReader(path)
    offsets = reader.scan()
    with path.open("r+b") as file:
        file.truncate(size)
    last = int(offsets[-1])
    for read in (reader.body, reader.read, lambda _: reader.headers(offsets)):
        with pytest.raises(CorruptDataError, match=f"train.rec: .*got {size}: the file was cut"):
            read(last)
