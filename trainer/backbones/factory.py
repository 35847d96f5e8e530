"""Networks made by the user's own code: ``package.module:factory``."""

import importlib
import sys
from pathlib import Path

from torch import nn

from gkd.storage.errors import ConfigError


def is_factory(name: str) -> bool:
    """Whether this names code, not one of gkd's backbones."""
    return ":" in name


def make_network(name: str) -> nn.Module:
    """Call ``package.module:factory`` without arguments, for a network [B, 3, 112, 112] to [B, D].

    That code runs with all of the user's permissions: name only code that you trust.
    It is looked for on Python's path and in the current folder.

    Raises:
        ConfigError: if there is no such module or attribute, the call fails, or does not return a
            network.
    """
    module, _, attribute = name.partition(":")
    if not (all(part.isidentifier() for part in module.split(".")) and attribute.isidentifier()):
        raise ConfigError(
            f"--arch {name}: expected package.module:factory, e.g. mypackage.nets:make_net"
        )
    factory = getattr(_module(module, name), attribute, None)
    if not callable(factory):
        raise ConfigError(
            f"--arch {name}: expected a function or class {attribute} in {module}, got "
            f"{'nothing of that name' if factory is None else type(factory).__name__}"
        )
    try:
        network = factory()
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"--arch {name}: {attribute}() raises {_first_line(error)}; it is called without "
            "arguments and must return the network"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"--arch {name}: expected {attribute}() to return a torch.nn.Module, got "
            f"{type(network).__name__}"
        )
    return network


def _module(module: str, name: str) -> object:
    # Last, so that no file there hides an installed package of the same name.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"--arch {name}: the module {module} cannot be imported: {_first_line(error)}; "
            f"it is looked for on Python's path and in {here}"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
