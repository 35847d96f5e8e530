"""Per-identity cosine statistics: how close images are to their class centres while training."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gkd.storage.records.base import Records
from gkd.trainer.distributed import ALONE, Ranks

# Steps whose cosines stay on the device: few enough for its memory, enough to fetch seldom.
PENDING = 64
WORST, WORST_IMAGES = 30, 3
# Below any cosine.
UNSEEN = -2.0


@dataclass(frozen=True)
class IdentityCosine:
    """One identity: mean cosine of its images to its centre, and its worst images by record key."""

    number: int
    images: int
    mean: float
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class CosineSummary:
    """The result of ``IdentityCosineStatistics``.

    images  number of images measured
    of      number of all images
    mean    cosine over the measured images
    worst   the identities with the lowest mean cosine, ascending
    """

    images: int
    of: int
    mean: float
    worst: tuple[IdentityCosine, ...]


class IdentityCosineStatistics:
    """Each image's cosine to its class centre, as the steps of the last epoch computed it.

    The class layer computes it anyway; nothing is embedded again. So images are augmented, the
    network is in training mode, and weights change from one image to the next.
    """

    def __init__(self, num_images: int, ranks: Ranks = ALONE) -> None:
        self.num_images, self.ranks = num_images, ranks
        self._cosines: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, cosines: Tensor) -> None:
        """Add the cosines [B] of this rank's images at ``rows`` int64 [B] of the records."""
        self._pending.append((rows, cosines))
        if len(self._pending) >= PENDING:
            self._fetch()

    def state(self) -> Tensor | None:
        """Each image's cosine float32 [N] on the CPU, for a checkpoint; None if none was added.

        All ranks call it, and either all or none of them have added some.
        """
        self._fetch()
        return None if self._cosines is None else self.ranks.elementwise_max(self._cosines)

    def restore(self, state: Tensor | None) -> None:
        """Continue from the result of ``state``."""
        self._cosines = state

    def summary(self, records: Records) -> CosineSummary | None:
        """The identities with the lowest cosines; None without measurements. All ranks call it."""
        state = self.state()
        if state is None:
            return None
        cosines = state.numpy()
        seen = np.flatnonzero(cosines > UNSEEN)
        return summarise(seen, cosines[seen], records)

    def _fetch(self) -> None:
        if not self._pending:
            return
        if self._cosines is None:
            self._cosines = torch.full((self.num_images,), UNSEEN)
        rows, cosines = zip(*self._pending, strict=True)
        self._cosines[torch.cat(rows).cpu()] = torch.cat(cosines).float().cpu()
        self._pending = []


def summarise(
    rows: npt.NDArray[np.int64], cosines: npt.NDArray[np.float32], records: Records
) -> CosineSummary:
    """The identities with the lowest mean of their images' ``cosines`` [M], of ``rows`` [M]."""
    labels = records.labels[rows]
    counts = np.bincount(labels, minlength=records.num_classes)
    sums = np.bincount(labels, cosines, minlength=records.num_classes)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    worst = np.argsort(means, kind="stable")[: min(WORST, int((counts > 0).sum()))]

    def identity(number: int) -> IdentityCosine:
        own = np.flatnonzero(labels == number)
        own = own[np.argsort(cosines[own], kind="stable")][:WORST_IMAGES]
        images = tuple((records.key(int(rows[i])), float(cosines[i])) for i in own)
        return IdentityCosine(number, int(counts[number]), float(means[number]), images)

    return CosineSummary(
        images=len(rows),
        of=len(records),
        mean=float(cosines.mean(dtype=np.float64)),
        worst=tuple(identity(int(number)) for number in worst),
    )
