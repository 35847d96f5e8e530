"""What the backbone families share: input pooling and the size of feature maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.storage.images import FACE_SHAPE

FACE_SIZE = FACE_SHAPE[0]
INPUT_SIZES = (112, 56, 28)


class InputPool(nn.Module):
    """Average-pools 112x112 images to the network's own input size; no parameters.

    Smaller networks work on smaller images, yet everything outside keeps one interface.
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        if input_size not in INPUT_SIZES:
            raise ConfigError(
                f"student.input_size: expected one of {', '.join(map(str, INPUT_SIZES))}, got "
                f"{input_size}: {FACE_SIZE}x{FACE_SIZE} images are pooled by a whole factor"
            )
        self.factor = FACE_SIZE // input_size

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, C, 112, 112] to [B, C, input_size, input_size]."""
        return images if self.factor == 1 else F.avg_pool2d(images, self.factor)


def halved(size: int, times: int) -> int:
    """Side of a feature map after ``times`` convolutions of stride 2 (each rounds up)."""
    for _ in range(times):
        size = -(-size // 2)
    return size


def scaled(channels: int, width: float) -> int:
    """Channels at a width multiplier.

    Raises:
        ConfigError: where the width leaves no whole number of channels.
    """
    result = channels * width
    if result < 1 or result != int(result):
        raise ConfigError(
            f"student.width: {channels} channels times {width:g} is {result:g}, expected a whole "
            "number; take a multiple of 1/16"
        )
    return int(result)


@torch.no_grad()
def freeze_at_one(norm: nn.BatchNorm1d) -> None:
    """Fix the weight of the embedding's BatchNorm at 1, as the field does: only its bias learns."""
    norm.weight.fill_(1.0)
    norm.weight.requires_grad_(False)
