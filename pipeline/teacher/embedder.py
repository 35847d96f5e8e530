"""Teachers: networks that turn aligned faces into embeddings."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkd.pipeline.teacher.onnx_digest import onnx_sha256
from gkd.storage.cache.spec import Precision, Preprocess, View
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.extras import require
from gkd.storage.util.torchrun_env import local_rank, own_gpu, usable_cores

FACE_SIZE = 112
CPU_BLOCK = 16
IN_FLIGHT = 2  # batches that an accelerator is given ahead of the one that is waited for
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Embeddings = Mapping[View, npt.NDArray[np.float32]]


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

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        """Ask for embeddings of faces in some views; what is returned waits for them.

        A device of its own works meanwhile; a CPU does all when it is waited for.
        """

        def wait() -> Embeddings:
            return {
                view: self(images if view == "original" else images[:, :, ::-1]) for view in views
            }

        return wait


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


class TorchEmbedder(Embedder):
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
        # Convolutions on GPUs are fastest where the channels come last.
        on_cpu = self.device == "cpu"
        self._memory_format = torch.contiguous_format if on_cpu else torch.channels_last
        module = module.to(torch.device(self.device)).eval()
        module = module.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self._module = torch.compile(module) if compile else module
        if not on_cpu:
            backend = torch.get_device_module(self.device)
            backend.synchronize(self.device)  # before another stream uses the weights
            self._stream = backend.Stream(self.device)
        self.embedding_dim = _probe(self, name)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D]."""
        if self.device != "cpu":
            return self.start(images, ["original"])()["original"]
        # How many threads share a sum changes its last bits, and torchrun gives a rank fewer of
        # them. So each image block is one thread's, and blocks do not depend on the threads.
        threads = torch.get_num_threads()
        blocks = [
            torch.from_numpy(np.ascontiguousarray(images[at : at + CPU_BLOCK]))
            for at in range(0, len(images), CPU_BLOCK)
        ]
        try:
            with ThreadPoolExecutor(
                min(threads, len(blocks)), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                embeddings = torch.cat(list(pool.map(self._forward, blocks)))
        finally:
            torch.set_num_threads(threads)  # a part of this setting is the process's
        return _checked(embeddings.numpy(), len(images), self.name)

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        """Ask for embeddings of faces in some views; what is returned waits for them.

        All of a device's work is asked for by the caller's thread, which never waits for it here:
        threads that ask side by side would wait for the interpreter at every operation.
        """
        if self.device == "cpu":
            return super().start(images, views)
        with torch.get_device_module(self.device).stream(self._stream):
            pinned = torch.from_numpy(np.ascontiguousarray(images)).pin_memory()
            moved = pinned.to(self.device, non_blocking=True)
            on_host: dict[View, torch.Tensor] = {
                view: self._forward(moved if view == "original" else moved.flip(2)).to(
                    "cpu", non_blocking=True
                )
                for view in views
            }
            done = self._stream.record_event()

        def wait() -> Embeddings:
            done.synchronize()
            return {
                view: _checked(embeddings.numpy(), len(images), self.name)
                for view, embeddings in on_host.items()
            }

        return wait

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 of faces uint8 [B, 112, 112, 3], both on the device."""
        half = AUTOCAST.get(self.precision)
        # Autocast's cache of weights would be shared by threads that do not wait for each other.
        with torch.autocast(
            images.device.type, half, enabled=half is not None, cache_enabled=False
        ):
            pixels = self._pixels(images).to(memory_format=self._memory_format)
            embeddings = self._module(pixels)
        if not isinstance(embeddings, torch.Tensor):
            raise GkdError(
                f"{self.name}: expected embeddings [{len(images)}, D] for {len(images)} "
                f"images, got a {type(embeddings).__name__}; the teacher must return one tensor"
            )
        return embeddings.float()

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """``Preprocess.apply`` on the device, to the same bits."""
        scale, shift = _affine(self.preprocess, images.device)
        images = images.flip(3) if self.preprocess.bgr else images
        return (images * scale + shift).permute(0, 3, 1, 2)


@functools.cache
def _affine(preprocess: Preprocess, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What pixels are multiplied by, and what is added; a copy to a GPU waits for its work."""
    scale = 1 / torch.tensor(preprocess.std, device=device)
    return scale, -torch.tensor(preprocess.mean, device=device) * scale


class OnnxEmbedder(Embedder):
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
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
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

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        """Ask for embeddings of faces in some views; what is returned waits for them."""
        wait = super().start(images, views)
        return wait if self.device == "cpu" else self._pool.submit(wait).result

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
