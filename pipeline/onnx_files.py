"""What an ONNX file is made of: itself, and the files beside it that may hold its weights."""

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gkd.storage.atomic import sha256_file
from gkd.storage.errors import ConfigError
from gkd.storage.extras import require


def onnx_sha256(path: Path) -> str:
    """Hex sha256 of a network: of its file, or where weights stand in others, of all their hashes.

    Raises:
        ConfigError: where it is no ONNX file, or a file of weights is missing or elsewhere.
    """
    outside = [_beside(path, name) for name in weight_files(path)]
    if not outside:
        return sha256_file(path)
    lines = [f"{sha256_file(each)}  {each.name}\n" for each in (path, *outside)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(path: Path) -> list[str]:
    """Names of the files that an ONNX file has weights in, as it says them, sorted.

    Raises:
        ConfigError: where it is no ONNX file.
    """
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    # protobuf's own error, of a module that has been renamed from version to version.
    except Exception as error:
        raise ConfigError(
            f"{path}: expected an ONNX network, got what no such file has: {error}"
        ) from error
    external = onnx.TensorProto.EXTERNAL
    tensors = [*_tensors(model.graph)]
    tensors += [each for function in model.functions for each in _tensors_of(function.node)]
    return sorted(
        {
            entry.value
            for tensor in tensors
            if tensor.data_location == external
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    yield from _tensors_of(graph.node)


def _tensors_of(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)


def _beside(path: Path, name: str) -> Path:
    file = path.parent / name
    plain = len(PurePosixPath(name).parts) == 1 and name != ".."
    if not plain or file.is_symlink() or not file.is_file():
        raise ConfigError(
            f"{path}: has weights in {name!r}, expected a file of that name beside it; get all of "
            "the network's files into one folder"
        )
    return file
