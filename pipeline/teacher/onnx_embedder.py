"""Teachers that are ONNX files, run by onnxruntime."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.pipeline.teacher.embedder import (
    FACE_SIZE,
    IN_FLIGHT,
    Embedder,
    Embeddings,
    check_embeddings,
    probe_embedding_dim,
)
from gkd.storage.cache.spec import Preprocess, View
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.extras import require
from gkd.storage.util.files import sha256_file
from gkd.storage.util.input_files import refuse_foreign
from gkd.storage.util.torch_device import Precision, own_cuda
from gkd.storage.util.torchrun_env import log_rank0, usable_cores

# Batch sizes of networks that declare any.
PROBED = (*range(1, 11), 12, 16, 20, 24, 32, 48, 64, 96, 100, 128, 256)
MAX_BATCH = 4096
_EMBEDDING = re.compile(r"(?i)embed|feat|fc1")


class OnnxEmbedder(Embedder):
    """Any ONNX network with one image input [N, 3, 112, 112], run by onnxruntime.

    It is probed with two batch sizes. One that declares a batch of any size and was traced with a
    constant one is served in that size, and batches are padded to it. ``output`` names the
    embedding among several outputs; by default it is the one that has the shape of embeddings
    [N, D], D above 1, by its name if there are several. ``threads`` are onnxruntime's own, by
    default one per core; the ranks of a node share them.

    Raises:
        ConfigError: if the file is missing, is no ONNX file or has another input, the device does
            not exist or is not used, no output or several could be the embedding, or onnxruntime
            is not installed.
        GkdError: if the network fails.
    """

    compiled = False

    def __init__(
        self,
        path: Path,
        preprocess: Preprocess,
        *,
        device: str = "auto",
        output: str | None = None,
        threads: int | None = None,
    ) -> None:
        runtime = require("onnxruntime", "onnx")
        if not path.exists():
            expected = "a teacher's ONNX file"
            raise ConfigError(path=path, expected=expected, got="nothing", remedy="check the path")
        refuse_foreign(path, "an ONNX network")
        self.name = path.stem
        self.sha256 = onnx_sha256(path)
        self.preprocess = preprocess
        self.precision: Precision = "float32"
        self.device = _device(runtime, device)
        self._session = _session(runtime, path, self.device, threads or usable_cores())
        self._new_options = runtime.RunOptions
        if self.device != "cpu" and "CUDAExecutionProvider" not in self._session.get_providers():
            self.device = _without_cuda(device, path)
        self._input, self._fixed_batch, self._dtype = _image_input(self._session, path)
        self._pool, self._runs = ThreadPoolExecutor(IN_FLIGHT), ThreadPoolExecutor(IN_FLIGHT)
        self._live: set[Any] = set()  # options of the runs that have not ended
        self.arch = "onnx" if output is None else f"onnx:{output}"
        self._output = self._probe(path, output)
        self.embedding_dim = probe_embedding_dim(self)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D]."""
        pixels = self.preprocess.apply(images).astype(self._dtype, copy=False)
        batch = self._fixed_batch or len(pixels)
        padding = np.zeros((-len(pixels) % batch, *pixels.shape[1:]), pixels.dtype)
        if len(padding):
            pixels = np.concatenate([pixels, padding])
        parts = []
        for start in range(0, len(pixels), batch):
            (embeddings,) = self._run(pixels[start : start + batch], [self._output])
            parts.append(check_embeddings(_flat(embeddings), batch, self.name))
        return np.concatenate(parts)[: len(images)]

    def _run(self, pixels: npt.NDArray[Any], outputs: list[str]) -> list[npt.NDArray[Any]]:
        """Run the network in another thread, so that a signal ends it whatever it computes.

        Raises:
            GkdError: if it fails.
        """
        options = self._new_options()
        self._live.add(options)
        run = self._runs.submit(self._session.run, outputs, {self._input: pixels}, options)
        try:
            return [np.asarray(array) for array in run.result()]
        except Exception as error:  # onnxruntime's errors have no common base class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GkdError(
                f"{self.name}: the network fails on {len(pixels)} images: {reason}",
                remedy="export it again with a batch axis of any size",
            ) from error
        except BaseException:
            self._terminate()
            raise
        finally:
            self._live.discard(options)

    def _terminate(self) -> None:
        for options in list(self._live):
            options.terminate = True

    def _probe(self, path: Path, asked: str | None) -> str:
        """Find the batch size that the network takes, and the output that is the embedding."""
        names = [output.name for output in self._session.get_outputs()]
        if asked is not None and asked not in names:
            raise ConfigError(
                f"--output {asked}", path=path, expected=f"one of {', '.join(names)}", got=asked
            )
        failed: Exception | None = None

        def fitting(size: int) -> Mapping[str, npt.NDArray[Any]]:
            """Outputs that are one vector for each of so many images."""
            nonlocal failed
            pixels = np.full((size, FACE_SIZE, FACE_SIZE, 3), 127, np.uint8)
            inputs = self.preprocess.apply(pixels).astype(self._dtype, copy=False)
            try:
                arrays = dict(zip(names, map(_flat, self._run(inputs, names)), strict=True))
            except GkdError as error:
                failed = failed or error
                return {}
            found = {n: a for n, a in arrays.items() if a.ndim == 2 and len(a) == size < a.size}
            return found if asked is None or asked in found else {}

        if self._fixed_batch is not None:
            fits = fitting(self._fixed_batch)
        elif not ((fits := fitting(3)) and fitting(2)):
            for size in PROBED:
                if fits := fitting(size):
                    log_rank0(
                        f"{path}: declares batches of any size and takes {size} alone: it is run "
                        f"on {size} images at a time, which is slow; export it with a batch axis "
                        "of any size"
                    )
                    self._fixed_batch = size
                    break
        if fits:
            return asked or _choose_output(fits, path)
        shapes = ", ".join(f"{o.name} {o.shape}" for o in self._session.get_outputs())
        if failed is not None:
            raise failed
        raise ConfigError(
            path=path,
            expected="an output of embeddings [N, D]: one vector per image",
            got=shapes,
            remedy="export the network without what follows its embedding",
        )

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        """Begin to embed faces in some views; the function returned waits for the embeddings."""
        wait = super().start(images, views)
        if self.device == "cpu":
            return wait
        begun = self._pool.submit(wait)

        def finish() -> Embeddings:
            try:
                return begun.result()
            except BaseException:  # a signal among them, which this thread alone hears
                self._terminate()
                raise

        return finish


def _flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[N, D] of [N, D, 1, 1]."""
    return array.reshape(array.shape[:2]) if array.shape[2:] == (1, 1) else array


def _choose_output(fits: Mapping[str, npt.NDArray[Any]], path: Path) -> str:
    named = [name for name in fits if _EMBEDDING.search(name)]
    for names in (list(fits), named):
        if len(names) == 1:
            return names[0]
    raise ConfigError(
        "has several outputs that could be its embeddings",
        path=path,
        expected="one",
        got=", ".join(f"{name} {list(array.shape)}" for name, array in fits.items()),
        remedy=f"name one, for example --output {next(iter(fits))}",
    )


def _without_cuda(asked: str, path: Path) -> str:
    """``cpu``, or an error if CUDA was asked for: onnxruntime has it and could not load it."""
    reason = "onnxruntime could not load CUDA (its own libraries, cuDNN or the driver are missing)"
    if asked != "auto":
        raise ConfigError(
            f"--device {asked}: {reason}",
            path=path,
            remedy="install what onnxruntime-gpu needs, or use --device cpu",
        )
    log_rank0(f"{path}: {reason}: the network runs on the CPU")
    return "cpu"


def _device(runtime: Any, device: str) -> str:
    usable = "CUDAExecutionProvider" in runtime.get_available_providers()
    if device == "auto":
        device = "cuda" if usable else "cpu"
    if device != "cpu" and not (usable and device.startswith("cuda")):
        raise ConfigError(
            f"device: expected auto or cpu, got {device!r}, which this onnxruntime cannot use "
            f"(it has {', '.join(runtime.get_available_providers())}); install onnxruntime-gpu or "
            "use --device cpu"
        )
    return own_cuda(device)


def _session(runtime: Any, path: Path, device: str, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what is fatal; errors are raised
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
    try:
        # Without fallback: it would run on the CPU in silence where a GPU fails.
        return runtime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    # onnxruntime's errors have no common base class.
    except Exception as error:
        reason = str(error).splitlines()[0]
        expected, remedy = "an ONNX network that onnxruntime can run", "export it again"
        raise ConfigError(path=path, expected=expected, got=reason, remedy=remedy) from error


def _image_input(session: Any, path: Path) -> tuple[str, int | None, npt.DTypeLike]:
    """The input's name, its batch size if that is fixed, and its type."""
    types: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs = session.get_inputs()
    shape = list(inputs[0].shape) if inputs else []
    # Axes of any length have a name instead of a number.
    fits = len(shape) == 4 and all(
        length == expected or not isinstance(length, int)
        for length, expected in zip(shape[1:], (3, FACE_SIZE, FACE_SIZE), strict=True)
    )
    if len(inputs) != 1 or inputs[0].type not in types or not fits:
        found = ", ".join(f"{i.name!r} {i.type} {list(i.shape)}" for i in inputs) or "none"
        last = shape[3:] == [3]
        raise ConfigError(
            path=path,
            expected="one input, tensor(float) or tensor(float16) of shape "
            f"[N, 3, {FACE_SIZE}, {FACE_SIZE}]",
            got=found,
            remedy=f"export the network with {'its channels first' if last else 'such an input'}",
        )
    fixed = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
    if fixed is not None and fixed > MAX_BATCH:
        raise ConfigError(
            path=path,
            expected=f"a batch of at most {MAX_BATCH:,} images",
            got=f"a fixed one of {fixed:,}",
            remedy="export the network with a batch axis of any size",
        )
    return inputs[0].name, fixed, types[inputs[0].type]


def onnx_sha256(path: Path) -> str:
    """Hex sha256 of a network: of its file, or of the hashes of all its files if it has several.

    Raises:
        ConfigError: if it is no ONNX file, or a file of weights is missing, truncated or in
            another folder.
    """
    weights = [_weight_file(path, name, size) for name, size in weight_files(path).items()]
    if not weights:
        return sha256_file(path)
    lines = [f"{sha256_file(file)}  {file.name}\n" for file in (path, *weights)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(path: Path) -> dict[str, int]:
    """Names of the files that an ONNX file refers to for weights, and their least sizes.

    Raises:
        ConfigError: if it is no ONNX file.
    """
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    # protobuf's own error, whose module differs between versions.
    except Exception as error:
        got, remedy = f"a file that cannot be parsed: {error}", "get it again"
        raise ConfigError(path=path, expected="an ONNX network", got=got, remedy=remedy) from error
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            name = fields.get("location", "")
            numbers = [fields.get(key, "0") for key in ("offset", "length")]
            if not all(number.isdecimal() for number in numbers):
                expected, remedy = f"offset and length of weights in {name!r}", "export it again"
                raise ConfigError(path=path, expected=expected, got=numbers, remedy=remedy)
            sizes[name] = max(sum(map(int, numbers)), sizes.get(name, 0))
    return dict(sorted(sizes.items()))


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, in whatever field, graph or function it is."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in value if isinstance(value, Sequence) else (value,):
            if field.message_type.name == "TensorProto":
                yield item
            else:
                yield from _tensors(item)


def _weight_file(path: Path, name: str, size: int) -> Path:
    """The file ``name`` beside a network, which must not leave its folder."""
    file = path.parent / name
    plain = len(PurePosixPath(name).parts) == 1 and name not in ("", "..")
    if not plain or file.is_symlink() or not file.is_file():
        raise ConfigError(
            f"has weights in {name!r}, expected a file of that name beside it",
            path=path,
            remedy="get all of the network's files into one folder",
        )
    refuse_foreign(file, f"the weights of {path.name}", allowed=("zeros", "empty"))
    if file.stat().st_size < size:
        expected, got = f"{size:,} bytes of weights or more", f"{file.stat().st_size:,}"
        raise ConfigError(path=file, expected=expected, got=got, remedy="get it again")
    return file
