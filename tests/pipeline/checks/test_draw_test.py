"""The chi-square test of draws against known values and true draws."""

import numpy as np
import pytest

from gkd.pipeline.checks.draw_test import DrawCounts


def test_a_known_chi_square_value() -> None:
    # Two classes of equal mass: 60 and 40 of 100 give 4 with one degree, above which is 0.0455.
    counts = DrawCounts()
    counts.add(np.repeat([0, 1], [60, 40]), np.log([0.5, 0.5]))
    found = counts.test()
    assert (found.draws, found.degrees) == (100, 1)
    assert found.statistic == pytest.approx(4)
    assert found.p_value == pytest.approx(0.0455, abs=1e-4)


def test_p_values_of_true_draws_are_not_small() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(40):
        counts = DrawCounts()
        for _ in range(30):
            logits = rng.normal(0, rng.uniform(0.1, 4), 200)
            log_probs = logits - np.logaddexp.reduce(logits)
            counts.add(rng.choice(200, 64, p=np.exp(log_probs)), log_probs)
        p_values.append(counts.test().p_value)
    assert min(p_values) > 1e-3
    assert np.mean(p_values) > 0.4
