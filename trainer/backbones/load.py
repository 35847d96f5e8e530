"""Backbones from the state dicts that people hold."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.trainer.backbones.build import BACKBONES, build_backbone, check_name
from gkd.trainer.backbones.common import INPUT_SIZES, halved
from gkd.trainer.backbones.iresnet import BLOCKS
from gkd.trainer.torch_files import read_torch_file

# Under which training code nests the backbone's state dict.
NESTS = ("state_dict", "state_dict_backbone", "backbone", "model")
SHOWN = 5


class LoadedBackbone(NamedTuple):
    """A backbone in eval mode, float [B, 3, 112, 112] to [B, D], and its name in ``BACKBONES``."""

    name: str
    module: nn.Module


def load_backbone(name: str, path: Path) -> LoadedBackbone:
    """A backbone with the weights of a ``.pt``/``.pth`` or ``.safetensors`` file.

    ``name`` is one of ``BACKBONES``, or ``auto`` to tell it from the keys. Width, embedding
    dimension and input size are told from shapes. Keys may carry ``module.`` and may be nested
    as training codes do. No code of the file runs (``weights_only=True``).

    Raises:
        ConfigError: for a file that is none, or whose keys or shapes do not fit, naming them.
    """
    path = Path(path)
    state = read_state_dict(path)
    if name == "auto":
        name = _recognise(state, path)
    check_name(name)
    backbone = _sized_for(name, state, path)
    _check_fit(backbone.state_dict(), state, name, path)
    backbone.load_state_dict(state, strict=False)
    return LoadedBackbone(name, backbone.eval())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by key, without ``module.`` prefixes or nesting.

    Raises:
        ConfigError: for a file that is absent, unreadable or holds no state dict.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file; expected .pt, .pth or .safetensors")
    content = _read(path)
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    odd = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise ConfigError(
            f"{path}: expected a state dict of tensors, got {type(content[odd[0]]).__name__} at "
            f"key {odd[0]!r}; save the network's state_dict() alone"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path, device="cpu")
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{path}: not a whole safetensors file: {error}") from error
    return read_torch_file(path)


def _recognise(state: Mapping[str, Tensor], path: Path) -> str:
    """The backbone whose keys these are."""
    if "layers.0.layers.0.weight" in state and "conv_sep.layers.0.weight" in state:
        return "mobilefacenet"
    found = [re.fullmatch(r"layer(\d)\.(\d+)\.conv1\.weight", key) for key in state]
    stages = [int(match[1]) for match in found if match]
    blocks = tuple(stages.count(stage) for stage in (1, 2, 3, 4))
    for name, expected in BLOCKS.items():
        if blocks == expected:
            return name
    first = ", ".join(list(state)[:SHOWN])
    raise ConfigError(
        f"{path}: its keys are of no backbone of gkd ({', '.join(BACKBONES)}); they begin: {first}"
    )


def _sized_for(name: str, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The named backbone with width, embedding dimension and input size told from shapes."""
    mobile = name == "mobilefacenet"
    first = "layers.0.layers.0.weight" if mobile else "conv1.weight"
    last = "features.layers.2.weight" if mobile else "fc.weight"
    spatial = "features.layers.0.layers.0.weight" if mobile else last
    for key in (first, last, spatial):
        if key not in state or state[key].dim() not in (2, 4):
            got = f"shape {list(state[key].shape)}" if key in state else "no such key"
            fits = _fits(state, name, path)
            raise ConfigError(f"{path}: not {name}: expected weights at {key!r}, got {got}{fits}")
    width = state[first].shape[0] / 64
    channels = 1 if mobile else 512 * width
    side = math.sqrt(state[spatial][0].numel() / channels)
    sizes = {halved(size, times=4): size for size in INPUT_SIZES}
    return build_backbone(
        name,
        embedding_dim=state[last].shape[0],
        width=width,
        # Another side fits none of the networks: the comparison of shapes says so.
        input_size=sizes.get(int(side), 112),
    )


def _fits(state: Mapping[str, Tensor], name: str, path: Path) -> str:
    """The end of a message: which other backbone the keys are of."""
    try:
        recognised = _recognise(state, path)
    except ConfigError:
        return "; the file fits no backbone of gkd"
    return f"; the file looks like {recognised}" if recognised != name else ""


def _check_fit(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str, path: Path
) -> None:
    # Old checkpoints lack the counters, and the frozen statistics do not need them.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} (expected {list(value.shape)}, got {list(state[key].shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = [
        f"{what}: {', '.join(keys[:SHOWN])}"
        + (f" and {len(keys) - SHOWN} more") * (len(keys) > SHOWN)
        for what, keys in (
            ("missing", missing),
            ("left over", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if faults:
        raise ConfigError(
            f"{path}: its keys do not fit {name}; {'; '.join(faults)}{_fits(state, name, path)}"
        )
