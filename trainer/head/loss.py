"""Grouped knowledge distillation from primary groups (Zhao et al., AAAI 2023).

    z   student logits, margin and scale applied             u = z / T,  q = softmax(u)
    P   the teacher's primary group of a sample              a = sum_P p,  b = sum_P q
    Binary  = a log(a/b) + (1-a) log((1-a)/(1-b))
    Primary = sum_P (p/a) log((p/a) / (q/b))
    total   = CE(z, label) + ramp * T^2 * mean(w_binary * Binary + w_primary * Primary)

Everything is computed in the log domain: 1-b is the logsumexp of the tail itself, never 1 minus
something. With d = lse_P(u) - lse_tail(u), log b = logsigmoid(d) and log(1-b) = logsigmoid(-d).
The gradient is closed: by u, Binary gives (b-a) q_j/b inside the group and (a-b) q_j/(1-b)
outside, Primary gives q_j/b - p_j/a inside and nothing outside. So the tail's gradient is one
number a row times the student's own exponentials, and no dense target ever exists.

From drawn classes an entry j stands for r_j classes of what was drawn from, G.
storage/cache/importance.py makes r_j such that E[r_j] = 1 for every class of G, so that sums over G
have unbiased estimates, E[sum_j r_j p_j f_j] = sum_G p_j f_j. Entries that are stored and not drawn
have r_j = 1.

All classes (a = 1). KL(p || q) = sum p_j (log p_j - u_j) + lse(u): the student's logsumexp is exact
as ever, the sum is linear in r_j. Value and gradient, q_j - r_j p_j, are unbiased for any number n
of draws; without stored entries r_j p_j = c_j / n, the cross-entropy of the counts.

A primary group. Its mass a is stored exactly. Of its classes only the drawn ones are known, so

    S = sum_j r_j exp(u_j)                      E[S] = sum_G exp(u_j), by weights a c_j / (n p_j)
    Primary = sum_j r_j (p_j/a) (log(p_j/a) - u_j) + log S
    b       = S / sum exp(u)                    the denominator is exact, so E[b] = sum_G q

Primary's first sum is unbiased. log S is short of lse_G(u) by Var(S) / (2 E[S]^2) and what is
smaller, by the second order of the logarithm, and Var(S) falls as 1/n: consistent. So is its
gradient, r_j (exp(u_j) / S - p_j/a). Where the student agrees with the teacher within G,
exp(u_j) = k p_j, S = k sum r_j p_j = k a whatever was drawn (without stored entries: sum r_j p_j
is a for every draw): nothing of Primary, b or Binary is left to chance.

The hold. A drawn b may come near 1 or pass it, where Binary is infinite. So Binary and its slope by
b are taken at min(b, (1 + a) / 2); the slope of b by u stays that of b itself. What is above a is
still pulled down, by a bounded force; below half way from a to 1 nothing changes. The hold binds by
chance: for a = 0.95 and a student's b = 0.94 in 39 % of the samples at 16 draws, where the mean of
the held b is 0.90. All in all the gradient of Binary + Primary, of length 0.18, was then off by
0.052 on average; by 0.017 at 128 draws and 0.004 at 1,024 (tests/trainer/head/test_drawn.py). The
nearer a is to 1 the more it binds: at 64 draws, with students as far from their teachers, the
gradient was off by 14 % of its length for 1-a = 0.05, by 22 % for 0.0025 and by 31 % for 2e-5.
Draws from all classes have no such bias.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd.storage.cache.targets import TargetBatch

# On a CPU rows are worked through in chunks that stay in its caches: elements of a chunk.
CHUNK_ELEMENTS = 1 << 18
# Exponents are held above this: nothing beside the tail's peak, yet no slow subnormal numbers.
FLOOR = -80.0


@dataclass(frozen=True)
class GroupTargets:
    """A ``TargetBatch`` as tensors: the teacher's signal for B samples, E entries in all.

    Entries of sample i stand at ``offsets[i]:offsets[i + 1]``. A sample without entries was
    skipped by the teacher and takes part in the cross-entropy only.

    offsets        int64   [B + 1]
    indices        int64   [E]    classes, unique within a sample
    log_probs      float32 [E]    natural log of p_j(T)
    log_secondary  float32 [B]    natural log of 1-a, -inf for a group that holds all mass
    log_weights    float32 [E]    natural log of r_j; None where every entry stands for itself
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

    @cached_property
    def rows(self) -> Tensor:
        """The sample of each entry, int64 [E]."""
        # With its length said the host does not wait for the device.
        return torch.repeat_interleave(torch.diff(self.offsets), output_size=len(self.indices))

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None}

    def to(self, device: torch.device) -> "GroupTargets":
        """The same on another device; does not wait for copies out of pinned memory."""
        return GroupTargets(
            **{name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        )

    def pin_memory(self) -> "GroupTargets":
        """The same in pinned memory; the name is the data loader's."""
        return GroupTargets(**{name: value.pin_memory() for name, value in self.tensors().items()})


class GkdLoss(NamedTuple):
    """Means over the batch: ``total`` carries the gradient, its parts are for the log."""

    total: Tensor
    ce: Tensor
    primary: Tensor
    binary: Tensor


def gkd_loss(
    logits: Tensor,
    labels: Tensor,
    targets: GroupTargets | None,
    *,
    temperature: float = 4.0,
    w_binary: float = 1.0,
    w_primary: float = 1.0,
    ramp: float = 1.0,
) -> GkdLoss:
    """Cross-entropy plus grouped distillation, the formula of this module.

    logits   [B, C] float, margin and scale applied; computed in float32, or float64 as given
    labels   [B] int64
    targets  the teacher's groups at ``temperature``; None for cross-entropy alone

    The gradient is computed along with the value. Value and gradient are finite for finite
    logits: for a group of one, of all classes or of none, and for a as near 0 or 1 as
    ``log_secondary`` can say.
    """
    weights = Weights(temperature, ramp * w_binary, ramp * w_primary)
    result: tuple[Tensor, ...] = _GroupedLoss.apply(  # type: ignore[no-untyped-call]
        logits, labels, targets, weights
    )
    return GkdLoss(*result)


class Weights(NamedTuple):
    """What weighs the terms; the ramp is in ``binary`` and ``primary`` already."""

    temperature: float
    binary: float
    primary: float


class GroupTerms(NamedTuple):
    """What the groups contribute, per row [B] and per entry [E]."""

    binary: Tensor  # Binary of each row, float64
    primary: Tensor  # Primary of each row
    grad_entries: Tensor  # d(weighted Binary + Primary)/du at the group's entries
    grad_tail: Tensor  # the tail's: this, times exp(u - tail's peak)


class _GroupedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, targets: GroupTargets | None, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = logits.detach()
        values = values if values.dtype == torch.float64 else values.float()
        grad = torch.empty_like(values)
        ce = values.new_empty(len(values))
        binary, primary = values.new_zeros(len(values)), values.new_zeros(len(values))
        for rows in _row_chunks(values):
            ce[rows] = _cross_entropy(values[rows], labels[rows], grad[rows])
            if targets is not None:
                terms = _distil(values[rows], _slice(targets, rows), weights, grad[rows])
                binary[rows], primary[rows] = terms
        ctx.save_for_backward(grad.div_(len(values)))
        ctx.dtype = logits.dtype
        means = ce.mean(), primary.mean(), binary.mean()
        kd = weights.binary * means[2] + weights.primary * means[1]
        ctx.mark_non_differentiable(*means)
        return means[0] + weights.temperature**2 * kd, *means

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(ctx.dtype), None, None, None


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    rows, classes = logits.shape
    step = max(1, CHUNK_ELEMENTS // classes) if logits.device.type == "cpu" else rows
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _slice(targets: GroupTargets, rows: slice) -> GroupTargets:
    if rows == slice(0, len(targets.log_secondary)):
        return targets
    first, last = targets.offsets[rows.start].item(), targets.offsets[rows.stop].item()
    entries = slice(int(first), int(last))
    return GroupTargets(
        offsets=targets.offsets[rows.start : rows.stop + 1] - first,
        indices=targets.indices[entries],
        log_probs=targets.log_probs[entries],
        log_secondary=targets.log_secondary[rows],
        log_weights=None if targets.log_weights is None else targets.log_weights[entries],
    )


def _cross_entropy(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """Cross-entropy of each row [B]; writes its gradient softmax - onehot to ``grad`` [B, C]."""
    torch.softmax(logits, 1, out=grad)
    # The largest probability is at least 1/C, so its log is safe; any other may be zero.
    lse = logits.amax(1) - grad.amax(1).log()
    rows = torch.arange(len(labels), device=labels.device)
    grad[rows, labels] -= 1.0
    return lse - logits[rows, labels]


def _distil(
    logits: Tensor, targets: GroupTargets, weights: Weights, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary and Primary of each row [B]; adds their gradient by z, weighted, to ``grad``."""
    temperature = weights.temperature
    entries = targets.rows * logits.shape[1] + targets.indices
    group = logits.reshape(-1).index_select(0, entries) / temperature
    tail = logits / temperature
    tail.view(-1).index_fill_(0, entries, -math.inf)
    tail_peak = tail.amax(1)
    # A group of all classes leaves a peak of -inf, which must not be subtracted from itself.
    shift = tail_peak.clamp(min=torch.finfo(tail.dtype).min)
    tail_sum = tail.sub_(shift[:, None]).clamp_(min=FLOOR).exp_().sum(1)
    terms = group_terms(group, tail_peak, tail_sum, targets, weights)
    # T^2 of the loss times 1/T of du/dz.
    grad.addcmul_(tail, terms.grad_tail[:, None], value=temperature)
    grad.view(-1).index_add_(0, entries, terms.grad_entries, alpha=temperature)
    return terms.binary, terms.primary


def group_terms(
    group: Tensor, tail_peak: Tensor, tail_sum: Tensor, targets: GroupTargets, weights: Weights
) -> GroupTerms:
    """Loss and gradient from u at the entries [E] and the tail's logsumexp [B].

    The latter is ``tail_peak + log(tail_sum)``, -inf for no tail.
    """
    if targets.log_weights is not None:
        lse_tail = tail_peak.double() + tail_sum.double().log()
        terms = _drawn_terms(group, targets.log_weights, lse_tail, targets, weights)
        return terms._replace(grad_tail=terms.grad_tail / tail_sum)
    lse_group = segment_logsumexp(group, targets)
    # Rows are few: float64 keeps 1-a and 1-b apart where both are tiny.
    gap = lse_group.double() - (tail_peak.double() + tail_sum.double().log())
    log_rest = targets.log_secondary.double()
    rest = log_rest.exp()
    a = -torch.expm1(log_rest)
    binary = torch.where(a > 0, a * (a.log() - F.logsigmoid(gap)), 0.0)
    binary += torch.where(rest > 0, rest * (log_rest - F.logsigmoid(-gap)), 0.0)
    # Without a group nothing is taught; without a tail, Binary is constant.
    split = torch.isfinite(gap)
    binary = torch.where(split, binary, 0.0)
    surplus = torch.where(split, weights.binary * (torch.sigmoid(gap) - a), 0.0)

    log_student = group - spread(lse_group, targets)
    # A group whose mass is below any float (the label alone, ranked last) has no inner shape.
    log_teacher = torch.where(
        spread(a > 0, targets),
        targets.log_probs - spread(a.log().to(group.dtype), targets),
        log_student,
    )
    student, teacher = log_student.exp(), log_teacher.exp()
    primary = _segment_reduce(teacher * (log_teacher - log_student), targets, "sum")
    grad_entries = (student - teacher).mul_(weights.primary)
    grad_entries.addcmul_(student, spread(surplus.to(group.dtype), targets))
    return GroupTerms(binary, primary, grad_entries, (-surplus / tail_sum).to(group.dtype))


def _drawn_terms(
    group: Tensor, log_weights: Tensor, lse_tail: Tensor, targets: GroupTargets, weights: Weights
) -> GroupTerms:
    """The same where entries stand for r_j classes each; ``grad_tail`` by exp(u - lse_tail)."""
    lse_all = torch.logaddexp(segment_logsumexp(group, targets).double(), lse_tail)
    lse_drawn = segment_logsumexp(group + log_weights, targets).double()
    log_rest = targets.log_secondary.double()
    a, b = -torch.expm1(log_rest), torch.exp(lse_drawn - lse_all)
    taught = (torch.diff(targets.offsets) > 0) & (a > 0)
    whole = taught & (log_rest == -math.inf)
    part = taught & ~whole
    # b held at (1 + a) / 2, said of 1-b and 1-a, which float64 keeps apart where a and b do not.
    log_outside = torch.maximum(torch.log1p(-b.clamp(max=1)), log_rest - math.log(2))
    held = -torch.expm1(log_outside)
    binary = a * (a.log() - held.log()) + log_rest.exp() * (log_rest - log_outside)
    pull = torch.where(part, weights.binary * torch.expm1(log_rest - log_outside) / held, 0.0)

    def each(values: Tensor) -> Tensor:
        return spread(values.to(group.dtype), targets)

    log_inside = targets.log_probs - each(torch.where(taught, a.log(), 0.0))
    log_odds = log_inside - group
    teacher = torch.exp(log_inside + log_weights).mul_(each(taught.double()))
    lse = torch.where(whole, lse_all, lse_drawn)
    primary = _segment_reduce(teacher * log_odds, targets, "sum").double() + lse
    dense = torch.where(whole, weights.primary, -pull * b)
    softmax = torch.exp(group - each(lse_all))
    # In G the student's own softmax; where G is everything, it is dense.
    inner = torch.exp(group + log_weights - each(lse_drawn)).mul_(each(part.double()))
    grad_entries = weights.primary * (inner - teacher)
    grad_entries += softmax * (each(dense) + each(pull) * log_weights.exp())
    return GroupTerms(
        torch.where(part, binary, 0.0),
        torch.where(taught, primary, 0.0).to(group.dtype),
        grad_entries,
        (dense * torch.exp(lse_tail - lse_all)).to(group.dtype),
    )


def segment_logsumexp(values: Tensor, targets: GroupTargets) -> Tensor:
    """Logsumexp of each sample's entries: [E] to [B]; -inf for no entries."""
    peak = _segment_reduce(values, targets, "max")
    total = _segment_reduce((values - spread(peak, targets)).exp_(), targets, "sum")
    return torch.where(total > 0, peak + total.log(), -math.inf)


def _segment_reduce(values: Tensor, targets: GroupTargets, how: str) -> Tensor:
    # Deterministic on every device, which scattered sums are not. `unsafe` skips a check of
    # the offsets that would make the host wait for the device.
    return torch.segment_reduce(values, how, offsets=targets.offsets, unsafe=True)


def spread(values: Tensor, targets: GroupTargets) -> Tensor:
    """A value of each sample to each of its entries: [B] to [E]."""
    return values.index_select(0, targets.rows)
