"""The teacher's signal for a batch as tensors, and sums over the entries of each sample."""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from gkd.storage.cache.targets import TargetBatch


@dataclass(frozen=True)
class GroupTargets:
    """A ``TargetBatch`` as tensors: the teacher's signal for B samples, E entries in all.

    Sample i has the entries ``offsets[i]:offsets[i + 1]``. The teacher skipped a sample that has
    none: it contributes to the cross-entropy only.

    offsets        int64   [B + 1]
    indices        int64   [E]    classes, unique within a sample
    log_probs      float32 [E]    natural log of p_j(T)
    log_secondary  float32 [B]    natural log of 1-a, -inf if the group holds all probability
    log_weights    float32 [E]    natural log of r_j (see ``drawn_loss``); None if all r_j are 1
    """

    offsets: Tensor
    indices: Tensor
    log_probs: Tensor
    log_secondary: Tensor
    log_weights: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: TargetBatch) -> Self:
        """Tensors over the same memory, on the CPU."""
        return cls(
            offsets=torch.from_numpy(batch.offsets),
            indices=torch.from_numpy(batch.indices),
            log_probs=torch.from_numpy(batch.log_probs),
            log_secondary=torch.from_numpy(batch.log_secondary),
            log_weights=None if batch.log_weights is None else torch.from_numpy(batch.log_weights),
        )

    @classmethod
    def empty(cls, labels: Tensor) -> Self:
        """Targets without any entry, for the samples of ``labels`` [B]."""
        nothing = labels.new_empty(0)
        return cls(
            offsets=labels.new_zeros(len(labels) + 1),
            indices=nothing,
            log_probs=nothing.float(),
            log_secondary=torch.zeros(len(labels), device=labels.device),
        )

    @cached_property
    def rows(self) -> Tensor:
        """The sample of each entry, int64 [E]."""
        # Given the output size, the host does not wait for the device.
        return torch.repeat_interleave(torch.diff(self.offsets), output_size=len(self.indices))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without absent ones."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None}

    def to(self, device: torch.device) -> "GroupTargets":
        """Copy to a device; does not wait for copies from pinned memory."""
        return GroupTargets(
            **{name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        )

    def spread(self, values: Tensor) -> Tensor:
        """Repeat each sample's value for its entries: [B] to [E]."""
        return values.index_select(0, self.rows)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each sample's entries: [E] to [B]."""
        return self._reduce(values, "sum")

    def logsumexp(self, values: Tensor) -> Tensor:
        """Logsumexp over each sample's entries: [E] to [B]; -inf without entries."""
        peak = self._reduce(values, "max")
        total = self.sum((values - self.spread(peak)).exp_())
        return torch.where(total > 0, peak + total.log(), -math.inf)

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        # Deterministic on every device, unlike scattered sums. `unsafe` skips a check of the
        # offsets that would make the host wait for the device.
        return torch.segment_reduce(values, how, offsets=self.offsets, unsafe=True)
