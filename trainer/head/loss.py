"""Grouped knowledge distillation from primary groups (Zhao et al., AAAI 2023).

    z   student logits, margin and scale applied             u = z / T,  q = softmax(u)
    P   the teacher's primary group of a sample              a = sum_P p,  b = sum_P q
    Binary  = a log(a/b) + (1-a) log((1-a)/(1-b))
    Primary = sum_P (p/a) log((p/a) / (q/b))
    total   = CE(z, label) + ramp * T^2 * mean(w_binary * Binary + w_primary * Primary)

Everything is computed in the log domain: 1-b is the logsumexp of the tail itself, never 1 minus
something. With d = lse_P(u) - lse_tail(u), log b = logsigmoid(d) and log(1-b) = logsigmoid(-d).
The gradient has a closed form: by u, Binary gives (b-a) q_j/b inside the group and (a-b) q_j/(1-b)
outside, Primary gives q_j/b - p_j/a inside and nothing outside. So the tail's gradient is one
number per row times the student's own exponentials, and no dense target ever exists.

Targets from drawn classes have another loss: see ``gkd.trainer.head.drawn_loss``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.trainer.head.targets import GroupTargets


class GkdLoss(NamedTuple):
    """Means over the batch: ``total`` carries the gradient, its parts are for the log."""

    total: Tensor
    ce: Tensor
    primary: Tensor
    binary: Tensor


class Weights(NamedTuple):
    """The temperature, and the factors of both terms: ``w_binary``, ``w_primary`` times ramp."""

    temperature: float
    binary: float
    primary: float


class GroupTerms(NamedTuple):
    """Both terms of each row, and the gradient of their weighted sum by u.

    binary        [B]  float64
    primary       [B]
    grad_entries  [E]  at the group's entries
    grad_tail     [B]  anywhere else, divided by exp(u - lse_tail)
    """

    binary: Tensor
    primary: Tensor
    grad_entries: Tensor
    grad_tail: Tensor


def group_terms(
    group: Tensor, lse_tail: Tensor, targets: GroupTargets, weights: Weights
) -> GroupTerms:
    """Value and gradient from u at the entries [E] and the tail's logsumexp, float64 [B].

    The logsumexp is -inf if there is no tail. Both are finite for finite logits: for a group of
    one class, of all classes or of none, and for a as near 0 or 1 as ``log_secondary`` can express.
    """
    lse_group = targets.logsumexp(group)
    # Float64 per row is cheap and keeps 1-a and 1-b apart if both are tiny.
    gap = lse_group.double() - lse_tail
    log_rest = targets.log_secondary.double()
    rest = log_rest.exp()
    a = -torch.expm1(log_rest)
    binary = torch.where(a > 0, a * (a.log() - F.logsigmoid(gap)), 0.0)
    binary += torch.where(rest > 0, rest * (log_rest - F.logsigmoid(-gap)), 0.0)
    # Without a group there is no signal; without a tail, Binary is constant.
    split = torch.isfinite(gap)
    binary = torch.where(split, binary, 0.0)
    surplus = torch.where(split, weights.binary * (torch.sigmoid(gap) - a), 0.0)

    log_student = group - targets.spread(lse_group)
    # A group whose mass underflows (the label alone, ranked last) has no inner distribution.
    log_teacher = torch.where(
        targets.spread(a > 0),
        targets.log_probs - targets.spread(a.log().to(group.dtype)),
        log_student,
    )
    student, teacher = log_student.exp(), log_teacher.exp()
    primary = targets.sum(teacher * (log_teacher - log_student))
    grad_entries = (student - teacher).mul_(weights.primary)
    grad_entries.addcmul_(student, targets.spread(surplus.to(group.dtype)))
    return GroupTerms(binary, primary, grad_entries, (-surplus).to(group.dtype))
