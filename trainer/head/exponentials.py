"""Exponentials of a chunk of logits at two temperatures, as few and as safe as the scale lets."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

# Exponents this far below zero vanish; a power of two, so that no dtype rounds it.
FAR = 2.0**100
# Squaring multiplies an exponential's rounding error; up to here it is below the logits' own.
SQUARED_TEMPERATURES = (1.0, 2.0, 4.0)


class Dense(NamedTuple):
    """Gradient outside the picks: softmax * exp(z - shift) + tail * exp(z / T - soft_shift)."""

    softmax: Tensor
    tail: Tensor
    shift: Tensor
    soft_shift: Tensor


class Exponentials(NamedTuple):
    """How the exponentials of z and of z / T are taken, from ``base = z / divisor``.

    bounded    no sum of them leaves the floating-point range: they are taken without a shift
    squarings  of exp(z / T) that make exp(z), or None where each is taken by itself
    temperature  T, None without distillation
    """

    divisor: float
    squarings: int | None
    bounded: bool
    temperature: float | None

    @classmethod
    def plan(
        cls, *, terms: int, dtype: torch.dtype, scale: float, temperature: float | None
    ) -> Self:
        """The way for ``terms`` exponentials in ``dtype`` of logits within ``scale`` of zero."""
        steepest = scale / min(1.0, temperature or 1.0)
        bounded = steepest < math.log(torch.finfo(dtype).max) - math.log(terms) - 4.0
        if bounded and temperature in SQUARED_TEMPERATURES:
            return cls(temperature, round(math.log2(temperature)), bounded, temperature)
        return cls(1.0, None, bounded, temperature)

    def log_sums(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Logsumexp over classes [n, B] of z and of z / T, float64 [B]. Overwrites ``base``."""
        if self.squarings is not None:
            soft = base.exp_().sum(0).double().log()
            for _ in range(self.squarings):
                base.mul_(base)
            return base.sum(0).double().log(), soft
        soft = torch.full_like(base[0], -math.inf, dtype=torch.float64)
        if self.temperature is not None:
            soft = self._log_sum(base / self.temperature)
        return self._log_sum(base), soft

    def _log_sum(self, values: Tensor) -> Tensor:
        if self.bounded:
            return values.exp_().sum(0).double().log()
        peak = values.amax(0).clamp_(min=torch.finfo(values.dtype).min)
        return peak.double() + values.sub_(peak).exp_().sum(0).double().log()

    def coefficients(
        self, log_all: Tensor, log_tail: Tensor, tail: Tensor, factor: Tensor, dtype: torch.dtype
    ) -> Dense:
        """What ``gradient`` multiplies the exponentials by, in their dtype, of float64 [B]."""
        # Without a tail every class of the row is picked, and no exponential may be infinite.
        log_tail = log_tail.masked_fill(log_tail == -math.inf, FAR)
        softmax, shift = self._over(log_all, dtype)
        of_tail, soft_shift = self._over(log_tail, dtype)
        softmax, of_tail = softmax * factor, of_tail * tail * factor
        return Dense(softmax.to(shift), of_tail.to(shift), shift, soft_shift)

    def _over(self, log_sum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """1 / exp(log_sum) as a coefficient (float64) and a shift, whose rounding is made good."""
        shift = torch.zeros_like(log_sum, dtype=dtype) if self.bounded else log_sum.to(dtype)
        return torch.exp(shift.double() - log_sum), shift

    def gradient(self, base: Tensor, dense: Dense) -> Tensor:
        """Gradient by z of the classes that are not picked [n, B]."""
        if self.squarings is not None:
            soft = torch.exp(base)
            sharp = soft
            for _ in range(self.squarings):
                sharp = sharp * sharp if sharp is soft else sharp.mul_(sharp)
            return torch.addcmul(soft * dense.tail, sharp, dense.softmax)
        sharp = base.clone() if self.bounded else base - dense.shift
        grad = sharp.exp_().mul_(dense.softmax)
        if self.temperature is not None:
            soft = base / self.temperature
            if not self.bounded:
                soft.sub_(dense.soft_shift)
            grad.addcmul_(soft.exp_(), dense.tail)
        return grad


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, once."""
    return torch.compile(function, fullgraph=True)
