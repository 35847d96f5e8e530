"""A chi-square test of stored draws against recomputed probabilities."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# The classes of a sample are put into bins of about equal mass by the rank of their probability.
BINS = 32
MIN_EXPECTED = 5.0
SIGNIFICANCE = 1e-6


@dataclass(frozen=True)
class DrawTest:
    """Result of a chi-square test of the frequencies of ``draws`` draws.

    The test fails if ``p_value`` is below ``significance``. It is conservative: counts of several
    samples are summed bin by bin, and vary less than counts of one sample would.
    """

    draws: int
    statistic: float
    degrees: int
    p_value: float
    significance: float = SIGNIFICANCE

    @property
    def ok(self) -> bool:
        """Whether the draws may come from the recomputed probabilities."""
        return self.p_value >= self.significance

    def __str__(self) -> str:
        return (
            f"{self.draws:,} draws {'agree' if self.ok else 'DISAGREE'} with the teacher (p-value "
            f"{self.p_value:.2g}; only one below {self.significance:g} is a fault)"
        )


class DrawCounts:
    """Observed and expected draws in each bin, summed over samples."""

    def __init__(self) -> None:
        self._observed = np.zeros(BINS)
        self._expected = np.zeros(BINS)

    def add(self, draws: npt.NDArray[np.integer], log_probs: npt.NDArray[np.float64]) -> None:
        """Add draws [n] of a sample from exp(log_probs) [C], which sum to 1."""
        order = np.argsort(-log_probs, kind="stable")
        probs = np.exp(log_probs[order])
        # A class belongs to the bin of its middle, so one of large mass leaves bins empty.
        middles = np.cumsum(probs) - probs / 2
        bins = np.empty(len(order), np.int64)
        bins[order] = np.minimum(middles * BINS, BINS - 1).astype(np.int64)
        self._observed += np.bincount(bins[draws], minlength=BINS)
        self._expected += len(draws) * np.bincount(bins[order], probs, minlength=BINS)

    def test(self) -> DrawTest:
        """The test of everything added; neighbouring bins with few expected draws are merged."""
        starts, expected = [0], 0.0
        for index, count in enumerate(self._expected):
            if expected >= MIN_EXPECTED:
                starts.append(index)
                expected = 0.0
            expected += count
        if len(starts) > 1 and expected < MIN_EXPECTED:
            starts.pop()
        observed_counts = np.add.reduceat(self._observed, starts)
        expected_counts = np.add.reduceat(self._expected, starts)
        statistic = float(((observed_counts - expected_counts) ** 2 / expected_counts).sum())
        degrees, p_value = len(starts) - 1, 1.0
        if degrees:
            halves = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
            p_value = float(torch.special.gammaincc(*halves))
        return DrawTest(int(observed_counts.sum()), statistic, degrees, p_value)
