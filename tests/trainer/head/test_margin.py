"""Margin heads against plain float64 trigonometry, and at the angular boundary."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.trainer.head.margin import Margin, MarginHead, apply_margin

MARGINS = {
    "cosface": Margin(m3=0.4),
    "arcface": Margin(m2=0.5),
    "sphereface": Margin(m1=4.0),
    "combined": Margin(0.9, 0.4, 0.15),
}


def make_head(margin: Margin, scale: float = 64.0) -> MarginHead:
    torch.manual_seed(0)
    return MarginHead(7, 5, margin=margin, scale=scale)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("scale", [1.0, 64.0, 128.0])
def test_logits_are_scaled_cosines_with_the_margin_at_the_label(name: str, scale: float) -> None:
    margin, head = MARGINS[name], make_head(MARGINS[name], scale)
    embeddings, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 6, 6])
    x, w = embeddings.double().numpy(), head.weight.detach().double().numpy()
    cosines = (x / np.linalg.norm(x, axis=1)[:, None]) @ (w / np.linalg.norm(w, axis=1)[:, None]).T
    for row, label in enumerate(labels.tolist()):
        phi = margin.m1 * math.acos(cosines[row, label]) + margin.m2
        turns = math.floor(phi / math.pi)
        cosines[row, label] = (-1) ** turns * math.cos(phi) - 2 * turns - margin.m3
    logits = head(embeddings, labels).detach().double().numpy()
    np.testing.assert_allclose(logits, scale * cosines, rtol=1e-4, atol=scale * 1e-5)


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
def test_slope_is_that_of_the_formula(name: str, cosine: float) -> None:
    margin = MARGINS[name]
    phi = margin.m1 * math.acos(cosine) + margin.m2
    if abs(phi / math.pi - round(phi / math.pi)) < 1e-3:
        return
    cosines = torch.tensor([cosine], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(apply_margin(cosines, margin).sum(), cosines)
    sides = [apply_margin(torch.tensor([cosine + h]).double(), margin) for h in (1e-6, -1e-6)]
    assert slope.item() == pytest.approx(((sides[0] - sides[1]) / 2e-6).item(), rel=2e-2, abs=1e-2)


def test_embedding_on_its_centre_and_a_zero_embedding_are_finite() -> None:
    head = make_head(MARGINS["arcface"])
    embeddings = torch.stack([head.weight[3].detach() * 9, torch.zeros(5)]).requires_grad_()
    head(embeddings, torch.tensor([3, 3])).sum().backward()
    assert embeddings.grad is not None
    assert head.weight.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(head.weight.grad).all()


def test_class_layer_is_float32_under_autocast() -> None:
    head = make_head(MARGINS["cosface"])
    embeddings, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    expected = head(embeddings.bfloat16().float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(embeddings.bfloat16(), labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
