"""ONNX files: onnxruntime computes what torch computes, or there is no file."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.trainer.backbones.build import build_backbone
from gkd.trainer.export.formats import export_onnx

onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")

PREPROCESS = preprocess_preset("imagenet", bgr=True)


def test_export_gives_torchs_embeddings_for_any_batch_and_leaves_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_backbone("mobilefacenet", embedding_dim=24, width=0.25, input_size=28)
    with torch.no_grad():  # statistics as a training would leave
        model(torch.randn(8, 3, 112, 112))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    out = tmp_path / "deep" / "student.onnx"
    export_onnx(model, out, preprocess=PREPROCESS, name="demo")
    assert [path.name for path in out.parent.iterdir()] == ["student.onnx"]
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    model.eval()

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((7, 3, 112, 112), np.float32)
    got = session.run(["embedding"], {"input": images})[0]
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.linalg.norm(expected, axis=1).min())
    alone = session.run(["embedding"], {"input": images[3:4]})[0]
    np.testing.assert_allclose(alone[0], got[3], rtol=1e-3, atol=1e-4)

    (entry,) = session.get_inputs()
    assert (entry.name, entry.shape, entry.type) == (
        "input",
        ["batch", 3, 112, 112],
        "tensor(float)",
    )
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["name"], metadata["embedding_dim"]) == ("demo", "24")
    assert (metadata["channel_order"], metadata["preprocess"]) == ("BGR", "imagenet")
    assert tuple(json.loads(metadata["preprocess_mean"])) == PREPROCESS.mean
    assert tuple(json.loads(metadata["preprocess_std"])) == PREPROCESS.std
    assert metadata["gkd_version"]


class Attending(nn.Module):
    """Normalises over a dimension in the middle, which Softmax can since opset 13."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(36, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, :3, :4].softmax(dim=1).flatten(1) @ self.weight


class Normalising(nn.Module):
    """Normalises a layer, an operator since opset 17."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.linear(self.norm(images[:, 0, :3, :4].flatten(1)))
        return features


@pytest.mark.parametrize(
    ("model", "opset", "ir_version"),
    [
        (build_backbone("iresnet18", embedding_dim=8, width=0.125, input_size=28), 10, 5),
        (Attending(), 13, 7),
        (Normalising(), 17, 8),
    ],
    ids=["pooling", "softmax", "layer norm"],
)
def test_an_export_has_the_oldest_opset_that_holds_the_network(
    tmp_path: Path, model: nn.Module, opset: int, ir_version: int
) -> None:
    out = tmp_path / "student.onnx"
    export_onnx(model, out, preprocess=PREPROCESS, name="demo")
    written = onnx.load(out)
    assert [entry.version for entry in written.opset_import] == [opset]
    assert written.ir_version == ir_version


class Random(nn.Module):
    """Returns other embeddings in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean(dim=(2, 3)) @ self.weight
        return pooled + torch.rand_like(pooled)


class Branching(Random):
    """Branches on values, which a graph cannot represent."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.sum().item() > 1:
            return images.mean(dim=(2, 3)) @ self.weight
        return images.amax(dim=(2, 3)) @ self.weight


def test_a_disagreement_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"student.onnx: the export disagrees with torch on a batch"
    ):
        export_onnx(Random(), tmp_path / "student.onnx", preprocess=PREPROCESS, name="demo")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student.onnx: Branching cannot be exported to ONNX: "):
        export_onnx(Branching(), tmp_path / "student.onnx", preprocess=PREPROCESS, name="demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"{missing} cannot be imported .*'\.\[onnx\]'"):
        export_onnx(Random(), tmp_path / "student.onnx", preprocess=PREPROCESS, name="demo")
