"""Merged caches of parts of a data set, compared with the cache of all of it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.merge import merge, merged_spec
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import CacheSpec, DerivedSpec, DrawsSpec
from gkd.storage.cache.targets import SparseTargets, offsets_from_sizes
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, SpecMismatchError
from tests.caches import make_cache

SKIPPED = {3: "no image", 41: "another size", 77: "no image"}
Change = Callable[[CacheSpec], CacheSpec]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    draws = DrawsSpec(3, 4.0, "primary")
    return make_cache(tmp_path_factory.mktemp("full") / "c", skipped=SKIPPED, draws=draws)


def pick_rows(cache: Cache, view: Any, rows: range) -> SparseTargets:
    """Targets of some rows, assembled sample by sample."""
    read_shard = functools.cache(lambda shard: cache.read_shard(shard, view))
    found = []
    for row in rows:
        shard, sample = divmod(row, cache.spec.shard_samples)
        targets = read_shard(shard)
        group = slice(targets.offsets[sample], targets.offsets[sample + 1])
        found.append(
            {
                name: values[group if name in ("indices", "log2_probs") else [sample]]
                for name, values in targets.arrays().items()
            }
        )
    sizes = np.array([len(sample["indices"]) for sample in found])
    arrays = {name: np.concatenate([sample[name] for sample in found]) for name in found[0]}
    return SparseTargets.from_arrays(offsets_from_sizes(sizes), arrays)


def part(
    full: Cache,
    path: Path,
    rows: range,
    shard_samples: int,
    change: Change = lambda spec: spec,
) -> Cache:
    """A cache of some rows of the full one, with record keys from "1"."""
    dataset = msgspec.structs.replace(
        full.spec.dataset,
        name=path.name,
        num_images=len(rows),
        fingerprint=f"{rows.start:064x}",
    )
    spec = msgspec.structs.replace(
        full.spec, num_samples=len(rows), shard_samples=shard_samples, dataset=dataset
    )
    samples = full.samples()
    writer = CacheWriter(path, change(spec))
    for shard in writer.pending():
        mine = spec.shard_rows(shard)
        theirs = range(rows.start + mine.start, rows.start + mine.stop)
        here = slice(theirs.start, theirs.stop)
        writer.write_shard(
            shard,
            {view: pick_rows(full, view, theirs) for view in spec.views},
            ShardSamples(
                [str(row + 1) for row in mine],
                samples.labels[here],
                samples.digests[here],
                {row - theirs.start: why for row, why in SKIPPED.items() if row in theirs},
            ),
            truncated=dict.fromkeys(spec.views, 1),
        )
    writer.finish()
    return Cache.open(path)


@pytest.fixture(scope="module")
def parts(full: Cache, tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Rows 0 to 9, 10 to 59 and 60 to 99, in shards of 10, 40 and 17 samples."""
    folder = tmp_path_factory.mktemp("parts")
    return [
        part(full, folder / "a", range(10), 10),
        part(full, folder / "b", range(10, 60), 40),
        part(full, folder / "c", range(60, 100), 17),
    ]


def test_merged_parts_equal_the_full_cache(full: Cache, parts: list[Cache], tmp_path: Path) -> None:
    id = merge(parts, tmp_path / "out.gkd")
    merged = Cache.open(tmp_path / "out.gkd")
    assert merged.id == id
    assert verify(merged.path).faults == ()
    ours, theirs = merged.samples(), full.samples()
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.digests, theirs.digests)
    np.testing.assert_array_equal(ours.present, theirs.present)
    for shard in range(3):
        for file in layout.shard_files(full.spec, shard, full.commit(shard).entries):
            if not file.endswith(".parquet"):
                assert (merged.path / file).read_bytes() == (full.path / file).read_bytes(), file


def test_keys_have_the_number_of_their_cache(parts: list[Cache], tmp_path: Path) -> None:
    merge(parts, tmp_path / "out.gkd")
    merged = Cache.open(tmp_path / "out.gkd")
    assert merged.samples().keys([0, 9, 10, 59, 60, 99]) == [
        "1/1", "1/10", "2/1", "2/50", "3/1", "3/40"
    ]  # fmt: skip
    assert merged.commit(0).skipped == {"1/4": "no image"}
    assert merged.commit(1).skipped == {"2/32": "another size", "3/18": "no image"}


def test_the_spec_names_its_sources(parts: list[Cache]) -> None:
    spec = merged_spec(parts)
    assert spec.derived == DerivedSpec("merge", tuple(cache.id for cache in parts))
    assert (spec.num_samples, spec.shard_samples) == (100, 40)
    assert (spec.dataset.name, spec.dataset.num_images) == ("a+b+c", 100)
    assert spec.dataset.fingerprint != parts[0].spec.dataset.fingerprint


def test_truncated_groups_are_counted(parts: list[Cache], tmp_path: Path) -> None:
    merge(parts, tmp_path / "out.gkd")
    manifest = Cache.open(tmp_path / "out.gkd").manifest
    assert manifest is not None
    # One in each of the six shards.
    assert manifest.truncated == {"original": 6, "flipped": 6}


def test_an_interrupted_merge_is_resumed(
    parts: list[Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = merge(parts, tmp_path / "unbroken")
    write_shard = CacheWriter.write_shard

    def fail(self: CacheWriter, shard: int, *arguments: Any, **more: Any) -> None:
        if shard == 1:
            raise OSError("the disk went away")
        write_shard(self, shard, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", fail)
        with pytest.raises(OSError, match="went away"):
            merge(parts, tmp_path / "out")
    assert merge(parts, tmp_path / "out") == unbroken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: msgspec.structs.replace(s, threshold=0.8),
            r"threshold: first 0\.9, second 0\.8",
        ),
        (
            lambda s: msgspec.structs.replace(s, pixels="opencv"),
            "pixels: first nothing, second opencv",
        ),
        (lambda s: msgspec.structs.replace(s, num_classes=60), "num_classes: first 50, second 60"),
        (
            lambda s: msgspec.structs.replace(
                s, centers=msgspec.structs.replace(s.centers, sha256="7" * 64)
            ),
            "centers.sha256: first 2{64}, second 7{64}",
        ),
        (
            lambda s: msgspec.structs.replace(
                s, teacher=msgspec.structs.replace(s.teacher, sha256="7" * 64)
            ),
            "teacher.sha256: first 1{64}, second 7{64}",
        ),
        (
            lambda s: msgspec.structs.replace(
                s, dataset=msgspec.structs.replace(s.dataset, label_order="plain")
            ),
            "dataset.label_order: first recordio, second plain",
        ),
    ],
)
def test_caches_of_other_settings_are_refused(
    full: Cache, parts: list[Cache], tmp_path: Path, change: Change, message: str
) -> None:
    other = part(full, tmp_path / "other", range(60, 80), 40, change)
    with pytest.raises(SpecMismatchError, match=f"differ in {message}; merge caches of one"):
        merge([parts[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_other_names_are_the_same_teacher_and_centres(
    full: Cache, parts: list[Cache], tmp_path: Path
) -> None:
    def renamed(spec: CacheSpec) -> CacheSpec:
        return msgspec.structs.replace(
            spec,
            teacher=msgspec.structs.replace(spec.teacher, name="copy.onnx"),
            centers=msgspec.structs.replace(spec.centers, name="copy.npy"),
        )

    other = part(full, tmp_path / "other", range(60, 80), 40, renamed)
    merge([parts[0], other], tmp_path / "out")
    assert Cache.open(tmp_path / "out").spec.teacher == full.spec.teacher
    # Resuming the other one is not refused either.
    CacheWriter(other.path, msgspec.structs.replace(other.spec, teacher=full.spec.teacher))


def test_an_image_in_two_caches_is_refused(full: Cache, parts: list[Cache], tmp_path: Path) -> None:
    other = part(full, tmp_path / "other", range(58, 65), 40)
    with pytest.raises(SpecMismatchError) as caught:
        merge([parts[1], other], tmp_path / "out")
    message = str(caught.value)
    assert "2 images are in more than one of the caches" in message
    assert f"key 49 of {parts[1].path} is key 1 of {other.path}" in message
    assert f"key 50 of {parts[1].path} is key 2 of {other.path}" in message
    assert not (tmp_path / "out").exists()


def test_a_single_cache_is_refused(parts: list[Cache], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected two or more caches to merge, got 1"):
        merge(parts[:1], tmp_path / "out")


def test_the_same_cache_twice_is_refused(parts: list[Cache], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the same cache 2 times; give each part"):
        merge([parts[0], parts[1], parts[0]], tmp_path / "out")
