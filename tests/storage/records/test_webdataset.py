import bz2
import gzip
import lzma
import pickle
import shutil
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError
from gkd.storage.records import webdataset as webdataset_records
from gkd.storage.records.check import records_info, verify_records
from gkd.storage.records.open import open_records
from gkd.storage.records.webdataset import WebDatasetRecords
from tests.storage.records.forms import BODIES, LABELS, Members, bodies, samples, write_tar


def opened(path: Path) -> WebDatasetRecords:
    records = open_records(path)
    assert isinstance(records, WebDatasetRecords)
    return records


def test_a_shard_is_read_in_order(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "faces.tar", samples(LABELS, BODIES))
    records = opened(path)
    assert records.labels.tolist() == LABELS
    assert bodies(records) == BODIES
    assert records.sizes.tolist() == list(map(len, BODIES))
    assert (records.name, records.path, records.num_classes) == ("faces", path, 3)
    assert (records.layout, records.label_order) == ("webdataset", "recordio")
    assert records.key(3) == "000000003"
    assert records.where(0) == f"{path}, key 000000000, offset 0"
    assert records.image(2).shape == (112, 112, 3)
    assert [name for name, _ in records.stamps()] == ["faces.tar"]
    info = records_info(records)
    assert (info.layout, info.images, info.image_size) == ("webdataset", 8, (112, 112))


def shards(folder: Path) -> Path:
    """Shards 1, 2 and 10, with equal keys, not written in order."""
    for number, part in [(10, slice(5, 8)), (1, slice(0, 2)), (2, slice(2, 5))]:
        write_tar(folder / f"faces-{number}.tar", samples(LABELS[part], BODIES[part]))
    return folder


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_shards_are_one_data_set_in_natural_order(tmp_path: Path, subfolder: str) -> None:
    shards(tmp_path / "set" / subfolder)
    (tmp_path / "set/README.md").write_text("faces")
    records = opened(tmp_path / "set")
    assert records.labels.tolist() == LABELS
    assert bodies(records) == BODIES
    assert (records.name, records.path) == ("set", tmp_path / "set")
    keys = [records.key(row) for row in (0, 2, 4, 5)]
    assert keys == [f"faces-{shard}/{key:09}" for shard, key in [(1, 0), (2, 0), (2, 2), (10, 0)]]
    assert records.where(7).startswith(
        f"{tmp_path / 'set' / subfolder / 'faces-10.tar'}, key 00000000"
    )
    (tmp_path / "set/property").write_text("9,112,112\n")
    assert opened(tmp_path / "set").num_classes == 9


def test_few_maps_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_records, "MAX_MAPS", 2)
    records = opened(shards(tmp_path))
    held = [records.encoded(row) for row in range(8)]  # views stay valid after their map is dropped
    rows = np.random.default_rng(0).integers(0, 8, 800).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: bytes(records.encoded(row)), rows))
    assert read == [BODIES[row] for row in rows]
    assert list(map(bytes, held)) == BODIES
    assert records._maps.get.cache_info().currsize <= 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("extra", "label"),
    [
        ({"a.cls": b"5"}, 5),
        ({"a.cls": b" 5\n"}, 5),
        ({"a.json": b'{"label": 5, "id": 3, "caption": "x"}'}, 5),
        ({"a.json": b'{"identity": 5}'}, 5),
        ({"a.json": b'{"cls": 5}', "a.txt": b"a face", "a.seg.png": b"other"}, 5),
        ({"a.JSON": b'{"label": 4}', "a.cls": b"5"}, 5),
        ({"a.cls": b"4294967295"}, 4294967295),
    ],
)
def test_a_label_is_read(tmp_path: Path, extra: dict[str, bytes], label: int) -> None:
    (tmp_path / "property").write_text(f"{2**32},112,112\n")
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"image"), *extra.items()])
    assert opened(path).labels.tolist() == [label]


GOOD = [("good.jpg", BODIES[0]), ("good.cls", b"2")]
NO_CLASS = "expected a whole number from 0, got label"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "a.cls": b"-1"}, rf"{NO_CLASS} -1; write"),
        ({"a.jpg": b"x", "a.cls": b""}, rf"{NO_CLASS} ''; write"),
        ({"a.jpg": b"x", "a.cls": b"anna"}, rf"{NO_CLASS} anna; write"),
        ({"a.jpg": b"x", "a.cls": b"9" * 30}, rf"{NO_CLASS} 9{{20}}; write"),
        ({"a.jpg": b"x", "a.cls": "²".encode()}, rf"{NO_CLASS} ²; write"),
        ({"a.jpg": b"x", "a.json": b"{"}, rf"{NO_CLASS} in broken JSON; write"),
        ({"a.jpg": b"x", "a.json": b'{"label": "anna"}'}, rf"{NO_CLASS} 'anna'; write"),
        ({"a.jpg": b"x", "a.json": b'{"label": true}'}, rf"{NO_CLASS} True; write"),
        ({"a.jpg": b"x", "a.json": b'{"label": -7}'}, rf"{NO_CLASS} -7; write"),
        ({"a.jpg": b"x", "a.json": b'{"label": 1, "class": 1}'}, rf"{NO_CLASS} label and class;"),
        ({"a.jpg": b"x", "a.json": b"[1]"}, r"expected a label in KEY\.cls .* got only jpg, json;"),
        ({"a.jpg": b"x", "a.txt": b"1"}, r"expected a label in KEY\.cls .* got only jpg, txt; wri"),
        ({"a.cls": b"1"}, r"expected one image beside its label, got none; links are not followed"),
        ({"a.jpg": b"x", "a.cls": b"1", "a.png": b"y"}, r"expected one image .*, got jpg, png"),
    ],
)
def test_an_incomplete_sample_stays_a_row(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", [*members.items(), *GOOD])
    records = opened(path)
    assert records.labels.tolist() == [-1, 2]
    location = rf"{path}, key a, offset 0: "
    with pytest.raises(CorruptRecordError, match=rf"^{location}{message}"):
        records.encoded(0)
    assert bytes(records.encoded(1)) == BODIES[0]
    (fault,) = verify_records(records, workers=2).faults
    assert str(fault).startswith(f"{path}, key a, offset 0: expected")
    # A shard without any other sample is refused, with the reason.
    alone = write_tar(tmp_path / "alone.tar", members.items())
    with pytest.raises(ConfigError, match=rf"got none among 1 samples, the first: .*{message}"):
        opened(alone)


def test_a_label_above_the_stated_number_of_classes_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "property").write_text("2,112,112\n")
    records = opened(write_tar(tmp_path / "x.tar", samples(LABELS, BODIES)))
    assert (records.num_classes, records.labels.tolist()) == (2, [1, 0, -1, 1, 1, 0, -1, 0])
    with pytest.raises(
        CorruptRecordError, match="expected a class from 0 to 1, got label 2; write"
    ):
        records.encoded(2)


def test_an_implausibly_large_label_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples([0, 3_000_000_000], BODIES[:2]))
    with pytest.raises(
        ConfigError, match=r"key 000000001, .*: expected a label below 1,000,000 among 2 images"
    ):
        opened(path)


def test_members_that_are_no_samples_are_ignored(tmp_path: Path) -> None:
    members: Members = [
        ("dataset.json", b'{"name": "faces"}'),
        ("._a.jpg", b"what a Mac leaves"),
        ("README", b"faces"),
        *GOOD,
    ]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    records = opened(path)
    assert [records.key(row) for row in range(len(records))] == ["good"]


def test_keys_of_any_name(tmp_path: Path) -> None:
    stem = "../Zoë/" + "x" * 200
    path = write_tar(tmp_path / "x.tar", [(f"{stem}.1.jpg", b""), *samples([0], [b"body"])])
    with tarfile.open(path, "a", encoding="utf-8", errors="surrogateescape") as archive:
        for name in ("\udcff.jpg", "\udcff.cls"):
            member = tarfile.TarInfo(name)
            archive.addfile(member)
    records = opened(write_tar(tmp_path / "y.tar", [(f"{stem}.jpg", b"a"), (f"{stem}.cls", b"1")]))
    assert records.key(0) == stem
    # A second dot makes another field, as in WebDataset; bytes that are not UTF-8 are escaped.
    records = opened(path)
    assert [records.key(row) for row in range(2)] == ["000000000", "\\xff"]


@pytest.mark.parametrize("order", ["apart", "again"])
def test_a_repeated_key_is_refused(tmp_path: Path, order: str) -> None:
    first, second = list(samples([0, 1], BODIES[:2]))[:2], list(samples([1], BODIES[1:2], 1))
    members = first + second + first if order == "again" else [first[0], *second, first[1]]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        CorruptRecordError,
        match=r"x\.tar: expected every key once, got 000000000 at offset 0 and again at \d+; .*so",
    ):
        opened(path)


def test_damage_loses_only_the_samples_it_hits(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples(LABELS, BODIES), format=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    starts = opened(path)._starts.tolist()
    content[starts[3] + 130] ^= 1  # the size of an image
    content[starts[6] - 1024] ^= 1  # the name of a label
    path.write_bytes(content)
    records = opened(path)
    faults = {records.where(row): records.labels[row] for row in range(len(records))}
    assert len(records) == 10
    assert [bytes(records.encoded(r)) for r in range(10) if records.labels[r] >= 0] == [
        body for row, body in enumerate(BODIES) if row not in (3, 5)
    ]
    assert faults[f"{path}, key @{starts[3]}, offset {starts[3]}"] == -1
    messages = [str(fault) for fault in verify_records(records, workers=1).faults]
    assert len(messages) == 4
    assert sum("expected a tar header with its checksum" in message for message in messages) == 2
    assert any("key 000000003" in m and "expected one image beside" in m for m in messages)
    assert any("key 000000005" in m and "expected a label" in m for m in messages)


@pytest.mark.parametrize("num_cut", [1024 + 10, 1500, 4000])
def test_a_truncated_shard_keeps_its_intact_samples(tmp_path: Path, num_cut: int) -> None:
    path = write_tar(tmp_path / "x.tar", samples(LABELS, BODIES), format=tarfile.USTAR_FORMAT)
    content = path.read_bytes().rstrip(b"\0")
    end = -(-len(content) // 512) * 512 + 1024  # without the padding of the archive
    path.write_bytes(path.read_bytes()[: end - num_cut])
    records = opened(path)
    good = (records.labels >= 0).tolist()
    assert good in ([True] * 8 + [False], [True] * 7 + [False] * 2, [True] * 7 + [False])
    assert "truncated" in str(verify_records(records, workers=1).faults[-1])


@pytest.mark.parametrize("content", [b"", b"x" * 3000, bytes(100)])
def test_files_that_are_not_tar_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(
        CorruptRecordError, match=r"x\.tar: offset 0: expected .*; fetch or write it"
    ):
        opened(path)


def test_an_empty_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"like KEY\.jpg and KEY\.cls, .* got none among 0 sampl"):
        opened(write_tar(tmp_path / "x.tar", []))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar", "x.tar.bz2", "x.tar.xz"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_compressed_archives_are_refused(tmp_path: Path, name: str, by_folder: bool) -> None:
    kind = {"bz2": bz2, "xz": lzma}.get(name.rpartition(".")[2], gzip)
    plain = write_tar(tmp_path / "inner", samples([0], BODIES[:1]))
    (tmp_path / name).write_bytes(kind.compress(plain.read_bytes()))
    with pytest.raises(
        CorruptRecordError, match=r"expected a plain \.tar file, got an? .*z"
    ) as error:
        open_records(tmp_path if by_folder else tmp_path / name)
    if kind is gzip:
        _, command, _ = str(error.value).split("`")
        subprocess.run(command, shell=True, check=True)
        (archive,) = tmp_path.glob("x*.tar")
        assert len(open_records(tmp_path if by_folder else archive)) == 1


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        CorruptRecordError, match=r"got a Git-LFS pointer to the file; fetch .* by `git l"
    ):
        opened(path)


def test_records_pickle_by_path(tmp_path: Path) -> None:
    records = opened(shards(tmp_path))
    pickled = pickle.dumps(records)
    assert len(pickled) < 3000
    copy = pickle.loads(pickled)
    assert bodies(copy) == BODIES
    assert copy.fingerprint == records.fingerprint
    with (tmp_path / "faces-2.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(
        CorruptRecordError, match=r"faces-2\.tar: expected \d+ bytes as when it was"
    ):
        pickle.loads(pickled).encoded(2)
    (tmp_path / "faces-1.tar").unlink()
    with pytest.raises(CorruptRecordError, match=r"faces-1\.tar: No such file .*; put it back"):
        pickle.loads(pickled).encoded(0)
    with pytest.raises(CorruptRecordError, match=r"faces-1\.tar: No such file .*; put it back"):
        list(records.stamps())


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("format", ["ustar", "gnu", "posix"])
def test_a_folder_packed_by_the_tar_program(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in samples(LABELS, BODIES):
        (folder / name).write_bytes(content)
    names = sorted(path.name for path in folder.iterdir())
    path = tmp_path / "x.tar"
    subprocess.run(["tar", f"--format={format}", "-cf", path, "-C", folder, *names], check=True)
    records = opened(path)
    assert records.labels.tolist() == LABELS
    assert bodies(records) == BODIES


small = st.lists(st.tuples(st.integers(0, 9), st.binary(min_size=1, max_size=1200)), min_size=1)


@given(small, st.data())
def test_a_flipped_bit_is_reported_or_hits_one_image(
    drawn: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    labels, images = [label for label, _ in drawn], [body for _, body in drawn]
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "x.tar", samples(labels, images))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            records = opened(path)
        except GkdError:
            return
        read, located = [], True
        for row in range(len(records)):
            try:
                read.append((int(records.labels[row]), bytes(records.encoded(row))))
            except CorruptRecordError as error:
                located = located and str(error).startswith(f"{records.where(row)}: expected")
        kept = [sample for sample in drawn if sample in read]
        assert len(kept) >= len(drawn) - 1
        assert located


def test_an_unreadable_shard_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(
        CorruptRecordError, match=r"x\.tar: expected a plain \.tar file, got a folder"
    ):
        open_records(tmp_path)
