"""Teachers that are torch modules."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkd.pipeline.teacher.embedder import (
    Embedder,
    Embeddings,
    check_embeddings,
    probe_embedding_dim,
)
from gkd.storage.cache.spec import Preprocess, View
from gkd.storage.errors import GkdError
from gkd.storage.util.torch_device import (
    Precision,
    map_single_threaded,
    resolve_device,
    resolve_precision,
)

CPU_BLOCK = 16
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_pixels = functools.cache(Preprocess.on_device)


class TorchEmbedder(Embedder):
    """A torch module float [B, 3, 112, 112] -> [B, D] as a teacher, in evaluation mode.

    ``compile`` compiles it with torch.compile, at the first batch of each length.

    Raises:
        ConfigError: if the device does not exist.
        GkdError: if the module's output is not [B, D].
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
        self.precision = resolve_precision(precision, self.device, without_bfloat16="float16")
        self.compiled = compile
        if self.precision == "float32":  # a spec that says float32 does not mean TF32
            torch.backends.cudnn.allow_tf32 = False
        # Convolutions on GPUs are fastest if the channels come last.
        on_cpu = self.device == "cpu"
        self._memory_format = torch.contiguous_format if on_cpu else torch.channels_last
        module = module.to(torch.device(self.device)).eval()
        module = module.to(memory_format=self._memory_format)
        self._module = torch.compile(module) if compile else module
        if not on_cpu:
            backend = torch.get_device_module(self.device)
            backend.synchronize(self.device)  # before another stream uses the weights
            self._stream = backend.Stream(self.device)
        self.embedding_dim = probe_embedding_dim(self)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D]."""
        if self.device != "cpu":
            return self.start(images, ["original"])()["original"]
        # Blocks do not depend on the number of threads, which torchrun makes smaller for a rank,
        # and each is computed by one thread: so neither do the bits.
        blocks = [
            torch.from_numpy(np.ascontiguousarray(images[start : start + CPU_BLOCK]))
            for start in range(0, len(images), CPU_BLOCK)
        ]
        embeddings = torch.cat(map_single_threaded(self._forward, blocks))
        return check_embeddings(embeddings.numpy(), len(images), self.name)

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        """Begin to embed faces in some views; the function returned waits for the embeddings.

        The caller's thread issues all of a device's work and never waits for it here: several
        threads would compete for the interpreter at every operation.
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
                view: check_embeddings(embeddings.numpy(), len(images), self.name)
                for view, embeddings in on_host.items()
            }

        return wait

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 of faces uint8 [B, 112, 112, 3], both on the device."""
        half = AUTOCAST.get(self.precision)
        # Threads that do not wait for each other would share autocast's cache of weights.
        with torch.autocast(
            images.device.type, half, enabled=half is not None, cache_enabled=False
        ):
            pixels = _pixels(self.preprocess, images.device)(images)
            embeddings = self._module(pixels.to(memory_format=self._memory_format))
        if not isinstance(embeddings, torch.Tensor):
            raise GkdError(
                f"{self.name}: expected embeddings [{len(images)}, D] for {len(images)} "
                f"images, got a {type(embeddings).__name__}; the teacher must return one tensor"
            )
        return embeddings.float()
