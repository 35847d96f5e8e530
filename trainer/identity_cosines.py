"""How well images fit their own identity: cosines to the class centre, gathered on the way."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gkd.storage.records.open import Records
from gkd.trainer.distributed import ALONE, Ranks

# Cosines that wait on the device, in steps: few enough to be small, enough to seldom wait.
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
    """What ``IdentityCosineStatistics`` gathered.

    images, of  that were measured, and that there are
    mean        cosine over these images
    worst       identities of the least mean cosine, ascending
    """

    images: int
    of: int
    mean: float
    worst: tuple[IdentityCosine, ...]


class IdentityCosineStatistics:
    """Each image's cosine to its own class centre, as the last epoch's steps saw it.

    The class layer has it anyway; nothing is embedded again. So the image is as augmented, the
    network in training mode, and weights move between one image and the next.
    """

    def __init__(self, num_images: int, ranks: Ranks = ALONE) -> None:
        self.num_images, self.ranks = num_images, ranks
        self._cosines: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, cosines: Tensor) -> None:
        """Take the cosines [B] of this rank's images at ``rows`` int64 [B] of the records."""
        self._pending.append((rows, cosines))
        if len(self._pending) >= PENDING:
            self._fetch()

    def state(self) -> Tensor | None:
        """Each image's cosine float32 [N] on the CPU, for a checkpoint; None before any was seen.

        All ranks call it, and all of them have seen some or none.
        """
        self._fetch()
        return None if self._cosines is None else self.ranks.elementwise_max(self._cosines)

    def restore(self, state: Tensor | None) -> None:
        """Go on from what ``state`` gave."""
        self._cosines = state

    def summary(self, records: Records) -> CosineSummary | None:
        """The identities that fit worst; None where no image was measured. All ranks call it."""
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
    """The worst identities by the mean of their images' ``cosines`` [M], of ``rows`` [M]."""
    labels = records.labels[rows]
    counts = np.bincount(labels, minlength=records.num_classes)
    sums = np.bincount(labels, cosines, minlength=records.num_classes)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    worst = np.argsort(means, kind="stable")[: min(WORST, int((counts > 0).sum()))]

    def identity(number: int) -> IdentityCosine:
        places = np.flatnonzero(labels == number)
        places = places[np.argsort(cosines[places], kind="stable")][:WORST_IMAGES]
        images = tuple((records.key(int(rows[p])), float(cosines[p])) for p in places)
        return IdentityCosine(number, int(counts[number]), float(means[number]), images)

    return CosineSummary(
        images=len(rows),
        of=len(records),
        mean=float(cosines.mean(dtype=np.float64)),
        worst=tuple(identity(int(number)) for number in worst),
    )
