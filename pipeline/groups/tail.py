"""The running sums of all classes that are no candidates."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from gkd.pipeline.groups.candidates import LOWEST, Taken
from gkd.pipeline.groups.draws import BlockSums

LEAST_TERM = 1e-19


class Tail:
    """What was dropped, as its logsumexp at each temperature, float64 [B]."""

    def __init__(self, of_labels: Tensor, temperatures: Iterable[float]) -> None:
        self._temperatures = tuple(sorted(set(temperatures), reverse=True))
        self._divisors = of_labels.new_tensor(self._temperatures, dtype=torch.float64)[:, None]
        shape = len(self._temperatures), len(of_labels)
        self._log_sums = of_labels.new_full(shape, -math.inf, dtype=torch.float64)

    def log_sum(self, temperature: float) -> Tensor:
        """At one of the temperatures."""
        return self._log_sums[self._temperatures.index(temperature)]

    def add(
        self, logits: Tensor, blocks: BlockSums | None = None, taken: Taken | None = None
    ) -> None:
        """Add logits [B, n], in memory that is overwritten; -inf counts nothing.

        With ``blocks`` they are a chunk whose terms these are to have too, and ``taken`` is what
        was taken out of it.
        """
        # The tail's own peak is the shift: its sum is at least one, however small its mass.
        peak = logits.amax(1).clamp(min=LOWEST)
        sums = []
        for temperature, terms in _exponentials(logits, peak, self._temperatures):
            if blocks is not None and taken is not None and temperature == blocks.temperature:
                sums.append(blocks.add(terms, peak, taken))
            else:
                sums.append(terms.sum(1))
        added = torch.stack(sums).double().log_() + peak.double() / self._divisors
        # Where all is -inf there is no tail, only the sums' lower bounds.
        added.masked_fill_(peak == LOWEST, -math.inf)
        self._log_sums = torch.logaddexp(self._log_sums, added)


def _exponentials(
    logits: Tensor, peak: Tensor, temperatures: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """exp((z - peak) / T) [B, n] for falling T, each overwritten by the next; so are the logits.

    Terms are kept above 1e-19, which no sum of one or more can feel: processors are tens of times
    slower where an exponential or a square underflows.
    """
    if all(higher == 2 * lower for higher, lower in pairwise(temperatures)):
        # exp(x / T) is the square of exp(x / 2T): one exponential serves all.
        factor = 1 / temperatures[0]
        torch.add(-factor * peak[:, None], logits, alpha=factor, out=logits)
        powers = logits.clamp_(min=math.log(LEAST_TERM)).exp_()
        yield temperatures[0], powers
        for temperature in temperatures[1:]:
            powers.clamp_(min=LEAST_TERM)
            yield temperature, powers.mul_(powers)
        return
    logits.sub_(peak[:, None])
    for temperature in temperatures:
        scaled = (logits / temperature).clamp_(min=math.log(LEAST_TERM))
        yield temperature, scaled.exp_()
