"""Networks that a user's own code makes: ``package.module:factory``."""

import importlib
import sys
from pathlib import Path

from torch import nn

from gkd.storage.errors import ConfigError


def is_factory(name: str) -> bool:
    """Whether this names code and not one of gkd's backbones."""
    return ":" in name


def make_network(name: str) -> nn.Module:
    """Call ``package.module:factory`` without arguments, for a network [B, 3, 112, 112] to [B, D].

    That code runs as it is, with all that this user may do: it is for code that the user trusts.
    It is looked for on Python's path and in the current folder.

    Raises:
        ConfigError: where there is no such module or attribute, the call fails, or gives another
            thing than a network.
    """
    place, _, attribute = name.partition(":")
    if not (all(part.isidentifier() for part in place.split(".")) and attribute.isidentifier()):
        raise ConfigError(
            f"--arch {name}: expected package.module:factory, e.g. mypackage.nets:make_net"
        )
    factory = getattr(_module(place, name), attribute, None)
    if not callable(factory):
        raise ConfigError(
            f"--arch {name}: expected a function or class {attribute} in {place}, got "
            f"{'nothing of that name' if factory is None else type(factory).__name__}"
        )
    try:
        network = factory()
    # Whatever a stranger's code raises.
    except Exception as error:
        raise ConfigError(
            f"--arch {name}: {attribute}() raises {_told(error)}; it is called without arguments "
            "and is to return the network"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"--arch {name}: expected {attribute}() to return a torch.nn.Module, got "
            f"{type(network).__name__}"
        )
    return network


def _module(place: str, name: str) -> object:
    # Last, so that no file there stands before an installed package of its name.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"--arch {name}: the module {place} cannot be imported: {_told(error)}; it is looked "
            f"for on Python's path and in {here}"
        ) from error


def _told(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
