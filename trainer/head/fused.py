"""Margin softmax and grouped distillation from embeddings and centres, without their logits.

The loss is that of ``gkd.trainer.head.loss`` on the logits of
``gkd.trainer.head.margin.margin_logits``.
Classes are worked through chunk by chunk, twice, and no ``[B, C]`` tensor ever exists:

1. ``class_sums``: the logits of a chunk, their exponentials summed over the classes that no sample
   looks at singly, and the logits picked out where one does (its group's entries, its label).
2. ``picked_terms``: everything that is not dense. The margin, the loss and the gradient at the
   picked classes, and per sample the two numbers that multiply all its other exponentials.
3. ``class_gradients``: the logits of a chunk again, their gradient, and its two products.

So there are four matrix products for three of a layer that keeps its logits. A cosine is bounded,
so the exponentials of scaled cosines are summed as they are where the scale lets them (no running
maximum), and for T = 1, 2 or 4 those of z come from those of z/T by squaring.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd.trainer.distributed import ALONE, Ranks
from gkd.trainer.gathering import gather_embeddings
from gkd.trainer.head.class_lookup import ClassLookup, LookedUp, look_up_classes
from gkd.trainer.head.exponentials import Exponentials, compiled
from gkd.trainer.head.loss import (
    GkdLoss,
    GroupTargets,
    Weights,
    gkd_loss,
    group_terms,
    segment_logsumexp,
    spread,
)
from gkd.trainer.head.margin import Margin, apply_margin, at_least_float32, margin_logits
from gkd.trainer.head.partial_fc import ClassSample, SampledCenters

# A norm below this is taken for this, as torch.nn.functional.normalize does.
EPSILON = 1e-12


class LayerLoss(NamedTuple):
    """A ``GkdLoss``, and each own sample's cosine to its label's centre, without the margin [B]."""

    total: Tensor
    ce: Tensor
    primary: Tensor
    binary: Tensor
    label_cosines: Tensor

    @property
    def means(self) -> GkdLoss:
        """The loss and its parts, without what is of single samples."""
        return GkdLoss(*self[:-1])


def grouped_margin_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    targets: GroupTargets | None,
    *,
    margin: Margin,
    scale: float = 64.0,
    temperature: float = 4.0,
    w_binary: float = 1.0,
    w_primary: float = 1.0,
    ramp: float = 1.0,
    impl: Literal["fused", "reference"] = "fused",
    compiled: bool = False,
    ranks: Ranks = ALONE,
    first_class: int = 0,
    sampled: SampledCenters | None = None,
    looked_up: LookedUp | None = None,
) -> LayerLoss:
    """Cross-entropy with a margin plus grouped distillation, from embeddings to the loss.

        z = scale * cosine(embedding, centre), at the label scale * psi(cosine)  (``apply_margin``)
        loss = CE(z, label) + ramp * T^2 * mean(w_binary * Binary + w_primary * Primary)

    embeddings  [B, D] float, un-normalised; half precision is taken up to float32
    centers     [C, D] float, un-normalised, the like
    labels      [B] int64
    targets     the teacher's groups at ``temperature``; None for cross-entropy alone
    impl        "fused" holds a chunk of classes at a time; "reference" holds all logits [B, C]
    compiled    whether a chunk's exponentials go through torch.compile (fused only)
    looked_up   what ``look_up_classes`` made of labels, targets and centres; by default made here

    Computed in float32, in float64 where the embeddings are; under autocast too.

    With several ``ranks`` (fused only) each gives its own part of the batch, B samples of each, and
    of the centres, the C from ``first_class`` on. The loss is that of the whole batch, on every
    rank; the embeddings' gradient is times the number of ranks, by which DistributedDataParallel
    divides the sum.

    With ``sampled`` centres (fused only) these get a gradient and ``centers`` get none: an unbiased
    estimate, see ``gkd.trainer.head.partial_fc``. The loss stays exact.
    """
    if impl == "reference":
        logits = margin_logits(embeddings, centers, labels, margin=margin, scale=scale)
        loss = gkd_loss(
            logits,
            labels,
            targets,
            temperature=temperature,
            w_binary=w_binary,
            w_primary=w_primary,
            ramp=ramp,
        )
        own = F.cosine_similarity(embeddings.detach(), centers.detach().index_select(0, labels))
        return LayerLoss(*loss, label_cosines=own)
    weights = Weights(temperature, ramp * w_binary, ramp * w_primary)
    objective = Objective(margin, scale, weights, targets is not None, compiled)
    if looked_up is None:
        looked_up = look_up_classes(
            labels, targets, centers, ranks=ranks, first_class=first_class, sampled=sampled
        )
    layer = _Layer(ranks, objective, sampled.sample if sampled else None, looked_up)
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(at_least_float32(embeddings), eps=EPSILON)
        everything = centers.to(unit.dtype)
        learning = sampled.centers.to(unit.dtype) if sampled else everything
        total, ce, primary, binary, cosines = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            gather_embeddings(unit, ranks), learning, everything.detach(), layer
        )
    mine = slice(ranks.rank * len(unit), (ranks.rank + 1) * len(unit))
    return LayerLoss(total, ce, primary, binary, cosines[mine])


class Objective(NamedTuple):
    """What is asked of the logits; without ``distil`` cross-entropy alone."""

    margin: Margin
    scale: float
    weights: Weights
    distil: bool
    compiled: bool


class _Layer(NamedTuple):
    """This rank's part of the class layer, and what is asked of it."""

    ranks: Ranks
    objective: Objective
    sample: ClassSample | None
    looked_up: LookedUp


class ClassSums(NamedTuple):
    """What the loss needs of a layer.

    norms          [C]           of the centres
    log_rest       [B] float64   logsumexp of z over the classes that a sample does not pick
    log_soft_rest  [B] float64   the same of z / T
    picked         [E + B]       z at the picks, before the margin
    """

    norms: Tensor
    log_rest: Tensor
    log_soft_rest: Tensor
    picked: Tensor


class PickedTerms(NamedTuple):
    """Loss of each row [B], and its gradient by z.

    At the picks the gradient stands as it is, by the label's cosine before the margin. Anywhere
    else it is exp(z - log_all) + tail * exp(z / T - log_tail).
    """

    ce: Tensor
    primary: Tensor
    binary: Tensor
    log_all: Tensor  # [B] float64
    log_tail: Tensor  # [B] float64
    tail: Tensor  # [B] float64
    at_picks: Tensor  # [E + B]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        learning: Tensor,
        centers: Tensor,
        layer: _Layer,
    ) -> tuple[Tensor, ...]:
        ranks, objective, sample, (labels, targets, picks, _) = layer
        sums = class_sums(unit, centers, picks, objective)
        sums = sums._replace(
            log_rest=ranks.logsumexp(sums.log_rest),
            log_soft_rest=ranks.logsumexp(sums.log_soft_rest),
            picked=ranks.sum(sums.picked),
        )
        terms = picked_terms(sums, labels, targets, objective)
        ctx.save_for_backward(unit, learning)
        ctx.rest = sums.norms if sample is None else sums.norms[sample.rows], terms, layer
        ce, primary, binary = (
            values.mean().to(unit.dtype) for values in (terms.ce, terms.primary, terms.binary)
        )
        weights = objective.weights
        kd = weights.binary * binary + weights.primary * primary
        cosines = sums.picked[len(targets.indices) :] / objective.scale
        ctx.mark_non_differentiable(ce, primary, binary, cosines)
        return ce + weights.temperature**2 * kd, ce, primary, binary, cosines

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        unit, learning = ctx.saved_tensors
        norms, terms, layer = ctx.rest
        picks = layer.looked_up.learning
        factor = grads[0] / len(unit)
        grad_unit, grad_centers = class_gradients(
            unit, learning, picks, norms, terms, layer.objective, factor, layer.sample
        )
        return layer.ranks.sum(grad_unit), grad_centers, None, None


def class_sums(
    unit: Tensor, centers: Tensor, picks: ClassLookup, objective: Objective
) -> ClassSums:
    """Sums of exponentials over a layer, and its logits at the picks.

    unit     [B, D]   normalised embeddings
    centers  [C, D]   not normalised
    """
    plan = _plan(unit, centers, objective)
    sum_up = compiled(Exponentials.log_sums) if objective.compiled else Exponentials.log_sums
    scaled = (unit * (objective.scale / plan.divisor)).T
    norms = torch.empty_like(centers[:, 0])
    picked = unit.new_zeros(len(picks.places))
    chunks = picks.chunks
    sums = unit.new_empty(2, len(chunks), len(unit), dtype=torch.float64)
    buffers = _ChunkBuffers.of(chunks, centers, len(unit))
    for place, (classes, some) in enumerate(chunks):
        norms[classes] = torch.linalg.vector_norm(centers[classes], dim=1).clamp_(min=EPSILON)
        _, logits = buffers.cosines(centers[classes], norms[classes, None], scaled)
        places, flat = picks.within(classes, some), logits.view(-1)
        picked[some] = flat.index_select(0, places)
        flat.index_fill_(0, places, -math.inf)
        sums[0, place], sums[1, place] = sum_up(plan, logits)
    unsorted = torch.empty_like(picked).index_copy_(0, picks.order, picked * plan.divisor)
    log_rest, log_soft_rest = sums.logsumexp(1)
    return ClassSums(norms, log_rest, log_soft_rest, unsorted)


def picked_terms(
    sums: ClassSums, labels: Tensor, targets: GroupTargets, objective: Objective
) -> PickedTerms:
    """The loss of each row, and its gradient wherever that is not dense."""
    entries, temperature = len(targets.indices), objective.weights.temperature
    at_labels, slopes = _label_logits(sums.picked[entries:], objective)
    is_label = targets.indices == spread(labels, targets)
    at_entries = torch.where(is_label, spread(at_labels, targets), sums.picked[:entries])
    # Rows are few: float64 from here on where logits are compared.
    fine_labels, fine_entries = at_labels.double(), at_entries.double()
    others = segment_logsumexp(fine_entries.masked_fill(is_label, -math.inf), targets)
    gap = torch.logaddexp(others, sums.log_rest) - fine_labels
    ce = -F.logsigmoid(-gap)
    log_all = fine_labels + ce

    in_group = torch.zeros(len(labels), device=labels.device)
    in_group = in_group.index_add_(0, targets.rows, is_label.float()) > 0
    soft_label = (fine_labels / temperature).masked_fill(in_group, -math.inf)
    log_tail = torch.logaddexp(sums.log_soft_rest, soft_label)
    terms = group_terms(
        at_entries / temperature, log_tail, torch.ones_like(log_tail), targets, objective.weights
    )
    # T^2 of the loss times 1/T of du/dz.
    tail = temperature * terms.grad_tail.double()
    kd_entries = temperature * terms.grad_entries
    grad_labels = torch.where(in_group, 0.0, tail * torch.exp(soft_label - log_tail))
    grad_labels.index_add_(0, targets.rows, kd_entries.double().masked_fill(~is_label, 0.0))
    # The label's probability less one, without the difference.
    grad_labels = ((grad_labels - torch.sigmoid(gap)) * slopes).to(at_labels.dtype)
    grad_entries = torch.exp(fine_entries - spread(log_all, targets)).to(kd_entries) + kd_entries
    grad_entries = torch.where(is_label, spread(grad_labels, targets), grad_entries)
    return PickedTerms(
        ce,
        terms.primary,
        terms.binary,
        log_all,
        log_tail,
        tail,
        torch.cat([grad_entries, grad_labels]),
    )


def class_gradients(
    unit: Tensor,
    centers: Tensor,
    picks: ClassLookup,
    norms: Tensor,
    terms: PickedTerms,
    objective: Objective,
    factor: Tensor,
    sample: ClassSample | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient by normalised embeddings [B, D] and by centres [C, D], times a number.

    Where the centres are a ``sample``, each drawn one counts as often as it stands for others.
    """
    plan = _plan(unit, centers, objective)
    slope = compiled(Exponentials.gradient) if objective.compiled else Exponentials.gradient
    softened = (unit * (objective.scale / plan.divisor)).T
    scaled = unit * objective.scale
    at_picks = (terms.at_picks * factor).index_select(0, picks.order)
    sums = terms.log_all, terms.log_tail, terms.tail
    dense = plan.coefficients(*sums, factor, unit.dtype)
    drawn = plan.coefficients(*sums, factor * sample.weight, unit.dtype) if sample else dense
    certain = sample.certain if sample else 0
    grad_scaled, grad_centers = torch.zeros_like(unit), torch.empty_like(centers)
    buffers = _ChunkBuffers.of(picks.chunks, centers, len(unit))
    for classes, some in picks.chunks:
        norm = norms[classes, None]
        directions, logits = buffers.cosines(centers[classes], norm, softened)
        grad = slope(plan, logits, drawn if classes.start >= certain else dense)
        grad.view(-1).index_copy_(0, picks.within(classes, some), at_picks[some])
        grad_scaled.addmm_(grad.T, directions)
        # By the centre's direction, less the part along it, which changes the norm alone.
        along = logits.mul_(grad.div_(norm)).sum(1, keepdim=True).mul_(-plan.divisor)
        torch.mul(directions, along, out=grad_centers[classes]).addmm_(grad, scaled)
    return grad_scaled.mul_(objective.scale), grad_centers


class _ChunkBuffers(NamedTuple):
    """Memory of the largest chunk, used again by all.

    Allocated for each anew, between small results that stay, it would not always come free.
    """

    directions: Tensor
    logits: Tensor

    @classmethod
    def of(cls, chunks: Sequence[tuple[slice, slice]], centers: Tensor, batch_size: int) -> Self:
        longest = max(classes.stop - classes.start for classes, _ in chunks)
        shape = longest, centers.shape[1]
        return cls(centers.new_empty(shape), centers.new_empty(longest, batch_size))

    def cosines(self, centers: Tensor, norms: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of a chunk's centres [n, D], and their products with ``scaled`` [D, B]."""
        directions = torch.div(centers, norms, out=self.directions[: len(centers)])
        return directions, torch.mm(directions, scaled, out=self.logits[: len(centers)])


def _plan(unit: Tensor, centers: Tensor, objective: Objective) -> Exponentials:
    return Exponentials.plan(
        terms=len(unit) * len(centers),
        dtype=unit.dtype,
        scale=objective.scale,
        temperature=objective.weights.temperature if objective.distil else None,
    )


def _label_logits(picked: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Labels' z without the margin [B] to z with it, and its slope by z without."""
    with torch.enable_grad():
        cosines = (picked / objective.scale).requires_grad_()
        shifted = apply_margin(cosines, objective.margin)
        (slopes,) = torch.autograd.grad(shifted.sum(), cosines)
    return shifted.detach() * objective.scale, slopes
