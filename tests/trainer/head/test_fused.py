"""The chunked class layer against the dense float64 twin, and beside the plain layer."""

import shutil
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd.trainer.head.fused import LayerLoss, grouped_margin_loss
from gkd.trainer.head.margin import Margin
from tests.reference import (
    dense_gkd_gradient,
    dense_gkd_loss,
    dense_margin_logits,
    log_sum_exp,
)
from tests.trainer.head.problems import Problem, group_targets

Impl = Literal["fused", "reference"]
COSFACE, ARCFACE = Margin(m3=0.4), Margin(m2=0.5)
MARGINS = [COSFACE, ARCFACE, Margin(0.9, 0.4, 0.15), Margin()]
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


def weights_of(problem: Problem) -> dict[str, Any]:
    return {name: problem[name] for name in ("temperature", "w_binary", "w_primary", "ramp")}


def leaves(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    embeddings, centers = (
        torch.from_numpy(problem[k]).to(dtype) for k in ("embeddings", "centers")
    )
    return embeddings.requires_grad_(), centers.requires_grad_()


def loss_of(
    problem: Problem,
    embeddings: Tensor,
    centers: Tensor,
    impl: Impl = "fused",
    kd: bool = True,
    compiled: bool = False,
) -> LayerLoss:
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    targets = group_targets(problem["teacher"], problem["groups"], problem["temperature"], dtype)
    return grouped_margin_loss(
        embeddings,
        centers,
        torch.from_numpy(problem["labels"]).to(embeddings.device),
        targets.to(embeddings.device) if kd else None,
        margin=problem["margin"],
        scale=problem["scale"],
        **weights_of(problem),
        impl=impl,
        compiled=compiled,
    )


def evaluate(problem: Problem, dtype: torch.dtype, impl: Impl = "fused") -> Result:
    at = leaves(problem, dtype)
    loss = loss_of(problem, *at, impl=impl)
    return Result(loss.total.item(), *(g.double() for g in torch.autograd.grad(loss.total, at)))


def twin(problem: Problem, dtype: torch.dtype = torch.float64) -> Result:
    """The dense twin in float64, at the numbers that ``dtype`` makes of the problem."""
    x, w = (leaf.detach().double().requires_grad_() for leaf in leaves(problem, dtype))
    labels = torch.from_numpy(problem["labels"])
    logits = dense_margin_logits(x, w, labels, margin=problem["margin"], scale=problem["scale"])
    dense: dict[str, Any] = {k: problem[k] for k in ("labels", "teacher", "groups")}
    dense |= {"student": logits.detach().numpy(), **weights_of(problem)}
    by_logits = torch.from_numpy(dense_gkd_gradient(**dense))
    return Result(dense_gkd_loss(**dense), *torch.autograd.grad(logits, (x, w), by_logits))


@pytest.fixture(params=[1, 3, 1024], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    monkeypatch.setattr("gkd.trainer.head.class_lookup.CHUNK_CLASSES", size)
    return size


@given(problem=problems())
def test_loss_and_gradients_are_the_twins(problem: Problem) -> None:
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
def test_single_precision_errs_no_more_than_the_plain_layer(problem: Problem) -> None:
    """Single roundings differ, so one problem allows some slack: the next test allows little."""
    expected = twin(problem, torch.float32)
    ours = errors(evaluate(problem, torch.float32), expected)
    plain = errors(evaluate(problem, torch.float32, "reference"), expected)
    strength = (problem["temperature"] ** 2 * 9 + 1) * problem["scale"]
    # A gradient is divided by the length of what is normalised, and its rounding with it.
    strengths = [strength, *(strength * steepness(problem[k]) for k in ("embeddings", "centers"))]
    sizes = [abs(expected.loss), *(float(gradient.norm()) for gradient in expected[1:])]
    for mine, theirs, size, strong in zip(ours, plain, sizes, strengths, strict=True):
        assert mine <= 4 * theirs + 3e-6 * (size + strong)


def steepness(vectors: npt.NDArray[np.float64]) -> float:
    """The largest factor by which normalising vectors [n, D] steepens a gradient."""
    return max(1.0, float(1 / np.linalg.norm(vectors, axis=1).min()))


@pytest.mark.parametrize("scale", [1.0, 64.0, 128.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("chunk", [1024], indirect=True)
def test_over_many_problems_single_precision_errs_no_more_than_the_plain_layer(
    scale: float, temperature: float
) -> None:
    ours, plain = [], []
    for seed in range(8):
        given_here = {"scale": scale, "temperature": temperature, "margin": MARGINS[seed % 2]}
        problem = random_problem(seed, 16, 1500, 64, **given_here)
        expected = twin(problem, torch.float32)
        ours.append(errors(evaluate(problem, torch.float32), expected)[1:])
        plain.append(errors(evaluate(problem, torch.float32, "reference"), expected)[1:])
    assert (np.mean(ours, 0) <= 1.03 * np.mean(plain, 0)).all()


@pytest.mark.parametrize("margin", [COSFACE, ARCFACE])
@pytest.mark.parametrize("kd", [True, False])
def test_gradients_are_the_slopes_of_the_loss(margin: Margin, kd: bool) -> None:
    problem = random_problem(3, 3, 5, 4, margin=margin, scale=8.0)
    at = leaves(problem, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: loss_of(problem, x, w, kd=kd).total, at)


@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_without_targets_it_is_the_plain_margin_softmax(scale: float) -> None:
    problem = random_problem(1, 6, 10, 4, scale=scale)
    at = leaves(problem, torch.float64)
    ours, plain = (loss_of(problem, *at, impl=impl, kd=False) for impl in ("fused", "reference"))
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours.total, at), torch.autograd.grad(plain.total, at), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("chunk", [64], indirect=True)
def test_no_tensor_of_all_logits_is_ever_alive() -> None:
    problem = random_problem(2, 24, 500, 4)
    largest: dict[Impl, int] = {"fused": 0, "reference": 0}
    for impl in largest:
        at = leaves(problem, torch.float32)
        with Largest() as mode:
            torch.autograd.grad(loss_of(problem, *at, impl=impl).total, at)
        largest[impl] = mode.elements
    assert largest["fused"] < 24 * 500 <= largest["reference"]


def test_parts_make_the_total_and_carry_no_gradient() -> None:
    problem = random_problem(4, 6, 10, 4, w_binary=2.0, w_primary=8.0, ramp=0.5)
    loss = loss_of(problem, *leaves(problem, torch.float64))
    parts = loss.ce + 0.5 * 16 * (2.0 * loss.binary + 8.0 * loss.primary)
    torch.testing.assert_close(loss.total.detach(), parts)
    assert [part.requires_grad for part in loss] == [True, False, False, False, False]


def test_gradient_scales_with_what_comes_from_above() -> None:
    problem = random_problem(5, 6, 10, 4)
    at = leaves(problem, torch.float64)
    loss = loss_of(problem, *at).total
    once = torch.autograd.grad(loss, at, retain_graph=True)
    for mine, first in zip(torch.autograd.grad(loss * 1024, at), once, strict=True):
        torch.testing.assert_close(mine, first * 1024)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("chunk", [16], indirect=True)
def test_compiled_it_is_the_same() -> None:
    """Whole graphs, with the short last chunk too; a CPU's kernels here, a GPU's on a GPU."""
    problem = random_problem(9, 6, 40, 4)
    at = leaves(problem, torch.float32)
    eager, compiled = (loss_of(problem, *at, compiled=flag) for flag in (False, True))
    torch.testing.assert_close(compiled, eager)
    grads = (torch.autograd.grad(loss.total, at) for loss in (eager, compiled))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_half_precision_embeddings_are_taken_up_to_single(
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
