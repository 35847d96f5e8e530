"""Logits that a row's candidates start at: estimated from some of the classes, or certain."""

import math

import torch
from torch import Tensor

from gkd.pipeline.groups.candidates import LOWEST, Candidates, key_logits
from gkd.pipeline.groups.tail import LEAST_TERM, Tail
from gkd.pipeline.settings import PartitionSettings

MOST_SAMPLED, LEAST_SAMPLED, SAMPLED_SHARE = 1024, 128, 1 / 16


def first_floor(
    chunk: Tensor, of_labels: Tensor, num_classes: int, settings: PartitionSettings
) -> Tensor:
    """A floor [B] from a sample of the first chunk."""
    if settings.threshold == 0:
        return torch.full_like(of_labels, math.inf)
    if settings.threshold == 1:
        return torch.full_like(of_labels, LOWEST)
    sampled = min(max(LEAST_SAMPLED, int(num_classes * SAMPLED_SHARE)), MOST_SAMPLED)
    stride = -(-chunk.shape[1] // sampled)
    sample = chunk[:, ::stride].sort(1, descending=True).values
    nothing = torch.full_like(of_labels, -math.inf, dtype=torch.float64)
    return _estimated_floor(sample, nothing, of_labels, sample.shape[1] / num_classes, settings)


def better_floor(
    found: Candidates,
    tail: Tail,
    of_labels: Tensor,
    share: float,
    settings: PartitionSettings,
) -> Tensor:
    """A floor [B] from all that was seen so far, which is ``share`` of the classes."""
    sample = key_logits(found.keys).sort(1, descending=True).values
    rest = tail.log_sum(settings.group_temperature)
    return _estimated_floor(sample, rest, of_labels, share, settings)


def _estimated_floor(
    sample: Tensor,
    log_rest: Tensor,
    of_labels: Tensor,
    share: float,
    settings: PartitionSettings,
) -> Tensor:
    """A logit [B] somewhat below the group's last entry, as a share of the classes tells.

    ``sample`` [B, n] are the share's largest logits, descending, and ``log_rest`` [B] is the
    logsumexp of its others at the group temperature.
    """
    peak = torch.maximum(sample[:, 0], of_labels)[:, None]
    both = (torch.cat([sample, of_labels[:, None]], 1) - peak) / settings.group_temperature
    terms = both.clamp_(min=math.log(LEAST_TERM)).exp_()
    mass, label_mass = terms[:, :-1].cumsum(1), terms[:, -1:]
    rest = torch.exp(log_rest[:, None] - peak / settings.group_temperature)
    # Of the share's mass, what the whole group's prefix without the label would hold.
    needed = (
        settings.threshold * (mass[:, -1:] + rest) - (1 - settings.threshold) * share * label_mass
    )
    rank = (mass < needed).sum(1).clamp(max=settings.most_candidates * share)
    # Four standard deviations of a count, and some for the smallest counts.
    rank = (rank + 4 * rank.sqrt() + 3).long().clamp(max=sample.shape[1] - 1)
    return sample.gather(1, rank[:, None])[:, 0].clamp(min=LOWEST)


def certain_floor(log_total: Tensor, num_classes: int, settings: PartitionSettings) -> Tensor:
    """A logit [B] that no entry of a group lies below.

    Before the group's last entry stands less than ``threshold``, so it and the at most C - 1
    others behind it hold more than 1 - threshold, and the last is the largest of these.
    """
    if settings.threshold == 1:
        return torch.full_like(log_total, LOWEST, dtype=torch.float32)
    least = log_total + math.log((1 - settings.threshold) / num_classes)
    rounding = 1e-4 * (1 + least.abs())
    return (settings.group_temperature * (least - rounding)).clamp(min=LOWEST).to(torch.float32)
