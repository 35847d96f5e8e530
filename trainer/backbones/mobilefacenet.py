"""MobileFaceNet, blocks 1-4-6-2, and the large one, blocks 2-8-12-4.

Chen et al., MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile
Devices, 2018, in the form of arcface_torch's ``mbf`` and ``mbf_large`` (deepinsight/insightface),
with its state-dict keys.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from gkd.trainer.backbones.common import (
    Family,
    InputPool,
    Layers,
    Sizes,
    freeze_at_one,
    halved,
    input_size_of,
    numbered,
    scaled,
)

BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "mobilefacenet": (1, 4, 6, 2),
    "mbf_large": (2, 8, 12, 4),
}
# The expansions and the last convolution are the same at every width, as published.
HEAD_CHANNELS = 512


class ConvBlock(Layers):
    """Convolution, BatchNorm and, unless ``linear``, PReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        activation = [] if linear else [nn.PReLU(outputs)]
        super().__init__(convolution, nn.BatchNorm2d(outputs), *activation)


class Bottleneck(Layers):
    """Expansion to ``hidden`` channels, depthwise 3x3, linear projection."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int, *, stride: int = 1, residual: bool = False
    ) -> None:
        super().__init__(
            ConvBlock(inputs, hidden),
            ConvBlock(hidden, hidden, 3, stride=stride, padding=1, groups=hidden),
            ConvBlock(hidden, outputs, linear=True),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = super().forward(x)
        return x + y if self.residual else y


class Residuals(Layers):
    """Bottlenecks, each added to its input."""

    def __init__(self, channels: int, hidden: int, blocks: int) -> None:
        super().__init__(
            *(Bottleneck(channels, channels, hidden, residual=True) for _ in range(blocks))
        )


class GlobalDepthwise(Layers):
    """A depthwise convolution over the full feature map, then the embedding."""

    def __init__(self, side: int, embedding_dim: int) -> None:
        norm = nn.BatchNorm1d(embedding_dim)
        freeze_at_one(norm)
        super().__init__(
            ConvBlock(HEAD_CHANNELS, HEAD_CHANNELS, side, groups=HEAD_CHANNELS, linear=True),
            nn.Flatten(),
            nn.Linear(HEAD_CHANNELS, embedding_dim, bias=False),
            norm,
        )


class MobileFaceNet(nn.Module):
    """Float images [B, 3, 112, 112] to un-normalised embeddings [B, embedding_dim].

    ``width`` is the published ``scale``: 64 x width channels at first, 128 x width later.
    ``input_size`` 56 or 28 pools the images first. If the first of ``blocks`` is 1, a convolution
    replaces the first bottlenecks.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int] = BLOCKS["mobilefacenet"],
        *,
        embedding_dim: int = 512,
        width: float = 2.0,
        input_size: int = 112,
    ) -> None:
        super().__init__()
        narrow, wide = scaled(64, width), scaled(128, width)
        # 64 groups at 128 channels too: not depthwise, but as published.
        second = ConvBlock(narrow, narrow, 3, padding=1, groups=math.gcd(64, narrow))
        self.pool = InputPool(input_size)
        self.layers = nn.ModuleList(
            [
                ConvBlock(3, narrow, 3, stride=2, padding=1),
                second if blocks[0] == 1 else Residuals(narrow, 128, blocks[0]),
                Bottleneck(narrow, narrow, 128, stride=2),
                Residuals(narrow, 128, blocks[1]),
                Bottleneck(narrow, wide, 256, stride=2),
                Residuals(wide, 256, blocks[2]),
                Bottleneck(wide, wide, 512, stride=2),
                Residuals(wide, 256, blocks[3]),
            ]
        )
        self.conv_sep = ConvBlock(wide, HEAD_CHANNELS)
        self.features = GlobalDepthwise(halved(input_size, times=4), embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, 3, 112, 112] to [B, embedding_dim]."""
        x = self.pool(images)
        for layer in self.layers:
            x = layer(x)
        embeddings: Tensor = self.features(self.conv_sep(x))
        return embeddings


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    last = ".layers.0.layers.0.weight"
    blocks = tuple(numbered(state, f"layers.{stage}.layers.", last) for stage in (1, 3, 5, 7))
    # The convolution that replaces the first bottlenecks has no number.
    blocks = (blocks[0] or 1, *blocks[1:])
    return next((name for name, expected in BLOCKS.items() if blocks == expected), None)


def _sizes(name: str, state: Mapping[str, Tensor]) -> Sizes:
    width = state["layers.0.layers.0.weight"].shape[0] / 64
    last_map = state["features.layers.0.layers.0.weight"]
    return Sizes(
        state["features.layers.2.weight"].shape[0], width, input_size_of(last_map[0].numel(), 1)
    )


FAMILY = Family(
    widths={"mobilefacenet": 2.0, "mbf_large": 4.0},
    build=lambda name, sizes: MobileFaceNet(BLOCKS[name], **sizes._asdict()),
    recognise=_recognise,
    size_keys={
        "layers.0.layers.0.weight": 4,
        "features.layers.2.weight": 2,
        "features.layers.0.layers.0.weight": 4,
    },
    sizes=_sizes,
)
