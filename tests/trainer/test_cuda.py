"""What a GPU computes: the class layer against the CPU's, and a training in each precision.

Every path here has a test of its own on the CPU; these run where there is a GPU.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.faces import run
from tests.trainer.head.test_fused import MARGINS, leaves, loss_of, random_problem
from tests.trainer.runs import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_the_class_layer_is_the_cpus(compiled: bool, temperature: float) -> None:
    for seed, margin in enumerate(MARGINS[:4]):
        problem = random_problem(seed, 16, 1500, 64, temperature=temperature, margin=margin)
        here = leaves(problem, torch.float32)
        x, w = there = tuple(leaf.detach().cuda().requires_grad_() for leaf in here)
        ours, theirs = loss_of(problem, *here), loss_of(problem, x, w, compiled=compiled)
        torch.testing.assert_close(theirs.total.cpu(), ours.total, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(ours.total, here), torch.autograd.grad(theirs.total, there)
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(other.cpu(), mine, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.precision=float32",),
        ("train.precision=bfloat16", "train.compile=true"),
        ("train.precision=float16", "head.sample_rate=0.5"),
    ],
)
def test_a_training_learns_and_goes_on(
    faces: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    settings = ("train.device=cuda", "data.workers=1", "train.epochs=6", *overrides)
    run(faces, tmp_path / "out", *settings)
    steps = losses(tmp_path / "out")
    assert np.mean([line[2] for line in steps[-5:]]) < np.mean([line[2] for line in steps[:5]])
    run(faces, tmp_path / "out", *settings)  # finished: nothing changes
    assert losses(tmp_path / "out") == steps
