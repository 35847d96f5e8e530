"""What an ONNX file is made of: itself, and the files beside it that may hold its weights."""

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gkd.storage.errors import ConfigError
from gkd.storage.util.extras import require
from gkd.storage.util.files import sha256_file


def onnx_sha256(path: Path) -> str:
    """Hex sha256 of a network: of its file, or where weights stand in others, of all their hashes.

    Raises:
        ConfigError: where it is no ONNX file, or a file of weights is missing, cut or elsewhere.
    """
    outside = [_beside(path, name, size) for name, size in weight_files(path).items()]
    if not outside:
        return sha256_file(path)
    lines = [f"{sha256_file(each)}  {each.name}\n" for each in (path, *outside)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(path: Path) -> dict[str, int]:
    """Names, as it says them, of the files that an ONNX file has weights in, and their least size.

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
    found: dict[str, int] = {}
    for tensor in tensors:
        if tensor.data_location == external:
            told = {entry.key: entry.value for entry in tensor.external_data}
            name = told.get("location", "")
            numbers = [told.get(key, "0") for key in ("offset", "length")]
            if not all(each.isdecimal() for each in numbers):
                raise ConfigError(
                    f"{path}: expected place and length of weights in {name!r}, got {numbers}"
                )
            end = sum(map(int, numbers))
            found[name] = max(end, found.get(name, 0))
    return dict(sorted(found.items()))


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


def _beside(path: Path, name: str, size: int) -> Path:
    file = path.parent / name
    plain = len(PurePosixPath(name).parts) == 1 and name not in ("", "..")
    if not plain or file.is_symlink() or not file.is_file():
        raise ConfigError(
            f"{path}: has weights in {name!r}, expected a file of that name beside it; get all of "
            "the network's files into one folder"
        )
    if file.stat().st_size < size:
        raise ConfigError(
            f"{file}: expected {size:,} bytes of weights or more, got {file.stat().st_size:,}; get "
            "it again"
        )
    return file
