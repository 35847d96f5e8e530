"""Small problems for the losses, drawn by hypothesis, and the loss at given logits."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.loss import GkdLoss
from gkd.trainer.head.margin import HeadSpec, Margin
from gkd.trainer.head.targets import GroupTargets
from tests.reference import Array, LossWeights, log_softmax

Problem = dict[str, Any]


def loss_at_logits(
    logits: Tensor,
    labels: Tensor,
    targets: GroupTargets | None,
    *,
    ramp: float = 1.0,
    **weights: float,
) -> GkdLoss:
    """``grouped_margin_loss`` at logits [B, C], differentiable.

    The centres are unit vectors e_j, the embeddings z / scale, completed to length 1 by a
    coordinate of no centre. They move on the sphere, so the gradient by z is the loss's own.
    """
    scale = max(1.0, 2 * float(logits.detach().norm(dim=1).max()))
    cosines = logits / scale
    rest = (1 - cosines.square().sum(1, keepdim=True)).sqrt()
    classes = logits.shape[1]
    spec = HeadSpec(margin=Margin(), scale=scale, **weights)  # type: ignore[arg-type]
    return grouped_margin_loss(
        torch.cat([cosines, rest], 1),
        torch.eye(classes, classes + 1, dtype=logits.dtype),
        labels,
        targets,
        spec,
        ramp=ramp,
    ).means


def plain_gkd_loss(
    logits: Tensor, labels: Tensor, targets: GroupTargets | None, weights: LossWeights
) -> Tensor:
    """The grouped loss from dense logits [B, C], by autograd in their own dtype; no draws."""
    temperature, kd = weights["temperature"], logits.new_zeros(())
    for row, u in enumerate(logits / temperature):
        if targets is None or targets.offsets[row] == targets.offsets[row + 1]:
            continue
        entries = slice(int(targets.offsets[row]), int(targets.offsets[row + 1]))
        in_group = torch.zeros(len(u), dtype=torch.bool).index_fill_(0, targets.indices[entries], 1)
        log_rest = targets.log_secondary[row]
        a = -torch.expm1(log_rest)
        teacher = targets.log_probs[entries] - a.log()
        student = torch.log_softmax(u[targets.indices[entries]], 0)
        kd = kd + weights["w_primary"] * (teacher.exp() * (teacher - student)).sum()
        if not in_group.all():
            gap = u[in_group].logsumexp(0) - u[~in_group].logsumexp(0)
            inside = a * (a.log() - F.logsigmoid(gap))
            outside = log_rest.exp() * (log_rest - F.logsigmoid(-gap))
            kd = kd + weights["w_binary"] * (inside + outside)
    return F.cross_entropy(logits, labels) + weights["ramp"] * temperature**2 * kd / len(labels)


def group_targets(
    teacher: Array,
    groups: npt.NDArray[np.bool_],
    temperature: float,
    dtype: torch.dtype = torch.float32,
) -> GroupTargets:
    """Sparse targets of dense teacher logits [B, C], exact to float32 or to ``dtype``."""
    log_p = log_softmax(teacher / temperature)
    rest = np.where(groups, -np.inf, log_p)
    peak = np.maximum(rest.max(1), -1e300)
    with np.errstate(divide="ignore"):
        log_secondary = peak + np.log(np.exp(rest - peak[:, None]).sum(1))
    # For a small a, 1 - a is more exact than the sum of the tail.
    a = np.where(groups, np.exp(log_p), 0.0).sum(1)
    log_secondary = np.where(a < 0.5, np.log1p(-np.minimum(a, 0.5)), log_secondary)
    indices = np.nonzero(groups)[1]
    return GroupTargets(
        offsets=torch.from_numpy(np.concatenate([[0], groups.sum(1).cumsum()])),
        indices=torch.from_numpy(indices),
        log_probs=torch.from_numpy(log_p[groups]).to(dtype),
        log_secondary=torch.from_numpy(np.where(groups.any(1), log_secondary, 0.0)).to(dtype),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes, rows = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    scale = draw(st.sampled_from([1.0, 16.0, 64.0, 128.0]))
    groups = rng.random((rows, classes)) < rng.random((rows, 1))
    teacher = rng.uniform(-1.4, 1.0, (rows, classes)) * draw(st.sampled_from([1.0, 64.0]))
    for row in range(rows):
        kind = draw(st.sampled_from(["any", "one", "all", "none"]))
        if kind != "any":
            groups[row] = kind == "all"
        if kind != "none":
            groups[row, teacher[row].argmax()] = True
    return {
        "student": rng.uniform(-1.4, 1.0, (rows, classes)) * scale,
        "teacher": teacher,
        "labels": rng.integers(0, classes, rows),
        "groups": groups,
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, 16.0])),
        "w_binary": draw(st.sampled_from([0.0, 1.0, 2.0])),
        "w_primary": draw(st.sampled_from([0.0, 1.0, 8.0])),
        "ramp": draw(st.sampled_from([0.0, 0.3, 1.0])),
    }


def dense_margin_logits(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    *,
    margin: tuple[float, float, float],
    scale: float,
) -> Tensor:
    """Logits [B, C] by autograd: scale * cosine, at the label scale * (psi(m1 theta + m2) - m3).

    Cosines are clamped 1e-6 inside the boundary before the angle, as the head's contract says.
    """
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    cosines = unit @ (centers / centers.norm(dim=1, keepdim=True)).T
    m1, m2, m3 = margin
    rows = torch.arange(len(labels))
    at_label = cosines[rows, labels]
    if (m1, m2) != (1.0, 0.0):
        phi = m1 * torch.acos(at_label.clamp(1e-6 - 1, 1 - 1e-6)) + m2
        turns = torch.floor(phi.detach() / torch.pi)
        at_label = torch.where(turns % 2 == 0, 1.0, -1.0) * torch.cos(phi) - 2 * turns
    onehot = F.one_hot(labels, len(centers)).bool()
    return scale * torch.where(onehot, (at_label - m3)[:, None], cosines)
