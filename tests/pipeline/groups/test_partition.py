"""Groups from chunked logits against softmax, full sort and cumulative sum in float64."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.pipeline.groups.partition import Partition, partition
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.cache.targets import decode_log_probs
from gkd.storage.errors import ConfigError
from tests.pipeline.given_logits import like_a_teacher, partition_logits
from tests.reference import class_order, dense_group, dense_secondary, log_sum_exp

# If the cumulative mass is this close to the threshold, rounding of float32 sums may decide whether
# one more class belongs to the group; either group is then right.
MASS_TOLERANCE = 1e-5
LOG_TOLERANCE = 1e-4
CODE_TOLERANCE = 1e-3 * np.log(2)  # of ln p: the code's step and float rounding


def check(
    result: Partition,
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    config: PartitionSettings,
) -> None:
    targets = result.targets
    assert targets.offsets.dtype == np.int64
    assert targets.indices.dtype == np.uint32
    assert targets.log2_probs.dtype == np.uint16
    assert targets.secondary.dtype == np.float32
    assert len(targets) == len(logits)
    for row, (z, label) in enumerate(zip(logits, labels, strict=True)):
        entries = slice(targets.offsets[row], targets.offsets[row + 1])
        group = targets.indices[entries].astype(np.int64)
        check_group(group, bool(result.truncated[row]), z, int(label), config)
        scaled = z.astype(np.float64) / config.group_temperature
        expected = np.maximum(scaled[group] - log_sum_exp(scaled), -63.9 * np.log(2))
        stored = np.maximum(decode_log_probs(targets.log2_probs[entries]), -63.9 * np.log(2))
        np.testing.assert_allclose(stored, expected, atol=CODE_TOLERANCE)
        for column, temperature in enumerate(config.temperatures):
            np.testing.assert_allclose(
                targets.secondary[row, column],
                dense_secondary(z, group, temperature),
                atol=LOG_TOLERANCE,
                rtol=1e-6,
            )


def check_group(
    group: npt.NDArray[np.int64],
    truncated: bool,
    logits: npt.NDArray[np.float32],
    label: int,
    config: PartitionSettings,
) -> None:
    expected, expected_truncated = dense_group(
        logits,
        label,
        threshold=config.threshold,
        group_temperature=config.group_temperature,
        max_group=config.max_group,
    )
    if np.array_equal(group, expected) and truncated == expected_truncated:
        return
    # The group on the other side of a threshold that the cumulative mass almost equals.
    nearby = []
    for threshold in (config.threshold - MASS_TOLERANCE, config.threshold + MASS_TOLERANCE):
        other, other_truncated = dense_group(
            logits,
            label,
            threshold=min(max(threshold, 1e-12), 1 - 1e-12),
            group_temperature=config.group_temperature,
            max_group=config.max_group,
        )
        nearby.append(len(other) + other_truncated)
    assert 0 < config.threshold < 1, (group, expected)
    assert min(nearby) <= len(group) + truncated <= max(nearby), (group, expected)
    assert label in group
    order = class_order(logits)
    prefix = group if label in order[: len(group)] else group[:-1]
    np.testing.assert_array_equal(prefix, order[: len(prefix)])


def run(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    config: PartitionSettings,
    class_chunk: int | None = None,
) -> Partition:
    return partition_logits(
        torch.from_numpy(logits.copy()), torch.from_numpy(labels), config, class_chunk=class_chunk
    )


@st.composite
def cases(
    draw: st.DrawFn,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], PartitionSettings, int]:
    num_classes = draw(st.one_of(st.integers(1, 3), st.integers(4, 60)))
    batch = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "ties", "flat", "one-hot", "two levels"]))
    match kind:
        case "normal":
            logits = rng.normal(0, draw(st.sampled_from([0.1, 3, 20])), (batch, num_classes))
        case "ties":
            logits = rng.integers(-2, 3, (batch, num_classes)).astype(float)
        case "flat":
            logits = np.full((batch, num_classes), draw(st.sampled_from([0.0, -0.0, 7.5])))
        case "one-hot":
            logits = np.full((batch, num_classes), -60.0)
            logits[np.arange(batch), rng.integers(0, num_classes, batch)] = 60.0
        case _:
            logits = np.where(rng.random((batch, num_classes)) < 0.3, 5.0, -90.0)
    labels = rng.integers(0, num_classes, batch)
    if draw(st.booleans()):
        labels = logits.argmin(1)
    config = PartitionSettings(
        threshold=draw(
            st.one_of(st.sampled_from([0.0, 1.0, 0.93, 1 - 1e-9]), st.floats(0.01, 0.99))
        ),
        group_temperature=draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, 3.3])),
        temperatures=draw(st.sampled_from([(1.0, 2.0, 4.0), (3.0, 1.0), (1.0,), (2.5,)])),
        max_group=draw(st.one_of(st.integers(1, 8), st.just(4096))),
    )
    chunk = draw(st.integers(1, num_classes + 1))
    return logits.astype(np.float32), labels.astype(np.int64), config, chunk


@given(cases())
def test_groups_equal_the_dense_reference_at_any_chunk(
    case: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], PartitionSettings, int],
) -> None:
    logits, labels, config, chunk = case
    check(run(logits, labels, config, chunk), logits, labels, config)


@pytest.mark.parametrize("group_temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("class_chunk", [None, 1000])
def test_many_classes_with_estimated_cutoffs(
    group_temperature: float, class_chunk: int | None
) -> None:
    logits, labels = like_a_teacher(24, 12_000)
    config = PartitionSettings(group_temperature=group_temperature, max_group=500)
    check(run(logits, labels, config, class_chunk), logits, labels, config)


def test_an_unrepresentative_first_chunk_is_still_exact() -> None:
    # The sample of the first chunk gives a cutoff far too high, so the rows are repeated, or far
    # too low, so candidates overflow and are dropped.
    logits, labels = like_a_teacher(6, 9000)
    logits[:3, :1000] += 30
    logits[3:, :1000] -= 30
    for max_group in (100, 4096):
        config = PartitionSettings(max_group=max_group)
        check(run(logits, labels, config, 1000), logits, labels, config)


def test_candidates_below_a_raised_cutoff_are_not_taken_as_complete() -> None:
    # More than max_group candidates are held here, but not all that a smaller group needs.
    logits, labels = like_a_teacher(70, 9000)
    config = PartitionSettings(max_group=100)
    check(run(logits, labels, config), logits, labels, config)


@pytest.mark.parametrize(
    ("num_classes", "threshold", "max_group"),
    [(5000, 0.5, 300), (5000, 1.0, 300), (400, 1.0, 300), (700, 0.999, 65535)],
)
def test_ties_are_broken_by_the_lower_class(
    num_classes: int, threshold: float, max_group: int
) -> None:
    logits = np.zeros((2, num_classes), np.float32)
    labels = np.array([0, num_classes - 1])
    config = PartitionSettings(threshold=threshold, max_group=max_group)
    result = run(logits, labels, config, 128)
    check(result, logits, labels, config)
    first = result.targets.indices[: result.targets.offsets[1]]
    np.testing.assert_array_equal(first, np.arange(len(first)))
    assert result.targets.indices[-1] == num_classes - 1


@pytest.mark.parametrize("gap", [30.0, 100.0, 400.0, 3000.0])
def test_a_tiny_secondary_mass_is_exact(gap: float) -> None:
    num_classes = 1000
    logits = np.full((1, num_classes), -gap, np.float32)
    logits[0, 7] = 0
    config = PartitionSettings(group_temperature=1.0)
    result = run(logits, np.array([7]), config, 64)
    np.testing.assert_array_equal(result.targets.indices, [7])
    expected = [-gap / t + np.log(num_classes - 1) for t in config.temperatures]
    expected = [float(e - np.logaddexp(0, e)) for e in expected]
    np.testing.assert_allclose(result.targets.secondary[0], expected, atol=1e-4, rtol=1e-6)


def test_a_group_of_all_classes_has_no_secondary_mass() -> None:
    logits = np.array([[3.0, 1.0, 2.0]], np.float32)
    result = run(logits, np.array([1]), PartitionSettings(threshold=1.0))
    np.testing.assert_array_equal(result.targets.indices, [0, 2, 1])
    np.testing.assert_array_equal(result.targets.secondary, np.full((1, 3), -np.inf))
    assert not result.truncated[0]


def test_threshold_zero_is_the_label_alone() -> None:
    logits, labels = like_a_teacher(8, 300)
    result = run(logits, labels, PartitionSettings(threshold=0.0))
    np.testing.assert_array_equal(result.targets.indices, labels)


def test_a_truncated_group_ends_with_the_label() -> None:
    logits = (np.arange(50) / 50).astype(np.float32)[None]
    result = run(logits, np.array([3]), PartitionSettings(max_group=5))
    np.testing.assert_array_equal(result.targets.indices, [49, 48, 47, 46, 3])
    assert result.truncated[0]


def test_embeddings_are_normalised_and_the_margin_is_subtracted_at_the_label() -> None:
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(700, 16)).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = rng.integers(0, 700, 12)
    embeddings = (centers[labels] + 0.1 * rng.normal(size=(12, 16))).astype(np.float32)
    config = PartitionSettings(group_temperature=1.0, threshold=0.9)
    result = partition(
        torch.from_numpy(embeddings * rng.uniform(0.1, 90, (12, 1)).astype(np.float32)),
        torch.from_numpy(labels),
        torch.from_numpy(centers),
        config,
        class_chunk=100,
    )
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit.astype(np.float64) @ centers.T.astype(np.float64)
    cosines[np.arange(12), labels] -= config.margin
    check(result, (config.scale * cosines).astype(np.float32), labels, config)


def test_given_logits_are_not_modified() -> None:
    logits, labels = like_a_teacher(4, 200)
    tensor = torch.from_numpy(logits)
    before = tensor.clone()
    partition_logits(tensor, torch.from_numpy(labels), PartitionSettings())
    assert torch.equal(tensor, before)


def test_groups_do_not_depend_on_the_chunk_size() -> None:
    logits, labels = like_a_teacher(16, 3000)
    config = PartitionSettings(group_temperature=1.0)
    reference = run(logits, labels, config, 3000)
    for chunk in (7, 77, 1024, 2999):
        other = run(logits, labels, config, chunk)
        np.testing.assert_array_equal(other.targets.indices, reference.targets.indices)
        np.testing.assert_array_equal(other.targets.offsets, reference.targets.offsets)


@pytest.mark.parametrize("batch", [5, 11, 200])
def test_bits_do_not_depend_on_the_number_of_threads(batch: int) -> None:
    """Neither for one block of rows nor for several."""
    rng = np.random.default_rng(5)
    centers = rng.normal(size=(6000, 32)).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    embeddings = torch.from_numpy(rng.normal(size=(batch, 32)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 6000, batch))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                partition(embeddings, labels, torch.from_numpy(centers), PartitionSettings())
            )
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in ("offsets", "indices", "log2_probs", "secondary"):
            np.testing.assert_array_equal(
                getattr(other.targets, name), getattr(results[0].targets, name)
            )


def test_an_empty_batch_is_an_empty_partition() -> None:
    result = run(np.empty((0, 9), np.float32), np.empty(0, np.int64), PartitionSettings())
    assert len(result.targets) == 0
    assert result.targets.secondary.shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threshold", 1.5, r"--threshold: expected from 0 to 1, got 1\.5; correct it"),
        ("threshold", float("nan"), "--threshold: expected from 0 to 1, got nan"),
        ("group_temperature", 0.0, r"--group-temperature: expected a finite .* above 0, got 0\.0"),
        (
            "group_temperature",
            math.inf,
            "--group-temperature: expected a finite .* above 0, got inf",
        ),
        ("temperatures", (), "--temperatures: expected one or more finite .* above 0, got none;"),
        ("temperatures", (1.0, math.inf), "--temperatures: expected one or more .*, got 1,inf;"),
        ("temperatures", (1.0, 1.0), "--temperatures: expected each number once, got 1,1;"),
        ("max_group", 0, "--max-group: expected a number from 1 to 65,535, got 0;"),
        ("max_group", 70000, "--max-group: expected a number from 1 to 65,535, got 70000;"),
        ("scale", -1.0, r"--scale: expected a number above 0, at most 1024, got -1\.0;"),
        ("scale", 1e6, r"--scale: expected a number above 0, at most 1024, got 1000000\.0;"),
        ("margin", math.inf, "--margin: expected a finite number, got inf"),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PartitionSettings(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_centers_in_half_precision_are_their_rounded_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    centers = torch.nn.functional.normalize(torch.randn(300, 24, generator=generator))
    rounded, labels = centers.to(dtype), torch.arange(7)
    embeddings = centers[:7] + 0.1 * torch.randn(7, 24, generator=generator)
    config = PartitionSettings(draws=DrawsSpec(5, 4.0, "all"))
    uniforms = np.random.default_rng(0).random((7, 5))
    ours, theirs = (
        partition(embeddings, labels, array, config, uniforms=uniforms, class_chunk=128).targets
        for array in (rounded, rounded.float())
    )
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)
    for name, values in theirs.arrays().items():
        np.testing.assert_array_equal(ours.arrays()[name], values, err_msg=name)
