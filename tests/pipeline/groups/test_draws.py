"""Draws from chunked logits against the inverted cumulative sums of a dense float64 softmax."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.pipeline.groups import logits as logits_module
from gkd.pipeline.groups.draws import SPAN, uniform_numbers
from gkd.pipeline.groups.logits import Logits
from gkd.pipeline.groups.partition import Partition, partition
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.errors import ConfigError
from tests.pipeline.given_logits import like_a_teacher, partition_logits
from tests.reference import class_order, dense_group, dense_secondary, log_softmax

Source = Literal["primary", "all"]
# If a number is this close to a cumulative probability, rounding may select either side.
NUMBER_TOLERANCE = 1e-5


def settings_of(
    source: Source, count: int, temperature: float = 4.0, **options: Any
) -> PartitionSettings:
    return PartitionSettings(**options, draws=DrawsSpec(count, temperature, source))


def run(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    config: PartitionSettings,
    uniforms: npt.NDArray[np.float64],
    class_chunk: int | None = None,
) -> Partition:
    return partition_logits(
        torch.from_numpy(logits),
        torch.from_numpy(labels),
        config,
        uniforms=uniforms,
        class_chunk=class_chunk,
    )


def uncut_group(
    logits: npt.NDArray[np.float32], label: int, config: PartitionSettings
) -> npt.NDArray[np.int64]:
    group, truncated = dense_group(
        logits,
        label,
        threshold=config.threshold,
        group_temperature=config.group_temperature,
        max_group=len(logits),
    )
    assert not truncated
    return np.asarray(group, np.int64)


def in_order(
    logits: npt.NDArray[np.float32], label: int, config: PartitionSettings
) -> npt.NDArray[np.int64]:
    """The classes that are drawn from, in the order of their cumulative probabilities."""
    if config.draws_from_group:
        group = uncut_group(logits, label, config)
        order = class_order(logits)
        return order[np.isin(order, group)]
    return np.arange(len(logits))


def check(
    result: Partition,
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    config: PartitionSettings,
    uniforms: npt.NDArray[np.float64],
    rows: Iterable[int] | None = None,
) -> None:
    """Every draw, or those of ``rows``, is the one its number selects, with its probability."""
    targets, draws = result.targets, config.draws
    assert draws is not None
    assert targets.draws is not None
    assert targets.draws.classes.dtype == np.uint32
    assert targets.draws.log2_probs.dtype == np.uint16
    assert targets.draws.classes.shape == targets.draws.log2_probs.shape == uniforms.shape
    for row in range(len(logits)) if rows is None else rows:
        z, label = logits[row], labels[row]
        log_probs = log_softmax(z.astype(np.float64) / draws.temperature)
        classes = in_order(z, int(label), config)
        cumulated = np.cumsum(np.exp(log_probs[classes]))
        ends = dict(zip(classes.tolist(), (cumulated / cumulated[-1]).tolist(), strict=True))
        starts = dict(zip(classes.tolist(), [0.0, *list(ends.values())[:-1]], strict=True))
        for drawn, number in zip(targets.draws.classes[row].tolist(), uniforms[row], strict=True):
            assert starts[drawn] - NUMBER_TOLERANCE <= number <= ends[drawn] + NUMBER_TOLERANCE
        exact = np.minimum(-log_probs[targets.draws.classes[row]] / np.log(2) * 1024, 65535)
        assert np.abs(targets.draws.log2_probs[row] - exact).max() < 0.6
        if draws.source == "all":
            assert targets.draws.secondary is None
        else:
            assert targets.draws.secondary is not None
            assert targets.draws.secondary.dtype == np.float32
            np.testing.assert_allclose(
                targets.draws.secondary[row],
                dense_secondary(z, classes, draws.temperature),
                atol=1e-4,
                rtol=1e-6,
            )


@st.composite
def cases(
    draw: st.DrawFn,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], PartitionSettings, int]:
    num_classes = draw(st.one_of(st.integers(1, 40), st.integers(200, 700)))
    batch = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    match draw(st.sampled_from(["normal", "ties", "flat", "one-hot"])):
        case "normal":
            logits = rng.normal(0, draw(st.sampled_from([0.1, 3, 9])), (batch, num_classes))
        case "ties":
            logits = rng.integers(-2, 3, (batch, num_classes)).astype(float)
        case "flat":
            logits = np.full((batch, num_classes), 7.5)
        case _:
            logits = np.full((batch, num_classes), -9.0)
            logits[np.arange(batch), rng.integers(0, num_classes, batch)] = 60.0
    labels = logits.argmin(1) if draw(st.booleans()) else rng.integers(0, num_classes, batch)
    config = settings_of(
        draw(st.sampled_from(["primary", "all"])),
        draw(st.integers(1, 30)),
        draw(st.sampled_from([1.0, 2.0, 4.0])),
        # Not a sum of equal probabilities, where rounding would decide the group.
        threshold=draw(st.sampled_from([0.0, 1.0, 0.50317, 0.93071])),
        group_temperature=draw(st.sampled_from([1.0, 2.0, 3.3])),
        temperatures=draw(st.sampled_from([(1.0, 2.0, 4.0), (4.0, 1.0, 2.0, 3.0)])),
        max_group=draw(st.one_of(st.integers(1, 8), st.just(4096))),
    )
    chunk = draw(st.integers(1, num_classes + 1))
    return logits.astype(np.float32), labels.astype(np.int64), config, chunk


@given(cases(), st.integers(0, 2**32 - 1))
def test_a_number_selects_the_class_of_the_dense_reference(
    case: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], PartitionSettings, int], seed: int
) -> None:
    logits, labels, config, chunk = case
    assert config.draws is not None
    uniforms = np.random.default_rng(seed).random((len(logits), config.draws.count))
    uniforms[:, :1] = np.random.default_rng(seed).choice([0.0, 1 - 2.0**-53, 0.5])
    check(run(logits, labels, config, uniforms, chunk), logits, labels, config, uniforms)


def with_uniforms(batch: int, num_classes: int) -> Any:
    """Logits like a teacher's, labels, and numbers for 64 draws."""
    numbers = np.random.default_rng(1).random((batch, 64))
    return *like_a_teacher(batch, num_classes), numbers


@pytest.mark.parametrize("source", ["primary", "all"])
@pytest.mark.parametrize("group_temperature", [1.0, 4.0])
def test_draws_do_not_depend_on_the_chunk_size(source: Source, group_temperature: float) -> None:
    logits, labels, uniforms = with_uniforms(70, 9000)
    config = settings_of(source, 64, group_temperature=group_temperature, max_group=300)
    reference = run(logits, labels, config, uniforms)
    check(reference, logits, labels, config, uniforms)
    for chunk in (SPAN, 1000, 9000):
        other = run(logits, labels, config, uniforms, chunk)
        # A number may be within rounding of the next class, and a probability of the next code:
        # draws that differ must be right as well.
        differs = np.zeros(len(logits), bool)
        for name in ("draws", "draw_log2_probs"):
            found, expected = (result.targets.arrays()[name] for result in (other, reference))
            assert (found != expected).mean() < 1e-3
            differs |= (found != expected).any(1)
        check(other, logits, labels, config, uniforms, np.flatnonzero(differs).tolist())


@pytest.mark.parametrize("source", ["primary", "all"])
@pytest.mark.parametrize("shift", [30, 400])
def test_draws_include_dropped_candidates_and_repeated_rows(source: Source, shift: float) -> None:
    logits, labels, uniforms = with_uniforms(6, 9000)
    logits[:3, :1000] += shift
    logits[3:, :1000] -= shift
    for max_group in (20, 4096):
        config = settings_of(source, 64, 1.0, max_group=max_group)
        check(run(logits, labels, config, uniforms, 1000), logits, labels, config, uniforms)


def test_draws_do_not_change_the_group() -> None:
    logits, labels, uniforms = with_uniforms(70, 9000)
    for source in ("primary", "all"):
        config = settings_of(source, 64, group_temperature=2.0, max_group=100)
        found = run(logits, labels, config, uniforms)
        plain = partition_logits(
            torch.from_numpy(logits), torch.from_numpy(labels), replace(config, draws=None)
        )
        np.testing.assert_array_equal(found.targets.indices, plain.targets.indices)
        np.testing.assert_array_equal(found.truncated, plain.truncated)
        assert plain.truncated.any()
        np.testing.assert_allclose(found.targets.secondary, plain.targets.secondary, atol=1e-5)


@pytest.mark.parametrize("source", ["primary", "all"])
def test_frequencies_match_the_probabilities(source: Source) -> None:
    # 20,000 numbers of the stream itself; a chi-square of 40 degrees is above 94 once in 250,000.
    logits = np.random.default_rng(1).normal(0, 4, (1, 300)).astype(np.float32)
    label = int(logits[0].argmin())
    config = settings_of(source, 20_000, 2.0, group_temperature=2.0, threshold=0.9, max_group=5)
    assert config.draws is not None
    uniforms = uniform_numbers(config.draws, "original", np.arange(16, dtype=np.uint8)[None])
    drawn = run(logits, np.array([label]), config, uniforms).targets.draws
    assert drawn is not None
    probs = np.zeros(300)
    classes = in_order(logits[0], label, config)
    probs[classes] = np.exp(log_softmax(logits[0, classes].astype(np.float64) / 2.0))
    counts = np.bincount(drawn.classes[0], minlength=300)
    assert counts[probs == 0].sum() == 0
    frequent = np.argsort(-probs)[:40]
    observed = np.append(counts[frequent], 20_000 - counts[frequent].sum())
    expected = 20_000 * np.append(probs[frequent], 1 - probs[frequent].sum())
    large = expected > 5
    assert large.sum() > 20
    assert ((observed - expected)[large] ** 2 / expected[large]).sum() < 94


def test_embeddings_give_the_draws_of_their_logits() -> None:
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(3000, 16)).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = rng.integers(0, 3000, 90)
    embeddings = (centers[labels] + 0.1 * rng.normal(size=(90, 16))).astype(np.float32)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit.astype(np.float64) @ centers.T.astype(np.float64)
    cosines[np.arange(90), labels] -= 0.05
    uniforms = rng.random((90, 50))
    for source in ("primary", "all"):
        config = settings_of(source, 50, 1.0, threshold=0.9, margin=0.05)
        result = partition(
            torch.from_numpy(embeddings),
            torch.from_numpy(labels),
            torch.from_numpy(centers),
            config,
            uniforms=uniforms,
        )
        check(result, (64 * cosines).astype(np.float32), labels, config, uniforms)
        assert result.targets.draws is not None
        assert np.any(result.targets.draws.classes == labels[:, None]), "labels are drawn too"


def test_batched_logits_of_classes_are_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logits_module, "ACCELERATOR_LOGITS", 3 * 16 * 8)  # three lines at once
    rng = np.random.default_rng(0)
    scaled, centers = (rng.normal(size=(n, 8)).astype(np.float32) for n in (5, 400))
    rows = np.sort(rng.integers(0, 5, 20))
    classes = rng.integers(0, 400, (20, 16))
    logits = Logits(
        torch.from_numpy(scaled), torch.arange(5), torch.from_numpy(centers), label_margin=0.5
    )
    dense = scaled.astype(np.float64) @ centers.T.astype(np.float64)
    dense[np.arange(5), np.arange(5)] -= 0.5
    monkeypatch.setattr(Logits, "_row_by_row", Logits._batched)
    found = logits.of(torch.from_numpy(rows), torch.from_numpy(classes))
    np.testing.assert_allclose(found, dense[rows[:, None], classes], rtol=1e-5, atol=1e-5)


def test_an_empty_batch_has_no_draws() -> None:
    config = settings_of("primary", 3)
    empty = np.empty((0, 9), np.float32), np.empty(0, np.int64)
    targets = run(*empty, config, np.empty((0, 3))).targets
    assert targets.draws is not None
    assert targets.draws.secondary is not None
    assert targets.draws.classes.shape == targets.draws.log2_probs.shape == (0, 3)
    assert targets.draws.secondary.shape == (0,)


def test_uniforms_of_a_wrong_shape_raise_value_error() -> None:
    logits, labels, uniforms = with_uniforms(2, 50)
    with pytest.raises(ValueError, match=r"uniforms: expected \(2, 5\), got \(2, 64\)"):
        run(logits, labels, settings_of("all", 5), uniforms)
    with pytest.raises(ValueError, match=r"uniforms: expected \(2, 0\), got \(2, 64\)"):
        run(logits, labels, PartitionSettings(), uniforms)


def test_uniforms_are_a_philox_stream_by_seed_view_and_digest() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (4, 16), dtype=np.uint8)
    many = uniform_numbers(DrawsSpec(70, 4.0, "all", seed=5), "flipped", digests)
    for row, digest in enumerate(digests):
        key = hashlib.blake2b(b"5/flipped/" + digest.tobytes(), digest_size=16).digest()
        stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        np.testing.assert_array_equal(many[row], stream.random(70))
    few = uniform_numbers(DrawsSpec(7, 1.0, "primary", seed=5), "flipped", digests[::-1])
    np.testing.assert_array_equal(few[::-1], many[:, :7])
    for other in (
        uniform_numbers(DrawsSpec(70, 4.0, "all", seed=6), "flipped", digests),
        uniform_numbers(DrawsSpec(70, 4.0, "all", seed=5), "original", digests),
    ):
        assert not np.isin(other, many).any()


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (DrawsSpec(0, 4.0, "all"), "--draws: expected a number from 1 to 65,535, got 0;"),
        (DrawsSpec(70_000, 4.0, "all"), "--draws: expected a number from 1 to 65,535, got 70000"),
        (
            DrawsSpec(4, 3.0, "all"),
            r"--draw-temperature: expected one of --temperatures, which are 1,2,4, got 3;",
        ),
    ],
)
def test_draws_outside_their_range_are_refused(draws: DrawsSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PartitionSettings(draws=draws)
