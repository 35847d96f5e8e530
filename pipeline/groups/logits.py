"""Logits of a batch, computed where and when they are needed."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CPU_LOGITS = 2**18  # 1 MB: stays in a core's cache
ACCELERATOR_LOGITS = 2**26  # 256 MB: large enough to keep one busy while the next is asked for


class Logits(Protocol):
    """Logits z of a batch, computed chunk by chunk."""

    @property
    def labels(self) -> Tensor:
        """Class of each row, int64 [B]."""
        ...

    @property
    def num_classes(self) -> int:
        """C."""
        ...

    def of_labels(self) -> Tensor:
        """Logit of each label, [B]."""
        ...

    def fill(self, out: Tensor, start: int) -> None:
        """Write the logits [B, n] of the classes from ``start`` on; the label's may be wrong."""
        ...

    def of(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Logits [m, n] of classes [m, n], of a row a line: ``rows`` [m], which ascend."""
        ...

    def rows(self, index: Tensor | slice) -> "Logits":
        """The same for some of the rows."""
        ...


@dataclass(frozen=True)
class CosineLogits:
    """Logits from embeddings and centres; ``label_margin`` is scale * margin.

    Centres of half precision become float32 a chunk at a time: only their rounding is felt.
    """

    scaled: Tensor  # float32 [B, D], of length scale
    labels: Tensor
    centers: Tensor  # [C, D]
    label_margin: float

    @property
    def num_classes(self) -> int:
        """C, one of each centre."""
        return len(self.centers)

    def of_labels(self) -> Tensor:
        """Logit of each label, [B]."""
        return (self.scaled * self.centers[self.labels].float()).sum(1) - self.label_margin

    def fill(self, out: Tensor, start: int) -> None:
        """Write the logits [B, n] of the classes from ``start`` on, without margin."""
        torch.mm(self.scaled, self.centers[start : start + out.shape[1]].float().T, out=out)

    def of(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Logits [m, n] of some classes; few centres are copied at once."""
        on_cpu = self.scaled.device.type == "cpu"
        products = self._row_by_row(rows, classes) if on_cpu else self._many(rows, classes)
        return products - self.label_margin * (classes == self.labels[rows, None])

    def _row_by_row(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Products [m, n], a row's at once: fewest operations on numbers."""
        counts = torch.bincount(rows, minlength=len(self.scaled)).tolist()
        products = [
            self.centers.index_select(0, some.flatten()).float() @ embedding
            for some, embedding in zip(classes.split(counts), self.scaled, strict=True)
        ]
        return torch.cat(products).view(classes.shape)

    def _many(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Products [m, n], many rows' at once: fewest calls of an accelerator."""
        lines = max(1, ACCELERATOR_LOGITS // (classes.shape[1] * self.scaled.shape[1]))
        parts = zip(rows.split(lines), classes.split(lines), strict=True)
        products = [
            torch.bmm(self.centers[some].float(), self.scaled[of, :, None])[:, :, 0]
            for of, some in parts
        ]
        return torch.cat(products)

    def rows(self, index: Tensor | slice) -> "CosineLogits":
        """The same for some of the rows."""
        return CosineLogits(self.scaled[index], self.labels[index], self.centers, self.label_margin)


@dataclass(frozen=True)
class GivenLogits:
    """Logits [B, C] as they are."""

    logits: Tensor
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[1]

    def of_labels(self) -> Tensor:
        """Logit of each label, [B]."""
        return self.logits.gather(1, self.labels[:, None])[:, 0]

    def fill(self, out: Tensor, start: int) -> None:
        """Write the logits [B, n] of the classes from ``start`` on."""
        out.copy_(self.logits[:, start : start + out.shape[1]])

    def of(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Logits [m, n] of some classes."""
        return self.logits.take(rows[:, None] * self.num_classes + classes)

    def rows(self, index: Tensor | slice) -> "GivenLogits":
        """The same for some of the rows."""
        return GivenLogits(self.logits[index], self.labels[index])
