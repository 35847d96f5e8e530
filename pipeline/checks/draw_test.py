"""Whether stored draws are draws: their classes against recomputed probabilities, by chi-square."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# Classes of a sample fall into bins of about equal mass by the rank of their probability.
BINS = 32
LEAST_EXPECTED = 5.0
LEAST_P_VALUE = 1e-6


@dataclass(frozen=True)
class DrawTest:
    """A chi-square test of the frequencies of ``draws`` draws.

    Numbers of several samples are added up bin by bin, and theirs vary less than those of one
    sample would, so a small ``p_value`` is no smaller than it says.
    """

    draws: int
    statistic: float
    degrees: int
    p_value: float

    @property
    def ok(self) -> bool:
        """Whether draws of the recomputed probabilities may look like this."""
        return self.p_value >= LEAST_P_VALUE


class DrawCounts:
    """Observed and expected draws in each bin, added up sample by sample."""

    def __init__(self) -> None:
        self._observed = np.zeros(BINS)
        self._expected = np.zeros(BINS)

    def add(self, draws: npt.NDArray[np.integer], log_probs: npt.NDArray[np.float64]) -> None:
        """Add draws [n] of a sample from exp(log_probs) [C], which add up to 1."""
        order = np.argsort(-log_probs, kind="stable")
        probs = np.exp(log_probs[order])
        # A class is in the bin of its middle, so a bin may be empty beside a class of much mass.
        middles = np.cumsum(probs) - probs / 2
        bins = np.empty(len(order), np.int64)
        bins[order] = np.minimum(middles * BINS, BINS - 1).astype(np.int64)
        self._observed += np.bincount(bins[draws], minlength=BINS)
        self._expected += len(draws) * np.bincount(bins[order], probs, minlength=BINS)

    def test(self) -> DrawTest:
        """The test of all that was added; neighbouring bins with few expected draws are one."""
        observed, expected = [0.0], [0.0]
        for seen, wanted in zip(self._observed, self._expected, strict=True):
            if expected[-1] >= LEAST_EXPECTED:
                observed.append(0.0)
                expected.append(0.0)
            observed[-1] += seen
            expected[-1] += wanted
        if len(expected) > 1 and expected[-1] < LEAST_EXPECTED:
            observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
        seen_all, wanted_all = np.array(observed), np.array(expected)
        statistic = float(((seen_all - wanted_all) ** 2 / wanted_all).sum())
        degrees = len(observed) - 1
        p_value = 1.0
        if degrees:
            halves = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
            p_value = float(torch.special.gammaincc(halves[0], halves[1]))
        return DrawTest(int(seen_all.sum()), statistic, degrees, p_value)
