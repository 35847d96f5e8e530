"""Margins against plain float64 trigonometry, and at the angular boundary."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec, Margin, apply_margin

MARGINS = {
    "cosface": Margin(m3=0.4),
    "arcface": Margin(m2=0.5),
    "sphereface": Margin(m1=4.0),
    "combined": Margin(0.9, 0.4, 0.15),
}


@pytest.mark.parametrize("name", MARGINS)
def test_values_are_those_of_the_formula(name: str) -> None:
    margin, cosines = MARGINS[name], np.linspace(-0.999, 0.999, 201)
    expected = []
    for cosine in cosines:
        phi = margin.m1 * math.acos(cosine) + margin.m2
        turns = math.floor(phi / math.pi)
        expected.append((-1) ** turns * math.cos(phi) - 2 * turns - margin.m3)
    values = apply_margin(torch.from_numpy(cosines), margin)
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MARGINS)
def test_a_worse_angle_is_never_rewarded(name: str) -> None:
    cosines = torch.linspace(1, -1, 20001, dtype=torch.float64)
    values = apply_margin(cosines, MARGINS[name])
    assert (torch.diff(values) <= 1e-9).all()


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 2e-7, -1.0 - 2e-7, math.cos(math.pi - 0.5)])
def test_the_angular_boundary_is_finite(name: str, cosine: float) -> None:
    cosines = torch.tensor([cosine], requires_grad=True)
    value = apply_margin(cosines, MARGINS[name])
    value.sum().backward()
    assert cosines.grad is not None
    assert torch.isfinite(value).all()
    assert torch.isfinite(cosines.grad).all()


@given(name=st.sampled_from(sorted(MARGINS)), cosine=st.floats(-0.995, 0.995))
def test_the_gradient_is_the_slope(name: str, cosine: float) -> None:
    margin = MARGINS[name]
    phi = margin.m1 * math.acos(cosine) + margin.m2
    if abs(phi / math.pi - round(phi / math.pi)) < 1e-3:
        return
    cosines = torch.tensor([cosine], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(apply_margin(cosines, margin).sum(), cosines)
    sides = [apply_margin(torch.tensor([cosine + h]).double(), margin) for h in (1e-6, -1e-6)]
    assert slope.item() == pytest.approx(((sides[0] - sides[1]) / 2e-6).item(), rel=2e-2, abs=1e-2)


def test_embedding_on_its_centre_and_a_zero_embedding_are_finite() -> None:
    centers = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeddings = torch.stack([centers[3].detach() * 9, torch.zeros(5)]).requires_grad_()
    spec = HeadSpec(margin=MARGINS["arcface"])
    grouped_margin_loss(embeddings, centers, torch.tensor([3, 3]), None, spec).total.backward()
    for leaf in (embeddings, centers):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
