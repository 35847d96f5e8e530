"""Whether torch.compile works on this machine, found out before a training counts on it."""

import torch
from torch import Tensor

from gkd.storage.errors import ConfigError


def require_compiler(device: torch.device) -> None:
    """Compile a few operations for ``device``, and nothing that was compiled before.

    Raises:
        ConfigError: where that fails, as without a C++ compiler.
    """
    # A kept result would hide that the next function cannot be compiled.
    compiled = torch.compile(_exponentials, fullgraph=True, options={"fx_graph_cache": False})
    try:
        compiled(torch.zeros(2, 16, device=device))
    except RuntimeError as error:  # of which every error of torch's compilers is one
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise ConfigError(
            f"train.compile: torch.compile does not work here ({reason}); install a C++ compiler "
            "(g++, or name another in CXX), or set train.compile=false"
        ) from error


def _exponentials(values: Tensor) -> Tensor:
    return values.exp().sum(0)
