"""Backbones from published state dicts and checkpoints of training codes."""

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import refuse_foreign
from gkd.storage.util.text import first_few
from gkd.storage.util.torch_files import read_torch_file, tensors_of
from gkd.trainer.backbones.build import BACKBONES, FAMILIES, build_backbone, family_of
from gkd.trainer.backbones.factory import is_factory, make_network

# Parts of keys by which training codes wrap a network or a part of it: DDP, torch.compile, FSDP.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# The averaged weights of a file that has the trained ones too.
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)")
# MagFace keeps the network under this name beside its class layer, and its BatchNorms have this
# eps (IrvingMeng/MagFace: models/{magface,iresnet}.py); no state dict tells it.
MAGFACE, MAGFACE_EPS = "features", 2e-5
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
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
    tensors = _read_tensors(path)
    magface = False
    if is_factory(name):
        module = make_network(name)
        expected = module.state_dict()
        # The user's own network may use a wrapper's name in its keys.
        both = (tensors, _unwrapped(tensors))
        found = [_below(keys, prefix) for keys in both for prefix in _prefixes(keys, expected)]
        state = max(found, key=lambda candidate: _shared(expected, candidate))
    else:
        prefix, state = _network(tensors, path)
        magface = MAGFACE in prefix.split(".")
        name = _recognised_or_closest(state, path) if name == "auto" else name
        module = _sized_for(name, state, path)
        expected = module.state_dict()
    state = _without_class_layer(state, expected)
    _require_fit(expected, state, name, path)
    module.load_state_dict(state, strict=False)
    if magface:
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.eps = MAGFACE_EPS
    return LoadedBackbone(name, module.eval())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by key, without the nesting and the prefixes of training codes.

    Raises:
        ConfigError: if the file is absent, unreadable or holds no state dict, or several networks.
    """
    return _network(_read_tensors(path), path)[1]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by dotted key."""
    if not path.exists():
        raise ConfigError(
            path=path, expected="a weights file (.pt, .pth, .ckpt, .safetensors)", got="no file"
        )
    content = _read(path)
    tensors = dict(tensors_of(content))
    if tensors and isinstance(content, Mapping):
        return tensors
    got = type(content).__name__
    if isinstance(content, Mapping) and content:
        key, value = next(iter(content.items()))
        got = f"{type(value).__name__} at key {key!r}"
    raise ConfigError(
        path=path,
        expected="a state dict of tensors",
        got=got,
        remedy="save the network's state_dict() alone",
    )


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        refuse_foreign(path, "a safetensors file")
        try:
            return safetensors.torch.load_file(path, device="cpu")
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{path}: not a complete safetensors file: {error}") from error
    return read_torch_file(path)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the wrappers' parts of their keys, wherever these stand."""
    return {
        ".".join(part for part in key.split(".") if part not in WRAPPERS): value
        for key, value in tensors.items()
    }


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _prefixes(tensors: Iterable[str], anchors: Iterable[str]) -> list[str]:
    """What may stand before a network's keys: whatever stands before one of the anchors."""
    found = {""}
    for anchor in anchors:
        ends = (key.removesuffix(anchor) for key in tensors if key.endswith(anchor))
        found |= {prefix for prefix in ends if prefix.endswith(".")}
    return sorted(found)


def _network(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, dict[str, Tensor]]:
    """The tensors of the one network in a file, and what stands before their keys there.

    Raises:
        ConfigError: if there are several.
    """
    tensors = _unwrapped(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    partial: dict[str, dict[str, Tensor]] = {}
    for family in FAMILIES:
        for prefix in _prefixes(tensors, family.size_keys):
            state = _below(tensors, prefix)
            if family.recognise(state) and not set(family.size_keys) - set(state):
                found[prefix] = state
            else:
                partial[prefix] = state
    if len(found) > 1:
        trained = {prefix: state for prefix, state in found.items() if not AVERAGED.search(prefix)}
        if len(trained) != 1:
            raise ConfigError(
                path=path,
                expected="the weights of one network",
                got=f"those of {len(found)}, at {first_few(sorted(found), SHOWN)}",
                remedy="save the state_dict() of the one that is meant alone",
            )
        found = trained
    # Without a whole network: the names of the one that is closest, for the message.
    candidates = found or {p: s for p, s in partial.items() if p == "" or len(s) * 2 > len(tensors)}
    return max(candidates.items(), key=lambda item: len(item[0]))


def _without_class_layer(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Without a class layer that stands beside the network: a matrix of as many columns or rows
    as the embedding has values, and what else has its name (TopoFR, losses with a kernel)."""
    own = {key.partition(".")[0] for key in expected}
    last = [value for value in expected.values() if value.dim()]
    dim = last[-1].shape[0] if last else 0
    beside = {
        key.rpartition(".")[0] or key
        for key, value in state.items()
        if key.partition(".")[0] not in own and value.dim() == 2 and dim in value.shape
    }
    return {
        key: value
        for key, value in state.items()
        if key not in beside and key.rpartition(".")[0] not in beside - {""}
    }


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

    def build() -> nn.Module:
        module = family.build(name, sizes)
        family.adapt(module, state)
        return module

    try:
        # Without memory first: the shapes of a strange file may ask for any amount of it.
        with torch.device("meta"):
            expected = build().state_dict()
    except ConfigError as error:
        raise ConfigError(
            f"{path}: not {name}: a width of {sizes.width:g}, from its shapes, is impossible"
            f"{_likeness(state, name)}"
        ) from error
    _require_fit(expected, _without_class_layer(state, expected), name, path)
    return build()


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
        "wrong kind of number": [
            f"{key} ({str(state[key].dtype).removeprefix('torch.')})"
            for key, value in expected.items()
            if key in state and value.is_floating_point() and state[key].dtype not in FLOATS
        ],
    }
    listed = [f"{fault}: {first_few(keys, SHOWN)}" for fault, keys in faults.items() if keys]
    if listed:
        raise ConfigError(
            f"{path}: its keys do not fit {name}; {'; '.join(listed)}{_likeness(state, name)}"
        )
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        raise ConfigError(
            path=path,
            expected="weights that are numbers",
            got=f"NaN or infinity in {first_few(broken, SHOWN)}",
            remedy="get the file again, or take a checkpoint from before the training diverged",
        )
