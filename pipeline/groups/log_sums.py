"""Log-sum of the rest: the mass of all classes that are not candidates."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from gkd.pipeline.groups.candidates import LOWEST, MIN_TERM, Extracted
from gkd.pipeline.groups.draws import BlockSums


class RestLogSums:
    """The running logsumexp(z / T) of all dropped classes at each temperature, float64 [B]."""

    def __init__(self, label_logits: Tensor, temperatures: Iterable[float]) -> None:
        self._temperatures = tuple(sorted(set(temperatures), reverse=True))
        self._divisors = label_logits.new_tensor(self._temperatures, dtype=torch.float64)[:, None]
        shape = len(self._temperatures), len(label_logits)
        self._log_sums = label_logits.new_full(shape, -math.inf, dtype=torch.float64)

    def at(self, temperature: float) -> Tensor:
        """The log-sum at one of the temperatures."""
        return self._log_sums[self._temperatures.index(temperature)]

    def add(
        self, logits: Tensor, blocks: BlockSums | None = None, extracted: Extracted | None = None
    ) -> None:
        """Add logits [B, n], which are overwritten; -inf adds nothing.

        If ``blocks`` are given, the logits are the next chunk, whose terms they need too, and
        ``extracted`` are the entries extracted from it.
        """
        # With the rest's own peak as the shift the sum is at least one, however small its mass.
        peak = logits.amax(1).clamp(min=LOWEST)
        sums = []
        for temperature, terms in _exponentials(logits, peak, self._temperatures):
            if blocks is not None and extracted is not None and temperature == blocks.temperature:
                sums.append(blocks.add(terms, peak, extracted))
            else:
                sums.append(terms.sum(1))
        added = torch.stack(sums).double().log_() + peak.double() / self._divisors
        # If all logits are -inf, the terms are only their lower bounds and there is no mass.
        added.masked_fill_(peak == LOWEST, -math.inf)
        self._log_sums = torch.logaddexp(self._log_sums, added)


def _exponentials(
    logits: Tensor, peak: Tensor, temperatures: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """exp((z - peak) / T) [B, n] for decreasing T; each overwrites the previous, and the logits.

    Terms are clamped to 1e-19, which does not change a sum of one or more: processors are tens of
    times slower if an exponential or a square underflows.
    """
    if all(higher == 2 * lower for higher, lower in pairwise(temperatures)):
        # exp(x / T) is the square of exp(x / 2T), so one exponential serves all.
        factor = 1 / temperatures[0]
        torch.add(-factor * peak[:, None], logits, alpha=factor, out=logits)
        powers = logits.clamp_(min=math.log(MIN_TERM)).exp_()
        yield temperatures[0], powers
        for temperature in temperatures[1:]:
            powers.clamp_(min=MIN_TERM)
            yield temperature, powers.mul_(powers)
        return
    logits.sub_(peak[:, None])
    for temperature in temperatures:
        scaled = (logits / temperature).clamp_(min=math.log(MIN_TERM))
        yield temperature, scaled.exp_()
