"""Backbones from the state dicts that people hold."""

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.storage.util.text import first_few
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones.build import BACKBONES, FAMILIES, build_backbone, family_of
from gkd.trainer.backbones.factory import is_factory, make_network

# Under which training code nests the backbone's state dict.
NESTS = ("state_dict", "state_dict_backbone", "backbone", "model")
# What DDP, torch.compile, Lightning modules, CVLface and FaceX-Zoo put before a network's keys.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
# And what some of them keep beside it: the class layer.
BESIDE = "head."
SHOWN = 5
# Share of the keys, of both sides together, that makes a file a damaged one and not another thing.
ALIKE = 0.5


class LoadedBackbone(NamedTuple):
    """A backbone in eval mode, float [B, 3, 112, 112] to [B, D], and what it was loaded as."""

    name: str
    module: nn.Module


def load_backbone(name: str, path: Path) -> LoadedBackbone:
    """A backbone with the weights of a ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file.

    ``name`` is one of ``BACKBONES``, or ``auto`` to tell it from keys and shapes, or
    ``package.module:factory``: then that code runs, and makes the network. Width, embedding
    dimension and input size are told from shapes. Keys may be nested and wrapped as training
    codes do. No code of the file runs (``weights_only=True``).

    Raises:
        ConfigError: for a file that is none, or whose keys or shapes do not fit, naming them and
            the backbone that comes closest.
    """
    path = Path(path)
    if is_factory(name):
        module = make_network(name)
        expected = module.state_dict()
        # A network of the user's may have a wrapper's name in its own keys.
        state = max(_unwrappings(_read_tensors(path)), key=lambda each: _shared(expected, each))
        _require_fit(expected, state, name, path)
    else:
        state = read_state_dict(path)
        name = _recognised_or_closest(state, path) if name == "auto" else name
        module = _sized_for(name, state, path)
        _require_fit(module.state_dict(), state, name, path)
    module.load_state_dict(state, strict=False)
    return LoadedBackbone(name, module.eval())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by key, without what training codes put around a network and before its keys.

    Raises:
        ConfigError: for a file that is absent, unreadable or holds no state dict.
    """
    *_, state = _unwrappings(_read_tensors(path))
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such weights file; expected .pt, .pth, .ckpt or .safetensors"
        )
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
    return {str(key): value for key, value in content.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path, device="cpu")
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{path}: not a whole safetensors file: {error}") from error
    return read_torch_file(path)


def _unwrappings(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A state dict as it is, and then with one wrapper less around it each time."""
    yield state
    while (wrapper := _wrapper(state)) is not None:
        state = {
            key.removeprefix(wrapper): value
            for key, value in state.items()
            if not key.startswith(BESIDE)
        }
        yield state


def _wrapper(keys: Collection[str]) -> str | None:
    return next((w for w in WRAPPERS if any(key.startswith(w) for key in keys)), None)


def _recognised(state: Mapping[str, Tensor]) -> str | None:
    """The backbone whose blocks these keys have."""
    names = (family.recognise(state) for family in FAMILIES)
    return next((name for name in names if name is not None), None)


def _recognised_or_closest(state: Mapping[str, Tensor], path: Path) -> str:
    """The backbone whose keys these are, or would be if the file were whole."""
    recognised = _recognised(state)
    if recognised is not None:
        return recognised
    closest, share = _closest(state)
    if share >= ALIKE:
        return closest
    first = ", ".join(list(state)[:SHOWN])
    raise ConfigError(
        f"{path}: its keys are of no backbone of gkd ({', '.join(BACKBONES)}); they begin: {first}"
        f"{_closeness(state, closest)}. For another network give the code that makes it: --arch "
        "package.module:factory"
    )


def _closeness(state: Collection[str], closest: str) -> str:
    shared = _shared(_keys(closest), state)
    return f"; the closest is {closest}, with {shared} of these {len(state)} keys" if shared else ""


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
    """The named backbone with width, embedding dimension and input size told from shapes."""
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
            f"{path}: not {name}: a width of {sizes.width:g}, as its shapes tell, cannot be"
            f"{_likeness(state, name)}"
        ) from error


def _likeness(state: Mapping[str, Tensor], name: str) -> str:
    """The end of a message: which other backbone the keys are of, or all but of."""
    recognised = _recognised(state)
    if recognised is not None:
        return f"; the file looks like {recognised}" if recognised != name else ""
    closest, share = _closest(state)
    if share < ALIKE:
        return "; the file fits no backbone of gkd"
    return f"; the file comes closest to {closest}" if closest != name else ""


def _require_fit(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str, path: Path
) -> None:
    # Old checkpoints lack the counters, and the frozen statistics do not need them.
    optional = ("num_batches_tracked",) if is_factory(name) else family_of(name).optional
    missing = [key for key in expected if key not in state and not key.endswith(optional)]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} (expected {list(value.shape)}, got {list(state[key].shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = [
        f"{what}: {first_few(keys, SHOWN)}"
        for what, keys in (
            ("missing", missing),
            ("left over", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if faults:
        raise ConfigError(
            f"{path}: its keys do not fit {name}; {'; '.join(faults)}{_likeness(state, name)}"
        )
