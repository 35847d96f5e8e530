"""Where the primary group is cut: the shortest prefix of candidates that reaches the threshold."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.groups.candidates import MIN_TERM, PADDING_KEY, key_classes, key_logits
from gkd.pipeline.groups.draws import draw_from_group
from gkd.pipeline.groups.log_sums import RestLogSums
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.targets import Draws, SparseTargets, encode_log_probs, offsets_from_sizes


@dataclass(frozen=True)
class PrimaryGroups:
    """Groups of b rows.

    truncated  bool [b]  whether ``max_group`` truncated them
    proved     bool [b]  whether the candidates were complete; otherwise the group may be wrong
    log_total  float64 [b]  logsumexp of all classes at the group temperature, on the device
    """

    targets: SparseTargets
    truncated: npt.NDArray[np.bool_]
    proved: npt.NDArray[np.bool_]
    log_total: Tensor


def cut_primary_groups(
    keys: Tensor,
    label_keys: Tensor,
    rest: RestLogSums,
    cutoff: Tensor | None,
    settings: PartitionSettings,
    uniforms: Tensor | None,
    draws: Draws | None,
) -> PrimaryGroups:
    """Groups from the keys of candidates and labels, and the log-sum of all other classes.

    Candidates outside the group are added to ``rest``, which then is the secondary mass.

    Args:
        keys: int64 [B, n], each label once.
        label_keys: int64 [B].
        rest: log-sums of the classes that are not among the keys.
        cutoff: [B], above which the candidates are complete, as far as they can matter; None if no
            class that a group needs is missing.
        settings: threshold, cap, temperatures and draws.
        uniforms: float64 [B, d], to draw from the primary group.
        draws: from all classes, instead.
    """
    keys = keys.sort(1, descending=True).values
    counts = (keys > PADDING_KEY).sum(1)
    logits = key_logits(keys)
    peak = logits[:, :1]
    terms = ((logits - peak) / settings.group_temperature).clamp_(min=math.log(MIN_TERM)).exp_()
    mass = terms.cumsum(1, dtype=torch.float64)
    scaled_peak = peak[:, 0].to(torch.float64) / settings.group_temperature
    total = mass[:, -1] + torch.exp(rest.at(settings.group_temperature) - scaled_peak)

    # The cut: a class belongs to the prefix if the classes before it do not reach the threshold.
    below = (mass < settings.threshold * total[:, None]).sum(1)
    prefix = torch.minimum(below + (settings.threshold > 0), counts)
    if settings.threshold == 1:
        prefix = counts
    label_rank = (keys == label_keys[:, None]).to(torch.uint8).argmax(1)
    full_sizes = prefix + (label_rank >= prefix)
    sizes = full_sizes.clamp(max=settings.max_group)
    proved = torch.ones_like(counts, dtype=torch.bool)
    if cutoff is not None:
        # Below a cutoff that was raised the candidates are incomplete.
        proved = (logits >= cutoff[:, None]).sum(1) > settings.max_candidates
        # The label may be among the candidates although it is below the cutoff.
        ends = logits.gather(1, (prefix - 1).clamp(min=0)[:, None])[:, 0]
        proved |= (below < keys.shape[1]) & ((prefix == 0) | (ends >= cutoff))

    if settings.draws and uniforms is not None and settings.draws_from_group:
        temperature = settings.draws.temperature
        columns = torch.arange(keys.shape[1], device=keys.device)
        members = (columns < prefix[:, None]) | (columns == label_rank[:, None])
        draws = draw_from_group(keys, members, rest.at(temperature), temperature, uniforms)

    # The group's ranks: the first ones, or the label's instead of the last of them.
    rows = torch.arange(len(keys), device=keys.device)
    ranks = torch.arange(int(sizes.max()), device=keys.device).repeat(len(keys), 1)
    inside = ranks < sizes[:, None]
    ranks[rows, sizes - 1] = torch.maximum(label_rank, sizes - 1)
    chosen = keys.gather(1, ranks)
    primary = key_logits(chosen).masked_fill_(~inside, -math.inf).to(torch.float64)
    logits.scatter_(1, ranks.where(inside, label_rank[:, None]), -math.inf)
    rest.add(logits)
    log_total = scaled_peak + total.log()
    log_probs = primary[inside] / settings.group_temperature - log_total.repeat_interleave(sizes)
    # log(o / (o + i)) without the cancellation of a difference of logarithms.
    secondary = [
        functional.logsigmoid(rest.at(temperature) - (primary / temperature).logsumexp(1))
        for temperature in settings.temperatures
    ]
    targets = SparseTargets(
        offsets=offsets_from_sizes(sizes.cpu().numpy()),
        indices=key_classes(chosen[inside]).cpu().numpy().astype(np.uint32),
        log2_probs=encode_log_probs(log_probs.cpu().numpy()),
        secondary=torch.stack(secondary, 1).to(torch.float32).cpu().numpy(),
        draws=draws,
    )
    truncated = (full_sizes > settings.max_group).cpu().numpy()
    return PrimaryGroups(targets, truncated, proved.cpu().numpy(), log_total)
