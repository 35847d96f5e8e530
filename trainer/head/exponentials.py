"""Exponentials of a chunk of logits at two temperatures, as few and as safe as the scale allows."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

# exp(-FAR) is 0; a power of two, so that no dtype rounds it.
FAR = 2.0**100
# Squaring multiplies an exponential's rounding error; up to here it is below the logits' own.
SQUARED_TEMPERATURES = (1.0, 2.0, 4.0)


class DenseFactors(NamedTuple):
    """The dense gradient is softmax * exp(z - shift) + tail * exp(z / T - soft_shift); each [B]."""

    softmax: Tensor
    tail: Tensor
    shift: Tensor
    soft_shift: Tensor


class Exponentials(NamedTuple):
    """How exponentials of z and of z / T are computed from ``base = z / divisor``.

    squarings    of exp(z / T) that give exp(z); None to compute each by itself
    bounded      whether no sum of them can overflow: they are summed without a shift
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
        """Plan for ``terms`` exponentials in ``dtype`` of logits within ``scale`` of zero."""
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

    def dense_factors(
        self, log_all: Tensor, log_tail: Tensor, tail: Tensor, factor: Tensor, dtype: torch.dtype
    ) -> DenseFactors:
        """Factors in ``dtype`` of ``factor * (exp(z - log_all) + tail * exp(z / T - log_tail))``.

        ``log_all``, ``log_tail`` and ``tail`` are float64 [B].
        """
        # Without a tail all of the row's classes are sparse; no exponential may be infinite.
        log_tail = log_tail.masked_fill(log_tail == -math.inf, FAR)
        softmax, shift = self._split(log_all, dtype)
        soft, soft_shift = self._split(log_tail, dtype)
        softmax, soft = softmax * factor, soft * tail * factor
        return DenseFactors(softmax.to(shift), soft.to(shift), shift, soft_shift)

    def _split(self, log_sum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """1 / exp(log_sum) as a float64 factor and a shift; the factor corrects its rounding."""
        shift = torch.zeros_like(log_sum, dtype=dtype) if self.bounded else log_sum.to(dtype)
        return torch.exp(shift.double() - log_sum), shift

    def gradient(self, base: Tensor, dense: DenseFactors) -> Tensor:
        """The dense gradient by z [n, B]."""
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
    """The function through torch.compile, compiled once."""
    return torch.compile(function, fullgraph=True)
