"""What a training may not go on through: steps that are not finite, and a loss that only grows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.storage.records.open import Records
from gkd.storage.util.text import first_few

# The mean that judges a divergence forgets over about this many steps.
MEMORY = 100
# A healthy warm-up lifts the cross-entropy by less; a scale of 64 leaves room for far more.
DIVERGED = 1.5
# Cosines are bounded, and so is the cross-entropy of a run that is lost: it need not rise further.
LONG = 2 * MEMORY
SHOWN_KEYS = 16
SHOWN_CLASSES = 5


@dataclass(frozen=True)
class SkippedStep:
    """A step that changed no weight, because its loss or its gradients were not finite.

    parts    total, ce, primary, binary and gradient_norm, as they were
    records  keys of the whole batch
    """

    step: int
    parts: dict[str, float]
    records: tuple[str, ...]

    def to_log(self) -> dict[str, object]:
        """For the log: JSON knows no NaN, so the parts are words."""
        parts = {name: f"{value:g}" for name, value in self.parts.items()}
        return {"not_finite": parts, "records": list(self.records)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:g}" for name, value in self.parts.items())
        return f"step {self.step} ({parts}) with records {first_few(self.records, SHOWN_KEYS)}"


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, a scalar on their device; nothing waits for it."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class BufferSnapshot:
    """A copy of a module's buffers: running statistics, which a bad step would spoil for good."""

    def __init__(self, module: nn.Module) -> None:
        live = list(module.buffers())
        # By type: only tensors of one type are copied all at once.
        kinds = {buffer.dtype for buffer in live}
        self._live = [[buffer for buffer in live if buffer.dtype == kind] for kind in kinds]
        self._kept = [[buffer.clone() for buffer in alike] for alike in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers as they are now."""
        for live, kept in zip(self._live, self._kept, strict=True):
            _copy_all(kept, live)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the buffers what they were when they were kept."""
        for live, kept in zip(self._live, self._kept, strict=True):
            _copy_all(live, kept)


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class Divergence:
    """Whether the cross-entropy has stood far above where it began, for long.

    first  cross-entropy of the first step
    mean   exponential mean since, over about ``MEMORY`` steps
    above  steps in a row, after the warm-up, that left the mean above the beginning
    """

    first: float | None = None
    mean: float = 0.0
    above: int = 0

    def add(self, ce: float, *, settled: bool) -> None:
        """Take one more step's cross-entropy into account; ``settled``: the warm-up is over."""
        if self.first is None:
            self.first = self.mean = ce
        self.mean += (ce - self.mean) / MEMORY
        self.above = self.above + 1 if settled and self.mean > self.first else 0

    @property
    def found(self) -> bool:
        """Whether the mean is above ``DIVERGED`` times the beginning, or above it for long."""
        if self.first is None:
            return False
        return self.mean > DIVERGED * self.first or self.above >= LONG


def finite_weights(modules: Iterable[nn.Module]) -> bool:
    """Whether every parameter and buffer is finite."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    floating = [t.detach() for t in tensors if t.is_floating_point()]
    # A sum of squares overflows where a norm in float32 does; the largest entry never does.
    return all(math.isfinite(peak.item()) for peak in map(_peak, floating))


def _peak(tensor: Tensor) -> Tensor:
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


def check_classes(records: Records, *, keep_empty: bool) -> None:
    """Refuse labels that the class layer has no centre for, or classes that leave nothing to tell.

    Labels are those of images that have one, 0 or above.

    Raises:
        ConfigError: naming the first record at fault, the only identity, or, unless
            ``keep_empty``, the first classes without an image.
    """
    outside = np.flatnonzero(records.labels >= records.num_classes)
    if len(outside):
        first = int(outside[0])
        raise ConfigError(
            f"{len(outside)} labels of {records.path} are outside its {records.num_classes} "
            f"classes, the first: {records.labels[first]} of {records.where(first)}; expected 0 to "
            f"{records.num_classes - 1}: `gkd records verify` lists damaged records, and a pack's "
            "`property` file says how many classes there are"
        )
    present = np.unique(records.labels)
    if len(present) < 2:
        raise ConfigError(
            f"{records.path}: expected images of two identities at least, got those of class "
            f"{records.labels[0]} alone; a class layer has nothing to tell apart"
        )

    empty = records.num_classes - len(present)
    if empty and not keep_empty:
        # Never as many numbers as there are classes: that count may be a stranger's.
        lowest = np.arange(min(records.num_classes, len(present) + SHOWN_CLASSES))
        without = np.setdiff1d(lowest, present)[:SHOWN_CLASSES]
        raise ConfigError(
            f"{records.path}: {empty:,} of {records.num_classes:,} classes have no image "
            f"({first_few(without.tolist(), SHOWN_CLASSES, count=empty)}); if the records were "
            "filtered, or are a part of a data set, set data.empty_classes=keep, else correct "
            "`property` or the labels"
        )
