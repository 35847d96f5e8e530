"""The margin at the label, and the settings of a class layer."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gkd.trainer.distributed import ALONE, Ranks

# The slope of the arc cosine is unbounded at 1: cosines are clamped this far inside.
BOUNDARY = 1e-6


class Margin(NamedTuple):
    """The label's cosine becomes ``psi(m1 * theta + m2) - m3``, see ``apply_margin``.

    ArcFace is (1, 0.5, 0), CosFace (1, 0, 0.4), SphereFace (4, 0, 0).
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The settings of a class layer and its loss that are the same in every step.

    margin, scale        logits are ``scale * cosine``, at the label ``scale * psi(...)``
    temperature          T of the distillation, that of the targets
    w_binary, w_primary  weights of its two terms
    compiled             whether the exponentials of a chunk go through torch.compile
    ranks                the processes that share the batch and the classes
    first_class          the class of this process's first centre
    """

    margin: Margin
    scale: float = 64.0
    temperature: float = 4.0
    w_binary: float = 1.0
    w_primary: float = 1.0
    compiled: bool = False
    ranks: Ranks = ALONE
    first_class: int = 0


def apply_margin(cosines: Tensor, margin: Margin) -> Tensor:
    """Cosines [B] of the labels to the values that replace them, [B].

        psi(phi) - m3,  phi = m1 * arccos(c) + m2
        psi(phi) = (-1)^k cos(phi) - 2k,  k = floor(phi / pi)

    psi is cos(phi) up to the angular boundary phi = pi; past it, where cos would rise again and
    reward a wrong angle, it continues to fall (SphereFace, Liu et al. 2017). Value and gradient
    are finite for any cosine, including ones that rounding leaves above 1.
    """
    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return cosines - margin.m3
    angles = torch.acos(cosines.clamp(BOUNDARY - 1.0, 1.0 - BOUNDARY))
    phi = margin.m1 * angles + margin.m2
    half_turns = torch.floor(phi.detach() / math.pi)
    sign = 1.0 - 2.0 * torch.remainder(half_turns, 2.0)
    return sign * torch.cos(phi) - 2.0 * half_turns - margin.m3
