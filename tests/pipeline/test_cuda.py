"""What a GPU computes for a cache: embeddings and groups against the CPU's.

Every path here also has a test on the CPU; these run if there is a GPU.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from gkd.pipeline.groups.partition import partition
from gkd.pipeline.settings import DRAWS, PartitionSettings
from gkd.pipeline.teacher.torch_embedder import TorchEmbedder
from gkd.storage.cache.spec import VIEWS, preprocess_preset
from gkd.trainer.backbones import build_backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("precision", "compile", "least"),
    [("float32", False, 0.9999), ("bfloat16", False, 0.99), ("float16", True, 0.99)],
)
def test_batches_in_flight_are_embedded_as_on_the_cpu(
    precision: str, compile: bool, least: float
) -> None:
    torch.manual_seed(0)
    module = build_backbone("iresnet18", width=0.25, embedding_dim=64, input_size=112).eval()
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (32, 112, 112, 3)).astype(np.uint8) for _ in range(8)]
    here, there = (
        TorchEmbedder(
            copy.deepcopy(module),
            name="random",
            arch="iresnet18",
            sha256="0" * 64,
            preprocess=preprocess_preset("arcface"),
            device=device,
            precision=precision,  # type: ignore[arg-type]
            compile=compile and device == "cuda",
        )
        for device, precision in (("cpu", "float32"), ("cuda", precision))
    )
    waits = [there.start(batch, VIEWS) for batch in batches]
    for batch, wait in zip(batches, waits, strict=True):
        theirs = wait()
        for view, ours in here.start(batch, VIEWS)().items():
            cosines = (ours * theirs[view]).sum(1) / np.linalg.norm(ours, axis=1)
            assert (cosines / np.linalg.norm(theirs[view], axis=1)).min() > least
        mirrored = there(batch[:, :, ::-1])
        np.testing.assert_allclose(mirrored, theirs["flipped"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=generator)).to(dtype)
    labels = torch.randint(20_000, (48,), generator=generator)
    embeddings = centers[labels].float() + 0.1 * torch.randn(48, 64, generator=generator)
    settings = PartitionSettings(group_temperature=2.0)
    ours = partition(embeddings, labels, centers, settings).targets
    drawing = replace(settings, draws=DRAWS)
    uniforms = np.random.default_rng(0).random((48, DRAWS.count))
    first, second = (
        partition(embeddings, labels, centers.cuda(), drawing, uniforms=uniforms).targets
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.offsets, second.offsets)
    for name, values in first.arrays().items():
        np.testing.assert_array_equal(values, second.arrays()[name], err_msg=name)
    theirs = partition(embeddings, labels, centers.cuda(), settings).targets
    np.testing.assert_allclose(theirs.secondary, ours.secondary, atol=2e-3)
    np.testing.assert_allclose(theirs.sizes, ours.sizes, rtol=0.02, atol=2)
