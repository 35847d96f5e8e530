"""Caches are read as they were written, by any Zarr reader; what no cache can hold is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import VIEWS, CacheSpec, DrawsSpec
from gkd.storage.cache.targets import SparseTargets, offsets_from_sizes
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, IncompleteCacheError, SpecMismatchError
from tests.caches import (
    add_draws,
    dense_targets,
    digest_of,
    labels_of,
    make_cache,
    make_logits,
    make_spec,
    write_shard,
)
from tests.storage.cache.strategies import Teaching, teachings


def assert_equal_targets(left: SparseTargets, right: SparseTargets) -> None:
    np.testing.assert_array_equal(right.offsets, left.offsets)
    expected, got = left.arrays(), right.arrays()
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
        assert got[name].dtype == values.dtype, name


@given(teaching=teachings())
@settings(max_examples=15 * settings().max_examples // 50)
def test_written_targets_are_read_back(
    teaching: Teaching, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = teaching.spec
    path = tmp_path_factory.mktemp("caches") / "round.gkd"
    writer = CacheWriter(path, spec)
    written = {}
    for shard in writer.pending():
        rows = spec.shard_rows(shard)
        part = slice(rows.start, rows.stop)
        targets, cut = dense_targets(teaching.logits[part], teaching.labels[part], spec)
        digests = np.frombuffer(b"".join(map(digest_of, rows)), np.uint8).reshape(-1, 16)
        samples = ShardSamples([f"k{r}" for r in rows], teaching.labels[part], digests, {})
        views = dict.fromkeys(VIEWS, targets)
        writer.write_shard(shard, views, samples, truncated=dict.fromkeys(VIEWS, cut))
        written[shard] = targets
    assert writer.finish() == hashlib.sha256((path / layout.MANIFEST).read_bytes()).hexdigest()

    cache = Cache.open(path)
    assert cache.spec == spec
    for shard, targets in written.items():
        for view in VIEWS:
            assert_equal_targets(targets, cache.read_shard(shard, view))
    np.testing.assert_array_equal(cache.samples().labels, teaching.labels)
    assert verify(path, workers=1).faults == ()


def test_draws_are_written_and_read(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", draws=DrawsSpec(5, 4.0, "primary"))
    rows = cache.spec.shard_rows(1)
    part = slice(rows.start, rows.stop)
    logits = make_logits(cache.spec, "flipped")[part]
    targets, _ = dense_targets(logits, labels_of(cache.spec)[part], cache.spec)
    assert_equal_targets(add_draws(targets, logits, cache.spec), cache.read_shard(1, "flipped"))
    assert verify(cache.path).ok


def test_zarr_itself_would_write_this_metadata() -> None:
    spec = make_spec(draws=DrawsSpec(5, 4.0, "primary"))
    for array in layout.arrays(spec, "original").values():
        chunks = (1, *array.shape[1:])
        blosc = BloscCodec(
            typesize=array.dtype.itemsize,
            cname="zstd",
            clevel=3,
            shuffle="bitshuffle",
        )
        made = zarr.create_array(
            MemoryStore(),
            shape=array.shape,
            dtype=array.dtype,
            chunks=(1, layout.INNER_CHUNK) if array.packed else chunks,
            shards=chunks if array.packed else None,
            compressors=[blosc, Crc32cCodec()],
            fill_value=0,
        )
        stored = made.metadata.to_buffer_dict(default_buffer_prototype())
        assert json.loads(stored["zarr.json"].to_bytes()) == array.metadata()


def test_tensorstore_and_plain_zarr_read_a_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    group: Any = zarr.open_group(cache.path, mode="r")
    assert msgspec.convert(dict(group.attrs), CacheSpec) == cache.spec
    targets = cache.read_shard(2, "flipped")
    entries = len(targets.indices)
    for name in ("indices", "log2_probs", "sizes", "secondary"):
        url = {"driver": "file", "path": str(cache.path / "flipped" / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": url}).result()
        expected = getattr(targets, name)
        count = entries if name in ("indices", "log2_probs") else len(targets)
        np.testing.assert_array_equal(array[2, :count].read().result(), expected)
        np.testing.assert_array_equal(group[f"flipped/{name}"][2, :count], expected)


def test_pending_shards_go_to_ranks_by_number(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec(num_samples=100, shard_samples=10))
    assert writer.pending(0, 3) == [0, 3, 6, 9]
    write_shard(writer, 3)
    assert writer.pending(0, 3) == [0, 6, 9]
    assert writer.pending(1, 3) == [1, 4, 7]
    with pytest.raises(IncompleteCacheError, match=r"9 of 10 shards .* first is 0; run the same"):
        writer.finish()


def test_a_finished_cache_has_nothing_pending(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", skipped={3: "corrupt"})
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == []
    manifest = cache.path / layout.MANIFEST
    before = manifest.stat()
    assert writer.finish() == cache.id
    after = manifest.stat()
    written = (after.st_ino, after.st_mtime_ns)
    assert written == (before.st_ino, before.st_mtime_ns), "it was written again"
    with pytest.raises(ValueError, match="shard 1 is committed already"):
        write_shard(writer, 1)


def test_other_settings_are_refused_field_by_field(tmp_path: Path) -> None:
    spec = make_spec(threshold=0.9)
    CacheWriter(tmp_path / "c", spec)
    other = msgspec.structs.replace(
        spec, threshold=0.8, teacher=msgspec.structs.replace(spec.teacher, sha256="9" * 64)
    )
    with pytest.raises(SpecMismatchError) as caught:
        CacheWriter(tmp_path / "c", other)
    message = str(caught.value)
    assert "threshold: the cache has 0.9, this run has 0.8" in message
    assert f"teacher.sha256: the cache has {'1' * 64}, this run has {'9' * 64}" in message
    assert "max_group" not in message
    assert "choose another folder" in message


def test_other_software_versions_resume_a_cache(tmp_path: Path) -> None:
    spec = make_spec()
    CacheWriter(tmp_path / "c", spec)
    CacheWriter(tmp_path / "c", msgspec.structs.replace(spec, software={"gkd": "0.2.0"}))


def test_a_path_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("x")
    zarr.create_group(tmp_path / "zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"file: expected a cache of targets .* got a file"):
        CacheWriter(tmp_path / "file", make_spec())
    with pytest.raises(ConfigError, match=r"full: expected a cache .* got another folder"):
        CacheWriter(tmp_path / "full", make_spec())
    with pytest.raises(ConfigError, match="zarr: a Zarr store, but not a cache of targets"):
        CacheWriter(tmp_path / "zarr", make_spec())
    assert CacheWriter(tmp_path / "empty", make_spec()).pending() == [0, 1, 2]
    assert (tmp_path / "full" / "photo.jpg").read_text() == "x"


def one_sample(**changes: Any) -> SparseTargets:
    fields: dict[str, Any] = {
        "offsets": np.array([0, 2]),
        "indices": np.array([0, 1], np.uint32),
        "log2_probs": np.array([0, 9], np.uint16),
        "secondary": np.zeros((1, 3), np.float32),
    }
    return SparseTargets(**fields | changes)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            one_sample(indices=np.array([0, 1])),
            r"original/indices: expected .*uint32.*, got .*int64",
        ),
        (one_sample(offsets=np.array([0, 1])), "offsets do not cover 1 samples and 2 entries"),
        (one_sample(offsets=np.array([0, 1, 2])), "offsets do not cover"),
        (one_sample(secondary=np.zeros((1, 2), np.float32)), r"secondary: expected .*\(1, 3\)"),
        (one_sample(log2_probs=np.zeros(3, np.uint16)), r"log2_probs: expected .*\(2,\)"),
        (one_sample(indices=np.array([0, 50], np.uint32)), "index 50 of 50 classes"),
        (
            one_sample(
                offsets=np.array([0, 0]),
                indices=np.zeros(0, np.uint32),
                log2_probs=np.zeros(0, np.uint16),
            ),
            "sizes outside 1..20, or 0 for no skipped sample",
        ),
        (
            one_sample(
                offsets=np.array([0, 21]),
                indices=np.arange(21, dtype=np.uint32),
                log2_probs=np.zeros(21, np.uint16),
            ),
            "sizes outside 1..20",
        ),
    ],
)
def test_inconsistent_targets_are_not_written(
    tmp_path: Path, targets: SparseTargets, message: str
) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec(num_samples=1, views=("original",)))
    samples = ShardSamples(["1"], np.zeros(1, np.int64), np.zeros((1, 16), np.uint8), {})
    with pytest.raises(ValueError, match=message):
        writer.write_shard(0, {"original": targets}, samples, truncated={"original": 0})
    assert writer.pending() == [0]


def test_missing_draws_are_refused(tmp_path: Path) -> None:
    draws = DrawsSpec(2, 1.0, "all")
    spec = make_spec(num_samples=1, views=("original",), draws=draws)
    samples = ShardSamples(["1"], np.zeros(1, np.int64), np.zeros((1, 16), np.uint8), {})
    with pytest.raises(ValueError, match=r"original/draws: expected .*, got None"):
        CacheWriter(tmp_path / "c", spec).write_shard(
            0, {"original": one_sample()}, samples, truncated={"original": 0}
        )


def test_samples_that_do_not_fit_the_shard_are_not_written(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec(num_samples=2, views=("original",)))
    samples = ShardSamples(["1"], np.zeros(1, np.int64), np.zeros((1, 16), np.uint8), {})
    with pytest.raises(ValueError, match="shard 0 has 2 samples"):
        writer.write_shard(0, {"original": one_sample()}, samples, truncated={"original": 0})


def test_chunks_of_zeros_are_written_like_any_others(tmp_path: Path) -> None:
    spec = make_spec(num_samples=3, num_classes=1, max_group=1, views=("original",))
    targets = SparseTargets(
        offsets_from_sizes(np.ones(3, np.int64)),
        np.zeros(3, np.uint32),
        np.zeros(3, np.uint16),
        np.zeros((3, 3), np.float32),
    )
    writer = CacheWriter(tmp_path / "c", spec)
    samples = ShardSamples(list("abc"), np.zeros(3, np.int64), np.ones((3, 16), np.uint8), {})
    writer.write_shard(0, {"original": targets}, samples, truncated={"original": 0})
    writer.finish()
    assert_equal_targets(targets, Cache.open(writer.path).read_shard(0, "original"))


def test_a_shard_of_skipped_samples_only_has_no_entries(tmp_path: Path) -> None:
    cache = make_cache(
        tmp_path / "c", num_samples=4, shard_samples=2, skipped={2: "bad", 3: "worse"}
    )
    targets = cache.read_shard(1, "original")
    assert targets.sizes.tolist() == [0, 0]
    assert (targets.secondary == 0).all()
    assert cache.commit(1).skipped == {"3": "bad", "4": "worse"}
    assert cache.samples().present.tolist() == [True, True, False, False]
    assert verify(cache.path).ok
