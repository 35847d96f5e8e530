"""Teachers from ONNX files and torch modules, and what is refused of them."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from gkd.pipeline.teacher.embedder import (
    OnnxEmbedder,
    TorchEmbedder,
    faulty_rows,
    resolve_device,
    resolve_precision,
)
from gkd.storage.cache.spec import VIEWS, preprocess_preset
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.files import sha256_file

ARCFACE = preprocess_preset("arcface")


def images(count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3)).astype(np.uint8)


def means_by_hand(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """What the networks of these tests compute: the mean of each channel."""
    means: npt.NDArray[np.float64] = (batch / 127.5 - 1).mean((1, 2))
    return means


def write_onnx(
    path: Path,
    shape: list[int | str],
    *,
    inputs: int = 1,
    kind: str = "FLOAT",
    keep: bool = False,
) -> Path:
    """A network of channel means; with ``keep`` its output stays [N, 3, 1, 1]."""
    import onnx
    from onnx import TensorProto, helper

    dtype = getattr(TensorProto, kind)
    values = [helper.make_tensor_value_info(f"in{i}", dtype, shape) for i in range(inputs)]
    floats = TensorProto.FLOAT if kind == "UINT8" else dtype
    nodes = [helper.make_node("Cast", ["in0"], ["pixels"], to=floats)]
    nodes.append(helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]))
    nodes.append(helper.make_node("Identity" if keep else "Flatten", ["pooled"], ["out"]))
    output = helper.make_tensor_value_info("out", floats, None)
    graph = helper.make_graph(nodes, "means", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("shape", [["n", 3, 112, 112], [4, 3, 112, 112], [1, 3, "h", "w"]])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_onnx_network_embeds_any_batch(
    tmp_path: Path, shape: list[int | str], count: int
) -> None:
    path = write_onnx(tmp_path / "means.onnx", shape)
    embedder = OnnxEmbedder(path, ARCFACE, device="cpu", threads=1)
    assert (embedder.name, embedder.arch, embedder.embedding_dim) == ("means", "onnx", 3)
    assert (embedder.precision, embedder.device) == ("float32", "cpu")
    assert embedder.sha256 == sha256_file(path)
    embeddings = embedder(images(count))
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, means_by_hand(images(count)), atol=1e-5)


def test_a_half_precision_network_is_fed_halves(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "half.onnx", ["n", 3, 112, 112], kind="FLOAT16")
    embeddings = OnnxEmbedder(path, ARCFACE, threads=1)(images(2))
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, means_by_hand(images(2)), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"shape": ["n", 3, 160, 160]},
            r"'in0': expected \[N, 3, 112, 112\], got \['n', 3, 160, 1",
        ),
        ({"shape": ["n", 112, 112, 3]}, r"got .*; its channels come last: export it with channels"),
        ({"shape": ["n", 3, 112]}, r"expected \[N, 3, 112, 112\], got \['n', 3, 112\]"),
        ({"shape": ["n", 3, 112, 112], "inputs": 2}, r"one image input, got 2: 'in0', 'in1'"),
        ({"shape": ["n", 3, 112, 112], "kind": "UINT8"}, r"expected tensor\(float\) .*uint8"),
    ],
)
def test_networks_with_another_input_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    path = write_onnx(tmp_path / "other.onnx", **arguments)
    with pytest.raises(ConfigError, match=message):
        OnnxEmbedder(path, ARCFACE)


def test_batches_asked_of_another_device_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = OnnxEmbedder(write_onnx(tmp_path / "means.onnx", ["n", 3, 112, 112]), ARCFACE)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (3, 112, 112, 3), np.uint8) for _ in range(4)]
    monkeypatch.setattr(embedder, "device", "cuda")  # which this onnxruntime does not have
    waits = [embedder.start(batch, VIEWS) for batch in batches]
    for batch, wait in zip(batches, waits, strict=True):
        found = wait()
        np.testing.assert_array_equal(found["original"], embedder(batch))
        np.testing.assert_array_equal(found["flipped"], embedder(batch[:, :, ::-1]))


def test_an_output_that_is_no_vector_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "map.onnx", ["n", 3, 112, 112], keep=True)
    message = r"map: expected embeddings \[1, D\] for 1 images, got shape \[1, 3, 1, 1\]"
    with pytest.raises(GkdError, match=message):
        OnnxEmbedder(path, ARCFACE)


def test_files_that_are_no_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.onnx: expected a teacher's ONNX file, got nothing"):
        OnnxEmbedder(tmp_path / "no.onnx", ARCFACE)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.onnx: expected an ONNX network"):
        OnnxEmbedder(tmp_path / "text.onnx", ARCFACE)


def test_a_gpu_that_onnxruntime_cannot_use_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "means.onnx", ["n", 3, 112, 112])
    with pytest.raises(ConfigError, match="device: expected auto or cpu, got 'cuda:7', which this"):
        OnnxEmbedder(path, ARCFACE, device="cuda:7")


def test_without_onnxruntime_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[onnx\]'"):
        OnnxEmbedder(tmp_path / "means.onnx", ARCFACE)


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


def test_a_rank_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    assert resolve_device("auto") == "cuda"
    for local_rank, expected in (("0", "cuda:0"), ("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert resolve_device("auto") == resolve_device("cuda") == expected
    assert resolve_device("cuda:2") == "cuda:2"
    assert resolve_device("cpu") == "cpu"


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu:0") == "cpu"
    for device in ("tpu9", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=f"device: expected auto, cpu or .* got '{device}'"):
            resolve_device(device)


def test_auto_precision_is_float32_on_a_cpu() -> None:
    assert resolve_precision("auto", "cpu") == "float32"
    assert resolve_precision("float16", "cpu") == "float16"


def test_faulty_rows_are_found() -> None:
    embeddings = np.ones((5, 3), np.float32)
    embeddings[1, 2] = np.nan
    embeddings[2] = 0
    embeddings[4, 0] = -np.inf
    np.testing.assert_array_equal(faulty_rows(embeddings), [1, 2, 4])
