"""IResNet: pre-activation residual networks of face recognition.

Duta et al., Improved Residual Networks for Image and Video Recognition, 2020, in the form of
arcface_torch (deepinsight/insightface), with its state-dict keys.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from gkd.trainer.backbones.common import (
    LEAST_STRIDED,
    Family,
    InputPool,
    Sizes,
    affine_as_stored,
    freeze_at_one,
    halved,
    input_size_of,
    numbered,
    scaled,
)

BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
CHANNELS = (64, 128, 256, 512)


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class IBasicBlock(nn.Module):
    """BN - conv - BN - PReLU - conv - BN, plus the input (projected if the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _conv3x3(outputs, outputs, stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        total: Tensor = self.bn3(self.conv2(x)) + shortcut
        return total


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = IBasicBlock(inputs, outputs, stride=2)
    return nn.Sequential(first, *(IBasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


class IResNet(nn.Module):
    """Float images [B, 3, 112, 112] to un-normalised embeddings [B, embedding_dim].

    ``width`` multiplies the channels 64-128-256-512; ``input_size`` 56 or 28 pools the images
    first.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: int = 112,
    ) -> None:
        super().__init__()
        stem, *channels = (scaled(c, width, least=LEAST_STRIDED) for c in (CHANNELS[0], *CHANNELS))
        side = halved(input_size, times=4)
        self.pool = InputPool(input_size)
        self.conv1 = _conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.prelu = nn.PReLU(stem)
        self.layer1 = _stage(stem, channels[0], blocks[0])
        self.layer2 = _stage(channels[0], channels[1], blocks[1])
        self.layer3 = _stage(channels[1], channels[2], blocks[2])
        self.layer4 = _stage(channels[2], channels[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3] * side * side, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)
        freeze_at_one(self.features)

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, 3, 112, 112] to [B, embedding_dim]."""
        x = self.prelu(self.bn1(self.conv1(self.pool(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        embeddings: Tensor = self.features(self.fc(self.bn2(x).flatten(1)))
        return embeddings


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    blocks = tuple(numbered(state, f"layer{stage}.", ".conv1.weight") for stage in (1, 2, 3, 4))
    return next((name for name, expected in BLOCKS.items() if blocks == expected), None)


def _sizes(name: str, state: Mapping[str, Tensor]) -> Sizes:
    width = state["conv1.weight"].shape[0] / CHANNELS[0]
    embedding_dim, inputs = state["fc.weight"].shape
    return Sizes(embedding_dim, width, input_size_of(inputs, CHANNELS[-1] * width))


FAMILY = Family(
    widths=dict.fromkeys(BLOCKS, 1.0),
    build=lambda name, sizes: IResNet(BLOCKS[name], **sizes._asdict()),
    recognise=_recognise,
    size_keys={"conv1.weight": 4, "fc.weight": 2},
    sizes=_sizes,
    adapt=affine_as_stored("features"),
)
