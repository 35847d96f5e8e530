import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
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

from gkd.storage import layout
from gkd.storage.cache import Cache
from gkd.storage.errors import ConfigError, GkdError, IncompleteCacheError, SpecMismatchError
from gkd.storage.metadata import committed_shards, read_commit
from gkd.storage.spec import VIEWS, CacheSpec, DrawsSpec
from gkd.storage.targets import SparseTargets, offsets_from_sizes
from gkd.storage.verify import verify
from gkd.storage.writer import CacheWriter, ShardSamples, delete_leftovers
from tests.caches import (
    add_draws,
    contents,
    dense_targets,
    digest_of,
    labels_of,
    make_cache,
    make_logits,
    make_spec,
    write_shard,
)
from tests.paths import ROOT
from tests.storage.strategies import Teaching, teachings


def assert_equal_targets(left: SparseTargets, right: SparseTargets) -> None:
    for field in (each.name for each in fields(SparseTargets)):
        expected, got = getattr(left, field), getattr(right, field)
        np.testing.assert_array_equal(got, expected, err_msg=field)
        assert (got is None) == (expected is None)
        if got is not None:
            assert got.dtype == expected.dtype, field


@settings(max_examples=12, deadline=None)
@given(teaching=teachings())
def test_what_is_written_is_read(
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
    assert writer.finish() == cache.id
    with pytest.raises(ValueError, match="shard 1 is committed already"):
        write_shard(writer, 1)


@pytest.mark.parametrize("left", [b"", b'{"format": 1, "shard"', b"{}", b"\xff"])
def test_a_shard_whose_commit_record_is_damaged_is_written_again(
    tmp_path: Path, left: bytes
) -> None:
    cache = make_cache(tmp_path / "c")
    (cache.path / "commits" / "000001.json").write_bytes(left)
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == [1]
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards .* first is 1"):
        writer.finish()
    write_shard(writer, 1)
    assert writer.finish() == cache.id


@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_shard_whose_files_are_not_there_is_written_again(tmp_path: Path, damage: str) -> None:
    """Before the manifest vouches for them."""
    cache = make_cache(tmp_path / "c")
    (cache.path / "manifest.json").unlink()
    path = cache.path / "original/indices/c/1/0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    if damage == "gone":
        path.unlink()
    writer = CacheWriter(cache.path, cache.spec)
    assert writer.pending() == [1]
    write_shard(writer, 1)
    assert writer.finish() == cache.id
    assert path.read_bytes() == content


def test_the_record_of_another_shard_is_no_commit(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    commits = cache.path / "commits"
    (commits / "000000.json").write_bytes((commits / "000001.json").read_bytes())
    assert CacheWriter(cache.path, cache.spec).pending() == [0]


def test_other_settings_are_refused_field_by_field(tmp_path: Path) -> None:
    spec = make_spec(threshold=0.9)
    CacheWriter(tmp_path / "c", spec)
    other = msgspec.structs.replace(
        spec, threshold=0.8, teacher=msgspec.structs.replace(spec.teacher, sha256="9" * 64)
    )
    with pytest.raises(SpecMismatchError) as caught:
        CacheWriter(tmp_path / "c", other)
    message = str(caught.value)
    assert "threshold: the cache has 0.9, this run 0.8" in message
    assert f"teacher.sha256: the cache has '{'1' * 64}', this run '{'9' * 64}'" in message
    assert "max_group" not in message
    assert "choose another folder" in message


def test_other_software_versions_go_on_with_a_cache(tmp_path: Path) -> None:
    spec = make_spec()
    CacheWriter(tmp_path / "c", spec)
    CacheWriter(tmp_path / "c", msgspec.structs.replace(spec, software={"gkd": "0.2.0"}))


def test_a_path_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("x")
    zarr.create_group(tmp_path / "zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"file: expected a cache of targets .* got a file"):
        CacheWriter(tmp_path / "file", make_spec())
    with pytest.raises(ConfigError, match=r"full: expected a cache .* got another folder"):
        CacheWriter(tmp_path / "full", make_spec())
    with pytest.raises(ConfigError, match="zarr: a Zarr store, but no cache of targets"):
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
            "sizes outside 1..20, or 0 where none is skipped",
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
def test_targets_that_cannot_be_are_not_written(
    tmp_path: Path, targets: SparseTargets, message: str
) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec(num_samples=1, views=("original",)))
    samples = ShardSamples(["1"], np.zeros(1, np.int64), np.zeros((1, 16), np.uint8), {})
    with pytest.raises(ValueError, match=message):
        writer.write_shard(0, {"original": targets}, samples, truncated={"original": 0})
    assert writer.pending() == [0]


def test_draws_that_the_spec_has_must_be_there(tmp_path: Path) -> None:
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


def test_chunks_of_zeros_are_written_like_all_others(tmp_path: Path) -> None:
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


def test_leftovers_of_a_shard_do_not_reach_its_bytes(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole")
    writer = CacheWriter(tmp_path / "c", whole.spec)
    write_shard(writer, 1, seed=5)
    (writer.path / layout.commit_file(1)).unlink()
    for array in layout.arrays(whole.spec, "flipped").values():
        leftover = writer.path / array.path / "c" / "0"
        leftover.mkdir(parents=True)
        (leftover / "0.partial").write_bytes(b"half")
    (writer.path / layout.samples_file(2)).write_bytes(b"half")
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()
    assert contents(writer.path) == contents(whole.path)


def write_as_rank(path: Path, spec: CacheSpec, rank: int, world_size: int) -> None:
    writer = CacheWriter(path, spec)
    for shard in writer.pending(rank, world_size):
        write_shard(writer, shard)


def test_ranks_that_race_to_create_write_one_cache(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole", num_samples=60, shard_samples=10)
    path = tmp_path / "c"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=write_as_rank, args=(path, whole.spec, rank, 3)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 3
    assert CacheWriter(path, whole.spec).finish() == whole.id
    assert contents(path) == contents(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]


def test_killed_and_gone_on_with_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole", num_samples=120, shard_samples=6)
    path = tmp_path / "c"
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.caches import make_spec, write_shard\n"
        "from gkd.storage.writer import CacheWriter\n"
        "writer = CacheWriter(Path(sys.argv[1]), make_spec(num_samples=120, shard_samples=6))\n"
        "for shard in writer.pending(): write_shard(writer, shard)\n"
        "writer.finish()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    rng = np.random.default_rng(7)
    kills = 0
    while not (path / layout.MANIFEST).exists():
        done = len(list((path / "commits").glob("0*.json"))) if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
        goal = done + int(rng.integers(2, 7))
        while process.poll() is None:
            if kills < 3 and (path / layout.commit_file(min(goal, 18))).exists():
                time.sleep(float(rng.uniform(0, 0.02)))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 2
    # A file that the kill left on its way into place is no part of the cache.
    on_the_way = {name for name in contents(path) if Path(name).name.startswith(".")}
    left = {name: content for name, content in contents(path).items() if name not in on_the_way}
    assert left == contents(whole.path)
    assert Cache.open(path).id == whole.id


def test_what_killed_writers_left_beside_a_cache_is_deleted(tmp_path: Path) -> None:
    name = "0" * 32
    for left in (f".c.{name}", f".other.{name}", ".c.lock", ".c.notes"):
        (tmp_path / left / "samples").mkdir(parents=True)
    (tmp_path / f".c.{'1' * 32}").write_text("half")
    delete_leftovers(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", ".c.notes", f".other.{name}"]


def test_records_on_their_way_into_place_are_deleted(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole")
    writer = CacheWriter(tmp_path / "c", whole.spec)
    for place in (writer.path / layout.commit_file(1), writer.path / layout.MANIFEST):
        place.with_name(f".{place.name}.{'0' * 32}").write_text("half")
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()
    assert contents(writer.path) == contents(whole.path)


def test_a_guard_stops_the_writing_before_anything_and_before_the_commit(tmp_path: Path) -> None:
    calls = 0

    def guard() -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise GkdError("another is at work")

    writer = CacheWriter(tmp_path / "c", make_spec(), guard=guard)
    for written in (False, True):
        with pytest.raises(GkdError, match="another is at work"):
            write_shard(writer, 0)
        assert writer.pending() == [0, 1, 2]
        assert (writer.path / layout.samples_file(0)).exists() == written
    write_shard(writer, 0)
    assert writer.pending() == [1, 2]


def test_a_cache_that_is_moved_away_is_not_begun_anew_without_its_beginning(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 0)
    writer.path.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"/c: expected the cache that was begun here, found it"):
        write_shard(writer, 1)
    assert not writer.path.exists()
    (tmp_path / "moved").rename(writer.path)
    write_shard(writer, 1)
    assert writer.pending() == [2]


def fill_up(place: Path, limit: int | None) -> subprocess.CompletedProcess[str]:
    """Write a cache in a process of its own, whose files may have ``limit`` bytes."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from gkd.storage.errors import ConfigError\n"
        "from gkd.storage.writer import CacheWriter\n"
        "from tests.caches import make_spec, write_shard\n"
        "spec = make_spec(num_samples=4000, num_classes=100, shard_samples=1000)\n"
        "writer = CacheWriter(Path(sys.argv[1]), spec)\n"
        "write_shard(writer, 0)\n"
        "limit = int(sys.argv[2])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    for shard in (1, 2, 3): write_shard(writer, shard)\n"
        "except ConfigError as error: print(error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(place), str(limit or 0)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
        capture_output=True,
        text=True,
    )


def require_whole_shards_only(path: Path, told: str) -> None:
    assert "make room and run the same command again to go on" in told
    spec = make_spec(num_samples=4000, num_classes=100, shard_samples=1000)
    committed = committed_shards(path)
    assert 0 in committed
    assert len(committed) < 4
    found = {name for name in contents(path) if "/c/" in name or name.startswith("samples/")}
    assert found == {file for n in committed for file in read_commit(path, spec, n).files}


def test_a_limit_on_files_ends_in_one_message_and_leaves_whole_shards(tmp_path: Path) -> None:
    done = fill_up(tmp_path / "c", 4000)
    assert "File too large" in done.stdout
    require_whole_shards_only(tmp_path / "c", done.stdout)


def test_a_full_disk_ends_in_one_message_and_leaves_whole_shards(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        done = fill_up(disk / "c", None)
        assert "No space left on device" in done.stdout
        require_whole_shards_only(disk / "c", done.stdout)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=rf"cannot be written \({os.strerror(code)}\); choose a"):
        CacheWriter(tmp_path / "c", make_spec())


def test_other_errors_of_a_disk_pass_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        CacheWriter(tmp_path / "c", make_spec())
