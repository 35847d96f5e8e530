import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.cache.targets import (
    SparseTargets,
    at_temperature,
    decode_log_probs,
    encode_log_probs,
    offsets_from_sizes,
)
from gkd.storage.errors import ConfigError
from tests.caches import dense_targets
from tests.storage.cache.strategies import Teaching, teachings


@given(st.floats(2.0**-64 * 1.001, 1.0))
def test_codes_keep_a_probability_to_three_and_a_half_in_ten_thousand(prob: float) -> None:
    code = encode_log_probs(np.log([prob]))
    assert 2.0 ** (-float(code[0]) / 1024) == pytest.approx(prob, rel=3.4e-4)
    assert np.exp(decode_log_probs(code))[0] == pytest.approx(prob, rel=3.5e-4)


def test_codes_clamp_what_is_below_their_range() -> None:
    with np.errstate(divide="ignore"):
        codes = encode_log_probs(np.log(np.array([1.0, 1 + 1e-9, 2.0**-80, 0.0])))
    assert codes.tolist() == [0, 0, 65535, 65535]


@given(teachings(), st.sampled_from([1.0, 2.0, 4.0]))
def test_any_stored_temperature_agrees_with_the_dense_softmax(
    teaching: Teaching, temperature: float
) -> None:
    spec = teaching.spec
    targets, _ = dense_targets(teaching.logits, teaching.labels, spec)
    batch = at_temperature(
        targets,
        temperature,
        group_temperature=spec.group_temperature,
        temperatures=spec.temperatures,
    )
    softened = teaching.logits / temperature
    dense = softened - np.logaddexp.reduce(softened, axis=1, keepdims=True)
    rows = np.repeat(np.arange(len(targets)), targets.sizes)
    expected = dense[rows, batch.indices]
    # Where p(group_temperature) fell below 2^-64 it was clamped, and there is no ratio to keep.
    kept = targets.log2_probs < 65535
    clamped = np.bincount(rows[~kept], minlength=len(targets))[rows] > 0
    error = np.abs(batch.log_probs - expected)
    step = 3.4e-4 * spec.group_temperature / temperature
    assert (error[kept & ~clamped] <= 2 * step + 1e-5).all()
    assert np.isfinite(batch.log_probs).all()
    assert batch.log_probs.dtype == np.float32
    inside = np.zeros(len(targets))
    np.add.at(inside, rows, np.exp(batch.log_probs, dtype=np.float64))
    np.testing.assert_allclose(inside + np.exp(batch.log_secondary), 1, atol=1e-5)


def test_empty_groups_and_empty_batches_pass_through() -> None:
    targets = SparseTargets(
        np.array([0, 0, 2]),
        np.array([4, 1], np.uint32),
        encode_log_probs(np.log([0.75, 0.25])),
        np.array([[0.0], [-np.inf]], np.float32),
    )
    batch = at_temperature(targets, 1.0, group_temperature=1.0, temperatures=(1.0,))
    np.testing.assert_allclose(np.exp(batch.log_probs), [0.75, 0.25], rtol=1e-3)
    assert batch.log_secondary.tolist() == [0.0, -np.inf]

    none = SparseTargets(
        np.zeros(1, np.int64),
        np.zeros(0, np.uint32),
        np.zeros(0, np.uint16),
        np.zeros((0, 1), np.float32),
    )
    assert len(at_temperature(none, 1.0, group_temperature=1.0, temperatures=(1.0,)).offsets) == 1


def test_a_temperature_that_was_not_stored_is_refused_with_those_that_were() -> None:
    none = SparseTargets(
        np.zeros(1, np.int64),
        np.zeros(0, np.uint32),
        np.zeros(0, np.uint16),
        np.zeros((0, 2), np.float32),
    )
    with pytest.raises(ConfigError, match="holds the secondary mass at 1, 4, got 3"):
        at_temperature(none, 3.0, group_temperature=1.0, temperatures=(1.0, 4.0))


def test_offsets_from_sizes() -> None:
    assert offsets_from_sizes(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert offsets_from_sizes(np.zeros(0, np.uint16)).tolist() == [0]
