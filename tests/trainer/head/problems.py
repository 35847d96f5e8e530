"""Small problems for the losses, drawn by hypothesis."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from gkd.trainer.head.loss import GroupTargets
from tests.reference import Array, log_softmax

Problem = dict[str, Any]


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
    # Near zero the sum of the tail has lost what the group's own mass still says.
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
