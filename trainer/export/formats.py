"""Export of trained networks: ONNX for any batch size, checked against torch, and weights."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import nn

from gkd.storage.cache.spec import Preprocess
from gkd.storage.errors import ConfigError
from gkd.storage.records.images import FACE_SHAPE
from gkd.storage.util.extras import require
from gkd.storage.util.files import disk_errors, write_file

OPSET = 18  # of torch's exporter
OLDEST_OPSET = 9  # that the runtimes of today read, TensorRT among them
INPUT, OUTPUT = "input", "embedding"
CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-4


def export_onnx(model: nn.Module, out: Path, *, preprocess: Preprocess, name: str) -> None:
    """Write ``model`` to ``out``: ``input`` float32 [batch, 3, 112, 112] to ``embedding``.

    The file is self-contained and carries ``metadata``. It has the oldest opset that holds the
    network, so that older runtimes read it too, and is written only after onnxruntime has
    reproduced torch's embeddings for batches of 1, 2 and 5.

    Raises:
        ConfigError: if the extra is not installed, ``model`` cannot be exported, or the export
            disagrees with it.
    """
    onnx = require("onnx", "onnx")
    require("onnxscript", "onnx")
    require("onnxruntime", "onnx")
    device = next(model.parameters()).device
    was_training = model.training
    model.cpu().eval()
    try:
        exported = _exported(model, out)
        embedding_dim = exported.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        onnx.helper.set_model_props(exported, metadata(preprocess, name, embedding_dim))
        content = _in_oldest_opset(exported, model, out)
    finally:
        model.to(device).train(was_training)
    _write(out, content)


def export_safetensors(model: nn.Module, out: Path, *, preprocess: Preprocess, name: str) -> None:
    """Write the backbone's state dict to ``out``: float32, under its publisher's key names.

    Carries the same metadata as the ONNX file.
    """
    state = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }
    with torch.inference_mode():
        device = next(model.parameters()).device
        embedding_dim = model(torch.zeros(2, 3, *FACE_SHAPE[:2], device=device)).shape[1]
    content = safetensors.torch.save(state, metadata(preprocess, name, embedding_dim))
    _write(out, content)


def _write(out: Path, content: bytes) -> None:
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, content)


def metadata(preprocess: Preprocess, name: str, embedding_dim: int) -> dict[str, str]:
    """What a program needs to know to use a network; text, lists as JSON.

    ``input = (pixels - preprocess_mean) / preprocess_std`` for pixels 0 to 255 of an aligned face
    of ``input_shape`` [3, height, width], channels in ``channel_order``, mean and deviation in
    the same order. The embedding is not normalised: compare by cosine.
    """
    return {
        "name": name,
        "gkd_version": version("gkd"),
        "embedding_dim": str(embedding_dim),
        "input_shape": json.dumps([3, *FACE_SHAPE[:2]]),
        "channel_order": "BGR" if preprocess.bgr else "RGB",
        "preprocess": preprocess.name,
        "preprocess_mean": json.dumps(preprocess.mean),
        "preprocess_std": json.dumps(preprocess.std),
    }


def _exported(model: nn.Module, out: Path) -> Any:
    """Trace ``model`` into an onnx ModelProto with its weights inside."""
    # Two images: torch.export would treat a batch of one as a constant.
    example = torch.zeros(2, 3, 112, 112)
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigError(
                f"{out}: {type(model).__name__} cannot be exported to ONNX: {reason}; "
                "use one of gkd's backbones"
            ) from error
    assert program is not None  # None only without dynamo
    return program.model_proto


def _in_oldest_opset(exported: Any, model: nn.Module, out: Path) -> bytes:
    """Serialise in the oldest opset, and IR version, that holds the network.

    An opset holds it if it has each operator with each attribute, by ONNX's checker, and
    onnxruntime still computes torch's embeddings with it. Nothing is rewritten: most operators
    have only learnt further types since opset 9, so that the same graph is valid there.
    """
    onnx = require("onnx", "onnx")
    for node in exported.graph.node:
        if node.op_type == "Reshape":  # allowzero is about dimensions of 0, and no batch is empty
            del node.attribute[:]
    (operators,) = (entry for entry in exported.opset_import if entry.domain == "")
    for opset in range(OLDEST_OPSET, OPSET + 1):
        operators.version = opset
        exported.ir_version = onnx.helper.find_min_ir_version_for(exported.opset_import)
        try:
            onnx.checker.check_model(exported, full_check=True)
            content: bytes = exported.SerializeToString()
            _check_against(model, content, out)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ConfigError):
            if opset == OPSET:
                raise
        else:
            break
    return content


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's messages about itself (deprecations, torchvision)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch|onnxscript|copyreg")
        try:
            yield
        finally:
            logger.setLevel(level)


def _check_against(model: nn.Module, content: bytes, out: Path) -> None:
    """Refuse an export whose embeddings differ from torch's by more than ``TOLERANCE``."""
    onnxruntime = require("onnxruntime", "onnx")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch in CHECKED_BATCHES:
        images = rng.standard_normal((batch, 3, 112, 112), np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).float().numpy()
        error = _relative_error(session.run([OUTPUT], {INPUT: images})[0], expected)
        if not error <= TOLERANCE:
            raise ConfigError(
                f"the export disagrees with torch on a batch of {batch}",
                path=out,
                expected=f"the same embeddings within {TOLERANCE:g} of their norm",
                got=f"a difference of {error:.2g}",
                remedy="nothing was written. The model may not be a pure function of its input",
            )


def _relative_error(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    if got.shape != expected.shape:
        return float("inf")
    difference = np.linalg.norm(got - expected, axis=1)
    return float((difference / np.maximum(np.linalg.norm(expected, axis=1), 1e-12)).max())
