"""Networks made by the user's code: they load by name, or the error says why not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gkd.commands.builders import build_embedder
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError, GkdError
from gkd.trainer.backbones import load_backbone
from tests.trainer.backbones.published_layouts import IMAGES, filled, published

NETS = """
from torch import nn

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Flatten(), nn.Linear(2916, 6))

    def forward(self, x):
        return self.backbone(x)

class Pair(Wrapped):
    def forward(self, x):
        return self.backbone(x), None

class Map(Wrapped):
    def forward(self, x):
        return self.backbone[0](x)

make_net = Wrapped

def make_text():
    return "net"

def fail():
    raise KeyError("no weights here")

def needs(path):
    return Wrapped()

constant = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a package ``own_nets`` and weights of its network."""
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets/nets.py").write_text(NETS)
    (tmp_path / "own_nets/broken.py").write_text("raise ImportError('needs abacus')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shapes = {"0.weight": (4, 3, 5, 5), "0.bias": (4,), "2.weight": (6, 2916), "2.bias": (6,)}
    state = filled({f"backbone.{key}": shape for key, shape in shapes.items()})
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_nets")]:
        del sys.modules[name]


@torch.no_grad()
def test_a_network_of_the_users_own_code_loads(nets: Path) -> None:
    loaded = load_backbone("own_nets.nets:make_net", nets / "w.pt")
    state = torch.load(nets / "w.pt")["state_dict"]
    weights = {key.removeprefix("module.backbone."): value for key, value in state.items()}
    x = F.conv2d(IMAGES, weights["0.weight"], weights["0.bias"], stride=4).flatten(1)
    expected = x @ weights["2.weight"].T + weights["2.bias"]
    torch.testing.assert_close(loaded.module(IMAGES), expected)
    assert loaded.name == "own_nets.nets:make_net"
    embedder = build_embedder(
        nets / "w.pt",
        arch="own_nets.nets:make_net",
        preprocess=preprocess_preset("arcface"),
        device="cpu",
        precision="float32",
    )
    assert (embedder.arch, embedder.embedding_dim) == ("own_nets.nets:make_net", 6)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("own_nets.nets:", r"expected package\.module:factory, e\.g\. mypackage"),
        ("own nets:make", r"expected package\.module:factory"),
        ("no_nets.at_all:make", r"no_nets\.at_all cannot be imported: ModuleNotFoundError: No mod"),
        ("own_nets.broken:make", r"own_nets\.broken cannot be imported: ImportError: needs abacus"),
        ("own_nets.nets:absent", r"class absent in own_nets\.nets, got nothing of that name"),
        ("own_nets.nets:constant", r"class constant in own_nets\.nets, got int"),
        ("own_nets.nets:make_text", r"make_text\(\) to return a torch\.nn\.Module, got str"),
        ("own_nets.nets:fail", r"fail\(\) raises KeyError: 'no weights here'; it is called with"),
        ("own_nets.nets:needs", r"needs\(\) raises TypeError: .*argument: 'path'; it is called"),
        ("own_nets.nets:Pair", r"w: expected embeddings \[1, D\] for 1 images, got a tuple"),
        ("own_nets.nets:Map", r"w: expected embeddings \[1, D\] .*got shape \[1, 4, 27, 27\]"),
    ],
)
def test_code_that_does_not_make_an_embedder_is_refused(
    nets: Path, arch: str, message: str
) -> None:
    with pytest.raises(GkdError, match=message):
        build_embedder(
            nets / "w.pt",
            arch=arch,
            preprocess=preprocess_preset("arcface"),
            device="cpu",
            precision="float32",
        )


def test_weights_of_another_network_do_not_fit(nets: Path) -> None:
    torch.save(filled(published("ir_18", small=True)), nets / "other.pt")
    with pytest.raises(
        ConfigError, match=r"do not fit own_nets.*missing: backbone\.0\.w.*like ir_18"
    ):
        load_backbone("own_nets.nets:make_net", nets / "other.pt")
