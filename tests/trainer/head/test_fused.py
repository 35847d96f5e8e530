"""The chunked class layer against the dense float64 twin, and against a plain dense layer."""

import shutil
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd.trainer.head.fused import LayerLoss, grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec, Margin
from tests.reference import (
    LossWeights,
    dense_gkd_gradient,
    dense_gkd_loss,
    log_sum_exp,
)
from tests.trainer.head.problems import (
    Problem,
    dense_margin_logits,
    group_targets,
    plain_gkd_loss,
)

COSFACE, ARCFACE = Margin(m3=0.4), Margin(m2=0.5)
MARGINS = [COSFACE, ARCFACE, Margin(0.9, 0.4, 0.15), Margin(), Margin(m1=4.0)]
# A group's logits this far above or below the tail's: a = 1 - 1e-9 or 1e-9.
EDGE = float(np.log(1e9))


class Result(NamedTuple):
    loss: float
    by_embeddings: Tensor
    by_centers: Tensor


def random_problem(seed: int, rows: int, classes: int, dim: int, **settings: Any) -> Problem:
    rng = np.random.default_rng(seed)
    groups = rng.random((rows, classes)) < 0.2
    groups[:, 0] = True
    return {
        "embeddings": rng.normal(size=(rows, dim)) * 3,
        "centers": rng.normal(size=(classes, dim)) * 0.1,
        "labels": rng.integers(0, classes, rows),
        "teacher": rng.uniform(-1.4, 1.0, (rows, classes)) * 8,
        "groups": groups,
        "margin": COSFACE,
        "scale": 64.0,
        "temperature": 4.0,
        "w_binary": 1.0,
        "w_primary": 1.0,
        "ramp": 1.0,
        "chunk": 1024,
        **settings,
    }


def to_the_edge(problem: Problem, row: int, gap: float) -> None:
    """Move the teacher's group so that its log odds against the tail are ``gap``."""
    group, temperature = problem["groups"][row], problem["temperature"]
    soft = problem["teacher"][row] / temperature
    if group.any() and not group.all():
        now = log_sum_exp(soft[group]) - log_sum_exp(soft[~group])
        problem["teacher"][row, group] += (gap - now) * temperature


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, classes = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    temperatures = st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 16.0]) | st.floats(0.5, 16.0)
    problem = random_problem(
        draw(st.integers(0, 2**32)),
        rows,
        classes,
        draw(st.integers(1, 6)),
        margin=draw(st.sampled_from(MARGINS)),
        scale=draw(st.sampled_from([1.0, 64.0, 128.0]) | st.floats(1.0, 128.0)),
        temperature=draw(temperatures),
        w_binary=draw(st.sampled_from([0.0, 1.0, 2.0])),
        w_primary=draw(st.sampled_from([0.0, 1.0, 8.0])),
        ramp=draw(st.sampled_from([0.0, 0.3, 1.0])),
        chunk=draw(st.sampled_from([1, 3, 1024])),
    )
    if draw(st.booleans()):
        problem["labels"][:] = draw(st.integers(0, classes - 1))
    for row, label in enumerate(problem["labels"]):
        kind = draw(st.sampled_from(["any", "label", "one", "all", "none"]))
        if kind in ("one", "all", "none"):
            problem["groups"][row] = kind == "all"
        if kind in ("label", "one"):
            problem["groups"][row, label] = True
        gap = draw(st.sampled_from([None, EDGE, -EDGE]))
        if gap is not None:
            to_the_edge(problem, row, gap)
        side = draw(st.sampled_from([0, 0, 1, -1]))
        if side:  # the angular boundary: the embedding on its centre, or opposite
            problem["embeddings"][row] = side * 7 * problem["centers"][label]
    return problem


def weights_of(problem: Problem) -> LossWeights:
    return {
        "temperature": problem["temperature"],
        "w_binary": problem["w_binary"],
        "w_primary": problem["w_primary"],
        "ramp": problem["ramp"],
    }


def leaves(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    embeddings, centers = (
        torch.from_numpy(problem[k]).to(dtype) for k in ("embeddings", "centers")
    )
    return embeddings.requires_grad_(), centers.requires_grad_()


def loss_of(
    problem: Problem,
    embeddings: Tensor,
    centers: Tensor,
    *,
    kd: bool = True,
    compiled: bool = False,
) -> LayerLoss:
    """The loss of a problem, in chunks of ``problem["chunk"]`` classes."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    targets = group_targets(problem["teacher"], problem["groups"], problem["temperature"], dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd.trainer.head.class_lookup.CHUNK_CLASSES", problem["chunk"])
        names = "margin", "scale", "temperature", "w_binary", "w_primary"
        return grouped_margin_loss(
            embeddings,
            centers,
            torch.from_numpy(problem["labels"]).to(embeddings.device),
            targets.to(embeddings.device) if kd else None,
            HeadSpec(**{name: problem[name] for name in names}, compiled=compiled),
            ramp=problem["ramp"],
        )


def plain_loss_of(problem: Problem, embeddings: Tensor, centers: Tensor, *, kd: bool) -> Tensor:
    """The same from dense logits by autograd, in the dtype of the leaves."""
    labels = torch.from_numpy(problem["labels"])
    logits = dense_margin_logits(
        embeddings, centers, labels, margin=problem["margin"], scale=problem["scale"]
    )
    targets = group_targets(
        problem["teacher"], problem["groups"], problem["temperature"], logits.dtype
    )
    return plain_gkd_loss(logits, labels, targets if kd else None, weights_of(problem))


def evaluate(problem: Problem, dtype: torch.dtype) -> Result:
    at = leaves(problem, dtype)
    total = loss_of(problem, *at).total
    return Result(total.item(), *(g.double() for g in torch.autograd.grad(total, at)))


def evaluate_plain(problem: Problem) -> Result:
    at = leaves(problem, torch.float32)
    total = plain_loss_of(problem, *at, kd=True)
    return Result(total.item(), *(g.double() for g in torch.autograd.grad(total, at)))


def twin(problem: Problem, dtype: torch.dtype = torch.float64) -> Result:
    """The dense twin in float64, of the problem rounded to ``dtype``."""
    x, w = (leaf.detach().double().requires_grad_() for leaf in leaves(problem, dtype))
    labels = torch.from_numpy(problem["labels"])
    logits = dense_margin_logits(x, w, labels, margin=problem["margin"], scale=problem["scale"])
    dense: dict[str, Any] = {k: problem[k] for k in ("labels", "teacher", "groups")}
    dense |= {"student": logits.detach().numpy(), **weights_of(problem)}
    by_logits = torch.from_numpy(dense_gkd_gradient(**dense))
    return Result(dense_gkd_loss(**dense), *torch.autograd.grad(logits, (x, w), by_logits))


@given(problem=problems())
def test_loss_and_gradients_match_the_twin(problem: Problem) -> None:
    ours, expected = evaluate(problem, torch.float64), twin(problem)
    strength = (problem["temperature"] ** 2 * 9 + 1) * problem["scale"]
    assert ours.loss == pytest.approx(expected.loss, rel=1e-9, abs=1e-10 * strength)
    for mine, dense in zip(ours[1:], expected[1:], strict=True):
        # Slopes of the arc cosine near the boundary magnify what rounding leaves.
        bound = 1e-9 * (1 + dense.abs().max().item()) * strength
        torch.testing.assert_close(mine, dense, rtol=1e-8, atol=bound)


def errors(result: Result, expected: Result) -> list[float]:
    """Distance from the twin, of the loss and of each gradient."""
    distances = [float((a - b).norm()) for a, b in zip(result[1:], expected[1:], strict=True)]
    return [abs(result.loss - expected.loss), *distances]


@given(problem=problems())
def test_single_precision_is_as_accurate_as_the_plain_layer(problem: Problem) -> None:
    """Individual roundings differ, so one problem needs some slack: the next test allows little."""
    expected = twin(problem, torch.float32)
    ours = errors(evaluate(problem, torch.float32), expected)
    plain = errors(evaluate_plain(problem), expected)
    strength = (problem["temperature"] ** 2 * 9 + 1) * problem["scale"]
    # Normalising divides a gradient, and its rounding, by the vector's length.
    strengths = [strength, *(strength * steepness(problem[k]) for k in ("embeddings", "centers"))]
    sizes = [abs(expected.loss), *(float(gradient.norm()) for gradient in expected[1:])]
    for mine, theirs, size, strong in zip(ours, plain, sizes, strengths, strict=True):
        assert mine <= 4 * theirs + 3e-6 * (size + strong)


def steepness(vectors: npt.NDArray[np.float64]) -> float:
    """The largest factor by which normalising vectors [n, D] steepens a gradient."""
    return max(1.0, float(1 / np.linalg.norm(vectors, axis=1).min()))


@pytest.mark.parametrize(  # each way of ``Exponentials``: by squaring, each alone, with a shift
    ("scale", "temperature"), [(64.0, 1.0), (64.0, 4.0), (1.0, 0.5), (64.0, 3.0), (128.0, 4.0)]
)
def test_over_many_problems_single_precision_is_as_accurate_as_the_plain_layer(
    scale: float, temperature: float
) -> None:
    ours, plain = [], []
    for seed in range(8):
        values = {"scale": scale, "temperature": temperature, "margin": MARGINS[seed % 2]}
        problem = random_problem(seed, 12, 600, 64, **values)
        expected = twin(problem, torch.float32)
        ours.append(errors(evaluate(problem, torch.float32), expected)[1:])
        plain.append(errors(evaluate_plain(problem), expected)[1:])
    # The ratio is between 0.99 and 1.11, depending on the processor's kernels.
    assert (np.mean(ours, 0) <= 1.25 * np.mean(plain, 0)).all()


@pytest.mark.parametrize("margin", [COSFACE, ARCFACE])
@pytest.mark.parametrize("kd", [True, False])
def test_gradients_are_the_slopes_of_the_loss(margin: Margin, kd: bool) -> None:
    problem = random_problem(3, 3, 5, 4, margin=margin, scale=8.0)
    at = leaves(problem, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: loss_of(problem, x, w, kd=kd).total, at)


@pytest.mark.parametrize("scale", [64.0, 128.0])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_without_targets_it_is_the_plain_margin_softmax(scale: float, chunk: int) -> None:
    problem = random_problem(1, 6, 10, 4, scale=scale, chunk=chunk)
    at = leaves(problem, torch.float64)
    loss, plain = loss_of(problem, *at, kd=False), plain_loss_of(problem, *at, kd=False)
    torch.testing.assert_close(loss.total, plain)
    assert (loss.primary.item(), loss.binary.item()) == (0.0, 0.0)
    for ours, theirs in zip(
        torch.autograd.grad(loss.total, at), torch.autograd.grad(plain, at), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_label_cosines_have_no_margin_and_no_gradient() -> None:
    problem = random_problem(1, 6, 10, 4)
    x, w = leaves(problem, torch.float64)
    cosines = loss_of(problem, x, w).label_cosines
    expected = torch.cosine_similarity(x, w[torch.from_numpy(problem["labels"])])
    torch.testing.assert_close(cosines, expected.detach())
    assert not cosines.requires_grad


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_of_all_logits_is_ever_alive() -> None:
    problem = random_problem(2, 8, 500, 4, chunk=64)
    at = leaves(problem, torch.float32)
    with Largest() as fused:
        torch.autograd.grad(loss_of(problem, *at).total, at)
    with Largest() as plain:
        torch.autograd.grad(plain_loss_of(problem, *at, kd=True), at)
    assert fused.elements < 8 * 500 <= plain.elements


def test_parts_make_the_total_and_carry_no_gradient() -> None:
    problem = random_problem(4, 6, 10, 4, w_binary=2.0, w_primary=8.0, ramp=0.5)
    loss = loss_of(problem, *leaves(problem, torch.float64))
    parts = loss.ce + 0.5 * 16 * (2.0 * loss.binary + 8.0 * loss.primary)
    torch.testing.assert_close(loss.total.detach(), parts)
    assert [part.requires_grad for part in loss] == [True, False, False, False, False]


def test_the_incoming_gradient_is_a_factor() -> None:
    problem = random_problem(5, 6, 10, 4)
    at = leaves(problem, torch.float64)
    loss = loss_of(problem, *at).total
    once = torch.autograd.grad(loss, at, retain_graph=True)
    for mine, first in zip(torch.autograd.grad(loss * 1024, at), once, strict=True):
        torch.testing.assert_close(mine, first * 1024)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_it_is_the_same() -> None:
    """Full graphs, including the shorter last chunk."""
    problem = random_problem(9, 6, 40, 4, chunk=16)
    at = leaves(problem, torch.float32)
    eager, compiled = (loss_of(problem, *at, compiled=flag) for flag in (False, True))
    torch.testing.assert_close(compiled, eager)
    grads = (torch.autograd.grad(loss.total, at) for loss in (eager, compiled))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_half_precision_embeddings_are_converted_to_float32(
    dtype: torch.dtype,
) -> None:
    problem = random_problem(6, 6, 10, 4)
    embeddings, centers = leaves(problem, torch.float32)
    half = embeddings.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = loss_of(problem, half, centers)
    by_half, by_centers = torch.autograd.grad(loss.total, (half, centers))
    single = half.detach().float().requires_grad_()
    expected = loss_of(problem, single, centers)
    by_single, by_centers_single = torch.autograd.grad(expected.total, (single, centers))
    assert (loss.total.dtype, by_half.dtype, by_centers.dtype) == (
        torch.float32,
        dtype,
        torch.float32,
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(by_centers, by_centers_single, rtol=0, atol=0)
    torch.testing.assert_close(by_half, by_single.to(dtype), rtol=0, atol=0)
