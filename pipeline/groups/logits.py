"""Logits of a batch, computed in chunks of classes and for single classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

CPU_LOGITS = 2**18  # 1 MB: stays in a core's cache
ACCELERATOR_LOGITS = 2**26  # 256 MB: enough to keep one busy while the next chunk is requested


@dataclass(frozen=True)
class Logits:
    """Logits z of a batch from embeddings and centres; ``label_margin`` is scale * margin.

    Centres of half precision become float32 a chunk at a time: only their rounding has an effect.
    """

    scaled: Tensor  # float32 [B, D], of length scale
    labels: Tensor  # int64 [B]
    centers: Tensor  # [C, D]
    label_margin: float

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.centers)

    def of_labels(self) -> Tensor:
        """Logit of each label, [B]."""
        return (self.scaled * self.centers[self.labels].float()).sum(1) - self.label_margin

    def fill(self, out: Tensor, start: int) -> None:
        """Write the logits [B, n] of the classes from ``start`` on, without margin."""
        torch.mm(self.scaled, self.centers[start : start + out.shape[1]].float().T, out=out)

    def of(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Logits [m, n] of classes [m, n] for ascending ``rows`` [m]."""
        on_cpu = self.scaled.device.type == "cpu"
        products = self._row_by_row(rows, classes) if on_cpu else self._batched(rows, classes)
        return products - self.label_margin * (classes == self.labels[rows, None])

    def _row_by_row(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Products [m, n] with the fewest arithmetic operations."""
        counts = torch.bincount(rows, minlength=len(self.scaled)).tolist()
        products = [
            self.centers.index_select(0, own.flatten()).float() @ embedding
            for own, embedding in zip(classes.split(counts), self.scaled, strict=True)
        ]
        return torch.cat(products).view(classes.shape)

    def _batched(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Products [m, n] with the fewest calls of an accelerator."""
        lines = max(1, ACCELERATOR_LOGITS // (classes.shape[1] * self.scaled.shape[1]))
        parts = zip(rows.split(lines), classes.split(lines), strict=True)
        products = [
            torch.bmm(self.centers[own].float(), self.scaled[of, :, None])[:, :, 0]
            for of, own in parts
        ]
        return torch.cat(products)

    def rows(self, index: Tensor | slice) -> "Logits":
        """The logits of a subset of the rows."""
        return Logits(self.scaled[index], self.labels[index], self.centers, self.label_margin)
