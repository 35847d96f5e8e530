"""Teachers: networks that turn aligned faces into embeddings."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkd.pipeline.onnx_files import onnx_sha256
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.extras import require
from gkd.storage.launch import local_rank, own_gpu, usable_cores
from gkd.storage.spec import Precision, Preprocess

FACE_SIZE = 112
CPU_BLOCK = 16
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Embedder(Protocol):
    """A network and all that decides its output; ``sha256`` is of its weights file."""

    name: str
    arch: str
    sha256: str
    embedding_dim: int
    preprocess: Preprocess
    precision: Precision
    compiled: bool
    device: str

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D], of any length."""
        ...


def resolve_device(device: str) -> str:
    """``auto`` is ``cuda`` where a GPU is usable, else ``cpu``; other names as torch takes them.

    Under torchrun ``cuda`` is the GPU of this rank's own number on its node.

    Raises:
        ConfigError: for a name that is no device, or a GPU that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _own_gpu(device, torch.cuda.device_count())
    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "cpu":
            return "cpu"
        torch.get_device_module(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected auto, cpu or a GPU of this machine such as cuda:0, got {device!r} "
            f"({reason}); use --device auto"
        ) from error
    return device


def _own_gpu(device: str, gpus: int) -> str:
    if device != "cuda" or local_rank() is None or not gpus:
        return device
    return f"cuda:{own_gpu(gpus)}"


def resolve_precision(precision: Precision | Literal["auto"], device: str) -> Precision:
    """``auto`` is float32 on a CPU, and on a GPU bfloat16 where it computes it, else float16."""
    if precision != "auto":
        return precision
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def faulty_rows(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Rows of [B, D] that have no direction: not finite, or zero."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    return np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))


class TorchEmbedder:
    """A torch module float [B, 3, 112, 112] -> [B, D] as a teacher, in evaluation mode.

    ``compile`` has torch.compile make its kernels, at the first batch of each length.

    Raises:
        ConfigError: for a device that is not there.
        GkdError: where the module's output is no [B, D].
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        arch: str,
        sha256: str,
        preprocess: Preprocess,
        device: str = "auto",
        precision: Precision | Literal["auto"] = "auto",
        compile: bool = False,
    ) -> None:
        self.name, self.arch, self.sha256 = name, arch, sha256
        self.preprocess = preprocess
        self.device = resolve_device(device)
        self.precision: Precision = resolve_precision(precision, self.device)
        self.compiled = compile
        if self.precision == "float32":  # what a spec calls so is not TF32
            torch.backends.cudnn.allow_tf32 = False
        self._backend = torch.get_device_module(self.device)
        self._streams = threading.local()
        # Convolutions on GPUs are fastest where the channels come last.
        on_cpu = self.device == "cpu"
        self._memory_format = torch.contiguous_format if on_cpu else torch.channels_last
        module = module.to(torch.device(self.device)).eval()
        module = module.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self._module = torch.compile(module) if compile else module
        self._backend.synchronize(self.device)  # before other streams use the weights
        self.embedding_dim = _probe(self, name)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D]."""
        if self.device != "cpu":
            return self._embed(images)
        # How many threads share a sum changes its last bits, and torchrun gives a rank fewer of
        # them. So each image block is one thread's, and blocks do not depend on the threads.
        threads = torch.get_num_threads()
        blocks = [images[at : at + CPU_BLOCK] for at in range(0, len(images), CPU_BLOCK)]
        try:
            with ThreadPoolExecutor(
                min(threads, len(blocks)), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                return np.concatenate(list(pool.map(self._embed, blocks)))
        finally:
            torch.set_num_threads(threads)  # a part of this setting is the process's

    @torch.inference_mode()
    def _embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embeddings by a stream of this thread's own, so that copies and work of two overlap."""
        kind, half = torch.device(self.device).type, AUTOCAST.get(self.precision)
        # Autocast's cache of weights is all threads', and does not wait for another's stream.
        autocast = torch.autocast(kind, half, enabled=half is not None, cache_enabled=False)
        with self._backend.stream(self._own_stream()), autocast:
            pixels = self._pixels(self._moved(images))
            embeddings = self._module(pixels.to(memory_format=self._memory_format))
            if not isinstance(embeddings, torch.Tensor):
                raise GkdError(
                    f"{self.name}: expected embeddings [{len(images)}, D] for {len(images)} "
                    f"images, got a {type(embeddings).__name__}; the teacher must return one tensor"
                )
            on_host = embeddings.float().cpu().numpy()
        return _checked(on_host, len(images), self.name)

    def _own_stream(self) -> Any:
        if not hasattr(self._streams, "own"):
            self._streams.own = self._backend.Stream(self.device)
        return self._streams.own

    def _moved(self, images: npt.NDArray[np.uint8]) -> torch.Tensor:
        """The images' bytes on the device, from pinned memory where that is another's."""
        if self.device == "cpu":
            return torch.from_numpy(np.ascontiguousarray(images))
        # A mirrored view is moved as it lies in memory, and turned there.
        mirrored = images.strides[2] < 0
        host = torch.from_numpy(np.ascontiguousarray(images[:, :, ::-1] if mirrored else images))
        moved = host.pin_memory().to(self.device, non_blocking=True)
        return moved.flip(2) if mirrored else moved

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """``Preprocess.apply`` on the device, to the same bits."""
        std = torch.tensor(self.preprocess.std, device=images.device)
        mean = torch.tensor(self.preprocess.mean, device=images.device)
        images = images.flip(3) if self.preprocess.bgr else images
        scale = 1 / std
        return (images * scale + -mean * scale).permute(0, 3, 1, 2)


class OnnxEmbedder:
    """Any ONNX network with one image input [N, 3, 112, 112], run by onnxruntime.

    A fixed batch axis is served by padding; of several outputs the first is the embedding.
    ``threads`` are onnxruntime's own, by default one a core, which the ranks of a node share.

    Raises:
        ConfigError: where the file is missing, is no ONNX or has another input, where the
            device is not there, or onnxruntime is not installed.
        GkdError: where the network's output is no [N, D].
    """

    arch = "onnx"
    compiled = False

    def __init__(
        self,
        path: Path,
        preprocess: Preprocess,
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        runtime = require("onnxruntime", "onnx")
        if not path.is_file():
            raise ConfigError(f"{path}: expected a teacher's ONNX file, got nothing there")
        self.name = path.stem
        self.sha256 = onnx_sha256(path)
        self.preprocess = preprocess
        self.precision: Precision = "float32"
        self.device = _onnx_device(runtime, device)
        self._session = _session(runtime, path, self.device, threads or usable_cores())
        self._input, self._fixed_batch, self._dtype = _image_input(self._session, path)
        self._output = self._session.get_outputs()[0].name
        self.embedding_dim = _probe(self, self.name)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D]."""
        pixels = self.preprocess.apply(images).astype(self._dtype, copy=False)
        if self._fixed_batch is None:
            return self._run(pixels)
        batch = self._fixed_batch
        return np.concatenate(
            [
                self._run_padded(pixels[at : at + batch], batch)
                for at in range(0, len(pixels), batch)
            ]
        )

    def _run_padded(self, pixels: npt.NDArray[Any], batch: int) -> npt.NDArray[np.float32]:
        padding = np.zeros((batch - len(pixels), *pixels.shape[1:]), pixels.dtype)
        return self._run(np.concatenate([pixels, padding]))[: len(pixels)]

    def _run(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        (embeddings,) = self._session.run([self._output], {self._input: pixels})
        return _checked(np.asarray(embeddings), len(pixels), self.name)


def _probe(embed: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]], name: str) -> int:
    """Length of the embeddings, seen on one grey image."""
    try:
        return int(embed(np.full((1, FACE_SIZE, FACE_SIZE, 3), 127, np.uint8)).shape[1])
    except GkdError:
        raise
    # Whatever a stranger's network does with the input that it promised to take.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GkdError(
            f"{name}: the teacher fails on an image of 3 x {FACE_SIZE} x {FACE_SIZE}: {reason}"
        ) from error


def _checked(embeddings: npt.NDArray[Any], batch: int, name: str) -> npt.NDArray[np.float32]:
    if embeddings.ndim != 2 or len(embeddings) != batch:
        raise GkdError(
            f"{name}: expected embeddings [{batch}, D] for {batch} images, got shape "
            f"{list(embeddings.shape)}; the teacher must end in one vector an image"
        )
    return np.ascontiguousarray(embeddings, np.float32)


def _onnx_device(runtime: Any, device: str) -> str:
    usable = "CUDAExecutionProvider" in runtime.get_available_providers()
    if device == "auto":
        device = "cuda" if usable else "cpu"
    if device != "cpu" and not (usable and device.startswith("cuda")):
        raise ConfigError(
            f"device: expected auto or cpu, got {device!r}, which this onnxruntime cannot use "
            f"(it has {', '.join(runtime.get_available_providers())}); install onnxruntime-gpu or "
            "use --device cpu"
        )
    return _own_gpu(device, torch.cuda.device_count())


def _session(runtime: Any, path: Path, device: str, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    # onnxruntime raises classes of its own without a common base.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: expected an ONNX network that onnxruntime can run, got {reason}"
        ) from error


def _image_input(session: Any, path: Path) -> tuple[str, int | None, npt.DTypeLike]:
    """The input's name, its batch size where that is fixed, and its type."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(repr(i.name) for i in inputs)
        raise ConfigError(f"{path}: expected one image input, got {len(inputs)}: {names}")
    (only,) = inputs
    types: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if only.type not in types:
        raise ConfigError(
            f"{path}: input {only.name!r}: expected tensor(float) or tensor(float16), "
            f"got {only.type}"
        )
    shape = list(only.shape)
    wanted = [3, FACE_SIZE, FACE_SIZE]
    fits = len(shape) == 4 and all(
        want == got for want, got in zip(wanted, shape[1:], strict=True) if isinstance(got, int)
    )
    if not fits:
        hint = ""
        if len(shape) == 4 and shape[3] == 3:
            hint = "; its channels come last: export it with channels first"
        raise ConfigError(
            f"{path}: input {only.name!r}: expected [N, 3, {FACE_SIZE}, {FACE_SIZE}], "
            f"got {shape}{hint}"
        )
    fixed = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
    return only.name, fixed, types[only.type]
