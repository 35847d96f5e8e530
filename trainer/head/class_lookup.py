"""Sparse class lookup: the classes that each sample of a batch refers to, by chunk of the layer."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.trainer.distributed import Ranks
from gkd.trainer.head.margin import HeadSpec
from gkd.trainer.head.partial_fc import SampledCenters
from gkd.trainer.head.targets import GroupTargets

# Classes per chunk: the logits of a chunk fit into a CPU's caches.
CHUNK_CLASSES = 1024
# An accelerator needs few and large operations: numbers in directions and logits, 128 MB.
ACCELERATOR_NUMBERS = 1 << 25


@dataclass(frozen=True)
class ClassLookup:
    """Positions of the classes of the batch's entries [E] and labels [B] in a set of centres.

    order      int64 [E + B]   sorts them by position in the centres
    positions  int64 [E + B]   position of the centre * B + row, sorted
    chunks     for each chunk: its slice of the centres, and its slice of ``positions``
    """

    order: Tensor
    positions: Tensor
    batch_size: int
    chunks: list[tuple[slice, slice]]

    @classmethod
    def build(
        cls, classes: Tensor, targets: GroupTargets, centers: Tensor, certain: int = 0
    ) -> Self:
        """Look up ``classes`` [E + B], positions in ``centers`` [n, D].

        Positions outside are of classes that other processes hold. A chunk boundary is placed
        after the first ``certain`` centres.
        """
        batch_size, device = len(classes) - len(targets.indices), classes.device
        rows = torch.cat([targets.rows, torch.arange(batch_size, device=device)])
        positions, order = torch.sort(classes * batch_size + rows)
        step = CHUNK_CLASSES
        if device.type != "cpu":
            step = max(step, ACCELERATOR_NUMBERS // (centers.shape[1] + batch_size))
        starts = [*range(0, certain, step), *range(certain, len(centers), step)]
        ends = [*starts[1:], len(centers)]
        edges = torch.tensor([*starts, len(centers)], device=device) * batch_size
        bounds = torch.searchsorted(positions, edges).tolist()
        chunks = [
            (slice(start, end), slice(first, last))
            for start, end, first, last in zip(starts, ends, bounds, bounds[1:], strict=False)
        ]
        return cls(order, positions, batch_size, chunks)

    def within(self, classes: slice, entries: slice) -> Tensor:
        """Indices of a chunk's sparse classes into its flattened logits [classes, B]."""
        indices: Tensor = self.positions[entries] - classes.start * self.batch_size
        return indices


class BatchLookup(NamedTuple):
    """Labels [B] and targets of the batch of all processes, and the lookup of their classes.

    distil   whether there are targets
    layer    lookup in this process's centres
    trained  lookup in the centres that get a gradient
    """

    labels: Tensor
    targets: GroupTargets
    distil: bool
    layer: ClassLookup
    trained: ClassLookup


def look_up_classes(
    labels: Tensor,
    targets: GroupTargets | None,
    centers: Tensor,
    spec: HeadSpec,
    *,
    sampled: SampledCenters | None = None,
) -> BatchLookup:
    """The lookup that ``grouped_margin_loss`` needs; the same arguments.

    The host waits for the device here, so call it before the backbone's work is queued.
    """
    distil = targets is not None
    targets = _gather_targets(targets or GroupTargets.empty(labels), spec.ranks)
    labels = spec.ranks.gather(labels)
    classes = torch.cat([targets.indices, labels]) - spec.first_class
    layer = trained = ClassLookup.build(classes, targets, centers)
    if sampled is not None:
        sample = sampled.sample
        positions = sample.locate(classes)
        trained = ClassLookup.build(positions, targets, sampled.centers, sample.certain)
    return BatchLookup(labels, targets, distil, layer, trained)


def classes_in_use(labels: Tensor, targets: GroupTargets | None, ranks: Ranks) -> Tensor:
    """The distinct labels and group classes of all ranks' batches: int64 [n], ascending."""
    own = labels if targets is None else torch.cat([labels, targets.indices])
    if ranks.world_size > 1:
        own = torch.unique(own)
        counts = ranks.gather(torch.tensor([len(own)], device=own.device)).tolist()
        own = ranks.gather_ragged(own, counts)
    distinct: Tensor = torch.unique(own)
    return distinct


def _gather_targets(targets: GroupTargets, ranks: Ranks) -> GroupTargets:
    """The ranks' targets, each of the same number of samples, as one."""
    if ranks.world_size == 1:
        return targets
    sizes = ranks.gather(torch.diff(targets.offsets))
    counts = sizes.view(ranks.world_size, -1).sum(1).tolist()
    weights = targets.log_weights
    return GroupTargets(
        offsets=F.pad(sizes.cumsum(0), (1, 0)),
        indices=ranks.gather_ragged(targets.indices, counts),
        log_probs=ranks.gather_ragged(targets.log_probs, counts),
        log_secondary=ranks.gather(targets.log_secondary),
        log_weights=None if weights is None else ranks.gather_ragged(weights, counts),
    )
