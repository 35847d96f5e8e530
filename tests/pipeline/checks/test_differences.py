"""Differences of groups from dense probabilities, and what rounding allows."""

import math
from typing import Any

import numpy as np
import pytest

from gkd.pipeline.checks.differences import allowed_differences, group_gap
from tests.caches import make_spec
from tests.reference import dense_group


def test_allowed_differences_are_half_a_step_and_the_rounding_of_cosines() -> None:
    allowed = allowed_differences(make_spec(group_temperature=1.0))
    step = math.log(2) / 1024
    assert allowed.log_probs == pytest.approx(step / 2 + 2 * 64 * 1e-4)
    assert allowed.secondary["4"] == pytest.approx(step / 2 + 2 * 64 * 1e-4 / 4)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("max_group", [1, 2, 5, 40])
def test_the_primary_group_has_no_gap_and_other_groups_have_one(
    threshold: float, max_group: int
) -> None:
    rng = np.random.default_rng(int(threshold * 100) + max_group)
    for _ in range(50):
        logits = rng.normal(0, 2, 40)
        log_probs = logits - np.logaddexp.reduce(logits)
        label = int(rng.integers(40))
        group, _ = dense_group(
            logits, label, threshold=threshold, group_temperature=1.0, max_group=max_group
        )
        group = np.asarray(group, np.int64)
        sizes: dict[str, Any] = {"threshold": threshold, "max_group": max_group}
        assert group_gap(log_probs, group, label, **sizes) <= 1e-12
        outside = np.setdiff1d(np.arange(40), group)
        others = group[group != label]
        if len(outside) and len(others):
            swapped = np.append(
                np.setdiff1d(group, others[:1]), outside[log_probs[outside].argmin()]
            )
            assert group_gap(log_probs, swapped, label, **sizes) > 1e-3
        if len(outside):
            assert group_gap(log_probs, outside[outside != label], label, **sizes) == math.inf


def test_the_gap_of_a_group_of_wrong_length_is_the_mass_between() -> None:
    log_probs = np.log([0.5, 0.3, 0.15, 0.05])
    sizes: dict[str, Any] = {"threshold": 0.75, "max_group": 4}
    assert group_gap(log_probs, np.array([0, 1]), 0, **sizes) == 0
    assert group_gap(log_probs, np.array([0]), 0, **sizes) == pytest.approx(0.25)
    assert group_gap(log_probs, np.array([0, 1, 2]), 0, **sizes) == pytest.approx(0.05)
    assert group_gap(log_probs, np.array([0, 1, 3]), 3, **sizes) == 0
    assert group_gap(log_probs, np.array([0, 3]), 3, **sizes) == pytest.approx(0.2)
