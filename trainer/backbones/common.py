"""What the backbone families share: their description, input pooling, sizes of feature maps."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.storage.records.images import FACE_SHAPE

FACE_SIZE = FACE_SHAPE[0]
INPUT_SIZES = (112, 56, 28)
# Of an input to a 1x1 convolution of stride 2: for fewer, oneDNN's gradient of its weights writes
# past its memory in the channels_last format (uxlfoundation/oneDNN#6035, seen on AVX2).
LEAST_STRIDED = 8


class Sizes(NamedTuple):
    """What is read from the shapes of a state dict: the arguments of ``Family.build``."""

    embedding_dim: int
    width: float
    input_size: int


@dataclass(frozen=True)
class Family:
    """Networks of one kind, and how their state dicts are recognised.

    widths      name -> the published width
    build       (name, sizes) -> a freshly initialised network
    recognise   state dict -> the name of the network with these blocks, or None
    size_keys   keys whose shapes determine the sizes, and their numbers of dimensions
    sizes       (name, state dict with these keys) -> sizes
    adapt       (network, state dict) changes a network to a published variant of it
    optional    suffixes of keys that a file may lack: the embeddings do not depend on them
    """

    widths: Mapping[str, float]
    build: Callable[[str, Sizes], nn.Module]
    recognise: Callable[[Mapping[str, Tensor]], str | None]
    size_keys: Mapping[str, int]
    sizes: Callable[[str, Mapping[str, Tensor]], Sizes]
    adapt: Callable[[nn.Module, Mapping[str, Tensor]], None] = lambda _module, _state: None
    optional: tuple[str, ...] = ("num_batches_tracked",)


def affine_as_stored(last: str) -> Callable[[nn.Module, Mapping[str, Tensor]], None]:
    """Give the last BatchNorm, of this name, weights exactly if a state dict has them."""

    def adapt(module: nn.Module, state: Mapping[str, Tensor]) -> None:
        parent, _, child = last.rpartition(".")
        norm = module.get_submodule(last)
        affine = any(f"{last}.{name}" in state for name in ("weight", "bias"))
        if isinstance(norm, nn.BatchNorm1d) and affine != norm.affine:
            changed = nn.BatchNorm1d(norm.num_features, eps=norm.eps, affine=affine)
            setattr(module.get_submodule(parent), child, changed)

    return adapt


def numbered(keys: Iterable[str], prefix: str, suffix: str) -> int:
    """How many different numbers follow ``prefix`` in keys that end in ``suffix``."""
    found = {
        key.removeprefix(prefix).partition(".")[0]
        for key in keys
        if key.startswith(prefix) and key.endswith(suffix)
    }
    return sum(part.isdecimal() for part in found)


def input_size_of(inputs: int, channels: float) -> int:
    """Input size of a network whose last feature map of ``channels`` has ``inputs`` values."""
    sides = {halved(size, times=4): size for size in INPUT_SIZES}
    # Any other side fits no network; the comparison of shapes reports it.
    return sides.get(math.isqrt(int(inputs / channels)), INPUT_SIZES[0])


class Layers(nn.Module):
    """Modules in a row, whose keys begin with ``layers.``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the modules one after the other."""
        y: Tensor = self.layers(x)
        return y


class InputPool(nn.Module):
    """Average-pools 112x112 images to the network's own input size; no parameters.

    So networks of smaller images have the same interface.
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        if input_size not in INPUT_SIZES:
            raise ConfigError(
                f"student.input_size: expected one of {', '.join(map(str, INPUT_SIZES))}, got "
                f"{input_size}: {FACE_SIZE}x{FACE_SIZE} images are pooled by an integer factor"
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


def scaled(channels: int, width: float, *, least: int = 1) -> int:
    """Channels at a width multiplier.

    Raises:
        ConfigError: if that is no whole number, or fewer than ``least``.
    """
    result = channels * width
    if result < least or result != int(result):
        raise ConfigError(
            f"student.width: {channels} channels times {width:g} is {result:g}, expected a whole "
            f"number of at least {least}; take a multiple of {max(1, least) / channels:g}"
        )
    return int(result)


@torch.no_grad()
def freeze_at_one(norm: nn.BatchNorm1d) -> None:
    """Fix the weight of the embedding's BatchNorm at 1: only its bias is trained."""
    norm.weight.fill_(1.0)
    norm.weight.requires_grad_(False)
