"""The published networks, written from their key names alone: torch and nothing of gkd.

Tests put this file instead of arcface_torch's package ``backbones``: ``get_model`` and
``MobileFaceNet`` are called as there.
"""

from typing import Any

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3)
        self.bn2, self.prelu = nn.BatchNorm2d(outputs), nn.PReLU(outputs)
        self.conv2, self.bn3 = conv(outputs, outputs, 3, stride=stride), nn.BatchNorm2d(outputs)
        if stride == 2:
            shape = conv(inputs, outputs, 1, stride=2), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(*shape)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (self.downsample(x) if hasattr(self, "downsample") else x)


class IResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], num_features: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.prelu = conv(3, 64, 3), nn.BatchNorm2d(64), nn.PReLU(64)
        channels = (64, 64, 128, 256, 512)
        for stage in range(4):
            before, after = channels[stage : stage + 2]
            rest = [Block(after, after, 1) for _ in range(blocks[stage] - 1)]
            layer = nn.Sequential(Block(before, after, 2), *rest)
            self.add_module(f"layer{stage + 1}", layer)
        self.bn2, self.fc = nn.BatchNorm2d(512), nn.Linear(512 * 7 * 7, num_features)
        self.features = nn.BatchNorm1d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        y: Tensor = self.features(self.fc(torch.flatten(self.bn2(x), 1)))
        return y


class Layers(nn.Module):
    """Modules in a row under the name ``layers``, perhaps added to their input."""

    def __init__(self, *modules: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.layers, self.residual = nn.Sequential(*modules), residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def unit(inputs: int, outputs: int, kernel: int = 1, *, active: bool = True, **more: int) -> Layers:
    activation = [nn.PReLU(outputs)] if active else []
    return Layers(conv(inputs, outputs, kernel, **more), nn.BatchNorm2d(outputs), *activation)


def bottleneck(inputs: int, outputs: int, hidden: int, stride: int, residual: bool) -> Layers:
    wide = unit(hidden, hidden, 3, stride=stride, groups=hidden)
    return Layers(
        unit(inputs, hidden), wide, unit(hidden, outputs, active=False), residual=residual
    )


class MobileFaceNet(nn.Module):
    def __init__(
        self,
        fp16: bool = False,
        num_features: int = 512,
        scale: int = 2,
        blocks: tuple[int, ...] = (1, 4, 6, 2),
    ) -> None:
        super().__init__()
        a, b = 64 * scale, 128 * scale

        def repeated(channels: int, hidden: int, times: int) -> Layers:
            blocks = [bottleneck(channels, channels, hidden, 1, True) for _ in range(times)]
            return Layers(*blocks)

        self.layers = nn.Sequential(
            unit(3, a, 3, stride=2),
            unit(a, a, 3, groups=64) if blocks[0] == 1 else repeated(a, 128, blocks[0]),
            bottleneck(a, a, 128, 2, False),
            repeated(a, 128, blocks[1]),
            bottleneck(a, b, 256, 2, False),
            repeated(b, 256, blocks[2]),
            bottleneck(b, b, 512, 2, False),
            repeated(b, 256, blocks[3]),
        )
        self.conv_sep = unit(b, 512)
        depthwise = Layers(nn.Conv2d(512, 512, 7, groups=512, bias=False), nn.BatchNorm2d(512))
        last = nn.Linear(512, num_features, bias=False), nn.BatchNorm1d(num_features)
        self.features = Layers(depthwise, nn.Flatten(), *last)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.features(self.conv_sep(self.layers(x)))
        return y


def get_model(name: str, **options: Any) -> nn.Module:
    if name == "mbf":
        return MobileFaceNet(**options)
    if name == "mbf_large":
        return MobileFaceNet(**{"scale": 4, **options}, blocks=(2, 8, 12, 4))
    return IResNet({"r18": (2, 2, 2, 2), "r34": (3, 4, 6, 3)}[name], options["num_features"])
