"""Backbones by name."""

import difflib

from torch import nn

from gkd.storage.errors import ConfigError
from gkd.trainer.backbones.iresnet import BLOCKS, IResNet
from gkd.trainer.backbones.mobilefacenet import MobileFaceNet

BACKBONES = (*BLOCKS, "mobilefacenet")


def check_name(name: str) -> None:
    """Refuse a backbone that does not exist.

    Raises:
        ConfigError: naming the ones that do.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}{hint}")


def default_width(name: str) -> float:
    """Width that was published: 2 for ``mobilefacenet`` (its ``scale``), 1 for the others."""
    return 2.0 if name == "mobilefacenet" else 1.0


def build_backbone(
    name: str, *, embedding_dim: int = 512, width: float | None = None, input_size: int = 112
) -> nn.Module:
    """A freshly initialised backbone: float images [B, 3, 112, 112] to [B, embedding_dim].

    ``width`` multiplies the channels, None means ``default_width``. With an ``input_size`` of 56
    or 28 the network average-pools its 112x112 images first.

    Raises:
        ConfigError: for an unknown name, or a width or input size that cannot be.
    """
    check_name(name)
    width = default_width(name) if width is None else width
    if name == "mobilefacenet":
        return MobileFaceNet(embedding_dim=embedding_dim, width=width, input_size=input_size)
    return IResNet(BLOCKS[name], embedding_dim=embedding_dim, width=width, input_size=input_size)
