"""Partition of a teacher's predictions into primary group and secondary mass, from chunked logits.

Classes are visited in chunks. The logits of a chunk at or above a cutoff become candidates and all
others are added to log-sums, so nothing wider than a chunk is held and only candidates are sorted.
The first cutoff of a row is estimated from a sample of classes; a group that its candidates fill is
exact, because everything dropped is below all of them. The few rows whose estimate was too high are
repeated with a cutoff that is certain: a class with p < (1 - threshold) / C is never needed.

``primary_group`` cuts the groups from the candidates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.groups.candidates import (
    MAX_SAMPLED,
    Candidates,
    Extracted,
    certain_cutoff,
    estimate_cutoff,
    initial_cutoff,
    key_logits,
    make_keys,
)
from gkd.pipeline.groups.draws import SPAN, BlockSums, draw_from_all
from gkd.pipeline.groups.log_sums import RestLogSums
from gkd.pipeline.groups.logits import ACCELERATOR_LOGITS, CPU_LOGITS, Logits
from gkd.pipeline.groups.primary_group import PrimaryGroups, cut_primary_groups
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.util.torch_device import map_single_threaded

BLOCK_ROWS = 64


@dataclass(frozen=True)
class Partition:
    """Groups of a batch; ``truncated`` bool [B] marks those that ``max_group`` truncated."""

    targets: SparseTargets
    truncated: npt.NDArray[np.bool_]

    def of(self, rows: range) -> "Partition":
        """The groups of consecutive rows."""
        return Partition(self.targets.slice(rows), self.truncated[rows.start : rows.stop])

    @classmethod
    def concat(cls, parts: Iterable["Partition"]) -> "Partition":
        """The groups of one or more parts, one part after the other."""
        parts = list(parts)
        return cls(
            SparseTargets.concat([part.targets for part in parts]),
            np.concatenate([part.truncated for part in parts]),
        )


def partition(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    settings: PartitionSettings,
    *,
    uniforms: npt.NDArray[np.float64] | None = None,
    class_chunk: int | None = None,
) -> Partition:
    """Primary groups of a batch from its embeddings, on the device of the centres.

    Args:
        embeddings: float [B, D], of any length: they are L2-normalised here.
        labels: int [B], the margin's class.
        centers: float32, float16 or bfloat16 [C, D], L2-normalised.
        settings: temperatures, threshold, cap, scale and margin.
        uniforms: float64 [B, n] in [0, 1), one for each draw; only if the settings have draws.
        class_chunk: number of classes whose logits are held at once; by default as the device
            needs.
    """
    unit = functional.normalize(embeddings.to(centers.device, torch.float32), dim=1)
    labels = labels.to(centers.device, torch.int64)
    label_margin = settings.scale * settings.margin
    logits = Logits(unit * settings.scale, labels, centers, label_margin)
    return partition_logits(logits, settings, uniforms, class_chunk)


def partition_logits(
    logits: Logits,
    settings: PartitionSettings,
    uniforms: npt.NDArray[np.float64] | None,
    class_chunk: int | None,
) -> Partition:
    """The same from ``Logits``, see ``partition``."""
    batch, device = len(logits.labels), logits.labels.device
    if not batch:
        return _empty(settings)
    count = settings.draws.count if settings.draws else 0
    numbers = torch.from_numpy(np.empty((batch, 0)) if uniforms is None else uniforms).to(device)
    if numbers.shape != (batch, count):
        raise ValueError(f"uniforms: expected {(batch, count)}, got {tuple(numbers.shape)}")
    on_cpu = device.type == "cpu"
    chunk = class_chunk or (CPU_LOGITS // BLOCK_ROWS if on_cpu else ACCELERATOR_LOGITS // batch + 1)
    if settings.draws:
        chunk = -(-chunk // SPAN) * SPAN  # block sums need chunks of complete spans
    if not on_cpu:
        return _partition_rows(logits, settings, numbers, chunk)
    # A chunk that fits a core's cache is too little work to share, so each thread takes blocks of
    # rows. The blocks, and so the bits, do not depend on the number of threads.
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, batch, BLOCK_ROWS)]

    def work(block: slice) -> Partition:
        return _partition_rows(logits.rows(block), settings, numbers[block], chunk)

    return Partition.concat(map_single_threaded(work, blocks))


@torch.inference_mode()
def _partition_rows(
    logits: Logits, settings: PartitionSettings, uniforms: Tensor, class_chunk: int
) -> Partition:
    groups = _scan_classes(logits, settings, uniforms, class_chunk, None)
    targets, truncated = groups.targets, groups.truncated
    repeated = np.flatnonzero(~groups.proved)
    if len(repeated):
        rows = torch.from_numpy(repeated).to(logits.labels.device)
        cutoff = certain_cutoff(groups.log_total[rows], logits.num_classes, settings)
        # Draws from all classes do not depend on the group and are right already.
        numbers = uniforms[rows] if settings.draws_from_group else None
        exact = _scan_classes(logits.rows(rows), settings, numbers, class_chunk, cutoff)
        right = exact.targets
        if settings.draws and numbers is None:
            right = replace(right, draws=targets.take(repeated).draws)
        order = np.arange(len(targets))
        order[repeated] = len(targets) + np.arange(len(repeated))
        targets = SparseTargets.concat([targets, right]).take(order)
        truncated[repeated] = exact.truncated
    return Partition(targets, truncated)


def _empty(settings: PartitionSettings) -> Partition:
    arrays: dict[str, npt.NDArray[Any]] = {
        "indices": np.empty(0, np.uint32),
        "log2_probs": np.empty(0, np.uint16),
        "secondary": np.empty((0, len(settings.temperatures)), np.float32),
    }
    if settings.draws:
        arrays["draws"] = np.empty((0, settings.draws.count), np.uint32)
        arrays["draw_log2_probs"] = np.empty((0, settings.draws.count), np.uint16)
    if settings.draws_from_group:
        arrays["draw_secondary"] = np.empty(0, np.float32)
    targets = SparseTargets.from_arrays(np.zeros(1, np.int64), arrays)
    return Partition(targets, np.empty(0, np.bool_))


def _scan_classes(
    logits: Logits,
    settings: PartitionSettings,
    uniforms: Tensor | None,
    class_chunk: int,
    cutoff: Tensor | None,
) -> PrimaryGroups:
    """Groups by one pass over the classes; without a cutoff the first chunk gives an estimate."""
    label_logits = logits.of_labels()
    batch = len(label_logits)
    blocks = None
    if settings.draws and uniforms is not None and not settings.draws_from_group:
        temperature = settings.draws.temperature
        blocks = BlockSums(batch, logits.num_classes, temperature, label_logits.device)
    rest = RestLogSums(label_logits, [*settings.temperatures, settings.group_temperature])
    candidates = Candidates(batch, label_logits.device)
    buffer = torch.empty(batch * min(class_chunk, logits.num_classes), device=label_logits.device)
    certain = cutoff is not None or settings.threshold == 1
    estimate, estimated_at = cutoff, 0
    for start in range(0, logits.num_classes, class_chunk):
        width = min(class_chunk, logits.num_classes - start)
        chunk = buffer[: batch * width].view(batch, width)
        logits.fill(chunk, start)
        label = _extract_labels(chunk, logits.labels - start, label_logits)
        if cutoff is None or estimate is None:
            cutoff = estimate = initial_cutoff(chunk, label_logits, logits.num_classes, settings)
        extracted = candidates.extract_above(chunk, start, cutoff)
        rest.add(chunk, blocks, Extracted.concat([extracted, label]))
        if candidates.width > 2 * settings.max_candidates:
            # Later classes lose ties, so from here on only a larger logit can enter.
            smallest, dropped = candidates.keep_largest(settings.max_group)
            rest.add(key_logits(dropped))
            above = torch.nextafter(smallest, torch.full_like(smallest, math.inf))
            cutoff = torch.maximum(cutoff, above)
        seen = start + width
        if not certain and seen >= 2 * estimated_at and 0 < candidates.width <= MAX_SAMPLED:
            refined = estimate_cutoff(
                key_logits(candidates.keys),
                rest.at(settings.group_temperature),
                label_logits,
                seen / logits.num_classes,
                settings,
            )
            estimate = torch.maximum(estimate, refined)
            cutoff = torch.maximum(cutoff, estimate)
            estimated_at = seen
    label_keys = make_keys(label_logits, logits.labels)
    keys = torch.cat([candidates.keys, label_keys[:, None]], 1)
    draws = draw_from_all(blocks, logits, uniforms) if blocks and uniforms is not None else None
    complete_above = None if certain else estimate
    return cut_primary_groups(keys, label_keys, rest, complete_above, settings, uniforms, draws)


def _extract_labels(chunk: Tensor, columns: Tensor, label_logits: Tensor) -> Extracted:
    """Extract each row's label, if the chunk holds it: it is neither candidate nor rest."""
    rows = ((columns >= 0) & (columns < chunk.shape[1])).nonzero()[:, 0]
    chunk[rows, columns[rows]] = -math.inf
    return Extracted(rows, columns[rows], label_logits[rows])
