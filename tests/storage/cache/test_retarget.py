"""Stricter caches without the teacher, against the dense float64 teacher with those settings."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.retarget import cut_groups, retarget, stricter_spec
from gkd.storage.cache.spec import CacheSpec, DerivedSpec, DrawsSpec
from gkd.storage.cache.targets import SparseTargets, at_temperature
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, CorruptShardError, SpecMismatchError
from tests.caches import dense_targets, labels_of, make_cache, make_logits, make_spec
from tests.reference import dense_group, dense_secondary, log_softmax
from tests.tampering import flip_bit

# Half a step of the stored codes, as a natural logarithm and so as a relative error.
ROUNDING = np.log(2) / 2048


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Groups of at most 20 of 50 classes; many are cut."""
    draws = DrawsSpec(3, 4.0, "all")
    return make_cache(tmp_path_factory.mktemp("made") / "c", skipped={41: "no image"}, draws=draws)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """No group is cut."""
    return make_cache(tmp_path_factory.mktemp("complete") / "c", max_group=50)


def assert_is_of_the_teacher(
    got: SparseTargets,
    logits: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    spec: CacheSpec,
) -> None:
    """Groups, probabilities and masses are the dense teacher's to the stored precision."""
    differing = 0
    for i, row in enumerate(logits):
        classes = got.indices[got.offsets[i] : got.offsets[i + 1]]
        group, _ = dense_group(
            row,
            int(labels[i]),
            threshold=spec.threshold,
            group_temperature=spec.group_temperature,
            max_group=spec.max_group,
        )
        if classes.tolist() != group.tolist():
            differing += 1
            assert_at_the_threshold(row, classes, group, spec)
        log_p = log_softmax(row / spec.group_temperature)[classes]
        codes = got.log2_probs[got.offsets[i] : got.offsets[i + 1]]
        stored = codes * (-np.log(2) / 1024)
        np.testing.assert_allclose(stored, log_p, atol=ROUNDING * 1.001)
        for column, temperature in enumerate(spec.temperatures):
            expected = dense_secondary(row, classes.astype(np.int64), temperature)
            tolerance = 2 * ROUNDING * max(1.0, spec.group_temperature / temperature) + 1e-5
            np.testing.assert_allclose(got.secondary[i, column], expected, atol=tolerance)
    assert differing <= len(logits) // 20


def assert_at_the_threshold(
    row: npt.NDArray[np.float64],
    got: npt.NDArray[np.uint32],
    expected: npt.NDArray[np.int64],
    spec: CacheSpec,
) -> None:
    """They differ by classes at which the mass is the threshold, to the stored precision.

    The last class of a group may be a label that was added to such a prefix.
    """
    shorter = min(got.tolist(), expected.tolist(), key=len)
    log_p = log_softmax(row / spec.group_temperature)
    masses = [np.exp(log_p[prefix]).sum() for prefix in (shorter, shorter[:-1])]
    assert min(abs(mass - spec.threshold) for mass in masses) < 2 * ROUNDING


STRICTER: list[dict[str, Any]] = [
    {},
    {"threshold": 0.7},
    {"threshold": 0.0},
    {"max_group": 7},
    {"max_group": 1},
    {"temperatures": (4.0,)},
    {"threshold": 0.8, "max_group": 12, "temperatures": (4.0, 1.0)},
]


@pytest.mark.parametrize("asked", STRICTER)
def test_a_retargeted_cache_is_what_the_teacher_would_give(
    made: Cache, tmp_path: Path, asked: dict[str, Any]
) -> None:
    id = retarget(made, tmp_path / "out.gkd", **asked)
    cache = Cache.open(tmp_path / "out.gkd")
    assert cache.id == id
    assert verify(cache.path).faults == ()
    assert cache.spec.derived == DerivedSpec("retarget", (made.id,))
    for field in ("threshold", "max_group", "temperatures"):
        assert getattr(cache.spec, field) == asked.get(field, getattr(made.spec, field))
    for shard in range(3):
        rows = cache.spec.shard_rows(shard)
        present = np.array([row for row in rows if row != 41])
        for view in cache.spec.views:
            got = cache.read_shard(shard, view)
            if shard == 1:
                assert got.sizes[1] == 0
                assert not got.secondary[1].any()
                got = drop(got, 1)
            labels = labels_of(cache.spec)[present]
            assert_is_of_the_teacher(got, make_logits(made.spec, view)[present], labels, cache.spec)


def drop(targets: SparseTargets, empty: int) -> SparseTargets:
    """The targets without a sample that has an empty group."""
    offsets = np.delete(targets.offsets, empty)
    secondary = np.delete(targets.secondary, empty, axis=0)
    return SparseTargets(offsets, targets.indices, targets.log2_probs, secondary)


@pytest.mark.parametrize("asked", STRICTER)
def test_groups_cut_at_the_cap_are_counted_as_the_teacher_would(
    made: Cache, tmp_path: Path, asked: dict[str, Any]
) -> None:
    retarget(made, tmp_path / "out.gkd", **asked)
    cache = Cache.open(tmp_path / "out.gkd")
    assert cache.manifest is not None
    labels = labels_of(cache.spec)
    keep = np.arange(100) != 41
    for view in cache.spec.views:
        logits = make_logits(made.spec, view)
        expected = [
            dense_group(
                row,
                int(label),
                threshold=cache.spec.threshold,
                group_temperature=2.0,
                max_group=cache.spec.max_group,
            )[1]
            for row, label in zip(logits[keep], labels[keep], strict=True)
        ]
        # The maker of the test's caches counts the skipped sample too.
        assert abs(cache.manifest.truncated[view] - sum(expected)) <= 1


def test_samples_and_draws_are_kept(made: Cache, tmp_path: Path) -> None:
    retarget(made, tmp_path / "out.gkd", threshold=0.5)
    cache = Cache.open(tmp_path / "out.gkd")
    for shard in range(3):
        assert cache.read_samples(shard).equals(made.read_samples(shard))
        assert cache.commit(shard).skipped == made.commit(shard).skipped
        old, new = made.read_shard(shard, "flipped"), cache.read_shard(shard, "flipped")
        for name in ("draws", "draw_log2_probs"):
            np.testing.assert_array_equal(new.arrays()[name], old.arrays()[name])


def test_without_cut_groups_a_larger_cap_changes_nothing(complete: Cache, tmp_path: Path) -> None:
    retarget(complete, tmp_path / "out.gkd", max_group=100)
    cache = Cache.open(tmp_path / "out.gkd")
    assert cache.manifest is not None
    assert set(cache.manifest.truncated.values()) == {0}
    for shard in range(3):
        old, new = complete.read_shard(shard, "original"), cache.read_shard(shard, "original")
        np.testing.assert_array_equal(new.indices, old.indices)
        np.testing.assert_array_equal(new.secondary, old.secondary)


def test_the_loss_sees_the_same_probabilities_at_every_temperature(
    complete: Cache, tmp_path: Path
) -> None:
    retarget(complete, tmp_path / "out.gkd", threshold=0.6)
    spec = Cache.open(tmp_path / "out.gkd").spec
    got = Cache.open(tmp_path / "out.gkd").read_shard(0, "original")
    logits = make_logits(complete.spec, "original")[:40]
    samples = np.repeat(np.arange(40), got.sizes)
    for temperature in spec.temperatures:
        batch = at_temperature(
            got, temperature, group_temperature=2.0, temperatures=spec.temperatures
        )
        expected = log_softmax(logits / temperature)[samples, batch.indices]
        np.testing.assert_allclose(batch.log_probs, expected, atol=6 * ROUNDING)


@given(
    seed=st.integers(0, 10**6),
    old_threshold=st.floats(0.3, 1.0),
    share=st.floats(0.0, 1.0),
    caps=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    temperature=st.sampled_from([0.5, 2.0, 4.0]),
    stored=st.booleans(),
    block_entries=st.sampled_from([1, 50, 10**6]),
)
# A prefix at the threshold, with a label that is not in it.
@example(11407, 0.4310768319768691, 0.4310768319768691, (3, 3), 4.0, False, 1)
def test_any_stricter_settings_give_the_teachers_groups(
    seed: int,
    old_threshold: float,
    share: float,
    caps: tuple[int, int],
    temperature: float,
    stored: bool,
    block_entries: int,
) -> None:
    """Whether or not the masses at the group temperature are stored, labels anywhere."""
    temperatures = (1.0, temperature) if stored else (1.0, 3.0)
    old = make_spec(
        num_samples=30,
        num_classes=12,
        max_group=max(caps),
        threshold=old_threshold,
        group_temperature=temperature,
        temperatures=temperatures,
    )
    new = msgspec.structs.replace(old, threshold=old_threshold * share, max_group=min(caps))
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (30, 12)), rng.integers(0, 12, 30)
    targets, _ = dense_targets(logits, labels, old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd.storage.cache.retarget._BLOCK_ENTRIES", block_entries)
        got = cut_groups(targets, labels, old, new).targets
    assert_is_of_the_teacher(got, logits, labels, new)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            {"threshold": 0.95},
            r"--threshold 0\.95: .* their mass reaches 0\.9, and the classes after",
        ),
        ({"max_group": 21}, r"--max-group 21: .* \d+ groups were truncated at 20"),
        ({"temperatures": (2.0, 3.0, 5.0)}, r"--temperatures 3,5: .* stored at 1, 2, 4 only"),
        ({"group_temperature": 4.0}, r"--group-temperature 4: .* stored, at 2; "),
    ],
)
def test_settings_that_are_not_determined_are_refused_with_the_reason(
    made: Cache, tmp_path: Path, asked: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*ask for less, or run `gkd cache-teacher`"):
        retarget(made, tmp_path / "out.gkd", **asked)
    assert not (tmp_path / "out.gkd").exists()


def test_draws_from_the_groups_keep_the_threshold(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_samples=10, draws=DrawsSpec(3, 4.0, "primary"))
    message = (
        r"--threshold 0\.5: .* 3 draws a sample are from the groups that reach 0\.9; --draws 0"
    )
    with pytest.raises(ConfigError, match=message):
        retarget(cache, tmp_path / "out.gkd", threshold=0.5)
    retarget(cache, tmp_path / "out.gkd", max_group=5)
    old, new = (Cache.open(tmp_path / name).read_shard(0, "flipped") for name in ("c", "out.gkd"))
    assert new.sizes.max() == 5 < old.sizes.max()
    for field in ("draws", "draw_log2_probs", "draw_secondary"):
        np.testing.assert_array_equal(new.arrays()[field], old.arrays()[field])
    assert verify(tmp_path / "out.gkd").ok
    retarget(cache, tmp_path / "none.gkd", threshold=0.5, draws=0)
    plain = Cache.open(tmp_path / "none.gkd").read_shard(0, "flipped")
    assert plain.draws is None


def test_the_temperature_of_the_draws_is_kept(made: Cache, tmp_path: Path) -> None:
    draws = made.spec.draws
    assert draws is not None
    others = tuple(t for t in made.spec.temperatures if t != draws.temperature)
    message = f"its draws are at {draws.temperature:g}, which must remain one of them"
    with pytest.raises(ConfigError, match=message):
        retarget(made, tmp_path / "c.gkd", temperatures=others)
    retarget(made, tmp_path / "c.gkd", temperatures=others, draws=0)
    assert Cache.open(tmp_path / "c.gkd").spec.temperatures == others


def test_fewer_draws_are_the_first(made: Cache, tmp_path: Path) -> None:
    retarget(made, tmp_path / "out.gkd", draws=2)
    cache = Cache.open(tmp_path / "out.gkd")
    assert cache.spec.draws == DrawsSpec(2, 4.0, "all")
    for shard in range(3):
        old, new = made.read_shard(shard, "original"), cache.read_shard(shard, "original")
        for name in ("draws", "draw_log2_probs"):
            np.testing.assert_array_equal(new.arrays()[name], old.arrays()[name][:, :2])
    assert verify(cache.path).ok


def test_more_draws_than_there_are_are_refused(made: Cache, complete: Cache) -> None:
    with pytest.raises(ConfigError, match=r"--draws 4: .* exactly: 3 classes a sample were drawn"):
        stricter_spec(made, draws=4)
    with pytest.raises(ConfigError, match=r"--draws 1: .* exactly: 0 classes a sample were drawn"):
        stricter_spec(complete, draws=1)
    with pytest.raises(ConfigError, match="--draws: expected 0 or more, got -1; give another"):
        stricter_spec(made, draws=-1)
    assert stricter_spec(complete, draws=0).draws is None


def test_settings_outside_their_range_are_refused(made: Cache) -> None:
    with pytest.raises(ConfigError, match="threshold: expected 0 to 1, got -1"):
        stricter_spec(made, threshold=-1)
    with pytest.raises(ConfigError, match="max_group: expected 1 to 65535, got 0"):
        stricter_spec(made, max_group=0)


def test_an_interrupted_retargeting_goes_on(
    made: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = retarget(made, tmp_path / "complete", threshold=0.8)
    write_shard = CacheWriter.write_shard

    def fail(self: CacheWriter, shard: int, *arguments: Any, **more: Any) -> None:
        if shard == 1:
            raise OSError("the disk went away")
        write_shard(self, shard, *arguments, **more)

    monkeypatch.setattr(CacheWriter, "write_shard", fail)
    with pytest.raises(OSError, match="went away"):
        retarget(made, tmp_path / "out", threshold=0.8)
    monkeypatch.setattr(CacheWriter, "write_shard", write_shard)
    assert CacheWriter(tmp_path / "out", stricter_spec(made, threshold=0.8)).pending() != [0, 1, 2]
    assert retarget(made, tmp_path / "out", threshold=0.8) == complete


def test_other_settings_do_not_resume_it(made: Cache, tmp_path: Path) -> None:
    retarget(made, tmp_path / "out", threshold=0.8)
    with pytest.raises(
        SpecMismatchError, match=r"threshold: the cache has 0\.8, this run has 0\.7"
    ):
        retarget(made, tmp_path / "out", threshold=0.7)


def test_a_damaged_cache_is_refused(made: Cache, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "c"))
    flip_bit(path / "flipped/secondary/c/1/0/0", 200)
    with pytest.raises(CorruptShardError, match="flipped/secondary/c/1/0/0: its sha256"):
        retarget(Cache.open(path), tmp_path / "out", threshold=0.8)
