"""The classes that a batch looks at singly, and where they stand in a class layer in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gkd.trainer.distributed import ALONE, Ranks
from gkd.trainer.gathering import gather_targets
from gkd.trainer.head.loss import GroupTargets
from gkd.trainer.head.partial_fc import SampledCenters

# Classes of a chunk: its logits stay in a CPU's caches.
CHUNK_CLASSES = 1024
# An accelerator wants few and large operations: directions and logits of a chunk, 128 MB.
ACCELERATOR_NUMBERS = 1 << 25


@dataclass(frozen=True)
class ClassLookup:
    """The classes that samples look at singly: entries of the groups [E], then labels [B].

    order   int64 [E + B]   sorts them by the place of their centre
    places  int64 [E + B]   place of the centre * B + row, sorted
    chunks  centres of each chunk of the layer, and which of the sorted picks fall among them
    """

    order: Tensor
    places: Tensor
    batch_size: int
    chunks: Sequence[tuple[slice, slice]]

    @classmethod
    def of(cls, wanted: Tensor, targets: GroupTargets, centers: Tensor, certain: int = 0) -> Self:
        """Those of the places ``wanted`` [E + B] in centres [n, D]; outside: on other ranks.

        A chunk ends where the first ``certain`` centres end.
        """
        batch_size, device = len(wanted) - len(targets.indices), wanted.device
        rows = torch.cat([targets.rows, torch.arange(batch_size, device=device)])
        places, order = torch.sort(wanted * batch_size + rows)
        step = CHUNK_CLASSES
        if device.type != "cpu":
            step = max(step, ACCELERATOR_NUMBERS // (centers.shape[1] + batch_size))
        starts = [*range(0, certain, step), *range(certain, len(centers), step)]
        ends = [*starts[1:], len(centers)]
        edges = torch.tensor([*starts, len(centers)], device=device) * batch_size
        bounds = torch.searchsorted(places, edges).tolist()
        chunks = [
            (slice(start, end), slice(first, last))
            for start, end, first, last in zip(starts, ends, bounds, bounds[1:], strict=False)
        ]
        return cls(order, places, batch_size, chunks)

    def within(self, classes: slice, picked: slice) -> Tensor:
        """Places of the picks of a chunk in its flattened logits [classes, B]."""
        places: Tensor = self.places[picked] - classes.start * self.batch_size
        return places


class LookedUp(NamedTuple):
    """A whole batch's labels [B] and targets, and their classes in this rank's layer.

    ``learning`` are the picks among the centres that get a gradient.
    """

    labels: Tensor
    targets: GroupTargets
    picks: ClassLookup
    learning: ClassLookup


def look_up_classes(
    labels: Tensor,
    targets: GroupTargets | None,
    centers: Tensor,
    *,
    ranks: Ranks = ALONE,
    first_class: int = 0,
    sampled: SampledCenters | None = None,
) -> LookedUp:
    """Where the classes that a batch looks at singly stand; all as ``grouped_margin_loss`` has it.

    Here the host waits for the device, so best before the backbone has been given work.
    """
    targets = gather_targets(_no_targets(labels) if targets is None else targets, ranks)
    labels = ranks.gather(labels)
    places = torch.cat([targets.indices, labels]) - first_class
    picks = learning = ClassLookup.of(places, targets, centers)
    if sampled is not None:
        sample = sampled.sample
        learning = ClassLookup.of(sample.locate(places), targets, sampled.centers, sample.certain)
    return LookedUp(labels, targets, picks, learning)


def _no_targets(labels: Tensor) -> GroupTargets:
    """Samples without any group."""
    nothing = labels.new_empty(0)
    return GroupTargets(
        offsets=labels.new_zeros(len(labels) + 1),
        indices=nothing,
        log_probs=nothing.float(),
        log_secondary=torch.zeros(len(labels), device=labels.device),
    )
