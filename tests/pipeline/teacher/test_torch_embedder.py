"""Teachers that are torch modules, and which are refused."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gkd.pipeline.teacher.torch_embedder import TorchEmbedder
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import GkdError
from tests.pipeline.teacher.channel_means import ARCFACE, images, means_by_hand


class Means(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.drop(pixels.mean((2, 3)))
        return embeddings


def torch_embedder(module: nn.Module, **options: Any) -> TorchEmbedder:
    return TorchEmbedder(
        module, name="means", arch="test", sha256="0" * 64, preprocess=ARCFACE, **options
    )


def test_a_torch_module_embeds_in_evaluation_mode() -> None:
    embedder = torch_embedder(Means(), device="cpu")
    assert (embedder.embedding_dim, embedder.precision) == (3, "float32")
    embeddings = embedder(images(5)[:, :, ::-1])
    np.testing.assert_allclose(embeddings, means_by_hand(images(5)), atol=1e-5)


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("preset", ["arcface", "imagenet", "raw"])
def test_a_module_gets_the_very_pixels_of_the_preset(preset: str, bgr: bool) -> None:
    preprocess = preprocess_preset(preset, bgr=bgr)
    embedder = TorchEmbedder(
        nn.Flatten(), name="pixels", arch="test", sha256="0" * 64, preprocess=preprocess
    )
    pixels = embedder(images(3)).reshape(3, 3, 112, 112)
    np.testing.assert_array_equal(pixels, preprocess.apply(images(3)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_module_embeds_as_the_plain_one() -> None:
    compiled = torch_embedder(Means(), device="cpu", compile=True)
    assert compiled.compiled
    np.testing.assert_allclose(
        compiled(images(20)), means_by_hand(images(20)[:, :, ::-1]), atol=1e-5
    )


def test_autocast_is_used_on_request() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.seen: list[torch.dtype] = []

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(pixels.mean((2, 3)))
            self.seen.append(out.dtype)
            return out

    layer = Layer()
    embedder = torch_embedder(layer, device="cpu", precision="bfloat16")
    assert embedder(images(2)).dtype == np.float32
    assert set(layer.seen) == {torch.bfloat16}
    assert embedder.precision == "bfloat16"


def test_a_module_that_fails_or_gives_maps_is_refused() -> None:
    with pytest.raises(
        GkdError, match=r"means: expected embeddings \[1, D\] .* \[1, 3, 112, 112\]"
    ):
        torch_embedder(nn.Identity())
    with pytest.raises(GkdError, match="means: the teacher fails on an image of 3 x 112 x 112: "):
        torch_embedder(nn.Linear(5, 5))


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    torch.manual_seed(0)
    # A sum over many inputs, which threads would share.
    wide = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.Flatten(), nn.Linear(8 * 28 * 28, 32))
    embedder = torch_embedder(wide, device="cpu")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(embedder(images(37)))
            assert torch.get_num_threads() == threads
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_array_equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)
