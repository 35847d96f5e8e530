"""The loss on drawn classes: unbiased or consistent estimates of ``gkd.trainer.head.loss``.

An entry j stands for r_j classes of G, the set that was drawn from.
storage/cache/importance.py makes r_j such that E[r_j] = 1 for every class of G, so that sums over G
have unbiased estimates, E[sum_j r_j p_j f_j] = sum_G p_j f_j. Entries that are stored and not drawn
have r_j = 1.

All classes (a = 1). KL(p || q) = sum p_j (log p_j - u_j) + lse(u): the student's logsumexp is
exact, and the sum is linear in r_j. Value and gradient, q_j - r_j p_j, are unbiased for any number
n of draws; without stored entries r_j p_j = c_j / n, the cross-entropy of the counts.

A primary group. Its mass a is stored exactly. Of its classes only the drawn ones are known, so

    S = sum_j r_j exp(u_j)                      E[S] = sum_G exp(u_j), by weights a c_j / (n p_j)
    Primary = sum_j r_j (p_j/a) (log(p_j/a) - u_j) + log S
    b       = S / sum exp(u)                    the denominator is exact, so E[b] = sum_G q

Primary's first sum is unbiased. The expectation of log S is below lse_G(u) by
Var(S) / (2 E[S]^2) and smaller terms (second order of the logarithm), and Var(S) falls as 1/n:
consistent. So is its gradient, r_j (exp(u_j) / S - p_j/a). If the student agrees with the teacher
within G, exp(u_j) = k p_j, then S = k sum r_j p_j = k a for any draw (without stored entries:
sum r_j p_j is a for every draw), and Primary, b and Binary do not depend on the draw.

The clamp. A drawn b may approach 1 or exceed it, where Binary is infinite. So Binary and its slope
by b are evaluated at min(b, (1 + a) / 2); the slope of b by u remains that of b itself. A b above a
is still pulled down, by a bounded force; below half way from a to 1 nothing changes. Whether the
clamp acts is random: for a = 0.95 and a student's b = 0.94 it acts in 39 % of the samples at 16
draws, and the mean of the clamped b is 0.90. The gradient of Binary + Primary, of length 0.18, was
then off by 0.052 on average; by 0.017 at 128 draws and 0.004 at 1,024
(tests/trainer/head/test_drawn_loss.py). It acts more often the nearer a is to 1: at 64 draws, with
students as far from their teachers, the gradient was off by 14 % of its length for 1-a = 0.05, by
22 % for 0.0025 and by 31 % for 2e-5. Draws from all classes have no such bias.
"""

import math

import torch
from torch import Tensor

from gkd.trainer.head.loss import GroupTerms, Weights
from gkd.trainer.head.targets import GroupTargets


def drawn_terms(
    group: Tensor, lse_tail: Tensor, targets: GroupTargets, weights: Weights
) -> GroupTerms:
    """What ``group_terms`` computes, for targets with ``log_weights``; same arguments."""
    assert targets.log_weights is not None
    log_weights = targets.log_weights
    lse_all = torch.logaddexp(targets.logsumexp(group).double(), lse_tail)
    lse_drawn = targets.logsumexp(group + log_weights).double()
    log_rest = targets.log_secondary.double()
    a, b = -torch.expm1(log_rest), torch.exp(lse_drawn - lse_all)
    has_signal = (torch.diff(targets.offsets) > 0) & (a > 0)
    from_all = has_signal & (log_rest == -math.inf)
    from_group = has_signal & ~from_all
    # b clamped at (1 + a) / 2, expressed by 1-b and 1-a, which stay apart if a and b round to 1.
    log_outside = torch.maximum(torch.log1p(-b.clamp(max=1)), log_rest - math.log(2))
    clamped = -torch.expm1(log_outside)
    binary = a * (a.log() - clamped.log()) + log_rest.exp() * (log_rest - log_outside)
    slope = weights.binary * torch.expm1(log_rest - log_outside) / clamped
    pull = torch.where(from_group, slope, 0.0)

    def spread(values: Tensor) -> Tensor:
        return targets.spread(values.to(group.dtype))

    log_inside = targets.log_probs - spread(torch.where(has_signal, a.log(), 0.0))
    log_odds = log_inside - group
    teacher = torch.exp(log_inside + log_weights).mul_(spread(has_signal.double()))
    lse = torch.where(from_all, lse_all, lse_drawn)
    primary = targets.sum(teacher * log_odds).double() + lse
    dense = torch.where(from_all, weights.primary, -pull * b)
    softmax = torch.exp(group - spread(lse_all))
    # The student's softmax within G; if G is all classes, it is part of the dense gradient.
    inner = torch.exp(group + log_weights - spread(lse_drawn)).mul_(spread(from_group.double()))
    grad_entries = weights.primary * (inner - teacher)
    grad_entries += softmax * (spread(dense) + spread(pull) * log_weights.exp())
    return GroupTerms(
        torch.where(from_group, binary, 0.0),
        torch.where(has_signal, primary, 0.0).to(group.dtype),
        grad_entries,
        (dense * torch.exp(lse_tail - lse_all)).to(group.dtype),
    )
