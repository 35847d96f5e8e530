"""Precision of products by device and dtype; needs no GPU."""

import pytest
import torch

from gkd.trainer.device import matmul_precision


@pytest.mark.parametrize(
    ("device", "dtype", "inside"),
    [
        ("cuda", torch.bfloat16, "high"),
        ("cuda", torch.float16, "high"),
        ("cuda", torch.float32, "highest"),
        ("cpu", torch.bfloat16, "highest"),
    ],
)
def test_only_a_gpu_in_half_precision_rounds_products(
    device: str, dtype: torch.dtype, inside: str
) -> None:
    with matmul_precision(dtype, torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"
