"""Candidates for a group as sortable keys, and the running sums of all that is dropped."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gkd.pipeline.draws import BlockSums

LOWEST = torch.finfo(torch.float32).min
LEAST_TERM = 1e-19
LOW_BITS = 0xFFFFFFFF
VOID_KEY = (-2139095041 << 32) | LOW_BITS  # no key of a logit above -inf is as small


def make_keys(logits: Tensor, classes: Tensor) -> Tensor:
    """One int64 for (logit, class): larger for a larger logit, or at a tie for a lower class."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one logit
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (LOW_BITS - classes)


def key_logits(keys: Tensor) -> Tensor:
    """Logits of keys, float32."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def key_classes(keys: Tensor) -> Tensor:
    """Classes of keys, int64; of a void one anything."""
    return LOW_BITS - (keys & LOW_BITS)


@dataclass(frozen=True)
class Taken:
    """Some entries [n] of a chunk and their logits; in the chunk -inf stands in their place."""

    rows: Tensor
    columns: Tensor
    logits: Tensor

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(
            torch.cat([self.rows, other.rows]),
            torch.cat([self.columns, other.columns]),
            torch.cat([self.logits, other.logits]),
        )


class Tail:
    """What was dropped, as its logsumexp at each temperature, float64 [B]."""

    def __init__(self, of_labels: Tensor, temperatures: Iterable[float]) -> None:
        nothing = torch.full_like(of_labels, -math.inf, dtype=torch.float64)
        self.log_sums = dict.fromkeys(sorted(set(temperatures), reverse=True), nothing)

    def add(
        self, logits: Tensor, blocks: "BlockSums | None" = None, taken: Taken | None = None
    ) -> None:
        """Add logits [B, n], in memory that is overwritten; -inf counts nothing.

        With ``blocks`` they are a chunk whose terms these are to have too, and ``taken`` is what
        was taken out of it.
        """
        # The tail's own peak is the shift: its sum is at least one, however small its mass.
        peak = logits.amax(1).clamp(min=LOWEST)
        for temperature, terms in _exponentials(logits, peak, tuple(self.log_sums)):
            if blocks is not None and taken is not None and temperature == blocks.temperature:
                sums = blocks.add(terms, peak, taken)
            else:
                sums = terms.sum(1)
            log_sum = peak.to(torch.float64) / temperature + sums.to(torch.float64).log()
            # Where all is -inf there is no tail, only the sums' lower bounds.
            log_sum = log_sum.masked_fill(peak == LOWEST, -math.inf)
            self.log_sums[temperature] = torch.logaddexp(self.log_sums[temperature], log_sum)


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


class Candidates:
    """Keys of each row's candidates so far, in any order, filled up with void ones."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._held = torch.zeros(batch, dtype=torch.int64, device=device)
        self._keys = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.width = 0

    @property
    def keys(self) -> Tensor:
        """int64 [B, width]."""
        return self._keys[:, : self.width]

    def take(self, chunk: Tensor, start: int, floor: Tensor) -> Taken:
        """Take the logits at or above the floor [B] out of the chunk."""
        rows, columns = _places(chunk >= floor[:, None])
        values = chunk[rows, columns]
        chunk[rows, columns] = -math.inf
        counts = torch.bincount(rows, minlength=len(chunk))
        first = counts.cumsum(0) - counts
        places = torch.arange(len(rows), device=rows.device) + (self._held - first)[rows]
        self._held += counts
        self.width = int(self._held.max())
        if self.width > self._keys.shape[1]:
            room = self._keys.new_full((len(chunk), 2 * self.width), VOID_KEY)
            room[:, : self._keys.shape[1]] = self._keys
            self._keys = room
        self._keys[rows, places] = make_keys(values, columns + start)
        return Taken(rows, columns, values)

    def keep_largest(self, count: int, tail: Tail) -> Tensor:
        """Leave all but the ``count`` largest of each row to the tail; the last one's logit [B]."""
        ordered = self.keys.sort(1, descending=True).values
        tail.add(key_logits(ordered[:, count:]))
        self._keys = ordered[:, :count].contiguous()
        self._held.clamp_(max=count)
        self.width = count
        return key_logits(ordered[:, count - 1])


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is true in a mask [B, n], row by row."""
    if mask.shape[1] % 8:
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    # Few are true: looking at eight at once is several times faster.
    rows, words = mask.view(torch.int64).nonzero(as_tuple=True)
    hits, bits = mask.view(len(mask), -1, 8)[rows, words].nonzero(as_tuple=True)
    return rows[hits], words[hits] * 8 + bits
