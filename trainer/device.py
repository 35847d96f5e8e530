"""The device and precision that a network runs in, and what they ask of its input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gkd.storage.cache.spec import Preprocess
from gkd.storage.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device for ``cpu``, ``cuda`` or ``auto``, which is a GPU if there is one.

    Raises:
        ConfigError: if a GPU is requested and there is none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("train.device: torch finds no GPU; set train.device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and found) else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that the backbone computes in.

    Raises:
        ConfigError: if float16 is requested without a GPU.
    """
    if precision == "auto":
        low = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if low else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise ConfigError(
            "train.precision: float16 needs a GPU; set train.precision=float32 or bfloat16"
        )
    return DTYPES[precision]


@contextmanager
def matmul_precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let a GPU compute float32 products in TF32 if ``dtype``, the backbone's, is coarser still."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def network_input(preprocess: Preprocess, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that computes ``Preprocess.apply`` on ``device``, bit for bit.

    It takes RGB images uint8 [B, H, W, 3] and returns float32 [B, 3, H, W], channels last in
    memory.
    """
    # Created once: copying them to a GPU in each step would make the host wait.
    scale = 1 / torch.tensor(preprocess.std, device=device)
    shift = -torch.tensor(preprocess.mean, device=device) * scale

    def apply(images: Tensor) -> Tensor:
        images = images.flip(3) if preprocess.bgr else images
        return images.mul(scale).add_(shift).permute(0, 3, 1, 2)

    return apply


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile works for ``device`` by compiling a small function.

    Raises:
        ConfigError: if it does not, for example because there is no C++ compiler.
    """
    # A cached result would hide that the next function cannot be compiled.
    compiled = torch.compile(
        lambda values: values.exp().sum(0), fullgraph=True, options={"fx_graph_cache": False}
    )
    try:
        compiled(torch.zeros(2, 16, device=device))
    except RuntimeError as error:  # the base of all errors of torch's compilers
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise ConfigError(
            f"train.compile: torch.compile does not work here ({reason}); install a C++ compiler "
            "(g++, or name another in CXX), or set train.compile=false"
        ) from error
