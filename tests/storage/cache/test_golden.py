"""The golden cache of format 1 remains readable, by gkd and by any Zarr reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, View
from gkd.storage.cache.verify import verify
from gkd.storage.reading.mmap_store import materialise
from tests.golden import make
from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
PATH = GOLDEN / "format1.gkd"
FIELDS = ("indices", "log2_probs", "secondary", "draws", "draw_log2_probs")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "format1.json").read_text())
    return content


def of_view(expected: dict[str, Any], rows: range, view: View, field: str) -> np.ndarray:
    """One field of some samples from the values that are spelt out."""
    values = [expected["samples"][row][view][field] for row in rows]
    match field:
        case "indices":
            return np.array([v for group in values for v in group], np.uint32)
        case "log2_probs":
            return np.array([v for group in values for v in group], np.uint16)
        case "secondary":
            return np.array([[float(v) for v in row] for row in values], np.float32)
        case "draws":
            return np.array(values, np.uint32)
    return np.array(values, np.uint16)


def test_it_is_whole_and_has_its_id(expected: dict[str, Any]) -> None:
    cache = Cache.open(PATH)
    assert cache.id == expected["id"]
    assert cache.spec == make.SPEC
    assert verify(PATH, level="hashes").faults == ()
    # Its numbers include the extreme codes, which no teacher predicts together; all else is right.
    found = {fault.problem.partition(": ")[2] for fault in verify(PATH).faults}
    tail = "a secondary mass at 1 that no tail of classes has"
    assert found == {"not the probability of its entry", tail}


def test_it_may_be_trained_from() -> None:
    cache = Cache.open(PATH)
    for shard in range(cache.spec.num_shards):
        for view in VIEWS:
            assert len(cache.read_verified(shard, view)) == len(cache.spec.shard_rows(shard))


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 60_000


def test_samples_are_as_they_were_written(expected: dict[str, Any]) -> None:
    cache = Cache.open(PATH)
    samples = cache.samples()
    for row, sample in enumerate(expected["samples"]):
        shard = row // 4
        assert samples.keys([row]) == [sample["key"]]
        assert samples.labels[row] == sample["label"]
        assert samples.present[row] == (sample["digest"] is not None)
        assert samples.digests[row].tobytes().hex() == (sample["digest"] or "00" * 16)
        assert cache.commit(shard).skipped.get(sample["key"]) == sample["skipped"]
    assert cache.manifest is not None
    assert cache.manifest.truncated == {"original": 3, "flipped": 0}


@pytest.mark.parametrize("view", VIEWS)
def test_every_value_is_as_it_was_written(expected: dict[str, Any], view: View) -> None:
    cache = Cache.open(PATH)
    for shard in range(3):
        rows = cache.spec.shard_rows(shard)
        targets = cache.read_shard(shard, view)
        sizes = [len(expected["samples"][row][view]["indices"]) for row in rows]
        assert targets.sizes.tolist() == sizes
        for field in FIELDS:
            values = of_view(expected, rows, view, field)
            np.testing.assert_array_equal(targets.arrays()[field], values, err_msg=field)
            assert targets.arrays()[field].dtype == values.dtype


def test_a_store_of_it_gives_the_same(expected: dict[str, Any], tmp_path: Path) -> None:
    store = materialise(Cache.open(PATH), folder=tmp_path)
    for view, flipped in (("original", False), ("flipped", True)):
        targets = store.lookup(np.arange(10), np.full(10, flipped))
        for field in FIELDS:
            values = of_view(expected, range(10), view, field)  # type: ignore[arg-type]
            np.testing.assert_array_equal(targets.arrays()[field], values, err_msg=field)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_other_readers_read_it(expected: dict[str, Any], reader: str) -> None:
    for view in VIEWS:
        for field in FIELDS:
            where = PATH / view / field
            array: Any = (
                tensorstore.open(
                    {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(where)}}
                ).result()
                if reader == "tensorstore"
                else zarr.open_array(where, mode="r")
            )
            for shard in range(3):
                values = of_view(expected, make.SPEC.shard_rows(shard), view, field)
                found = np.asarray(array[shard, : len(values)])
                np.testing.assert_array_equal(found, values, err_msg=f"{view}/{field}")


def test_the_script_still_makes_it(expected: dict[str, Any], tmp_path: Path) -> None:
    """All but the tables of samples, whose bytes are pyarrow's, and what hashes them."""
    make.make(tmp_path)
    made = json.loads((tmp_path / "format1.json").read_text())
    assert made["samples"] == expected["samples"]
    ours, theirs = Cache.open(tmp_path / "format1.gkd"), Cache.open(PATH)
    for shard in range(3):
        for file in layout.shard_files(make.SPEC, shard, ours.commit(shard).entries):
            if not file.endswith(".parquet"):
                assert (ours.path / file).read_bytes() == (theirs.path / file).read_bytes(), file
        assert ours.read_samples(shard).equals(theirs.read_samples(shard))
