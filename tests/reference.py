"""Dense float64 twins of what gkd computes sparsely, for tests."""

from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


# --- the loss (gkd.trainer.head.loss) --------------------------------------------------------


def log_softmax(logits: Array) -> Array:
    """Natural-log softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def relative_entropy(p: Array, log_p: Array, log_q: Array) -> float:
    """sum p (log p - log q), where 0 log 0 = 0."""
    held = p > 0
    return float((p[held] * (log_p[held] - log_q[held])).sum())


@dataclass(frozen=True)
class DenseTerms:
    """One sample's distillation terms, from dense predictions."""

    a: float
    binary: float
    primary: float
    secondary: float
    total: float


def dense_terms(teacher: Array, student: Array, group: npt.NDArray[np.bool_]) -> DenseTerms:
    """Terms of one sample from logits divided by T, float64 [C], and the group [C].

    Masses and the distributions within group and tail come from logsumexps of their own logits.
    """
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    log_mass_p = np.array([log_sum_exp(log_p[group]), log_sum_exp(log_p[~group])])
    log_mass_q = np.array([log_sum_exp(log_q[group]), log_sum_exp(log_q[~group])])

    def within(part: npt.NDArray[np.bool_]) -> float:
        if not part.any():
            return 0.0
        inner_p, inner_q = log_softmax(teacher[part]), log_softmax(student[part])
        return relative_entropy(np.exp(inner_p), inner_p, inner_q)

    return DenseTerms(
        a=float(np.exp(log_mass_p[0])),
        binary=relative_entropy(np.exp(log_mass_p), log_mass_p, log_mass_q),
        primary=within(group),
        secondary=within(~group),
        total=relative_entropy(np.exp(log_p), log_p, log_q),
    )


class LossWeights(TypedDict):
    """Temperature and weights of the grouped loss (see gkd.trainer.head.loss)."""

    temperature: float
    w_binary: float
    w_primary: float
    ramp: float


def dense_gkd_loss(
    student: Array,
    labels: npt.NDArray[np.int64],
    teacher: Array,
    groups: npt.NDArray[np.bool_],
    **weights: Unpack[LossWeights],
) -> float:
    """The grouped loss from dense logits [B, C] and groups [B, C]; no group, no KD."""
    temperature = weights["temperature"]
    total = 0.0
    for z, label, t, group in zip(student, labels, teacher, groups, strict=True):
        total -= log_softmax(z)[label]
        if group.any():
            terms = dense_terms(t / temperature, z / temperature, group)
            kd = weights["w_binary"] * terms.binary + weights["w_primary"] * terms.primary
            total += weights["ramp"] * temperature**2 * kd
    return float(total / len(labels))


def dense_gkd_gradient(
    student: Array,
    labels: npt.NDArray[np.int64],
    teacher: Array,
    groups: npt.NDArray[np.bool_],
    **weights: Unpack[LossWeights],
) -> Array:
    """The gradient of ``dense_gkd_loss`` by the student's logits [B, C], in closed form.

    A test holds it against finite differences of the loss.
    """
    temperature = weights["temperature"]
    gradient = np.exp(log_softmax(student))
    gradient[np.arange(len(labels)), labels] -= 1.0
    for i, group in enumerate(groups):
        if not group.any():
            continue
        t, z = teacher[i] / temperature, student[i] / temperature
        p, q = np.exp(log_softmax(t)), np.exp(log_softmax(z))
        by_u = np.zeros_like(q)
        inner_p, inner_q = np.exp(log_softmax(t[group])), np.exp(log_softmax(z[group]))
        by_u[group] = weights["w_primary"] * (inner_q - inner_p)
        if not group.all():
            # (1-a) - (1-b): the same as b - a, and exact where a and b are nearly 1.
            surplus = p[~group].sum() - q[~group].sum()
            by_u[group] += weights["w_binary"] * surplus * inner_q
            by_u[~group] -= weights["w_binary"] * surplus * np.exp(log_softmax(z[~group]))
        gradient[i] += weights["ramp"] * temperature * by_u
    return gradient / len(labels)


# ---- Partition: primary groups and secondary mass -------------------------------------------


def log_sum_exp(values: npt.NDArray[np.float64]) -> float:
    """Natural log of the sum of exponentials; -inf for no values."""
    if not values.size or values.max() == -np.inf:
        return -np.inf
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def class_order(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Classes by descending logit, at a tie the lower class first."""
    return np.lexsort((np.arange(len(logits)), -np.asarray(logits, np.float64)))


def dense_group(
    logits: npt.NDArray[np.floating],
    label: int,
    *,
    threshold: float,
    group_temperature: float,
    max_group: int,
) -> tuple[npt.NDArray[np.int64], bool]:
    """Primary group of one row by softmax, full sort and cumulative sum; and whether it was cut."""
    scaled = np.asarray(logits, np.float64) / group_temperature
    order = class_order(logits)
    mass = np.exp(scaled[order] - log_sum_exp(scaled)).cumsum()
    if threshold == 0:
        length = 0
    elif threshold == 1:
        length = len(order)
    else:
        length = min(int(np.searchsorted(mass, threshold)) + 1, len(order))
    group = order[:length]
    if label not in group:
        group = np.append(group, label)
    if len(group) <= max_group:
        return group, False
    kept = order[:max_group].copy()
    if label not in kept:
        kept[-1] = label
    return kept, True


def dense_secondary(
    logits: npt.NDArray[np.floating], group: npt.NDArray[np.integer], temperature: float
) -> float:
    """Natural log of the mass outside ``group`` at a temperature."""
    scaled = np.asarray(logits, np.float64) / temperature
    outside = np.ones(len(scaled), np.bool_)
    outside[group] = False
    return log_sum_exp(scaled[outside]) - log_sum_exp(scaled)
