"""The loss and its gradient against the dense float64 twin."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from gkd.trainer.head.loss import GroupTargets, gkd_loss
from tests.reference import (
    Array,
    dense_gkd_gradient,
    dense_gkd_loss,
    dense_terms,
)
from tests.trainer.head.problems import Problem, group_targets, problems


def evaluate(problem: Problem, dtype: torch.dtype) -> tuple[float, Array]:
    logits = torch.from_numpy(problem["student"]).to(dtype).requires_grad_()
    targets = group_targets(problem["teacher"], problem["groups"], problem["temperature"])
    weights = {k: problem[k] for k in ("temperature", "w_binary", "w_primary", "ramp")}
    loss = gkd_loss(logits, torch.from_numpy(problem["labels"]), targets, **weights)
    loss.total.backward()
    assert logits.grad is not None
    return loss.total.item(), logits.grad.double().numpy()


@given(problems())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 2e-6)], ids=["f32", "f64"]
)
def test_loss_and_gradient_are_the_twins(
    dtype: torch.dtype, tolerance: float, problem: Problem
) -> None:
    """The targets are float32, which bounds the error in float64 as well."""
    loss, gradient = evaluate(problem, dtype)
    expected = dense_gkd_loss(**problem)
    strength = problem["temperature"] ** 2 * 9 + 1
    assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance * strength)
    np.testing.assert_allclose(
        gradient,
        dense_gkd_gradient(**problem),
        rtol=tolerance * 10,
        atol=tolerance * strength,
    )


@given(problems())
def test_twins_gradient_is_the_slope_of_its_loss(problem: Problem) -> None:
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
def test_terms_add_up_to_the_whole_divergence(problem: Problem) -> None:
    """KL(p||q) = Binary + a Primary + (1-a) Secondary."""
    teacher, student = np.asarray(problem["teacher"]), np.asarray(problem["student"])
    for t, s, group in zip(teacher, student, np.asarray(problem["groups"]), strict=True):
        terms = dense_terms(t, s, group)
        total = terms.binary + terms.a * terms.primary + (1 - terms.a) * terms.secondary
        assert total == pytest.approx(terms.whole, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rest", [1e-9, 1 - 1e-9], ids=["a=1-1e-9", "a=1e-9"])
@pytest.mark.parametrize("student_rest", [1e-9, 0.5, 1 - 1e-9])
def test_masses_at_the_very_edge(rest: float, student_rest: float) -> None:
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
    loss, gradient = evaluate(problem, torch.float64)
    assert loss == pytest.approx(dense_gkd_loss(**problem), rel=1e-6)
    expected = dense_gkd_gradient(**problem)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def random_case(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, GroupTargets]:
    rng = np.random.default_rng(7)
    groups = rng.random((rows, classes)) < 0.2
    targets = group_targets(rng.normal(size=(rows, classes)) * 8, groups, 4.0)
    logits = torch.from_numpy(rng.normal(size=(rows, classes)) * 16).float().requires_grad_()
    return logits, torch.from_numpy(rng.integers(0, classes, rows)), targets


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, targets = random_case(10, 50)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for elements in (50, 149, 1 << 20):
        monkeypatch.setattr("gkd.trainer.head.loss.CHUNK_ELEMENTS", elements)
        logits.grad = None
        loss = gkd_loss(logits, labels, targets)
        loss.total.backward()
        assert logits.grad is not None
        results.append((torch.stack(loss).detach(), logits.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-7)


def test_without_targets_it_is_cross_entropy() -> None:
    logits, labels, _ = random_case(10, 50)
    loss = gkd_loss(logits, labels, None)
    (gradient,) = torch.autograd.grad(loss.total, logits)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert (loss.primary.item(), loss.binary.item()) == (0.0, 0.0)


def test_parts_make_the_total_and_carry_no_gradient() -> None:
    logits, labels, targets = random_case(10, 50)
    loss = gkd_loss(logits, labels, targets, temperature=4.0, w_binary=2.0, w_primary=8.0, ramp=0.5)
    parts = loss.ce + 0.5 * 16 * (2.0 * loss.binary + 8.0 * loss.primary)
    torch.testing.assert_close(loss.total.detach(), parts)
    assert [part.requires_grad for part in loss] == [True, False, False, False]


def test_gradient_scales_with_what_comes_from_above_and_keeps_the_dtype() -> None:
    logits, labels, targets = random_case(4, 20)
    (once,) = torch.autograd.grad(gkd_loss(logits, labels, targets).total, logits)
    (scaled,) = torch.autograd.grad(gkd_loss(logits, labels, targets).total * 1024, logits)
    torch.testing.assert_close(scaled, once * 1024)
    half = logits.detach().bfloat16().requires_grad_()
    gkd_loss(half, labels, targets).total.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_a_skipped_sample_takes_part_in_the_cross_entropy_only() -> None:
    logits, labels, targets = random_case(2, 20)
    first = int(targets.offsets[1])
    skipped = replace(
        targets,
        offsets=torch.tensor([0, first, first]),
        indices=targets.indices[:first],
        log_probs=targets.log_probs[:first],
        log_secondary=torch.tensor([float(targets.log_secondary[0]), 0.0]),
    )
    (gradient,) = torch.autograd.grad(gkd_loss(logits, labels, skipped).total, logits)
    (plain,) = torch.autograd.grad(gkd_loss(logits, labels, None).total, logits)
    torch.testing.assert_close(gradient[1], plain[1])
    assert not torch.allclose(gradient[0], plain[0])


@pytest.mark.parametrize("log_prob", [-400.0, -np.inf])
def test_a_group_without_any_mass_is_pushed_down_and_finite(log_prob: float) -> None:
    """The label alone, ranked last: its mass is zero in float32, and no shape is left in it."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    targets = GroupTargets(
        offsets=torch.tensor([0, 1]),
        indices=torch.tensor([0]),
        log_probs=torch.tensor([log_prob]),
        log_secondary=torch.tensor([0.0]),
    )
    loss = gkd_loss(logits, torch.tensor([0]), targets, temperature=1.0)
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


def test_targets_move_with_everything_they_hold() -> None:
    _, _, targets = random_case(3, 20)
    moved = targets.to(torch.device("meta"))
    assert {value.device.type for value in moved.tensors().values()} == {"meta"}
