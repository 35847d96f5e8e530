"""Guards against steps that are not finite and losses that only grow."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gkd.storage.util.text import first_few

# The running mean that detects a divergence averages over about this many steps.
MEMORY = 50
# A healthy warm-up raises the cross-entropy by less; a scale of 64 leaves room for far more.
DIVERGED = 1.5
# Cosines are bounded, and so is the cross-entropy of a failed run: it need not rise further.
LONG = 200
# Clearly above its beginning, a step counts as many.
CLEARLY, AS_MANY = 1.15, 8


@dataclass(frozen=True)
class SkippedStep:
    """A step that changed no weight because its loss or its gradients were not finite.

    parts    total, ce, primary, binary and gradient_norm
    records  keys of the whole batch
    """

    step: int
    parts: dict[str, float]
    records: tuple[str, ...]

    def to_log(self) -> dict[str, object]:
        """For the log: the parts are strings, since JSON has no NaN."""
        parts = {name: f"{value:g}" for name, value in self.parts.items()}
        return {"not_finite": parts, "records": list(self.records)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:g}" for name, value in self.parts.items())
        return f"step {self.step} ({parts}) with records {first_few(self.records, 16)}"


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, a scalar on their device; the host does not wait for it."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class BufferSnapshot:
    """A copy of a module's buffers: running statistics, which one bad step would ruin."""

    def __init__(self, module: nn.Module) -> None:
        # By dtype: only tensors of one dtype are copied in one operation.
        buffers = defaultdict(list)
        for buffer in module.buffers():
            buffers[buffer.dtype].append(buffer)
        self._pairs = [(live, [buffer.clone() for buffer in live]) for live in buffers.values()]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now."""
        for live, kept in self._pairs:
            torch._foreach_copy_(kept, live)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore(self) -> None:
        """Reset the buffers to the copy."""
        for live, kept in self._pairs:
            torch._foreach_copy_(live, kept)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class Divergence:
    """Whether the cross-entropy has long been far above its first value.

    first  cross-entropy of the first step
    mean   exponential mean since, over about ``MEMORY`` steps
    above  consecutive steps after the warm-up with a mean above the first value; those that are
           clearly above count ``AS_MANY``
    """

    first: float | None = None
    mean: float = 0.0
    above: int = 0

    def add(self, ce: float, *, settled: bool) -> None:
        """Add a step's cross-entropy; ``settled`` means that the warm-up is over."""
        if self.first is None:
            self.first = self.mean = ce
        self.mean += (ce - self.mean) / MEMORY
        step = AS_MANY if self.mean > CLEARLY * self.first else int(self.mean > self.first)
        self.above = self.above + step if settled and step else 0

    @property
    def found(self) -> bool:
        """Whether the mean is above ``DIVERGED`` times the first value, or long above it."""
        if self.first is None:
            return False
        return self.mean > DIVERGED * self.first or self.above >= LONG


def finite_weights(modules: Iterable[nn.Module]) -> bool:
    """Whether every parameter and buffer is finite."""
    tensors = [t.detach() for module in modules for t in (*module.parameters(), *module.buffers())]
    # A norm in float32 overflows for large weights; the largest entry does not.
    return all(
        math.isfinite(t.abs().amax().item()) for t in tensors if t.is_floating_point() and t.numel()
    )
