"""Published checkpoints: each family loads files with the names of its source, and its results.

Key names, shapes and the expected embeddings come from ``published_layouts`` and
``published_networks``, which know nothing of gkd.
"""

import argparse
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.records.open import open_records
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones import BACKBONES, build_backbone, load_backbone, vit
from gkd.trainer.dry_run import dry_run
from gkd.trainer.export.formats import export_onnx
from gkd.trainer.export.model_card import export_student
from tests.trainer.backbones import published_layouts as layouts
from tests.trainer.backbones import published_networks
from tests.trainer.backbones.published_layouts import (
    DIM,
    IMAGES,
    IRS,
    VITS,
    Forward,
    State,
    filled,
    published,
)
from tests.trainer.faces import run, small_config


@pytest.mark.parametrize("name", BACKBONES)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        state = build_backbone(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published(name)


def arcface_torch(state: State) -> Any:
    return dict(state)


def checkpoint_gpu(state: State) -> Any:
    """A checkpoint of arcface_torch: the DDP backbone, a class layer, an optimizer."""
    return {
        "epoch": 19,
        "global_step": 90_000,
        "state_dict_backbone": OrderedDict((f"module.{k}", v) for k, v in state.items()),
        "state_dict_softmax_fc": {"weight": torch.zeros(9, DIM)},
        "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(9, DIM)}}},
    }


def lightning(state: State) -> Any:
    """A checkpoint of AdaFace, with the class layer beside the network."""
    head = {"kernel": torch.zeros(DIM, 9), "t": torch.zeros(1), "batch_mean": torch.ones(1)}
    return {
        "epoch": 25,
        "pytorch-lightning_version": "1.4.4",
        "state_dict": {f"model.{k}": v for k, v in state.items()}
        | {f"head.{k}": v for k, v in head.items()},
        "hyper_parameters": {"arch": "ir_50", "lr": 0.1},
        "optimizer_states": [{"state": {}, "param_groups": []}],
    }


def cvlface(state: State) -> Any:
    return {f"net.{k}": v for k, v in state.items()}


def cvlface_hub(state: State) -> Any:
    return {f"model.net.{k}": v for k, v in state.items()}


def facex_zoo(state: State) -> Any:
    inside = {f"backbone.{k}": v for k, v in state.items()}
    return {"state_dict": inside | {"head.weight": torch.zeros(DIM, 9)}, "epoch": 17}


def compiled(state: State) -> Any:
    return {f"module._orig_mod.{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [
        ("iresnet50", arcface_torch),
        ("iresnet200", checkpoint_gpu),
        ("mobilefacenet", checkpoint_gpu),
        ("mbf_large", arcface_torch),
        ("vit_t", checkpoint_gpu),
        ("vit_b", cvlface),
        ("ir_18", cvlface_hub),
        ("ir_50", lightning),
        ("ir_101", lightning),
        ("ir_152", cvlface),
        ("ir_se_50", facex_zoo),
        ("ir_se_200", lightning),
        ("evolve_ir_50", arcface_torch),
        ("evolve_ir_152", compiled),
        ("evolve_ir_se_50", arcface_torch),
        ("evolve_ir_se_101", facex_zoo),
    ],
)
def test_a_published_file_loads_as_it_is(tmp_path: Path, name: str, wrapped: Any) -> None:
    state = filled(published(name, small=True))
    torch.save(wrapped(state), tmp_path / "w.ckpt")
    loaded = load_backbone("auto", tmp_path / "w.ckpt")
    assert loaded.name == name
    assert not loaded.module.training
    loaded_state = loaded.module.state_dict()
    assert set(loaded_state) == set(state)
    assert all(torch.equal(loaded_state[key], value) for key, value in state.items())


def test_transformers_of_one_depth_are_recognised_by_width() -> None:
    for channels, depth, name in ((512, 12, "vit_s"), (768, 24, "vit_l"), (128, 12, "vit_t")):
        shapes = layouts.vit_shapes(channels, depth, 8, patches=9)
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert vit.FAMILY.recognise(state) == name


def test_a_transformer_without_a_mask_token_loads(tmp_path: Path) -> None:
    state = filled(published("vit_t", small=True))
    del state["mask_token"]
    torch.save(state, tmp_path / "w.pt")
    assert load_backbone("auto", tmp_path / "w.pt").name == "vit_t"


def by_modules(name: str, **options: Any) -> Forward:
    """The network of ``published_networks`` with the weights."""

    def forward(state: State, images: Tensor) -> Tensor:
        network = published_networks.get_model(name, num_features=DIM, **options).double().eval()
        network.load_state_dict(dict(state))
        embeddings: Tensor = network(images)
        return embeddings

    return forward


def by_functions(name: str) -> Forward:
    if name in VITS:
        return layouts.vit
    return lambda state, images: layouts.ir(state, images, IRS[name][0])


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("mobilefacenet", by_modules("mbf", scale=1)),
        ("mbf_large", by_modules("mbf_large", scale=1)),
        ("vit_t", by_functions("vit_t")),
        ("vit_b", by_functions("vit_b")),
        ("ir_18", by_functions("ir_18")),
        ("ir_152", by_functions("ir_152")),
        ("ir_se_50", by_functions("ir_se_50")),
        ("ir_se_152", by_functions("ir_se_152")),
        ("evolve_ir_50", by_functions("evolve_ir_50")),
        ("evolve_ir_se_50", by_functions("evolve_ir_se_50")),
    ],
)
@torch.no_grad()
def test_embeddings_are_those_of_an_independent_forward(
    tmp_path: Path, name: str, forward: Forward
) -> None:
    state = filled(published(name, small=True), seed=1)
    torch.save(state, tmp_path / "w.pt")
    ours = load_backbone("auto", tmp_path / "w.pt").module.double()(IMAGES.double())
    double = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    expected = forward(double, IMAGES.double())
    assert ours.shape == (2, DIM)
    assert expected.std(dim=0).min() > 1e-4  # images differ, so that parity is meaningful
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@torch.no_grad()
def test_onnxruntime_gives_the_independent_embeddings_of_a_transformer(tmp_path: Path) -> None:
    """For a network of 28x28 pixels, which pools its images first; others: tests of the export."""
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    state = filled(layouts.vit_shapes(16, 12, DIM, patches=9), seed=2)
    torch.save(state, tmp_path / "w.pt")
    model = load_backbone("auto", tmp_path / "w.pt").module
    out = tmp_path / "w.onnx"
    export_onnx(model, out, preprocess=preprocess_preset("arcface"), name="vit_t")
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (got,) = session.run(["embedding"], {"input": IMAGES.numpy()})
    expected = layouts.vit(state, F.avg_pool2d(IMAGES, 4)).numpy()
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-4


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


FAMILIES = {  # a missing key, and one of another shape
    "iresnet18": ("layer3.1.bn2.bias", "layer2.0.conv1.weight"),
    "mobilefacenet": ("layers.3.layers.1.layers.0.layers.1.bias", "conv_sep.layers.0.weight"),
    "vit_t": ("blocks.7.mlp.fc1.bias", "blocks.3.attn.qkv.weight"),
    "ir_18": ("body.5.res_layer.2.running_var", "body.2.shortcut_layer.0.weight"),
    "evolve_ir_50": ("output_layer.4.weight", "body.9.res_layer.1.weight"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_damaged_files_of_each_family_are_refused_with_the_reason(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing, misshapen = FAMILIES[name]
    state = filled(published(name, small=True))
    path = tmp_path / "w.pt"

    def refused(content: Any) -> str:
        torch.save(content, path)
        with pytest.raises(ConfigError) as error:
            load_backbone("auto", path)
        return str(error.value)

    without = {key: value for key, value in state.items() if key != missing}
    assert f"do not fit {name}; missing: {missing}" in refused(without)
    shape = list(state[misshapen].shape)
    wrong = [shape[0] + 1, *shape[1:]]
    message = refused({**state, misshapen: torch.zeros(wrong)})
    assert f"wrong shape: {misshapen} (expected {shape}, got {wrong})" in message
    message = refused({**state, missing: Payload()})
    assert "none that would run code, got one that names " in message
    assert not Path("ran").exists()


def test_a_file_without_one_block_is_closest_to_its_network(tmp_path: Path) -> None:
    state = filled(published("ir_50", small=True))
    less = {k: v for k, v in state.items() if not k.startswith("body.9.")}
    torch.save(less, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"do not fit ir_50; missing: body\.9\..* and 1\d more"):
        load_backbone("auto", tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"do not fit ir_34; .*is closest to ir_50"):
        load_backbone("ir_34", tmp_path / "w.pt")


def test_the_closest_network_of_unknown_keys_is_named(tmp_path: Path) -> None:
    keys = ["conv1.weight", "bn1.weight", "bn1.bias", "inception.weight", "dense.weight"]
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "w.pt")
    message = (
        r"match no backbone of gkd .*closest is iresnet18, with 3 of these 5 keys\. For another"
    )
    with pytest.raises(ConfigError, match=message):
        load_backbone("auto", tmp_path / "w.pt")


def test_an_impossible_width_is_named(tmp_path: Path) -> None:
    shapes = layouts.vit_shapes(20, 12, 8)
    torch.save({k: torch.zeros(s) for k, s in shapes.items()}, tmp_path / "w.pt")
    with pytest.raises(
        ConfigError, match=r"w\.pt: not vit_t: a width of 0\.078125, from its shapes"
    ):
        load_backbone("auto", tmp_path / "w.pt")


def test_settings_beside_the_weights_are_inert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of argparse, and callbacks of Lightning, which is not installed."""
    state = filled(published("ir_18", small=True))
    module_name = "pytorch_lightning.callbacks.model_checkpoint"
    with monkeypatch.context() as patch:
        module = types.ModuleType(module_name)
        callback = type("ModelCheckpoint", (), {"__module__": module_name})
        module.ModelCheckpoint = callback  # type: ignore[attr-defined]
        for part in (module_name, "pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, module)
        content = lightning(state)
        content["callbacks"] = {callback: {"best_model_score": torch.tensor(0.9)}}
        content["hyper_parameters"]["args"] = argparse.Namespace(lr=0.1, gpus=2)
        content["best_acc"] = np.float64(0.99)
        torch.save(content, tmp_path / "w.ckpt")
    assert "pytorch_lightning" not in sys.modules
    assert load_backbone("auto", tmp_path / "w.ckpt").name == "ir_18"
    content["hyper_parameters"]["args"] = argparse.Namespace(path=Payload())
    content["callbacks"] = {}
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match="would run code, got one that names "):
        load_backbone("auto", tmp_path / "w.ckpt")


@pytest.mark.parametrize("name", ["vit_t", "ir_18"])  # other families: tests of the trainer
def test_students_train_and_export(faces: Path, tmp_path: Path, name: str) -> None:
    settings = (f"student.name={name}", "train.epochs=1", "train.batch_size=20")
    expected = dry_run(
        small_config("kd.enabled=false", *settings), open_records(faces / "faces"), None
    )
    summary = run(faces, tmp_path / "run", *settings)
    assert summary.steps == expected.total_steps == 2
    exported = export_student(tmp_path / "run", tmp_path / "student.safetensors")
    assert load_backbone("auto", exported.path).name == name


def test_dict_like_settings_of_lightning_are_skipped(tmp_path: Path) -> None:
    module_name = "pytorch_lightning.utilities.parsing"
    kind = type("AttributeDict", (dict,), {"__module__": module_name})
    module = types.ModuleType(module_name)
    module.AttributeDict = kind  # type: ignore[attr-defined]
    parts = ("pytorch_lightning", "pytorch_lightning.utilities")
    modules = {part: types.ModuleType(part) for part in parts} | {module_name: module}
    with pytest.MonkeyPatch.context() as patch:
        for part, made in modules.items():
            patch.setitem(sys.modules, part, made)
        content = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": kind(lr=0.1, arch="ir")}
        torch.save(content, tmp_path / "last.ckpt")
    read = read_torch_file(tmp_path / "last.ckpt")
    assert read["hyper_parameters"] == {"lr": 0.1, "arch": "ir"}
    assert "pytorch_lightning" not in sys.modules
