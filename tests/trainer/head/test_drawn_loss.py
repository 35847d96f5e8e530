"""Distillation from drawn classes against the dense float64 twin, by simulation.

Each simulation is one batch of 10,000 rows of the same prediction, each row with its own draws.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.storage.cache.importance import drawn_targets
from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.cache.targets import Draws, SparseTargets, at_temperature, encode_log_probs
from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec, Margin
from gkd.trainer.head.targets import GroupTargets
from tests.reference import (
    Array,
    DenseTerms,
    dense_gkd_gradient,
    dense_terms,
    log_softmax,
)
from tests.trainer.head.problems import dense_margin_logits, loss_at_logits

ROWS, CLASSES, TEMPERATURE = 10_000, 40, 2.0
ALL_CLASSES = np.ones(CLASSES, np.bool_)


class Prediction(NamedTuple):
    """Logits of teacher and student for one image, and the classes drawn from."""

    teacher: Array
    student: Array
    label: int
    drawn_from: npt.NDArray[np.bool_]

    @property
    def log_probs(self) -> Array:
        return log_softmax(self.teacher / TEMPERATURE)

    @property
    def terms(self) -> DenseTerms:
        soft = self.teacher / TEMPERATURE, self.student / TEMPERATURE
        return dense_terms(*soft, self.drawn_from)


def make_prediction(drawn_from: str, *, student_is_teacher: bool = False) -> Prediction:
    rng = np.random.default_rng(2)
    teacher = rng.normal(size=CLASSES) * 3
    group = ALL_CLASSES.copy()
    if drawn_from == "primary":
        group[np.argsort(teacher)[:15]] = False
    student = teacher + rng.normal(size=CLASSES)
    if student_is_teacher:
        student = np.where(group, teacher + 1.5, student)
    return Prediction(teacher, student, int(teacher.argmax()), group)


def simulate(prediction: Prediction, count: int, stored: int, rows: int = ROWS) -> GroupTargets:
    """Targets of rows that each drew ``count`` classes, and stored the ``stored`` largest ones."""
    log_p = prediction.log_probs
    p = np.where(prediction.drawn_from, np.exp(log_p), 0.0)
    draws = np.random.default_rng(10).choice(CLASSES, (rows, count), p=p / p.sum())
    group = np.argsort(-log_p)[: max(stored, 1)]
    outside = np.log(np.delete(np.exp(log_p), group).sum())
    from_all = bool(prediction.drawn_from.all())
    rest = -np.inf if from_all else np.log(np.exp(log_p)[~prediction.drawn_from].sum())
    targets = SparseTargets(
        offsets=np.arange(rows + 1) * len(group),
        indices=np.tile(group, rows).astype(np.uint32),
        log2_probs=np.tile(encode_log_probs(log_p[group]), rows),
        secondary=np.full((rows, 1), outside, np.float32),
        draws=Draws(
            draws.astype(np.uint32),
            encode_log_probs(log_p)[draws],
            None if from_all else np.full(rows, rest, np.float32),
        ),
    )
    exact = at_temperature(
        targets, TEMPERATURE, group_temperature=TEMPERATURE, temperatures=(TEMPERATURE,)
    )
    spec = DrawsSpec(count, TEMPERATURE, "all" if from_all else "primary")
    return GroupTargets.from_batch(drawn_targets(targets, spec, exact if stored else None))


class Estimates(NamedTuple):
    """Mean of both terms, and each row's gradient of their sum by u [rows, C]."""

    primary: float
    binary: float
    gradient: Array


def estimate(prediction: Prediction, targets: GroupTargets) -> Estimates:
    rows = len(targets.log_secondary)
    logits = torch.from_numpy(np.tile(prediction.student, (rows, 1))).requires_grad_()
    labels = torch.full((rows,), prediction.label)
    loss = loss_at_logits(logits, labels, targets, temperature=TEMPERATURE)
    (by_z,) = torch.autograd.grad(loss.total * rows, logits)
    ce = np.exp(log_softmax(prediction.student))
    ce[prediction.label] -= 1
    gradient = (by_z.numpy() - ce) / TEMPERATURE
    return Estimates(loss.primary.item(), loss.binary.item(), gradient)


def exact_gradient(prediction: Prediction) -> Array:
    """Of Primary + Binary by u, in closed form, dense."""
    with_kd, without = (
        dense_gkd_gradient(
            prediction.student[None] / TEMPERATURE,
            np.array([prediction.label]),
            prediction.teacher[None] / TEMPERATURE,
            prediction.drawn_from[None],
            temperature=1.0,
            w_binary=1.0,
            w_primary=1.0,
            ramp=ramp,
        )[0]
        for ramp in (1.0, 0.0)
    )
    return np.asarray(with_kd - without)


@pytest.mark.parametrize("stored", [0, 1, 6])
@pytest.mark.parametrize("count", [1, 4, 64])
def test_full_distillation_has_an_unbiased_gradient(count: int, stored: int) -> None:
    prediction = make_prediction("all")
    estimates = estimate(prediction, simulate(prediction, count, stored))
    distance = estimates.gradient.mean(0) - exact_gradient(prediction)
    error = estimates.gradient.std(0) / math.sqrt(ROWS)
    # The mean of a class that was drawn a few times only is not yet normal.
    often = np.exp(prediction.log_probs) * count * ROWS > 50
    assert often.sum() >= 8
    rounding = 4e-4 * np.exp(prediction.log_probs)  # of the stored probabilities
    assert (np.abs(distance) < 4 * error + rounding)[often].all()
    assert error.max() > 0


@pytest.mark.parametrize("stored", [0, 6])
def test_full_distillation_has_the_value_of_the_full_divergence(stored: int) -> None:
    prediction = make_prediction("all")
    estimates = estimate(prediction, simulate(prediction, 4, stored))
    assert estimates.primary == pytest.approx(prediction.terms.total, rel=0.03)
    assert estimates.binary == 0


def test_stored_entries_reduce_the_variance() -> None:
    prediction = make_prediction("all")
    spreads = [
        estimate(prediction, simulate(prediction, 8, stored)).gradient.var(0).sum()
        for stored in (0, 4, 10)
    ]
    assert spreads[0] > 1.5 * spreads[1] > 2 * spreads[2]


@pytest.mark.parametrize("stored", [0, 4])
def test_grouped_distillation_is_consistent(stored: int) -> None:
    """Bias and variance of terms and gradient fall with the number of draws."""
    prediction, rows = make_prediction("primary"), 2000
    expected, terms = exact_gradient(prediction), prediction.terms
    biases, variances = [], []
    for count in (16, 128, 1024):
        estimates = estimate(prediction, simulate(prediction, count, stored, rows))
        variances.append(estimates.gradient.var(0).sum())
        squared = ((estimates.gradient.mean(0) - expected) ** 2).sum()
        biases.append(math.sqrt(max(squared - variances[-1] / rows, 0.0)))
    print(f"gradient {np.linalg.norm(expected)}, bias {biases}, variance {variances}")
    assert biases[2] < 0.03 * np.linalg.norm(expected)
    assert biases[2] < 0.15 * biases[0]
    assert variances == sorted(variances, reverse=True)
    assert estimates.primary == pytest.approx(terms.primary, rel=0.01)
    assert estimates.binary == pytest.approx(terms.binary, abs=0.005)


def test_the_log_of_the_drawn_sum_is_below_by_half_its_variance() -> None:
    """Primary is a linear part plus log S; that part and S are unbiased, at 64 draws of a group."""
    prediction, count = make_prediction("primary"), 64
    u, p = prediction.student / TEMPERATURE, np.exp(prediction.log_probs)
    group, a = prediction.drawn_from, prediction.terms.a
    exact_linear = (p / a * (np.log(p / a) - u))[group].sum()
    exact_sum = np.exp(u)[group].sum()
    exact_variance = (a * (np.exp(2 * u) / p)[group].sum() - exact_sum**2) / count

    targets = simulate(prediction, count, 0)
    assert targets.log_weights is not None
    rows, classes = targets.rows.numpy(), targets.indices.numpy()
    r = np.exp(targets.log_weights.double().numpy())
    inner = targets.log_probs.double().numpy() - math.log(a)
    linear = np.bincount(rows, r * np.exp(inner) * (inner - u[classes]))
    sums = np.bincount(rows, r * np.exp(u[classes]))
    expected = {
        "linear": (linear, exact_linear),
        "S": (sums, exact_sum),
        "log S": (np.log(sums), math.log(exact_sum) - exact_variance / (2 * exact_sum**2)),
    }
    for name, (values, exact) in expected.items():
        error = values.std() / math.sqrt(ROWS)
        print(f"{name} {exact}, off by {(values.mean() - exact) / error} standard errors")
        assert abs(values.mean() - exact) < 4 * error, name
    short = math.log(exact_sum) - np.log(sums).mean()
    assert short > 2 * np.log(sums).std() / math.sqrt(ROWS)
    print(f"variance of S {sums.var()}, exact {exact_variance}; of log S {np.log(sums).var()}")
    assert sums.var() == pytest.approx(exact_variance, rel=0.1)
    primary = estimate(prediction, targets).primary
    assert primary == pytest.approx((linear + np.log(sums)).mean(), rel=1e-5)


def test_if_the_student_agrees_within_the_group_nothing_depends_on_the_draw() -> None:
    """The weights 1/p make the group's logsumexp exact, whichever classes were drawn."""
    prediction = make_prediction("primary", student_is_teacher=True)
    estimates = estimate(prediction, simulate(prediction, 8, 0))
    terms = prediction.terms
    assert terms.primary == pytest.approx(0.0, abs=1e-12)
    assert estimates.primary == pytest.approx(0.0, abs=1e-6)
    assert estimates.binary == pytest.approx(terms.binary, rel=0.01)
    # The sum of Binary's gradient over the group is deterministic, its distribution is not.
    group = prediction.drawn_from
    totals = estimates.gradient[:, group].sum(1)
    undrawn = -np.exp(log_softmax(prediction.student / TEMPERATURE))[group].sum()
    assert totals.std() < 2e-3 * abs(undrawn)


def test_b_is_clamped_half_way_from_a_to_1() -> None:
    """At 16 draws, against the formula with the clamp applied to each row's b."""
    prediction = make_prediction("primary")
    a = prediction.terms.a
    targets = simulate(prediction, 16, 0)
    assert targets.log_weights is not None
    soft = torch.from_numpy(prediction.student / TEMPERATURE)
    shares = torch.exp(soft.log_softmax(0))[targets.indices] * targets.log_weights.double().exp()
    b = torch.zeros(ROWS, dtype=torch.float64).index_add_(0, targets.rows, shares)
    assert b.mean().item() == pytest.approx(
        1 - np.exp(log_softmax(soft.numpy()))[~prediction.drawn_from].sum(), rel=2e-3
    )  # unbiased before the clamp
    clamped = torch.minimum(b, torch.tensor((1 + a) / 2))
    expected = a * (math.log(a) - clamped.log()) + (1 - a) * (math.log(1 - a) - (1 - clamped).log())
    binary = estimate(prediction, targets).binary
    assert binary == pytest.approx(expected.mean().item(), rel=1e-3)
    share = (b > clamped).double().mean()
    print(f"clamped in {share:.1%}, b {b.mean():.4f} to {clamped.mean():.4f}")


@pytest.mark.parametrize("drawn_from", ["all", "primary"])
@pytest.mark.parametrize("stored", [0, 3])
def test_with_a_margin_it_is_the_loss_of_the_margin_logits(drawn_from: str, stored: int) -> None:
    rng = np.random.default_rng(4)
    targets = simulate(make_prediction(drawn_from), 6, stored, rows=16)
    x, w = (torch.from_numpy(rng.normal(size=(n, 8))).requires_grad_() for n in (16, CLASSES))
    labels = torch.from_numpy(rng.integers(0, CLASSES, 16))
    spec = HeadSpec(margin=Margin(m3=0.2), scale=8.0, temperature=TEMPERATURE)
    logits = dense_margin_logits(x, w, labels, margin=spec.margin, scale=spec.scale)
    results = [
        (*loss, *torch.autograd.grad(loss.total, (x, w)))
        for loss in (
            grouped_margin_loss(x, w, labels, targets, spec).means,
            loss_at_logits(logits, labels, targets, temperature=TEMPERATURE),
        )
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_the_slope_of_the_estimate() -> None:
    for drawn_from in ("all", "primary"):
        prediction = make_prediction(drawn_from)
        targets = simulate(prediction, 5, 2, rows=3)
        logits = torch.from_numpy(np.tile(prediction.student, (3, 1))).requires_grad_()
        labels = torch.tensor([0, 3, prediction.label])
        doubled = GroupTargets(
            **{
                name: value.double() if value.is_floating_point() else value
                for name, value in targets.tensors().items()
            }
        )
        assert torch.autograd.gradcheck(
            lambda z, y=labels, t=doubled: loss_at_logits(z, y, t, temperature=TEMPERATURE).total,
            logits,
            fast_mode=True,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_secondary", [-1e-9, -0.5, -36.0, -40.0, -2000.0, -math.inf, 0.0])
@pytest.mark.parametrize("label_logit", [-60.0, 0.0, 60.0, 600.0])
def test_loss_and_gradient_are_finite_for_any_mass_of_teacher_and_student(
    label_logit: float, log_secondary: float, dtype: torch.dtype
) -> None:
    logits = torch.zeros(1, 6, dtype=dtype)
    logits[0, 0] = label_logit
    logits.requires_grad_()
    targets = GroupTargets(
        offsets=torch.tensor([0, 1]),
        indices=torch.tensor([0]),
        log_probs=torch.log(-torch.expm1(torch.tensor([log_secondary]))).clamp(min=-80.0),
        log_secondary=torch.tensor([log_secondary]),
        log_weights=torch.tensor([0.1]),
    )
    loss = loss_at_logits(logits, torch.tensor([0]), targets, temperature=1.0)
    loss.total.backward()
    assert all(torch.isfinite(value) for value in loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
