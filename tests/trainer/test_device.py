"""What products are rounded to, by device and precision; no GPU is needed to say so."""

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
def test_products_are_rounded_beside_half_precision_on_a_gpu_alone(
    device: str, dtype: torch.dtype, inside: str
) -> None:
    with matmul_precision(dtype, torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"
