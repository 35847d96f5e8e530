"""Primary groups and secondary mass of a teacher's prediction, exact, from chunked logits.

Classes are visited in chunks. Of each chunk, logits at or above a floor become candidates and all
others go into sums that never leave the log domain, so nothing wider than a chunk is held and only
candidates are sorted. The first floor of a row is estimated from a sample of classes; a group that
its candidates fill is exact, because everything dropped lies below all of them. The few rows that
were estimated too high are done again with a floor that cannot be: a class with
p < (1 - threshold) / C is never needed.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.groups.candidates import (
    VOID_KEY,
    Candidates,
    Taken,
    key_classes,
    key_logits,
    make_keys,
)
from gkd.pipeline.groups.draws import (
    SPAN,
    BlockSums,
    draw_from_all,
    draw_from_group,
    replace_draws,
)
from gkd.pipeline.groups.floors import MOST_SAMPLED, better_floor, certain_floor, first_floor
from gkd.pipeline.groups.logits import (
    ACCELERATOR_LOGITS,
    CPU_LOGITS,
    CosineLogits,
    GivenLogits,
    Logits,
)
from gkd.pipeline.groups.tail import LEAST_TERM, Tail
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.targets import Draws, SparseTargets, encode_log_probs, offsets_from_sizes
from gkd.storage.util.torch_device import map_single_threaded

BLOCK_ROWS = 64


@dataclass(frozen=True)
class Partition:
    """Groups of a batch; ``truncated`` bool [B] marks those that ``max_group`` cut."""

    targets: SparseTargets
    truncated: npt.NDArray[np.bool_]

    def of(self, rows: range) -> "Partition":
        """Those of some consecutive rows."""
        return Partition(self.targets.slice(rows), self.truncated[rows.start : rows.stop])


def partition(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    settings: PartitionSettings,
    *,
    uniforms: npt.NDArray[np.float64] | None = None,
    class_chunk: int | None = None,
) -> Partition:
    """Primary groups of a batch from its embeddings, on the device that holds the centres.

    Args:
        embeddings: float [B, D], of any length: they are L2-normalised here.
        labels: int [B], the margin's class.
        centers: float32, float16 or bfloat16 [C, D], L2-normalised.
        settings: temperatures, threshold, cap, scale and margin.
        uniforms: float64 [B, n] of [0, 1), one a draw; only where the settings have draws.
        class_chunk: classes whose logits are held at once; by default what suits the device.
    """
    unit = functional.normalize(embeddings.to(centers.device, torch.float32), dim=1)
    labels = labels.to(centers.device, torch.int64)
    label_margin = settings.scale * settings.margin
    logits = CosineLogits(unit * settings.scale, labels, centers, label_margin)
    return _partition(logits, settings, uniforms, class_chunk)


def partition_logits(
    logits: Tensor,
    labels: Tensor,
    settings: PartitionSettings,
    *,
    uniforms: npt.NDArray[np.float64] | None = None,
    class_chunk: int | None = None,
) -> Partition:
    """Primary groups of a batch from logits z float32 [B, C] with scale and margin applied."""
    source = GivenLogits(logits, labels.to(logits.device, torch.int64))
    return _partition(source, settings, uniforms, class_chunk)


@dataclass(frozen=True)
class _Groups:
    """Groups of some rows on the host, entries flat, and what a second try needs to know."""

    sizes: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]
    secondary: npt.NDArray[np.float32]
    truncated: npt.NDArray[np.bool_]
    proved: npt.NDArray[np.bool_]
    log_total: Tensor  # [b], of all classes at the group temperature
    drawn: Draws | None


def _partition(
    logits: Logits,
    settings: PartitionSettings,
    uniforms: npt.NDArray[np.float64] | None,
    class_chunk: int | None,
) -> Partition:
    batch, device = len(logits.labels), logits.labels.device
    if not batch:
        return _nothing(settings)
    count = settings.draws.count if settings.draws else 0
    numbers = torch.from_numpy(np.empty((batch, 0)) if uniforms is None else uniforms).to(device)
    if numbers.shape != (batch, count):
        raise ValueError(f"uniforms: expected {(batch, count)}, got {tuple(numbers.shape)}")
    if device.type != "cpu":
        chunk = _whole_spans(class_chunk or ACCELERATOR_LOGITS // batch + 1, settings)
        return _partition_rows(logits, settings, numbers, chunk)
    # Work on a cache's worth of logits is too small to be shared, so threads take blocks of rows
    # instead. The blocks do not depend on the number of threads, and so the bits do not either.
    blocks = [slice(at, at + BLOCK_ROWS) for at in range(0, batch, BLOCK_ROWS)]
    chunk = _whole_spans(class_chunk or CPU_LOGITS // BLOCK_ROWS, settings)

    def work(block: slice) -> Partition:
        return _partition_rows(logits.rows(block), settings, numbers[block], chunk)

    return _join(map_single_threaded(work, blocks))


def _whole_spans(class_chunk: int, settings: PartitionSettings) -> int:
    """A chunk that no span of classes reaches out of, where sums of such are kept."""
    return -(-class_chunk // SPAN) * SPAN if settings.draws else class_chunk


@torch.inference_mode()
def _partition_rows(
    logits: Logits, settings: PartitionSettings, uniforms: Tensor, class_chunk: int
) -> Partition:
    groups = _groups(logits, settings, uniforms, class_chunk, None)
    again = np.flatnonzero(~groups.proved)
    if len(again):
        rows = torch.from_numpy(again).to(logits.labels.device)
        floor = certain_floor(groups.log_total[rows], logits.num_classes, settings)
        # Of all classes the draws are right already, whatever the group is.
        numbers = uniforms[rows] if settings.draws_from_group else None
        sure = _groups(logits.rows(rows), settings, numbers, class_chunk, floor)
        groups = _replace(groups, again, sure)
    targets = SparseTargets(
        offsets=offsets_from_sizes(groups.sizes),
        indices=groups.classes.astype(np.uint32),
        log2_probs=encode_log_probs(groups.log_probs),
        secondary=groups.secondary,
        draws=groups.drawn,
    )
    return Partition(targets, groups.truncated)


def _join(parts: list[Partition]) -> Partition:
    return Partition(
        SparseTargets.concat([part.targets for part in parts]),
        np.concatenate([part.truncated for part in parts]),
    )


def _nothing(settings: PartitionSettings) -> Partition:
    draws = settings.draws
    targets = SparseTargets(
        offsets=np.zeros(1, np.int64),
        indices=np.empty(0, np.uint32),
        log2_probs=np.empty(0, np.uint16),
        secondary=np.empty((0, len(settings.temperatures)), np.float32),
        draws=draws
        and Draws(
            np.empty((0, draws.count), np.uint32),
            np.empty((0, draws.count), np.uint16),
            np.empty(0, np.float32) if draws.source == "primary" else None,
        ),
    )
    return Partition(targets, np.empty(0, np.bool_))


def _groups(
    logits: Logits,
    settings: PartitionSettings,
    uniforms: Tensor | None,
    class_chunk: int,
    floor: Tensor | None,
) -> _Groups:
    """Groups by one pass over the classes; without a floor it is estimated from the first chunk."""
    of_labels = logits.of_labels()
    batch = len(of_labels)
    draws = settings.draws
    blocks = None
    if draws and uniforms is not None and not settings.draws_from_group:
        blocks = BlockSums(batch, logits.num_classes, draws.temperature, of_labels.device)
    tail = Tail(of_labels, [*settings.temperatures, settings.group_temperature])
    found = Candidates(batch, of_labels.device)
    buffer = torch.empty(batch * min(class_chunk, logits.num_classes), device=of_labels.device)
    certain = floor is not None or settings.threshold == 1
    estimated = floor
    estimated_at = 0
    for start in range(0, logits.num_classes, class_chunk):
        width = min(class_chunk, logits.num_classes - start)
        chunk = buffer[: batch * width].view(batch, width)
        logits.fill(chunk, start)
        label = _take_out(chunk, logits.labels - start, of_labels)
        if floor is None or estimated is None:
            floor = estimated = first_floor(chunk, of_labels, logits.num_classes, settings)
        taken = found.take(chunk, start, floor)
        tail.add(chunk, blocks, taken + label)
        if found.width > 2 * settings.most_candidates:
            # Later classes lose a tie, so from here on only a larger logit can enter.
            least, dropped = found.keep_largest(settings.max_group)
            tail.add(key_logits(dropped))
            above = torch.nextafter(least, torch.full_like(least, math.inf))
            floor = torch.maximum(floor, above)
        seen = start + width
        if not certain and seen >= 2 * estimated_at and 0 < found.width <= MOST_SAMPLED:
            share = seen / logits.num_classes
            better = better_floor(found, tail, of_labels, share, settings)
            estimated = torch.maximum(estimated, better)
            floor = torch.maximum(floor, estimated)
            estimated_at = seen
    label_keys = make_keys(of_labels, logits.labels)
    keys = torch.cat([found.keys, label_keys[:, None]], 1)
    drawn = None
    if blocks is not None and uniforms is not None:
        drawn = draw_from_all(blocks, logits, uniforms)
    groups = _cut(keys, label_keys, tail, None if certain else estimated, settings, uniforms)
    return replace(groups, drawn=drawn or groups.drawn)


def _take_out(chunk: Tensor, columns: Tensor, of_labels: Tensor) -> Taken:
    """Take each row's label out, where the chunk holds it: no candidate and no mass of the tail."""
    rows = ((columns >= 0) & (columns < chunk.shape[1])).nonzero()[:, 0]
    chunk[rows, columns[rows]] = -math.inf
    return Taken(rows, columns[rows], of_labels[rows])


def _cut(
    keys: Tensor,
    label_keys: Tensor,
    tail: Tail,
    floor: Tensor | None,
    settings: PartitionSettings,
    uniforms: Tensor | None,
) -> _Groups:
    """Groups from candidates and labels [B, n] and the tail, which gets what is left over.

    ``floor`` [B] tells above what the candidates are complete, as far as they can matter; without
    one no class that a group needs is missing.
    """
    keys = keys.sort(1, descending=True).values
    held = (keys > VOID_KEY).sum(1)
    logits = key_logits(keys)
    peak = logits[:, :1]
    terms = ((logits - peak) / settings.group_temperature).clamp_(min=math.log(LEAST_TERM)).exp_()
    mass = terms.cumsum(1, dtype=torch.float64)
    scaled_peak = peak[:, 0].to(torch.float64) / settings.group_temperature
    total = mass[:, -1] + torch.exp(tail.log_sum(settings.group_temperature) - scaled_peak)
    missing = (mass < settings.threshold * total[:, None]).sum(1)
    prefix = torch.minimum(missing + (settings.threshold > 0), held)
    if settings.threshold == 1:
        prefix = held
    label_place = (keys == label_keys[:, None]).to(torch.uint8).argmax(1)
    full_sizes = prefix + (label_place >= prefix)
    sizes = full_sizes.clamp(max=settings.max_group)
    proved = torch.ones_like(held, dtype=torch.bool)
    if floor is not None:
        # Below a floor that rose there may be candidates, but not all that there are.
        proved = (logits >= floor[:, None]).sum(1) > settings.most_candidates
        # The label may stand among the candidates although it lies below the floor.
        ends = logits.gather(1, (prefix - 1).clamp(min=0)[:, None])[:, 0]
        proved |= (missing < keys.shape[1]) & ((prefix == 0) | (ends >= floor))

    drawn = None
    draws = settings.draws
    if draws and uniforms is not None and settings.draws_from_group:
        columns = torch.arange(keys.shape[1], device=keys.device)
        members = (columns < prefix[:, None]) | (columns == label_place[:, None])
        log_rest = tail.log_sum(draws.temperature)
        drawn = draw_from_group(keys, members, log_rest, draws.temperature, uniforms)

    # The group's places: the first ones, or the label's instead of the last of them.
    rows = torch.arange(len(keys), device=keys.device)
    places = torch.arange(int(sizes.max()), device=keys.device).repeat(len(keys), 1)
    taken = places < sizes[:, None]
    places[rows, sizes - 1] = torch.maximum(label_place, sizes - 1)
    chosen = keys.gather(1, places)
    primary = key_logits(chosen).masked_fill_(~taken, -math.inf).to(torch.float64)
    logits.scatter_(1, places.where(taken, label_place[:, None]), -math.inf)
    tail.add(logits)
    log_total = scaled_peak + total.log()
    log_probs = primary[taken] / settings.group_temperature - log_total.repeat_interleave(sizes)
    return _Groups(
        sizes=sizes.cpu().numpy(),
        classes=key_classes(chosen[taken]).cpu().numpy(),
        log_probs=log_probs.cpu().numpy(),
        secondary=_secondary(primary, tail, settings).cpu().numpy(),
        truncated=(full_sizes > settings.max_group).cpu().numpy(),
        proved=proved.cpu().numpy(),
        log_total=log_total,
        drawn=drawn,
    )


def _secondary(primary: Tensor, tail: Tail, settings: PartitionSettings) -> Tensor:
    """Natural log of the mass outside the group, float32 [b, temperatures]."""
    columns = []
    for temperature in settings.temperatures:
        outside = tail.log_sum(temperature)
        inside = (primary / temperature).logsumexp(1)
        # log(o / (o + i)) without the cancellation of a difference of logarithms.
        columns.append(functional.logsigmoid(outside - inside))
    return torch.stack(columns, 1).to(torch.float32)


def _replace(groups: _Groups, rows: npt.NDArray[np.int64], others: _Groups) -> _Groups:
    """The groups with those of ``rows`` exchanged for ``others``."""
    starts = np.cumsum(groups.sizes) - groups.sizes
    starts[rows] = len(groups.classes) + np.cumsum(others.sizes) - others.sizes
    sizes = groups.sizes.copy()
    sizes[rows] = others.sizes
    within = np.arange(sizes.sum()) - (np.cumsum(sizes) - sizes).repeat(sizes)
    entries = starts.repeat(sizes) + within
    secondary = groups.secondary.copy()
    secondary[rows] = others.secondary
    truncated = groups.truncated.copy()
    truncated[rows] = others.truncated
    return replace(
        groups,
        sizes=sizes,
        classes=np.concatenate([groups.classes, others.classes])[entries],
        log_probs=np.concatenate([groups.log_probs, others.log_probs])[entries],
        secondary=secondary,
        truncated=truncated,
        drawn=replace_draws(groups.drawn, rows, others.drawn)
        if groups.drawn and others.drawn
        else groups.drawn,
        proved=np.ones(len(sizes), np.bool_),
    )
