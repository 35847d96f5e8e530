"""Networks whose weights stand in files of their own, as torch exports large ones."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gkd.pipeline.teacher.embedder import OnnxEmbedder
from gkd.pipeline.teacher.onnx_digest import onnx_sha256, weight_files
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import sha256_file
from tests.paths import SHARED_DATA, needs_shared_data


def network(path: Path, weight: float = 2.0, location: str = "") -> Path:
    """Channel means times a weight, which stands at ``location`` where one is given."""
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
