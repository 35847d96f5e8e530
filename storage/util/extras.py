"""Optional packages, imported when they are needed."""

import importlib
from typing import Any

from gkd.storage.errors import ConfigError


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: if it is not installed, naming the extra of gkd that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{package} cannot be imported ({error}); install it in the checkout of gkd with: pip "
            f"install '.[{extra}]'"
        ) from error
