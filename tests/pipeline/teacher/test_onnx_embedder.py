"""Teachers from ONNX files: what is read, what is refused, and files with their weights outside."""

import signal
import sys
import time
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
from tests.processes import running


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


def write_graph(
    path: Path,
    nodes: list[Any],
    outputs: list[str],
    initializers: dict[str, "np.ndarray[Any, Any]"],
    batch: int | str = "n",
) -> Path:
    """A network of channel means ``pooled`` [N, 3] and what ``nodes`` make of them."""
    means = [
        helper.make_node("GlobalAveragePool", ["in"], ["maps"]),
        helper.make_node("Flatten", ["maps"], ["pooled"]),
    ]
    shape = [batch, 3, 112, 112]
    graph = helper.make_graph(
        [*means, *nodes],
        "means",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def test_a_map_of_one_pixel_is_a_vector(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "map.onnx", ["n", 3, 112, 112], keep=True)
    embedder = OnnxEmbedder(path, ARCFACE)
    np.testing.assert_allclose(embedder(images(5)), means_by_hand(images(5)), atol=1e-5)


def test_an_output_that_is_no_vector_is_refused(tmp_path: Path) -> None:
    sums = [helper.make_node("ReduceL2", ["pooled"], ["length"], axes=[1], keepdims=1)]
    path = write_graph(tmp_path / "length.onnx", sums, ["length", "maps2"][:1], {})
    with pytest.raises(ConfigError, match=r"expected an output of embeddings \[N, D\].*got length"):
        OnnxEmbedder(path, ARCFACE)


NORM = helper.make_node("ReduceL2", ["pooled"], ["norm"], axes=[1], keepdims=1)


@pytest.mark.parametrize("outputs", [["norm", "unit"], ["unit", "norm"]])
def test_the_length_is_never_the_embedding(tmp_path: Path, outputs: list[str]) -> None:
    nodes = [NORM, helper.make_node("Div", ["pooled", "norm"], ["unit"])]
    embedder = OnnxEmbedder(write_graph(tmp_path / "a.onnx", nodes, outputs, {}), ARCFACE)
    assert embedder.embedding_dim == 3
    np.testing.assert_allclose(np.linalg.norm(embedder(images(4)), axis=1), 1, atol=1e-5)


def test_of_several_vectors_one_is_chosen_by_name_or_asked_for(tmp_path: Path) -> None:
    double = helper.make_node("Add", ["pooled", "pooled"], ["double"])
    feature = helper.make_node("Identity", ["pooled"], ["feature"])
    path = write_graph(tmp_path / "a.onnx", [double, feature], ["double", "feature"], {})
    expected = means_by_hand(images(3))
    np.testing.assert_allclose(OnnxEmbedder(path, ARCFACE)(images(3)), expected, atol=1e-5)
    asked = OnnxEmbedder(path, ARCFACE, output="double")
    assert asked.arch == "onnx:double"
    np.testing.assert_allclose(asked(images(3)), 2 * expected, atol=1e-5)
    with pytest.raises(ConfigError, match="--output out: expected one of double, feature, got out"):
        OnnxEmbedder(path, ARCFACE, output="out")
    path = write_graph(tmp_path / "b.onnx", [double], ["double", "pooled"], {})
    with pytest.raises(ConfigError, match=r"got double \[3, 3\], pooled .*--output double"):
        OnnxEmbedder(path, ARCFACE)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_batch_that_was_traced_as_a_constant_is_served_in_that_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    reshape = helper.make_node("Reshape", ["pooled", "shape"], ["out"])
    shape = {"shape": np.array([size, 3], np.int64)}
    path = write_graph(tmp_path / "constant.onnx", [reshape], ["out"], shape)
    embedder = OnnxEmbedder(path, ARCFACE)
    assert f"declares batches of any size and takes {size} alone" in capsys.readouterr().err
    np.testing.assert_allclose(embedder(images(6)), means_by_hand(images(6)), atol=1e-5)


def test_a_network_that_fails_ends_in_one_message(tmp_path: Path) -> None:
    reshape = helper.make_node("Reshape", ["pooled", "shape"], ["out"])
    shape = {"shape": np.array([7, 5], np.int64)}
    path = write_graph(tmp_path / "broken.onnx", [reshape], ["out"], shape)
    with pytest.raises(GkdError, match=r"broken: the network fails on 3 images: .*Reshape"):
        OnnxEmbedder(path, ARCFACE)


def endless(path: Path) -> Path:
    """A network that counts to 2^60 before it answers."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["value"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["count", "yes", "pooled"], ["out"], body=body)
    constants = {"count": np.array(2**60), "yes": np.array(True)}
    return write_graph(path, [loop], ["out"], constants)


def embed_for_ever(path: Path) -> None:
    print("begun", file=sys.stderr, flush=True)
    OnnxEmbedder(path, ARCFACE)


def test_a_signal_ends_a_network_that_runs_for_ever(tmp_path: Path) -> None:
    with running(embed_for_ever, endless(tmp_path / "endless.onnx")) as process:
        while "begun" not in process.err:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) != 0


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


def sparse_network(path: Path, place: str, location: str) -> Path:
    """A network with a sparse tensor in ``location``: an initializer's, a subgraph's, a function's.

    It is not run: only what it refers to matters.
    """
    dense = numpy_helper.from_array(np.full(3, 2.0, np.float32), "weight")
    model = onnx.load(network(path))
    indices = numpy_helper.from_array(np.arange(3), "indices")
    sparse = helper.make_sparse_tensor(dense, indices, [3])
    for tensor, name, size in ((sparse.values, location, 12), (sparse.indices, "indices.data", 24)):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    constant = helper.make_node("Constant", [], ["c"], sparse_value=sparse)
    if place == "initializer":
        model.graph.sparse_initializer.append(sparse)
    elif place == "attribute":
        model.graph.node.append(constant)
    elif place == "subgraph":
        branch = helper.make_graph([], "b", [], [], sparse_initializer=[sparse])
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["x"], then_branch=branch, else_branch=branch)
        )
    else:
        opset = [helper.make_opsetid("", 17)]
        function = helper.make_function("own", "F", [], ["c"], [constant], opset)
        model.functions.append(function)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "function"])
def test_sparse_weights_are_part_of_the_digest(tmp_path: Path, place: str) -> None:
    path = sparse_network(tmp_path / "t.onnx", place, "values.data")
    files = {"indices.data": 24, "values.data": 12}
    assert weight_files(path) == files
    for name, size in files.items():
        (tmp_path / name).write_bytes(bytes(size))
    digests = {onnx_sha256(path)}
    for name, size in files.items():
        (tmp_path / name).write_bytes(bytes([1]) * size)
        digests.add(onnx_sha256(path))
    assert len(digests) == 3


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "function"])
@pytest.mark.parametrize("name", ["../values.data", "link", "/etc/hostname"])
def test_sparse_weights_elsewhere_are_refused(tmp_path: Path, place: str, name: str) -> None:
    (tmp_path / "values.data").write_bytes(bytes(12))
    here = folder(tmp_path / "here")
    (here / "indices.data").write_bytes(bytes(24))
    (here / "link").symlink_to(tmp_path / "values.data")
    path = sparse_network(here / "t.onnx", place, name)
    with pytest.raises(ConfigError, match=r"t\.onnx: has weights in .* expected a file of that"):
        OnnxEmbedder(path, preprocess_preset("arcface"))


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


def test_a_claimed_batch_takes_no_memory(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "huge.onnx", [1_000_000, 3, 112, 112])
    with pytest.raises(ConfigError, match="a batch of at most 4,096 images, got a fixed one of 1,"):
        OnnxEmbedder(path, ARCFACE)
