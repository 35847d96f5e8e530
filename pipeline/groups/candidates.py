"""Candidates for the primary group: sortable keys, and the cutoffs at which they start."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gkd.pipeline.settings import PartitionSettings

LOWEST = torch.finfo(torch.float32).min
LOW_BITS = 0xFFFFFFFF
PADDING_KEY = (-2139095041 << 32) | LOW_BITS  # below the key of any logit above -inf
MIN_TERM = 1e-19  # of an exponential, next to a sum of one or more
MAX_SAMPLED, MIN_SAMPLED, SAMPLED_SHARE = 1024, 128, 1 / 16


def make_keys(logits: Tensor, classes: Tensor) -> Tensor:
    """One int64 for (logit, class): larger for a larger logit, and for ties for a lower class."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are the same logit
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (LOW_BITS - classes)


def key_logits(keys: Tensor) -> Tensor:
    """Logits of keys, float32."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def key_classes(keys: Tensor) -> Tensor:
    """Classes of keys, int64; undefined for padding."""
    return LOW_BITS - (keys & LOW_BITS)


class Extracted(NamedTuple):
    """Entries [n] extracted from a chunk, which holds -inf at their rows and columns."""

    rows: Tensor
    columns: Tensor
    logits: Tensor

    @classmethod
    def concat(cls, parts: Iterable["Extracted"]) -> "Extracted":
        """The entries of one or more parts, one part after the other."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Candidates:
    """Keys of each row's candidates so far, in any order, with padding at the end."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self._keys = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.width = 0

    @property
    def keys(self) -> Tensor:
        """int64 [B, width]."""
        return self._keys[:, : self.width]

    def extract_above(self, chunk: Tensor, start: int, cutoff: Tensor) -> Extracted:
        """Move the logits at or above the cutoff [B] from the chunk to the candidates."""
        rows, columns = _true_entries(chunk >= cutoff[:, None])
        values = chunk[rows, columns]
        chunk[rows, columns] = -math.inf
        counts = torch.bincount(rows, minlength=len(chunk))
        first = counts.cumsum(0) - counts
        positions = torch.arange(len(rows), device=rows.device) + (self._counts - first)[rows]
        self._counts += counts
        self.width = int(self._counts.max())
        if self.width > self._keys.shape[1]:
            grown = self._keys.new_full((len(chunk), 2 * self.width), PADDING_KEY)
            grown[:, : self._keys.shape[1]] = self._keys
            self._keys = grown
        self._keys[rows, positions] = make_keys(values, columns + start)
        return Extracted(rows, columns, values)

    def keep_largest(self, count: int) -> tuple[Tensor, Tensor]:
        """Keep each row's ``count`` largest; the last one's logit [B], and the dropped keys."""
        ordered = self.keys.sort(1, descending=True).values
        self._keys = ordered[:, :count].contiguous()
        self._counts.clamp_(max=count)
        self.width = count
        return key_logits(ordered[:, count - 1]), ordered[:, count:]


def _true_entries(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the true entries of a mask [B, n], row by row."""
    if mask.shape[1] % 8:
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    # Few entries are true: testing eight at once is several times faster.
    rows, words = mask.view(torch.int64).nonzero(as_tuple=True)
    hits, bits = mask.view(len(mask), -1, 8)[rows, words].nonzero(as_tuple=True)
    return rows[hits], words[hits] * 8 + bits


def initial_cutoff(
    chunk: Tensor, label_logits: Tensor, num_classes: int, settings: PartitionSettings
) -> Tensor:
    """A cutoff [B] from a sample of the first chunk."""
    if settings.threshold == 0:
        return torch.full_like(label_logits, math.inf)
    if settings.threshold == 1:
        return torch.full_like(label_logits, LOWEST)
    sampled = min(max(MIN_SAMPLED, int(num_classes * SAMPLED_SHARE)), MAX_SAMPLED)
    stride = -(-chunk.shape[1] // sampled)
    sample = chunk[:, ::stride]
    nothing = torch.full_like(label_logits, -math.inf, dtype=torch.float64)
    share = sample.shape[1] / num_classes
    return estimate_cutoff(sample, nothing, label_logits, share, settings)


def estimate_cutoff(
    sample: Tensor,
    log_rest: Tensor,
    label_logits: Tensor,
    share: float,
    settings: PartitionSettings,
) -> Tensor:
    """A logit [B] somewhat below the group's last entry, estimated from a share of the classes.

    ``sample`` [B, n] are the share's largest logits, and ``log_rest`` [B] is the logsumexp of its
    others at the group temperature.
    """
    sample = sample.sort(1, descending=True).values
    peak = torch.maximum(sample[:, 0], label_logits)[:, None]
    terms = (torch.cat([sample, label_logits[:, None]], 1) - peak) / settings.group_temperature
    terms.clamp_(min=math.log(MIN_TERM)).exp_()
    mass, label_mass = terms[:, :-1].cumsum(1), terms[:, -1:]
    rest = torch.exp(log_rest[:, None] - peak / settings.group_temperature)
    # The part of the share's mass that belongs to the group's prefix without the label.
    needed = (
        settings.threshold * (mass[:, -1:] + rest) - (1 - settings.threshold) * share * label_mass
    )
    rank = (mass < needed).sum(1).clamp(max=settings.max_candidates * share)
    # Four standard deviations of a count, and a few more for the smallest counts.
    rank = (rank + 4 * rank.sqrt() + 3).long().clamp(max=sample.shape[1] - 1)
    return sample.gather(1, rank[:, None])[:, 0].clamp(min=LOWEST)


def certain_cutoff(log_total: Tensor, num_classes: int, settings: PartitionSettings) -> Tensor:
    """A logit [B] that no entry of a group is below.

    The classes before the group's last entry hold less than ``threshold``, so this entry and the at
    most C - 1 classes after it hold more than 1 - threshold, and it is the largest of them.
    """
    if settings.threshold == 1:
        return torch.full_like(log_total, LOWEST, dtype=torch.float32)
    bound = log_total + math.log((1 - settings.threshold) / num_classes)
    rounding = 1e-4 * (1 + bound.abs())
    return (settings.group_temperature * (bound - rounding)).clamp(min=LOWEST).to(torch.float32)
