"""What a network runs on and computes in, by name."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gkd.storage.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        ConfigError: where a GPU is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("train.device: torch finds no GPU; set train.device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and found) else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the backbone computes in.

    Raises:
        ConfigError: for float16 without a GPU.
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
def products_for(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let a GPU round factors of float32 products to TF32, where ``dtype`` rounds more."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
