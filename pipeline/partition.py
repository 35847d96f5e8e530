"""Primary groups and secondary mass of a teacher's prediction, exact, from chunked logits.

Classes are visited in chunks. Of each chunk, logits at or above a floor become candidates and all
others go into sums that never leave the log domain, so nothing wider than a chunk is held and only
candidates are sorted. The first floor of a row is estimated from a sample of classes; a group that
its candidates fill is exact, because everything dropped lies below all of them. The few rows that
were estimated too high are done again with a floor that cannot be: a class with
p < (1 - threshold) / C is never needed.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.candidates import (
    LEAST_TERM,
    LOWEST,
    VOID_KEY,
    Candidates,
    Tail,
    key_classes,
    key_logits,
    make_keys,
)
from gkd.storage.errors import ConfigError
from gkd.storage.targets import SparseTargets, encode_log_probs

MAX_GROUP_LIMIT = 65535  # sizes are stored as uint16
CPU_LOGITS = 2**18  # 1 MB: stays in a core's cache
ACCELERATOR_LOGITS = 2**25
BLOCK_ROWS = 64
MOST_SAMPLED, LEAST_SAMPLED, SAMPLED_SHARE = 1024, 128, 1 / 16


@dataclass(frozen=True, kw_only=True)
class PartitionSettings:
    """What decides a primary group.

    z = scale * (cosine - margin * [class = label]);  p(T) = softmax(z / T)
    Group: shortest prefix by descending z (ties: lower class first) with
    sum p(group_temperature) >= threshold, and always the label; at most ``max_group`` classes.
    The secondary mass is taken at each of ``temperatures``.

    Raises:
        ConfigError: for a value outside its range.
    """

    threshold: float = 0.93
    group_temperature: float = 2.0
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    max_group: int = 4096
    scale: float = 64.0
    margin: float = 0.4

    def __post_init__(self) -> None:
        _check("--threshold", self.threshold, 0 <= self.threshold <= 1, "from 0 to 1")
        positive = "a finite number above 0"
        temperature = self.group_temperature
        _check("--group-temperature", temperature, _is_positive(temperature), positive)
        temperatures = ",".join(f"{t:g}" for t in self.temperatures) or "none"
        fits = len(self.temperatures) > 0 and all(map(_is_positive, self.temperatures))
        _check("--temperatures", temperatures, fits, "one or more finite numbers above 0")
        distinct = len(set(self.temperatures)) == len(self.temperatures)
        _check("--temperatures", temperatures, distinct, "each number once")
        fits = 1 <= self.max_group <= MAX_GROUP_LIMIT
        _check("--max-group", self.max_group, fits, f"a number from 1 to {MAX_GROUP_LIMIT:,}")
        _check("--scale", self.scale, _is_positive(self.scale), positive)
        _check("--margin", self.margin, math.isfinite(self.margin), "a finite number")


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _check(option: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(
            f"{option}: expected {expected}, got {value}; correct it, or leave it at its default"
        )


@dataclass(frozen=True)
class Partition:
    """Groups of a batch; ``truncated`` bool [B] marks those that ``max_group`` cut."""

    targets: SparseTargets
    truncated: npt.NDArray[np.bool_]


def partition(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    settings: PartitionSettings,
    *,
    class_chunk: int | None = None,
) -> Partition:
    """Primary groups of a batch from its embeddings, on the device that holds the centres.

    Args:
        embeddings: float [B, D], of any length: they are L2-normalised here.
        labels: int [B], the margin's class.
        centers: float32 [C, D], L2-normalised.
        settings: temperatures, threshold, cap, scale and margin.
        class_chunk: classes whose logits are held at once; by default what suits the device.
    """
    unit = functional.normalize(embeddings.to(centers.device, torch.float32), dim=1)
    labels = labels.to(centers.device, torch.int64)
    logits = _CosineLogits(unit * settings.scale, labels, centers, settings)
    return _partition(logits, settings, class_chunk)


def partition_logits(
    logits: Tensor,
    labels: Tensor,
    settings: PartitionSettings,
    *,
    class_chunk: int | None = None,
) -> Partition:
    """Primary groups of a batch from logits z float32 [B, C] with scale and margin applied."""
    source = _GivenLogits(logits, labels.to(logits.device, torch.int64))
    return _partition(source, settings, class_chunk)


class _Logits(Protocol):
    """Logits z of a batch, computed chunk by chunk."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def num_classes(self) -> int: ...

    def of_labels(self) -> Tensor:
        """Logit of each label, [B]."""
        ...

    def fill(self, out: Tensor, start: int) -> None:
        """Write the logits [B, n] of the classes from ``start`` on; the label's may be wrong."""
        ...

    def rows(self, index: Tensor | slice) -> "_Logits":
        """The same for some of the rows."""
        ...


@dataclass(frozen=True)
class _CosineLogits:
    scaled: Tensor  # [B, D], of length scale
    labels: Tensor
    centers: Tensor
    settings: PartitionSettings

    @property
    def num_classes(self) -> int:
        return len(self.centers)

    def of_labels(self) -> Tensor:
        cosines = (self.scaled * self.centers[self.labels]).sum(1)
        return cosines - self.settings.scale * self.settings.margin

    def fill(self, out: Tensor, start: int) -> None:
        torch.mm(self.scaled, self.centers[start : start + out.shape[1]].T, out=out)

    def rows(self, index: Tensor | slice) -> "_CosineLogits":
        return _CosineLogits(self.scaled[index], self.labels[index], self.centers, self.settings)


@dataclass(frozen=True)
class _GivenLogits:
    logits: Tensor
    labels: Tensor

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1]

    def of_labels(self) -> Tensor:
        return self.logits.gather(1, self.labels[:, None])[:, 0]

    def fill(self, out: Tensor, start: int) -> None:
        out.copy_(self.logits[:, start : start + out.shape[1]])

    def rows(self, index: Tensor | slice) -> "_GivenLogits":
        return _GivenLogits(self.logits[index], self.labels[index])


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


def _partition(logits: _Logits, settings: PartitionSettings, class_chunk: int | None) -> Partition:
    batch = len(logits.labels)
    if not batch:
        return _nothing(settings)
    if logits.labels.device.type != "cpu":
        return _partition_rows(logits, settings, class_chunk or ACCELERATOR_LOGITS // batch + 1)
    # Work on a cache's worth of logits is too small to be shared, so threads take blocks of rows
    # instead. The blocks do not depend on the number of threads, and so the bits do not either.
    blocks = [logits.rows(slice(at, at + BLOCK_ROWS)) for at in range(0, batch, BLOCK_ROWS)]
    chunk = class_chunk or CPU_LOGITS // BLOCK_ROWS
    threads = torch.get_num_threads()
    if min(threads, len(blocks)) == 1:
        return _join([_partition_rows(block, settings, chunk) for block in blocks])
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return _join(list(pool.map(lambda b: _partition_rows(b, settings, chunk), blocks)))
    finally:
        torch.set_num_threads(threads)  # a part of this setting is the process's


@torch.inference_mode()
def _partition_rows(logits: _Logits, settings: PartitionSettings, class_chunk: int) -> Partition:
    groups = _groups(logits, settings, class_chunk, None)
    again = np.flatnonzero(~groups.proved)
    if len(again):
        rows = torch.from_numpy(again).to(logits.labels.device)
        floor = _certain_floor(groups.log_total[rows], logits.num_classes, settings)
        sure = _groups(logits.rows(rows), settings, class_chunk, floor)
        groups = _replace(groups, again, sure)
    targets = SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(groups.sizes)]).astype(np.int64),
        indices=groups.classes.astype(np.uint32),
        log2_probs=encode_log_probs(groups.log_probs),
        secondary=groups.secondary,
    )
    return Partition(targets, groups.truncated)


def _join(parts: list[Partition]) -> Partition:
    targets = [part.targets for part in parts]
    sizes = np.concatenate([t.sizes for t in targets])
    return Partition(
        SparseTargets(
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            indices=np.concatenate([t.indices for t in targets]),
            log2_probs=np.concatenate([t.log2_probs for t in targets]),
            secondary=np.concatenate([t.secondary for t in targets]),
        ),
        np.concatenate([part.truncated for part in parts]),
    )


def _nothing(settings: PartitionSettings) -> Partition:
    targets = SparseTargets(
        offsets=np.zeros(1, np.int64),
        indices=np.empty(0, np.uint32),
        log2_probs=np.empty(0, np.uint16),
        secondary=np.empty((0, len(settings.temperatures)), np.float32),
    )
    return Partition(targets, np.empty(0, np.bool_))


def _groups(
    logits: _Logits, settings: PartitionSettings, class_chunk: int, floor: Tensor | None
) -> _Groups:
    """Groups by one pass over the classes; without a floor it is estimated from the first chunk."""
    of_labels = logits.of_labels()
    batch = len(of_labels)
    tail = Tail(of_labels, [*settings.temperatures, settings.group_temperature])
    found = Candidates(batch, of_labels.device)
    buffer = torch.empty(batch * min(class_chunk, logits.num_classes), device=of_labels.device)
    certain = floor is not None or settings.threshold == 1
    estimated_at = 0
    for start in range(0, logits.num_classes, class_chunk):
        width = min(class_chunk, logits.num_classes - start)
        chunk = buffer[: batch * width].view(batch, width)
        logits.fill(chunk, start)
        _take_out(chunk, logits.labels - start)
        if floor is None:
            floor = _first_floor(chunk, of_labels, logits.num_classes, settings)
        found.take(chunk, start, floor)
        tail.add(chunk)
        if found.width > 2 * settings.max_group:
            # Later classes lose a tie, so from here on only a larger logit can enter.
            least = found.keep_largest(settings.max_group, tail)
            above = torch.nextafter(least, torch.full_like(least, math.inf))
            floor = torch.maximum(floor, above)
        seen = start + width
        if not certain and seen >= 2 * estimated_at and 0 < found.width <= MOST_SAMPLED:
            share = seen / logits.num_classes
            floor = torch.maximum(floor, _better_floor(found, tail, of_labels, share, settings))
            estimated_at = seen
    label_keys = make_keys(of_labels, logits.labels)
    return _cut(found.keys, label_keys, tail, None if certain else floor, settings)


def _take_out(chunk: Tensor, columns: Tensor) -> None:
    """Mark each row's label, where the chunk holds it, with -inf: no candidate and no mass."""
    rows = ((columns >= 0) & (columns < chunk.shape[1])).nonzero()[:, 0]
    chunk[rows, columns[rows]] = -math.inf


def _first_floor(
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


def _better_floor(
    found: Candidates,
    tail: Tail,
    of_labels: Tensor,
    share: float,
    settings: PartitionSettings,
) -> Tensor:
    """A floor [B] from all that was seen so far, which is ``share`` of the classes."""
    sample = key_logits(found.keys).sort(1, descending=True).values
    rest = tail.log_sums[settings.group_temperature]
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
    rank = (mass < needed).sum(1).clamp(max=settings.max_group * share)
    # Three standard deviations of a count, and some for the smallest counts.
    rank = (rank + 3 * rank.sqrt() + 2).long().clamp(max=sample.shape[1] - 1)
    return sample.gather(1, rank[:, None])[:, 0].clamp(min=LOWEST)


def _certain_floor(log_total: Tensor, num_classes: int, settings: PartitionSettings) -> Tensor:
    """A logit [B] that no entry of a group lies below.

    Before the group's last entry stands less than ``threshold``, so it and the at most C - 1
    others behind it hold more than 1 - threshold, and the last is the largest of these.
    """
    if settings.threshold == 1:
        return torch.full_like(log_total, LOWEST, dtype=torch.float32)
    least = log_total + math.log((1 - settings.threshold) / num_classes)
    rounding = 1e-4 * (1 + least.abs())
    return (settings.group_temperature * (least - rounding)).clamp(min=LOWEST).to(torch.float32)


def _cut(
    found: Tensor,
    label_keys: Tensor,
    tail: Tail,
    floor: Tensor | None,
    settings: PartitionSettings,
) -> _Groups:
    """Groups from candidates [B, n], the labels and the tail, which gets what is left over.

    ``floor`` [B] tells above what the candidates are complete; without one no class that a group
    needs is missing.
    """
    keys = torch.cat([found, label_keys[:, None]], 1).sort(1, descending=True).values
    held = (keys > VOID_KEY).sum(1)
    logits = key_logits(keys)
    peak = logits[:, :1]
    terms = ((logits - peak) / settings.group_temperature).clamp_(min=math.log(LEAST_TERM)).exp_()
    mass = terms.cumsum(1, dtype=torch.float64)
    scaled_peak = peak[:, 0].to(torch.float64) / settings.group_temperature
    total = mass[:, -1] + torch.exp(tail.log_sums[settings.group_temperature] - scaled_peak)
    missing = (mass < settings.threshold * total[:, None]).sum(1)
    prefix = torch.minimum(missing + (settings.threshold > 0), held)
    if settings.threshold == 1:
        prefix = held
    label_place = (keys == label_keys[:, None]).to(torch.uint8).argmax(1)
    full_sizes = prefix + (label_place >= prefix)
    sizes = full_sizes.clamp(max=settings.max_group)
    proved = held > settings.max_group
    if floor is None:
        proved = torch.ones_like(proved)
    else:
        # The label may stand among the candidates although it lies below the floor.
        ends = logits.gather(1, (prefix - 1).clamp(min=0)[:, None])[:, 0]
        proved |= (missing < keys.shape[1]) & ((prefix == 0) | (ends >= floor))

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
    )


def _secondary(primary: Tensor, tail: Tail, settings: PartitionSettings) -> Tensor:
    """Natural log of the mass outside the group, float32 [b, temperatures]."""
    columns = []
    for temperature in settings.temperatures:
        outside = tail.log_sums[temperature]
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
        proved=np.ones(len(sizes), np.bool_),
    )
