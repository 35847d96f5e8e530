"""What tests of commands start from."""

from pathlib import Path

import torch

from gkd.demo.synthetic import draw_faces, draw_pairs
from gkd.trainer.backbones import build_backbone
from gkd.trainer.evaluation.bin_file import write_verification_set


def write_home(home: Path) -> Path:
    """Faces of eight people, a verification set of six others, and a teacher."""
    known, unknown = range(8), range(8, 14)
    draw_faces(home / "faces", identities=known, images_each=4, seed=0, workers=1)
    draw_faces(home / "others", identities=unknown, images_each=4, seed=0, workers=1)
    paths, issame = draw_pairs(home / "others", identities=unknown, images_each=4, pairs=40, seed=0)
    write_verification_set(home / "others.bin", [path.read_bytes() for path in paths], issame)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(teacher.state_dict(), home / "teacher.pt")
    return home
