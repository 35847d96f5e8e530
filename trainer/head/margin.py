"""The class layer: cosines to class centres, with a margin, as logits."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The arc cosine's slope is unbounded at 1: cosines are held this far inside.
BOUNDARY = 1e-6
# Classes whose centres are drawn at a time.
INIT_ROWS = 1 << 16


class Margin(NamedTuple):
    """The label's cosine becomes ``psi(m1 * theta + m2) - m3``, see ``apply_margin``.

    ArcFace is (1, 0.5, 0), CosFace (1, 0, 0.4), SphereFace (4, 0, 0).
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0


def apply_margin(cosines: Tensor, margin: Margin) -> Tensor:
    """Cosines [B] of the labels to what stands in for them, [B].

        psi(phi) - m3,  phi = m1 * arccos(c) + m2
        psi(phi) = (-1)^k cos(phi) - 2k,  k = floor(phi / pi)

    psi is cos(phi) up to the angular boundary phi = pi; past it, where cos would rise again and
    reward a wrong angle, it goes on falling (SphereFace, Liu et al. 2017). Finite in value and
    gradient for any cosine, rounding beyond 1 included.
    """
    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return cosines - margin.m3
    angles = torch.acos(cosines.clamp(BOUNDARY - 1.0, 1.0 - BOUNDARY))
    phi = margin.m1 * angles + margin.m2
    half_turns = torch.floor(phi.detach() / math.pi)
    sign = 1.0 - 2.0 * torch.remainder(half_turns, 2.0)
    return sign * torch.cos(phi) - 2.0 * half_turns - margin.m3


def margin_logits(
    embeddings: Tensor, centers: Tensor, labels: Tensor, *, margin: Margin, scale: float
) -> Tensor:
    """Logits ``scale * (cosine, with the margin at the label)``, [B, C].

    Un-normalised embeddings [B, D] and class centres [C, D], int64 labels [B]. Always computed in
    float32 (float64 as given): under autocast too.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        scaled = F.normalize(at_least_float32(embeddings)) * scale
        logits = F.linear(scaled, F.normalize(at_least_float32(centers)))
        rows = torch.arange(len(labels), device=labels.device)
        target = apply_margin(logits[rows, labels] / scale, margin) * scale
        # In place: the product's own values are not needed backward, so one [B, C] suffices.
        return logits.index_put_((rows, labels), target)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision taken up to float32; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


class MarginHead(nn.Module):
    """The class layer's centres, float32 [num_classes, embedding_dim], and how they are used.

    ``weight`` is normalised on the way. Called, it gives ``margin_logits``; training goes through
    ``gkd.trainer.head.fused.grouped_margin_loss``, which never holds them all.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: Margin,
        scale: float = 64.0,
        rows: range | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.rows = range(num_classes) if rows is None else rows
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(_initial_centers(num_classes, embedding_dim, self.rows))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Un-normalised embeddings [B, D] and int64 labels [B] to logits [B, C]."""
        return margin_logits(embeddings, self.weight, labels, margin=self.margin, scale=self.scale)


def _initial_centers(num_classes: int, embedding_dim: int, rows: range) -> Tensor:
    """Rows of centres drawn for all classes, so that ranks with parts begin as one with all."""
    centers = torch.empty(len(rows), embedding_dim)
    for start in range(0, num_classes, INIT_ROWS):
        block = torch.empty(min(INIT_ROWS, num_classes - start), embedding_dim).normal_(std=0.01)
        first, last = max(start, rows.start), min(start + len(block), rows.stop)
        if first < last:
            centers[first - rows.start : last - rows.start] = block[first - start : last - start]
    return centers
