"""Margin softmax and grouped distillation from embeddings and centres, without their logits.

The loss is that of ``gkd.trainer.head.loss``, or ``drawn_loss`` for targets from draws, on the
logits scale * cosine with the margin at the label. Classes are processed in chunks, twice, and no
``[B, C]`` tensor ever exists:

1. ``class_sums``: the logits of a chunk; the sparse ones (a sample's entries and its label) are
   extracted, the exponentials of all others summed.
2. ``sparse_terms``: everything that is not dense. The margin, the loss, the gradient at the sparse
   classes, and for each sample the two numbers that multiply all its other exponentials.
3. ``class_gradients``: the logits of a chunk again, their gradient, and its two products.

So there are four matrix products, and three in a layer that keeps its logits. A cosine is bounded,
so the exponentials of scaled cosines are summed without a running maximum if the scale allows it,
and for T = 1, 2 or 4 those of z come from those of z/T by squaring.
"""

import math
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd.trainer.head.class_lookup import BatchLookup, ClassLookup, look_up_classes
from gkd.trainer.head.drawn_loss import drawn_terms
from gkd.trainer.head.exponentials import Exponentials, compiled
from gkd.trainer.head.loss import GkdLoss, Weights, group_terms
from gkd.trainer.head.margin import HeadSpec, apply_margin
from gkd.trainer.head.partial_fc import ClassSample, SampledCenters
from gkd.trainer.head.targets import GroupTargets

# Smaller norms are taken as this, as in torch.nn.functional.normalize.
EPSILON = 1e-12


class LayerLoss(NamedTuple):
    """A ``GkdLoss``, and the cosine of each own sample to its label's centre, no margin [B]."""

    total: Tensor
    ce: Tensor
    primary: Tensor
    binary: Tensor
    label_cosines: Tensor

    @property
    def means(self) -> GkdLoss:
        """The loss and its parts, means over the batch."""
        return GkdLoss(*self[:-1])


def grouped_margin_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    targets: GroupTargets | None,
    spec: HeadSpec,
    *,
    ramp: float = 1.0,
    sampled: SampledCenters | None = None,
    lookup: BatchLookup | None = None,
) -> LayerLoss:
    """Cross-entropy with a margin plus grouped distillation, from embeddings to the loss.

        z = scale * cosine(embedding, centre), at the label scale * psi(cosine)  (``apply_margin``)
        loss = CE(z, label) + ramp * T^2 * mean(w_binary * Binary + w_primary * Primary)

    embeddings  [B, D] float, un-normalised; half precision is converted to float32
    centers     [C, D] float, un-normalised, likewise
    labels      [B] int64
    targets     the teacher's signal at ``spec.temperature``; None for cross-entropy alone
    lookup      the result of ``look_up_classes`` for the same arguments; computed here if None

    Computed in float32, or float64 for float64 embeddings; under autocast too.

    With several ``spec.ranks`` each process passes its own part of the batch, all of the same size
    B, and of the centres, C from ``spec.first_class``. The loss is that of the whole batch, on
    every process; the embeddings' gradient is multiplied by the number of processes, by which
    DistributedDataParallel divides the sum.

    With ``sampled`` centres these get a gradient and ``centers`` get none: an unbiased estimate,
    see ``gkd.trainer.head.partial_fc``. The loss remains exact.
    """
    ranks = spec.ranks
    if lookup is None:
        lookup = look_up_classes(labels, targets, centers, spec, sampled=sampled)
    step = _Step(
        spec,
        Weights(spec.temperature, ramp * spec.w_binary, ramp * spec.w_primary),
        lookup,
        sampled.sample if sampled else None,
    )
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(_at_least_float32(embeddings), eps=EPSILON)
        layer = centers.to(unit.dtype)
        trained = sampled.centers.to(unit.dtype) if sampled else layer
        total, ce, primary, binary, cosines = _FusedLoss.apply(
            ranks.gather_with_gradient(unit), trained, layer.detach(), step
        )
    own = slice(ranks.rank * len(unit), (ranks.rank + 1) * len(unit))
    return LayerLoss(total, ce, primary, binary, cosines[own])


class _Step(NamedTuple):
    """All that a step of the class layer depends on beside embeddings and centres."""

    spec: HeadSpec
    weights: Weights
    lookup: BatchLookup
    sample: ClassSample | None

    def plan(self, unit: Tensor, centers: Tensor) -> Exponentials:
        return Exponentials.plan(
            terms=len(unit) * len(centers),
            dtype=unit.dtype,
            scale=self.spec.scale,
            temperature=self.spec.temperature if self.lookup.distil else None,
        )


class ClassSums(NamedTuple):
    """What the loss needs of a layer.

    norms          [C]           of the centres
    log_rest       [B] float64   logsumexp of z over the classes that are not sparse
    log_soft_rest  [B] float64   the same of z / T
    sparse         [E + B]       z of the sparse classes, before the margin
    """

    norms: Tensor
    log_rest: Tensor
    log_soft_rest: Tensor
    sparse: Tensor


class SparseTerms(NamedTuple):
    """Loss of each row [B], and its gradient by z.

    At the sparse classes the gradient is given, by the label's cosine before the margin. Anywhere
    else it is exp(z - log_all) + tail * exp(z / T - log_tail).
    """

    ce: Tensor
    primary: Tensor
    binary: Tensor
    log_all: Tensor  # [B] float64
    log_tail: Tensor  # [B] float64
    tail: Tensor  # [B] float64
    grad_sparse: Tensor  # [E + B]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, trained: Tensor, centers: Tensor, step: _Step
    ) -> tuple[Tensor, ...]:
        ranks, weights = step.spec.ranks, step.weights
        sums = class_sums(unit, centers, step)
        sums = sums._replace(
            log_rest=ranks.logsumexp(sums.log_rest),
            log_soft_rest=ranks.logsumexp(sums.log_soft_rest),
            sparse=ranks.sum(sums.sparse),
        )
        terms = sparse_terms(sums, step)
        ctx.save_for_backward(unit, trained)
        norms = sums.norms if step.sample is None else sums.norms[step.sample.rows]
        ctx.rest = norms, terms, step
        ce, primary, binary = (
            values.mean().to(unit.dtype) for values in (terms.ce, terms.primary, terms.binary)
        )
        kd = weights.binary * binary + weights.primary * primary
        cosines = sums.sparse[len(step.lookup.targets.indices) :] / step.spec.scale
        ctx.mark_non_differentiable(ce, primary, binary, cosines)
        return ce + weights.temperature**2 * kd, ce, primary, binary, cosines

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        unit, trained = ctx.saved_tensors
        norms, terms, step = ctx.rest
        factor = grads[0] / len(unit)
        grad_unit, grad_centers = class_gradients(unit, trained, norms, terms, step, factor)
        return step.spec.ranks.sum(grad_unit), grad_centers, None, None


def class_sums(unit: Tensor, centers: Tensor, step: _Step) -> ClassSums:
    """Sums of exponentials over a layer, and its logits at the sparse classes.

    unit     [B, D]   normalised embeddings
    centers  [C, D]   not normalised
    """
    lookup, plan = step.lookup.layer, step.plan(unit, centers)
    log_sums = compiled(Exponentials.log_sums) if step.spec.compiled else Exponentials.log_sums
    scaled = (unit * (step.spec.scale / plan.divisor)).T
    norms = torch.empty_like(centers[:, 0])
    sparse = unit.new_zeros(len(lookup.positions))
    sums = unit.new_empty(2, len(lookup.chunks), len(unit), dtype=torch.float64)
    buffers = _ChunkBuffers.allocate(lookup, centers)
    for number, (classes, entries) in enumerate(lookup.chunks):
        norms[classes] = torch.linalg.vector_norm(centers[classes], dim=1).clamp_(min=EPSILON)
        _, logits = buffers.cosines(centers[classes], norms[classes, None], scaled)
        indices, flat = lookup.within(classes, entries), logits.view(-1)
        sparse[entries] = flat.index_select(0, indices)
        flat.index_fill_(0, indices, -math.inf)
        sums[0, number], sums[1, number] = log_sums(plan, logits)
    unsorted = torch.empty_like(sparse).index_copy_(0, lookup.order, sparse * plan.divisor)
    log_rest, log_soft_rest = sums.logsumexp(1)
    return ClassSums(norms, log_rest, log_soft_rest, unsorted)


def sparse_terms(sums: ClassSums, step: _Step) -> SparseTerms:
    """The loss of each row, and its gradient except the dense part."""
    labels, targets, weights = step.lookup.labels, step.lookup.targets, step.weights
    entries, temperature = len(targets.indices), weights.temperature
    at_labels, slopes = _label_logits(sums.sparse[entries:], step.spec)
    is_label = targets.indices == targets.spread(labels)
    at_entries = torch.where(is_label, targets.spread(at_labels), sums.sparse[:entries])
    # Float64 per row is cheap; from here on logits are compared.
    exact_labels, exact_entries = at_labels.double(), at_entries.double()
    others = targets.logsumexp(exact_entries.masked_fill(is_label, -math.inf))
    gap = torch.logaddexp(others, sums.log_rest) - exact_labels
    ce = -F.logsigmoid(-gap)
    log_all = exact_labels + ce

    in_group = torch.zeros(len(labels), device=labels.device)
    in_group = in_group.index_add_(0, targets.rows, is_label.float()) > 0
    soft_label = (exact_labels / temperature).masked_fill(in_group, -math.inf)
    log_tail = torch.logaddexp(sums.log_soft_rest, soft_label)
    kd_terms = group_terms if targets.log_weights is None else drawn_terms
    terms = kd_terms(at_entries / temperature, log_tail, targets, weights)
    # T^2 of the loss times 1/T of du/dz.
    tail = temperature * terms.grad_tail.double()
    kd_entries = temperature * terms.grad_entries
    grad_labels = torch.where(in_group, 0.0, tail * torch.exp(soft_label - log_tail))
    grad_labels.index_add_(0, targets.rows, kd_entries.double().masked_fill(~is_label, 0.0))
    # The label's probability minus one, without cancellation.
    grad_labels = ((grad_labels - torch.sigmoid(gap)) * slopes).to(at_labels.dtype)
    grad_entries = torch.exp(exact_entries - targets.spread(log_all)).to(kd_entries) + kd_entries
    grad_entries = torch.where(is_label, targets.spread(grad_labels), grad_entries)
    return SparseTerms(
        ce,
        terms.primary,
        terms.binary,
        log_all,
        log_tail,
        tail,
        torch.cat([grad_entries, grad_labels]),
    )


def class_gradients(
    unit: Tensor, centers: Tensor, norms: Tensor, terms: SparseTerms, step: _Step, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """``factor`` times the gradient by normalised embeddings [B, D] and by centres [C, D].

    If the centres are a sample, each drawn one counts ``sample.weight`` times.
    """
    lookup, sample, plan = step.lookup.trained, step.sample, step.plan(unit, centers)
    gradient = compiled(Exponentials.gradient) if step.spec.compiled else Exponentials.gradient
    softened = (unit * (step.spec.scale / plan.divisor)).T
    scaled = unit * step.spec.scale
    grad_sparse = (terms.grad_sparse * factor).index_select(0, lookup.order)
    sums = terms.log_all, terms.log_tail, terms.tail
    dense = plan.dense_factors(*sums, factor, unit.dtype)
    drawn = plan.dense_factors(*sums, factor * sample.weight, unit.dtype) if sample else dense
    certain = sample.certain if sample else 0
    grad_scaled, grad_centers = torch.zeros_like(unit), torch.empty_like(centers)
    buffers = _ChunkBuffers.allocate(lookup, centers)
    for classes, entries in lookup.chunks:
        norm = norms[classes, None]
        directions, logits = buffers.cosines(centers[classes], norm, softened)
        grad = gradient(plan, logits, drawn if classes.start >= certain else dense)
        grad.view(-1).index_copy_(0, lookup.within(classes, entries), grad_sparse[entries])
        grad_scaled.addmm_(grad.T, directions)
        # By the centre's direction, minus the component along it, which only changes the norm.
        along = logits.mul_(grad.div_(norm)).sum(1, keepdim=True).mul_(-plan.divisor)
        torch.mul(directions, along, out=grad_centers[classes]).addmm_(grad, scaled)
    return grad_scaled.mul_(step.spec.scale), grad_centers


class _ChunkBuffers(NamedTuple):
    """Memory for the largest chunk, reused by all.

    If each chunk allocated its own, between small results that are kept, memory would fragment.
    """

    directions: Tensor
    logits: Tensor

    @classmethod
    def allocate(cls, lookup: ClassLookup, centers: Tensor) -> Self:
        longest = max(classes.stop - classes.start for classes, _ in lookup.chunks)
        shape = longest, centers.shape[1]
        return cls(centers.new_empty(shape), centers.new_empty(longest, lookup.batch_size))

    def cosines(self, centers: Tensor, norms: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of a chunk's centres [n, D], and their products with ``scaled`` [D, B]."""
        directions = torch.div(centers, norms, out=self.directions[: len(centers)])
        return directions, torch.mm(directions, scaled, out=self.logits[: len(centers)])


def _label_logits(sparse: Tensor, spec: HeadSpec) -> tuple[Tensor, Tensor]:
    """Labels' z without the margin [B] to z with it, and its slope by z without."""
    with torch.enable_grad():
        cosines = (sparse / spec.scale).requires_grad_()
        shifted = apply_margin(cosines, spec.margin)
        (slopes,) = torch.autograd.grad(shifted.sum(), cosines)
    return shifted.detach() * spec.scale, slopes


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
