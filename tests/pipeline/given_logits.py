"""Partition of logits that a test chooses, in place of those of embeddings and centres."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gkd.pipeline.groups import partition as product
from gkd.pipeline.groups.logits import Logits
from gkd.pipeline.groups.partition import Partition
from gkd.pipeline.settings import PartitionSettings


@dataclass(frozen=True)
class GivenLogits(Logits):
    """Dense logits [B, C] as ``scaled``, with scale and margin applied."""

    @property
    def num_classes(self) -> int:
        return self.scaled.shape[1]

    def of_labels(self) -> Tensor:
        return self.scaled.gather(1, self.labels[:, None])[:, 0]

    def fill(self, out: Tensor, start: int) -> None:
        out.copy_(self.scaled[:, start : start + out.shape[1]])

    def of(self, rows: Tensor, classes: Tensor) -> Tensor:
        return self.scaled.take(rows[:, None] * self.num_classes + classes)

    def rows(self, index: Tensor | slice) -> "GivenLogits":
        return GivenLogits(self.scaled[index], self.labels[index], self.centers, 0.0)


def like_a_teacher(
    batch: int, num_classes: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Logits of impostors with a heavy tail, and of labels from certain to misclassified."""
    rng = np.random.default_rng(0)
    cosines = 0.09 * rng.standard_t(12, (batch, num_classes))
    labels = rng.integers(0, num_classes, batch)
    cosines[np.arange(batch), labels] = rng.uniform(-0.2, 1.0, batch) - 0.4
    return (64 * cosines).astype(np.float32), labels


def partition_logits(
    logits: Tensor,
    labels: Tensor,
    settings: PartitionSettings,
    *,
    uniforms: npt.NDArray[np.float64] | None = None,
    class_chunk: int | None = None,
) -> Partition:
    """Primary groups of a batch from logits z float32 [B, C] with scale and margin applied."""
    labels = labels.to(logits.device, torch.int64)
    given = GivenLogits(logits, labels, logits.new_empty(0), 0.0)
    return product.partition_logits(given, settings, uniforms, class_chunk)
