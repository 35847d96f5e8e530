"""Sparse class lookup: the classes that each sample of a batch refers to, by chunk of the layer."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gkd.trainer.gathering import gather_targets
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
    targets = gather_targets(targets or GroupTargets.empty(labels), spec.ranks)
    labels = spec.ranks.gather(labels)
    classes = torch.cat([targets.indices, labels]) - spec.first_class
    layer = trained = ClassLookup.build(classes, targets, centers)
    if sampled is not None:
        sample = sampled.sample
        positions = sample.locate(classes)
        trained = ClassLookup.build(positions, targets, sampled.centers, sample.certain)
    return BatchLookup(labels, targets, distil, layer, trained)
