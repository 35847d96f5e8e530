"""Student and teacher networks by name: built, or loaded from published and own weights.

May be imported by all of the trainer and by the commands.
"""

from gkd.trainer.backbones.build import BACKBONES, build_backbone, default_width
from gkd.trainer.backbones.load import LoadedBackbone, load_backbone, read_state_dict

__all__ = [
    "BACKBONES",
    "LoadedBackbone",
    "build_backbone",
    "default_width",
    "load_backbone",
    "read_state_dict",
]
