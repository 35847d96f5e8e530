"""How well images fit their own identity: cosines to the class centre, gathered on the way."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.storage.records import Records
from gkd.trainer.data import Batch

# Cosines that wait on the device, in steps: few enough to be small, enough to seldom wait.
PENDING = 64
WORST, WORST_IMAGES = 30, 3


@dataclass(frozen=True)
class IdentityCosine:
    """One identity: mean cosine of its images to its centre, and its worst images by record key."""

    number: int
    images: int
    mean: float
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class FitSummary:
    """What ``IdentityFit`` gathered.

    images, of  that were measured, and that there are
    mean        cosine over these images
    worst       identities of the least mean cosine, ascending
    """

    images: int
    of: int
    mean: float
    worst: tuple[IdentityCosine, ...]


class IdentityFit:
    """Each image's cosine to its own class centre, as the last epoch's steps saw it.

    It costs a gather of [B, D] centres a step; nothing is embedded again. So the image is as
    augmented, the network in training mode, and weights move between one image and the next.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._cosines: npt.NDArray[np.float32] | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, batch: Batch, embeddings: Tensor, class_centers: Tensor) -> None:
        """Take a batch's embeddings [B, D] with the centres [C, D] of all classes."""
        own = class_centers.index_select(0, batch.labels)
        cosines = F.cosine_similarity(embeddings.detach().float(), own)
        self._pending.append((batch.rows, cosines))
        if len(self._pending) >= PENDING:
            self._fetch()

    def summary(self, records: Records) -> FitSummary | None:
        """The identities that fit worst; None where no image was measured."""
        self._fetch()
        if self._cosines is None:
            return None
        seen = np.flatnonzero(np.isfinite(self._cosines))
        return summarise(seen, self._cosines[seen], records)

    def _fetch(self) -> None:
        if not self._pending:
            return
        if self._cosines is None:
            self._cosines = np.full(self.num_images, np.nan, np.float32)
        rows, cosines = zip(*self._pending, strict=True)
        self._cosines[torch.cat(rows).numpy()] = torch.cat(cosines).cpu().numpy()
        self._pending = []


def summarise(
    rows: npt.NDArray[np.int64], cosines: npt.NDArray[np.float32], records: Records
) -> FitSummary:
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

    return FitSummary(
        images=len(rows),
        of=len(records),
        mean=float(cosines.mean(dtype=np.float64)),
        worst=tuple(identity(int(number)) for number in worst),
    )
