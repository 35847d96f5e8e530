"""The device and precision that a student is trained in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from gkd.storage.errors import ConfigError
from gkd.storage.util.torch_device import Precision, resolve_device, resolve_precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """``cpu`` or ``cuda``, for ``auto`` a GPU if there is one; ranks each have their current GPU.

    Raises:
        ConfigError: if a GPU is requested and there is none.
    """
    return torch.device(torch.device(resolve_device(name, option="train.device")).type)


def choose_dtype(precision: Precision | Literal["auto"], device: torch.device) -> torch.dtype:
    """The dtype that the backbone computes in.

    Raises:
        ConfigError: if float16 is requested without a GPU.
    """
    if precision == "float16" and device.type == "cpu":
        raise ConfigError(
            "train.precision: float16 needs a GPU; set train.precision=float32 or bfloat16"
        )
    return DTYPES[resolve_precision(precision, device.type, without_bfloat16="float32")]


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
