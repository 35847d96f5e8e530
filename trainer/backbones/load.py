"""Backbones from published state dicts and checkpoints of training codes."""

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import refuse_foreign
from gkd.storage.util.text import first_few
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones.build import BACKBONES, FAMILIES, build_backbone, family_of
from gkd.trainer.backbones.factory import is_factory, make_network

# Keys under which training codes store the backbone's state dict.
NESTS = ("state_dict", "state_dict_backbone", "backbone", "model")
# Prefixes of a network's keys by DDP, torch.compile, Lightning modules, CVLface and FaceX-Zoo.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
# The class layer, which some of them store beside the network.
CLASS_LAYER = "head."
SHOWN = 5
# A file that shares at least this part of all keys with a backbone is taken for a damaged one.
ALIKE = 0.5


class LoadedBackbone(NamedTuple):
    """A backbone in eval mode, float [B, 3, 112, 112] to [B, D], and its name."""

    name: str
    module: nn.Module


def load_backbone(name: str, path: Path) -> LoadedBackbone:
    """A backbone with the weights of a ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file.

    ``name`` is one of ``BACKBONES``, or ``auto`` to recognise it by keys and shapes, or
    ``package.module:factory``: then that code runs and makes the network. Width, embedding
    dimension and input size follow from shapes. Keys may be nested and prefixed as training
    codes do. No code of the file runs (``weights_only=True``).

    Raises:
        ConfigError: if the file holds no weights, or its keys or shapes do not fit; names them and
            the closest backbone.
    """
    path = Path(path)
    if is_factory(name):
        module = make_network(name)
        expected = module.state_dict()
        # The user's own network may use a wrapper's prefix in its keys.
        candidates = _unwrappings(_read_tensors(path))
        state = max(candidates, key=lambda candidate: _shared(expected, candidate))
    else:
        state = read_state_dict(path)
        name = _recognised_or_closest(state, path) if name == "auto" else name
        module = _sized_for(name, state, path)
    _require_fit(module.state_dict(), state, name, path)
    module.load_state_dict(state, strict=False)
    return LoadedBackbone(name, module.eval())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by key, without the nesting and the prefixes of training codes.

    Raises:
        ConfigError: if the file is absent, unreadable or holds no state dict.
    """
    *_, state = _unwrappings(_read_tensors(path))
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ConfigError(
            path=path, expected="a weights file (.pt, .pth, .ckpt, .safetensors)", got="no file"
        )
    content = _read(path)
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(path=path, expected="a state dict of tensors", got=type(content).__name__)
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                path=path,
                expected="a state dict of tensors",
                got=f"{type(value).__name__} at key {key!r}",
                remedy="save the network's state_dict() alone",
            )
    return {str(key): value for key, value in content.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        refuse_foreign(path, "a safetensors file")
        try:
            return safetensors.torch.load_file(path, device="cpu")
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{path}: not a complete safetensors file: {error}") from error
    return read_torch_file(path)


def _unwrappings(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a state dict as it is, and then with one prefix less each time."""
    yield state
    while wrapper := next((w for w in WRAPPERS if any(key.startswith(w) for key in state)), None):
        state = {
            key.removeprefix(wrapper): value
            for key, value in state.items()
            if not key.startswith(CLASS_LAYER)
        }
        yield state


def _recognised(state: Mapping[str, Tensor]) -> str | None:
    """The backbone with these keys' blocks."""
    names = (family.recognise(state) for family in FAMILIES)
    return next((name for name in names if name is not None), None)


def _recognised_or_closest(state: Mapping[str, Tensor], path: Path) -> str:
    """The backbone with these keys, or the closest if keys are missing."""
    recognised = _recognised(state)
    if recognised is not None:
        return recognised
    closest, share = _closest(state)
    if share >= ALIKE:
        return closest
    shared = _shared(_keys(closest), state)
    closeness = f"; the closest is {closest}, with {shared} of these {len(state)} keys"
    raise ConfigError(
        f"{path}: its keys match no backbone of gkd ({', '.join(BACKBONES)}); they begin: "
        f"{', '.join(list(state)[:SHOWN])}{closeness if shared else ''}. For another network give "
        "the code that makes it: --arch package.module:factory"
    )


def _closest(state: Mapping[str, Tensor]) -> tuple[str, float]:
    """The backbone with most keys in common, and their share of all keys of both."""
    own = {key for key in state if not key.endswith("num_batches_tracked")}

    def share(name: str) -> float:
        return len(own & _keys(name)) / len(own | _keys(name))

    closest = max(BACKBONES, key=share)
    return closest, share(closest)


@functools.cache
def _keys(name: str) -> frozenset[str]:
    with torch.device("meta"):
        state = build_backbone(name).state_dict()
    return frozenset(key for key in state if not key.endswith("num_batches_tracked"))


def _shared(expected: Collection[str], state: Collection[str]) -> int:
    return len(set(expected) & set(state))


def _sized_for(name: str, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The named backbone with the width, embedding dimension and input size of the weights."""
    family = family_of(name)
    for key, dims in family.size_keys.items():
        if key not in state or state[key].dim() != dims or not state[key].numel():
            got = f"shape {list(state[key].shape)}" if key in state else "no such key"
            raise ConfigError(
                f"{path}: not {name}: expected weights at {key!r}, got {got}"
                f"{_likeness(state, name)}"
            )
    sizes = family.sizes(name, state)
    try:
        return family.build(name, sizes)
    except ConfigError as error:
        raise ConfigError(
            f"{path}: not {name}: a width of {sizes.width:g}, from its shapes, is impossible"
            f"{_likeness(state, name)}"
        ) from error


def _likeness(state: Mapping[str, Tensor], name: str) -> str:
    """The end of a message: which other backbone has these keys, or most of them."""
    recognised = _recognised(state)
    if recognised is not None:
        return f"; the file looks like {recognised}" if recognised != name else ""
    closest, share = _closest(state)
    if share < ALIKE:
        return "; the file matches no backbone of gkd"
    return f"; the file is closest to {closest}" if closest != name else ""


def _require_fit(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str, path: Path
) -> None:
    # Old checkpoints lack the counters, and the frozen statistics do not need them.
    optional = ("num_batches_tracked",) if is_factory(name) else family_of(name).optional
    faults = {
        "missing": [key for key in expected if key not in state and not key.endswith(optional)],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} (expected {list(value.shape)}, got {list(state[key].shape)})"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    listed = [f"{fault}: {first_few(keys, SHOWN)}" for fault, keys in faults.items() if keys]
    if listed:
        raise ConfigError(
            f"{path}: its keys do not fit {name}; {'; '.join(listed)}{_likeness(state, name)}"
        )
