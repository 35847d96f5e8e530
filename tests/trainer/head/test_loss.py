"""The grouped loss and its gradient by the logits against the dense float64 twin."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from gkd.trainer.head.targets import GroupTargets
from tests.reference import (
    Array,
    dense_gkd_gradient,
    dense_gkd_loss,
    dense_terms,
)
from tests.trainer.head.problems import Problem, group_targets, loss_at_logits, problems


def evaluate(problem: Problem) -> tuple[float, Array]:
    logits = torch.from_numpy(problem["student"]).requires_grad_()
    targets = group_targets(problem["teacher"], problem["groups"], problem["temperature"])
    weights = {k: problem[k] for k in ("temperature", "w_binary", "w_primary", "ramp")}
    loss = loss_at_logits(logits, torch.from_numpy(problem["labels"]), targets, **weights)
    loss.total.backward()
    assert logits.grad is not None
    return loss.total.item(), logits.grad.numpy()


@given(problems())
def test_loss_and_gradient_match_the_twin(problem: Problem) -> None:
    """The targets are float32, which bounds the error."""
    loss, gradient = evaluate(problem)
    strength = problem["temperature"] ** 2 * 9 + 1
    assert loss == pytest.approx(dense_gkd_loss(**problem), rel=2e-6, abs=2e-6 * strength)
    np.testing.assert_allclose(
        gradient, dense_gkd_gradient(**problem), rtol=2e-5, atol=2e-6 * strength
    )


@given(problems())
def test_the_gradient_of_the_twin_is_the_slope_of_its_loss(problem: Problem) -> None:
    student = np.asarray(problem["student"])
    step = 1e-5
    slope = np.empty_like(student)
    for at in np.ndindex(student.shape):
        sides = []
        for sign in (1, -1):
            moved = student.copy()
            moved[at] += sign * step
            beside: dict[str, Any] = {**problem, "student": moved}
            sides.append(dense_gkd_loss(**beside))
        slope[at] = (sides[0] - sides[1]) / (2 * step)
    gradient = dense_gkd_gradient(**problem)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5)


@given(problems())
def test_the_terms_add_up_to_the_full_divergence(problem: Problem) -> None:
    """KL(p||q) = Binary + a Primary + (1-a) Secondary."""
    teacher, student = np.asarray(problem["teacher"]), np.asarray(problem["student"])
    for t, s, group in zip(teacher, student, np.asarray(problem["groups"]), strict=True):
        terms = dense_terms(t, s, group)
        total = terms.binary + terms.a * terms.primary + (1 - terms.a) * terms.secondary
        assert total == pytest.approx(terms.total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rest", [1e-9, 1 - 1e-9], ids=["a=1-1e-9", "a=1e-9"])
@pytest.mark.parametrize("student_rest", [1e-9, 0.5, 1 - 1e-9])
def test_extreme_masses(rest: float, student_rest: float) -> None:
    def logits(outside: float) -> Array:
        inside = -np.expm1(np.log(outside))
        return np.asarray(np.log([[inside * 0.7, inside * 0.3, outside * 0.4, outside * 0.6]]))

    problem: Problem = {
        "student": logits(student_rest),
        "teacher": logits(rest),
        "labels": np.array([0]),
        "groups": np.array([[True, True, False, False]]),
        "temperature": 1.0,
        "w_binary": 1.0,
        "w_primary": 1.0,
        "ramp": 1.0,
    }
    loss, gradient = evaluate(problem)
    assert loss == pytest.approx(dense_gkd_loss(**problem), rel=1e-6)
    expected = dense_gkd_gradient(**problem)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def random_case(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, GroupTargets]:
    rng = np.random.default_rng(7)
    groups = rng.random((rows, classes)) < 0.2
    targets = group_targets(rng.normal(size=(rows, classes)) * 8, groups, 4.0)
    logits = torch.from_numpy(rng.normal(size=(rows, classes)) * 16).requires_grad_()
    return logits, torch.from_numpy(rng.integers(0, classes, rows)), targets


def test_a_skipped_sample_contributes_to_the_cross_entropy_only() -> None:
    logits, labels, targets = random_case(2, 20)
    first = int(targets.offsets[1])
    skipped = replace(
        targets,
        offsets=torch.tensor([0, first, first]),
        indices=targets.indices[:first],
        log_probs=targets.log_probs[:first],
        log_secondary=torch.tensor([float(targets.log_secondary[0]), 0.0]),
    )
    (gradient,) = torch.autograd.grad(loss_at_logits(logits, labels, skipped).total, logits)
    (plain,) = torch.autograd.grad(loss_at_logits(logits, labels, None).total, logits)
    torch.testing.assert_close(gradient[1], plain[1])
    assert not torch.allclose(gradient[0], plain[0])


@pytest.mark.parametrize("log_prob", [-400.0, -np.inf])
def test_a_group_without_mass_has_a_finite_loss_that_lowers_it(log_prob: float) -> None:
    """The label alone, ranked last: its mass is zero in float32, so Primary is 0."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = GroupTargets(
        offsets=torch.tensor([0, 1]),
        indices=torch.tensor([0]),
        log_probs=torch.tensor([log_prob]),
        log_secondary=torch.tensor([0.0]),
    )
    loss = loss_at_logits(logits, torch.tensor([0]), targets, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss.total, logits)
    q = torch.softmax(logits.detach()[0], 0)
    assert loss.primary.item() == 0.0
    assert loss.binary.item() == pytest.approx(-torch.log1p(-q[0]).item(), rel=1e-6)
    expected = (
        q
        - torch.tensor([1.0, 0.0, 0.0])
        + torch.stack([q[0], -q[0] * q[1] / (q[1] + q[2]), -q[0] * q[2] / (q[1] + q[2])])
    )
    torch.testing.assert_close(gradient[0], expected)


def test_all_tensors_of_targets_move_to_a_device() -> None:
    _, _, targets = random_case(3, 20)
    moved = targets.to(torch.device("meta"))
    assert {value.device.type for value in moved.tensors().values()} == {"meta"}
