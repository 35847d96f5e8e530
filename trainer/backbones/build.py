"""Backbones by name."""

import difflib
from typing import Literal, get_args

from torch import nn

from gkd.storage.errors import ConfigError
from gkd.trainer.backbones import ir, iresnet, mobilefacenet, vit
from gkd.trainer.backbones.common import Family, Sizes

IResNetName = Literal["iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200"]
MobileFaceNetName = Literal["mobilefacenet", "mbf_large"]
VitName = Literal["vit_t", "vit_s", "vit_b", "vit_l"]
IrName = Literal["ir_18", "ir_34", "ir_50", "ir_101", "ir_152", "ir_200"]
IrSeName = Literal["ir_se_50", "ir_se_101", "ir_se_152", "ir_se_200"]
EvolveName = Literal["evolve_ir_50", "evolve_ir_101", "evolve_ir_152"]
EvolveSeName = Literal["evolve_ir_se_50", "evolve_ir_se_101", "evolve_ir_se_152"]
BackboneName = Literal[
    IResNetName, MobileFaceNetName, VitName, IrName, IrSeName, EvolveName, EvolveSeName
]
BACKBONES: tuple[str, ...] = get_args(BackboneName)
FAMILIES = (iresnet.FAMILY, mobilefacenet.FAMILY, vit.FAMILY, ir.FAMILY)


def family_of(name: str) -> Family:
    """The family of a backbone.

    Raises:
        ConfigError: if the name is unknown; lists the known ones.
    """
    for family in FAMILIES:
        if name in family.widths:
            return family
    near = difflib.get_close_matches(name, BACKBONES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}{hint}")


def default_width(name: str) -> float:
    """The published width: 2 for ``mobilefacenet`` and 4 for ``mbf_large``, else 1."""
    return family_of(name).widths[name]


def build_backbone(
    name: str, *, embedding_dim: int = 512, width: float | None = None, input_size: int = 112
) -> nn.Module:
    """A freshly initialised backbone: float images [B, 3, 112, 112] to [B, embedding_dim].

    ``width`` multiplies the channels, None means ``default_width``. With an ``input_size`` of 56
    or 28 the network average-pools its 112x112 images first.

    Raises:
        ConfigError: if the name is unknown, or the width or input size is impossible.
    """
    width = default_width(name) if width is None else width
    return family_of(name).build(name, Sizes(embedding_dim, width, input_size))
