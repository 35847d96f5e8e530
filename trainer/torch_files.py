"""Files that torch saved, read without running their code."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from gkd.storage.errors import ConfigError


def read_torch_file(path: Path) -> Any:
    """Content of a ``.pt`` or ``.pth`` on the CPU: tensors and builtins only.

    Raises:
        ConfigError: for a file that is damaged, or would run code.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than 2, and then reads or refuses them.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, zipfile.BadZipFile, KeyError) as error:
        reason = (str(error).strip() or "the file is cut off").splitlines()[0]
        raise ConfigError(
            f"{path}: cannot be read as weights ({reason}); only files of tensors are read, none "
            "that would run code: get it again, or save the network's state_dict() alone"
        ) from error
