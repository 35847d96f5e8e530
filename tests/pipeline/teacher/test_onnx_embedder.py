"""Teachers from ONNX files: what is read, what is refused, and files with their weights outside."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder, onnx_sha256, weight_files
from gkd.storage.cache.spec import VIEWS, preprocess_preset
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.files import sha256_file
from tests.paths import SHARED_DATA, needs_shared_data
from tests.pipeline.teacher.channel_means import ARCFACE, images, means_by_hand


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
            r"'in0' tensor\(float\) \['n', 3, 160, 160\]; export .* such",
        ),
        ({"shape": ["n", 112, 112, 3]}, r"got .*\['n', 112, 112, 3\]; export .* channels first"),
        ({"shape": ["n", 3, 112]}, r"of shape \[N, 3, 112, 112\], got .*\['n', 3, 112\];"),
        ({"shape": ["n", 3, 112, 112], "inputs": 2}, r"expected one input, .*got 'in0' .*, 'in1' "),
        ({"shape": ["n", 3, 112, 112], "kind": "UINT8"}, r"or tensor\(float16\) .*got .*uint8"),
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


def network(path: Path, weight: float = 2.0, location: str = "") -> Path:
    """Channel means times a weight, which is stored in the file ``location`` if one is given."""
    inputs = [helper.make_tensor_value_info("in", TensorProto.FLOAT, ["n", 3, 112, 112])]
    nodes = [
        helper.make_node("GlobalAveragePool", ["in"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Mul", ["means", "weight"], ["out"]),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(np.full(3, weight, np.float32), "weight")]
    graph = helper.make_graph(nodes, "means", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if not location:
        onnx.save(model, path)
        return path
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights.data")
    if location != "weights.data":
        model = onnx.load(path, load_external_data=False)
        (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "location")
        entry.value = location
        onnx.save(model, path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_weights_beside_a_network_are_part_of_its_digest(tmp_path: Path) -> None:
    inside = network(tmp_path / "t.onnx")
    assert onnx_sha256(inside) == sha256_file(inside)
    twos, again, threes = (
        network(folder(tmp_path / name) / "t.onnx", weight, "weights.data")
        for name, weight in (("twos", 2.0), ("again", 2.0), ("threes", 3.0))
    )
    assert sha256_file(twos) == sha256_file(threes), "the file itself does not say which weights"
    assert onnx_sha256(twos) == onnx_sha256(again) != onnx_sha256(threes)
    image = np.full((1, 112, 112, 3), 255, np.uint8)
    for path, weight in ((twos, 2.0), (threes, 3.0)):
        embedder = OnnxEmbedder(path, preprocess_preset("arcface"))
        assert embedder(image)[0].tolist() == [weight] * 3
        assert embedder.sha256 == onnx_sha256(path)


def test_weights_within_the_branches_of_a_network_are_found(tmp_path: Path) -> None:
    path = network(tmp_path / "t.onnx", location="weights.data")
    inner = onnx.load(path, load_external_data=False)
    outer = onnx.load(network(tmp_path / "outer.onnx"))
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    branch = helper.make_graph(inner.graph.node, "b", [], [output], inner.graph.initializer)
    outer.graph.node.append(
        helper.make_node("If", ["yes"], ["both"], then_branch=branch, else_branch=branch)
    )
    onnx.save(outer, tmp_path / "outer.onnx")
    assert weight_files(tmp_path / "outer.onnx") == {"weights.data": 12}


@pytest.mark.parametrize("name", ["../weights.data", "..", "/etc/hostname", "gone.data", "link"])
def test_weights_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights.data").write_bytes(bytes(12))
    here = folder(tmp_path / "here")
    path = network(here / "t.onnx", location=name)
    (here / "link").symlink_to(tmp_path / "weights.data")
    with pytest.raises(ConfigError, match=r"t\.onnx: has weights in .* expected a file of that"):
        OnnxEmbedder(path, preprocess_preset("arcface"))


def test_weights_that_are_cut_off_are_named(tmp_path: Path) -> None:
    path = network(tmp_path / "t.onnx", location="weights.data")
    (tmp_path / "weights.data").write_bytes(bytes(8))
    with pytest.raises(ConfigError, match=r"weights\.data: expected 12 bytes of weights or more"):
        onnx_sha256(path)


@needs_shared_data
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    path = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
    images = np.random.default_rng(0).integers(0, 256, (9, 112, 112, 3)).astype(np.uint8)
    one, *others = (
        OnnxEmbedder(path, preprocess_preset("imagenet"), threads=threads)(images)
        for threads in (1, 2, 3, 8)
    )
    for other in others:
        np.testing.assert_array_equal(one, other)
