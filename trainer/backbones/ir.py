"""The IR family: residual networks with an input layer, a body and an output layer.

In the two published forms, with their state-dict keys:

- ``ir_*`` and ``ir_se_*``: AdaFace's ``net.py`` (mk-minchul/AdaFace; TFace and CVLface have the
  same), with a BatchNorm between the convolutions of a unit, bottlenecks in the 152 and 200, and a
  last BatchNorm without weights. There the network returns a normalised embedding and its
  length; here an un-normalised one.
- ``evolve_ir_*`` and ``evolve_ir_se_*``: face.evoLVe's ``model_irse.py`` (ZhaoJ9014/face.evoLVe),
  without that BatchNorm and without bottlenecks, and with weights in the last.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from gkd.trainer.backbones.common import (
    LEAST_STRIDED,
    Family,
    InputPool,
    Sizes,
    affine_as_stored,
    halved,
    input_size_of,
    numbered,
    scaled,
)

STEM = 64
CHANNELS = (64, 128, 256, 512)
# A bottleneck's output has four times the channels of its inner convolution.
EXPANSION = 4
REDUCTION = 16
DROPOUT = {False: 0.4, True: 0.5}
BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    101: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class Form(NamedTuple):
    """What distinguishes the networks of the family."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    squeeze: bool  # with squeeze and excitation
    evolve: bool


FORMS: dict[str, Form] = {
    **{f"ir_{n}": Form(BLOCKS[n], n > 101, False, False) for n in (18, 34, 50, 101, 152, 200)},
    **{f"ir_se_{n}": Form(BLOCKS[n], n > 101, True, False) for n in (50, 101, 152, 200)},
    **{f"evolve_ir_{n}": Form(BLOCKS[n], False, False, True) for n in (50, 101, 152)},
    **{f"evolve_ir_se_{n}": Form(BLOCKS[n], False, True, True) for n in (50, 101, 152)},
}


class SqueezeExcitation(nn.Module):
    """Weights each channel by a function of all channels' means (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // REDUCTION)
        self.fc1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.fc2 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, channels, H, W], the same shape out."""
        weights = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        y: Tensor = x * weights
        return y


class Unit(nn.Module):
    """A residual unit: its ``res_layer``, plus the input, projected if the channels change."""

    def __init__(self, inputs: int, outputs: int, stride: int, form: Form) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(*_layers(inputs, outputs, stride, form))
        if form.squeeze:
            name = str(len(self.res_layer)) if form.evolve else "se_block"
            self.res_layer.add_module(name, SqueezeExcitation(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return y


def _layers(inputs: int, outputs: int, stride: int, form: Form) -> list[nn.Module]:
    def convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Module:
        return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)

    layers: list[nn.Module] = [nn.BatchNorm2d(inputs)]
    if form.bottleneck:
        inner = outputs // EXPANSION
        layers += [convolution(inputs, inner, 1), nn.BatchNorm2d(inner), nn.PReLU(inner)]
        layers += [convolution(inner, inner, 3), nn.BatchNorm2d(inner), nn.PReLU(inner)]
        return [*layers, convolution(inner, outputs, 1, stride), nn.BatchNorm2d(outputs)]
    layers += [convolution(inputs, outputs, 3)]
    layers += [] if form.evolve else [nn.BatchNorm2d(outputs)]
    layers += [nn.PReLU(outputs), convolution(outputs, outputs, 3, stride)]
    return [*layers, nn.BatchNorm2d(outputs)]


class IR(nn.Module):
    """Float images [B, 3, 112, 112] to un-normalised embeddings [B, embedding_dim].

    ``width`` multiplies the channels; ``input_size`` 56 or 28 pools the images first.
    """

    def __init__(
        self,
        form: Form,
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: int = 112,
    ) -> None:
        super().__init__()
        expansion = EXPANSION if form.bottleneck else 1
        published = (STEM, *(c * expansion for c in CHANNELS))
        stem, *channels = (scaled(c, width, least=LEAST_STRIDED) for c in published)
        side = halved(input_size, times=4)
        self.pool = InputPool(input_size)
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem)
        )
        units: list[nn.Module] = []
        for inputs, outputs, blocks in zip([stem, *channels], channels, form.blocks, strict=False):
            units.append(Unit(inputs, outputs, 2, form))
            units += [Unit(outputs, outputs, 1, form) for _ in range(blocks - 1)]
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels[-1]),
            nn.Dropout(DROPOUT[form.evolve]),
            nn.Flatten(),
            nn.Linear(channels[-1] * side * side, embedding_dim),
            nn.BatchNorm1d(embedding_dim, affine=form.evolve),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, 3, 112, 112] to [B, embedding_dim]."""
        embeddings: Tensor = self.output_layer(self.body(self.input_layer(self.pool(images))))
        return embeddings


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    """By the number of units and the layers of the first one."""
    units = numbered(state, "body.", ".res_layer.0.weight")
    first = "body.0.res_layer."
    layers = {key.removeprefix(first).partition(".")[0] for key in state if key.startswith(first)}
    evolve = not any(f"{first}{index}.running_mean" in state for index in (2, 5))
    squeeze = ("5" if evolve else "se_block") in layers
    for name, form in FORMS.items():
        expected = (sum(form.blocks), form.bottleneck, form.squeeze, form.evolve)
        if expected == (units, "8" in layers, squeeze, evolve):
            return name
    return None


def _sizes(name: str, state: Mapping[str, Tensor]) -> Sizes:
    width = state["input_layer.0.weight"].shape[0] / STEM
    embedding_dim, inputs = state["output_layer.3.weight"].shape
    expansion = EXPANSION if FORMS[name].bottleneck else 1
    return Sizes(embedding_dim, width, input_size_of(inputs, CHANNELS[-1] * expansion * width))


FAMILY = Family(
    widths=dict.fromkeys(FORMS, 1.0),
    build=lambda name, sizes: IR(FORMS[name], **sizes._asdict()),
    recognise=_recognise,
    size_keys={"input_layer.0.weight": 4, "output_layer.3.weight": 2},
    sizes=_sizes,
    adapt=affine_as_stored("output_layer.4"),
)
