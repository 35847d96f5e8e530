import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.records.open import Records, digest, digests, open_records
from gkd.storage.records.pack import RecordFile
from tests.storage.records.packs import (
    insightface_records,
    jpeg,
    payload,
    write_folder,
    write_pack,
)

IDENTITIES = [2, 1, 3]
LABELS = [0, 0, 1, 2, 2, 2]


def opened(path: Path) -> RecordFile:
    records = open_records(path)
    assert isinstance(records, RecordFile)
    return records


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"expected a folder with train\.rec, a \.rec, .* got nothing"),
        (lambda path: path.write_text("x"), r"expected a folder with train\.rec, .* another file;"),
        (lambda path: path.mkdir(), r"expected a folder with train\.rec, .*, got no image"),
        (lambda path: write_pack(path, {}), r"records with images, got 0 records and no image"),
        (
            lambda path: write_pack(path, {0: payload([1, 1], b"")}),
            r"records with images, got 1 records and no image; name a pack with images",
        ),
    ],
)
def test_paths_without_records_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "data"
    make(path)
    with pytest.raises(ConfigError, match=message):
        open_records(path)


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
