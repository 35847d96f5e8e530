"""Files as training codes publish them, and files that would cost far more than their size."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gkd.pipeline.centers.files import read_center_files
from gkd.storage.errors import ConfigError
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones import build_backbone, load_backbone

FACES = torch.rand(2, 3, 112, 112)
SMALL: dict[str, Any] = {"width": 1 / 8, "input_size": 28, "embedding_dim": 16}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    network = build_backbone("iresnet18", **SMALL).eval()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if "running_var" in key:
                value.uniform_(0.5, 1.5)
    return network


def embed(module: nn.Module) -> Tensor:
    with torch.no_grad():
        embeddings: Tensor = module(FACES)
    return embeddings


def wrapped(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in network.state_dict().items()}


@pytest.mark.parametrize("prefix", ["module.", "net.module.", "_orig_mod.backbone.", "a.model."])
@pytest.mark.parametrize("container", ["state_dict", "model", "ema", "backbone"])
def test_any_wrapping_is_stripped(
    network: nn.Module, prefix: str, container: str, tmp_path: Path
) -> None:
    torch.save({"epoch": 1, container: wrapped(network, prefix)}, tmp_path / "w.pt")
    assert torch.equal(embed(load_backbone("auto", tmp_path / "w.pt").module), embed(network))


@pytest.mark.parametrize("prefix", ["features.module.", "module.features."])
def test_magface_has_its_eps_and_its_centres(
    network: nn.Module, prefix: str, tmp_path: Path
) -> None:
    head = ("module." if prefix.startswith("module") else "") + "fc.weight"
    centers = torch.randn(16, 5)
    torch.save({"state_dict": {**wrapped(network, prefix), head: centers}}, tmp_path / "m.pth")
    loaded = load_backbone("auto", tmp_path / "m.pth").module
    norms = [m.eps for m in loaded.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert set(norms) == {2e-5}
    torch.testing.assert_close(embed(loaded), embed(network), rtol=1e-3, atol=1e-3)
    for dim in (16, None):
        (file,) = read_center_files([tmp_path / "m.pth"], dim)
        assert file.array.shape == (5, 16)
        torch.testing.assert_close(torch.from_numpy(file.array), centers.T)


def test_a_last_batch_norm_without_weights_and_a_class_layer_beside_the_network(
    network: nn.Module, tmp_path: Path
) -> None:
    state = {
        k: v for k, v in network.state_dict().items() if k[:10] not in ("features.w", "features.b")
    }
    torch.save({**state, "weight": torch.randn(9, 16)}, tmp_path / "topofr.pt")
    loaded = load_backbone("iresnet18", tmp_path / "topofr.pt").module
    torch.testing.assert_close(embed(loaded), embed(network))


def test_adaface_with_weights_in_the_last_batch_norm(tmp_path: Path) -> None:
    network = build_backbone("ir_18", **SMALL).eval()
    state = {**network.state_dict(), "output_layer.4.weight": torch.full((16,), 2.0)}
    torch.save({**state, "output_layer.4.bias": torch.ones(16)}, tmp_path / "w.pt")
    loaded = load_backbone("auto", tmp_path / "w.pt").module
    torch.testing.assert_close(embed(loaded), 2 * embed(network) + 1)


def test_averaged_weights_yield_to_the_trained_and_two_networks_are_refused(
    network: nn.Module, tmp_path: Path
) -> None:
    other = {key: value * 0 for key, value in network.state_dict().items()}
    torch.save({"model": network.state_dict(), "model_ema": other}, tmp_path / "w.pt")
    assert torch.equal(embed(load_backbone("auto", tmp_path / "w.pt").module), embed(network))
    torch.save({"teacher": network.state_dict(), "student": other}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"got those of 2, at student\., teacher\."):
        load_backbone("auto", tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_programs_are_named_and_the_advice_works(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.jit.trace(network, FACES).save(path)
    with pytest.raises(ConfigError, match="a TorchScript program") as caught:
        load_backbone("auto", path)
    advice = str(caught.value).split("`")[1].replace("weights.pt", str(tmp_path / "weights.pt"))
    exec(advice, {"torch": torch})
    assert torch.equal(embed(load_backbone("auto", tmp_path / "weights.pt").module), embed(network))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(8, 3, 3, 3, device="meta"), "without values"),
        (torch.ones(8, 3, 3, 3).to_sparse(), "a sparse tensor"),
        (torch.ones(1).expand(8, 3, 3, 3), "repeats fewer stored values"),
        (torch.ones(8, 3, 3, 3, dtype=torch.int8), r"wrong kind of number: conv1.weight \(int8\)"),
        (torch.ones(8, 3, 3, 3, dtype=torch.cfloat), r"conv1.weight \(complex64\)"),
        (torch.full((8, 3, 3, 3), float("nan")), "got NaN or infinity in conv1.weight"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_named(
    network: nn.Module, value: Tensor, message: str, tmp_path: Path
) -> None:
    torch.save({**network.state_dict(), "conv1.weight": value}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=message):
        load_backbone("auto", tmp_path / "w.pt")


SHARED = b"(" + b"K\x01\x85" + b"2\x86" * 60 + b"K\x00d."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02" + SHARED, "so often"),
        (b"\x80\x02N" + b"\x85" * 100_000 + b".", "deep"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo"),
    ],
)
def test_pickles_that_cost_more_than_their_size(
    pickled: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    (tmp_path / "old.pt").write_bytes(pickled)
    for file in (path, tmp_path / "old.pt"):
        with pytest.raises(ConfigError, match=message):
            read_torch_file(file)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(1 << 23)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ConfigError, match="compressed"):
        read_torch_file(path)
