"""What all forms of records have in common."""

import hashlib
import multiprocessing
import pickle
import struct
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkd.storage.errors import CorruptRecordError
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.digests import digests
from gkd.storage.records.images import digest
from gkd.storage.records.open import open_records
from tests.storage.records.packs import insightface_records, jpeg, write_folder, write_pack


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Records]:
    """400 images of 80 identities as a pack and as a folder."""
    home = tmp_path_factory.mktemp("forms")
    files = {f"{key % 80}/{key}.jpg": jpeg(key) for key in range(400)}
    return {
        "pack": open_records(write_pack(home / "pack", insightface_records([5] * 80))),
        "folder": open_records(write_folder(home / "folder", files)),
    }


@pytest.fixture(params=["pack", "folder"])
def many(forms: dict[str, Records], request: pytest.FixtureRequest) -> Records:
    return forms[request.param]


def test_digests_are_those_of_the_encoded_images(many: Records) -> None:
    hashed = digests(many, workers=3)
    assert hashed.shape == (400, 16)
    assert hashed.dtype == np.uint8
    for row in range(400):
        assert hashed[row].tobytes() == digest(many.encoded(row))
    assert len(np.unique(hashed, axis=0)) == 400


def test_several_threads_read_at_once(many: Records) -> None:
    expected = [bytes(many.encoded(row)) for row in range(400)]
    rows = np.random.default_rng(0).integers(0, 400, 1000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: bytes(many.encoded(row)), rows))
    assert read == [expected[row] for row in rows]


def test_spawned_workers_open_by_path(forms: dict[str, Records]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for records in forms.values():
            assert pickle.loads(pickle.dumps(records)).fingerprint == records.fingerprint
            np.testing.assert_array_equal(
                pool.submit(digests, records, workers=1).result(), digests(records, workers=1)
            )
            np.testing.assert_array_equal(
                pool.submit(records.image, 399).result(), records.image(399)
            )


# pyarrow's own threads are idle at the fork; the workers never use them.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_workers_share_one_map(many: Records) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).permutation(400)
        results.put((seed, [digest(many.encoded(row)) for row in rows.tolist()]))

    workers = [context.Process(target=read, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = [digest(many.encoded(row)) for row in range(400)]
    for seed in range(3):
        rows = np.random.default_rng(seed).permutation(400).tolist()
        assert found[seed] == [expected[row] for row in rows]


def test_faces_of_another_size_are_faults_with_a_location(tmp_path: Path) -> None:
    records = open_records(write_folder(tmp_path, {"a/1.jpg": jpeg(0, (96, 112))}))
    for read in (records.face, records.image):
        with pytest.raises(CorruptRecordError) as caught:
            read(0)
        assert caught.value.path == records.where(0) == f"{tmp_path}, key a/1.jpg"
        assert caught.value.problem == "expected an aligned face of 112x112 pixels, got 96x112"
    assert "gkd records verify" in str(caught.value.remedy)


def test_a_fingerprint_is_the_sha256_of_labels_and_sizes(tmp_path: Path) -> None:
    records = open_records(write_pack(tmp_path, insightface_records([2, 1, 3])))
    labels, sizes = [0, 0, 1, 2, 2, 2], [len(jpeg(key)) for key in range(1, 7)]
    assert records.fingerprint == hashlib.sha256(struct.pack("<12q", *labels, *sizes)).hexdigest()


def test_a_subset_has_rows_of_the_same_files(forms: dict[str, Records]) -> None:
    records = forms["folder"]
    subset = Subset(records, np.array([4, 2]), num_classes=99)
    assert (subset.num_classes, len(subset)) == (99, 2)
    assert [subset.key(row) for row in range(2)] == [records.key(4), records.key(2)]
    assert [subset.encoded(row) for row in range(2)] == [records.encoded(4), records.encoded(2)]
    assert subset.labels.tolist() == records.labels[[4, 2]].tolist()
    assert list(subset.stamps()) == list(records.stamps())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    records = open_records(write_folder(tmp_path / "faces", {"a/1.jpg": b"x", "b/2.jpg": b"y"}))
    (tmp_path / "faces/b/2.jpg").unlink()
    with pytest.raises(CorruptRecordError, match=r"faces/b/2\.jpg: No such file"):
        list(records.stamps())
    pack = open_records(write_pack(tmp_path / "pack", insightface_records([1])))
    (tmp_path / "pack/train.idx").unlink()
    with pytest.raises(CorruptRecordError, match=r"train\.idx: No such file"):
        list(pack.stamps())
