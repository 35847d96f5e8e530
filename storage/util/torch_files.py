"""Files saved by torch, read without running their code.

The rest of storage does not need torch, so it is imported when a file is read.
"""

import io
import mmap
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import open_regular, refuse_foreign
from gkd.storage.util.pickles import PickleCost, check_pickle

if TYPE_CHECKING:
    from torch import Tensor

ZIP_START = b"PK\x03\x04"
# What training code saves beside tensors (parsed options, Lightning's callbacks, an accuracy as a
# NumPy number). None of it is needed, so it is read as inert objects, without importing these
# packages.
SETTINGS = re.compile(
    r"argparse\.Namespace|(pytorch_lightning|lightning|lightning_fabric)\..+"
    r"|numpy\.dtype|numpy\.(_core|core)\.multiarray\.scalar"
)
# A file in torch's old form is five pickles and then the tensors' bytes.
OLD_PICKLES = 5
# What torch writes is not compressed; what others compressed again shrinks by a small factor.
MAX_INFLATED, FREE_INFLATED = 4, 1 << 24
# Other zip archives by a part that only they have: what they are, and what to do instead.
ARCHIVES = (
    (
        r"[^/]+/(code/.+|constants\.pkl)",
        "a TorchScript program, which would run its code",
        "save its weights by `torch.save(torch.jit.load({name!r}).state_dict(), 'weights.pt')` and "
        "give those, or export the network to ONNX where it was made",
    ),
    (
        r"([^/]+/)?(models/[^/]+\.json|archive_format|serialized_exported_program\.json)",
        "an exported program (torch.export)",
        "save its weights by `torch.save(dict(torch.export.load({name!r}).state_dict), "
        "'weights.pt')` and give those, or export the network to ONNX where it was made",
    ),
    (
        r"([^/]+/)?data/aotinductor/.*",
        "a program compiled by AOTInductor",
        "give the weights or the ONNX file that it was made from",
    ),
    (
        r"([^/]+/)?\.data/(extern_modules|python_version)",
        "a torch.package, which would run its code",
        "save the network's state_dict() alone",
    ),
    (r".+\.npy", "a NumPy archive (.npz)", "save the arrays as a state dict by torch.save"),
)


class Inert:
    """Replaces an object of a training code's settings; its code is not run."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_torch_file(
    path: Path,
    *,
    what: str = "weights",
    remedy: str = "get it again, or save the network's state_dict() alone",
) -> Any:
    """Content of a ``.pt`` or ``.pth`` on the CPU: tensors and builtins, and ``Inert`` settings.

    ``what`` the file should hold and the ``remedy`` are used in messages.

    Raises:
        ConfigError: if the file is damaged, or would run code.
        OSError: if the system does not open the file.
    """
    refuse_foreign(path, f"a file of {what}", allowed=("zip", "empty"))
    expected = "a file that torch.save wrote, of tensors only and none that would run code"

    def refuse(got: str, remedy: str, error: Exception | None = None) -> NoReturn:
        raise ConfigError(
            f"cannot be read as {what}", path=path, expected=expected, got=got, remedy=remedy
        ) from error

    if archive := _archive(path):
        refuse(*archive)
    try:
        _check_cost(path)
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than 2, and then reads or refuses them.
            warnings.simplefilter("ignore", UserWarning)
            content = _load(path)
    except PickleCost as error:
        refuse(f"one that {error}", remedy, error)
    # Damaged and hostile bytes make torch raise almost anything, even an OSError without a file.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        refuse(_described(path, error), remedy, error)
    if damaged := _damaged_part(path):
        raise ConfigError(
            f"its bytes are not those that were written: the checksum of {damaged} does not match",
            path=path,
            remedy=remedy and "get it again",
        )
    for place, tensor in tensors_of(content):
        if odd := _odd(tensor):
            refuse(
                f"{odd} at {place or 'the top'}",
                remedy
                and "save the network's weights again as plain dense tensors: "
                "{key: value.clone() for key, value in network.state_dict().items()}",
            )
    return content


def tensors_of(content: object) -> Iterator[tuple[str, "Tensor"]]:
    """Tensors of nested dictionaries and lists, by dotted key; each container is entered once."""
    from torch import Tensor

    waiting: list[tuple[str, object]] = [("", content)]
    entered: set[int] = set()
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in entered:
            entered.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            nested = [(f"{key}.{name}" if key else str(name), item) for name, item in items]
            waiting += reversed(nested)


def _odd(tensor: "Tensor") -> str:
    """What a tensor is, if its values are not simply those that are stored."""
    import torch

    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return f"a quantised tensor ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.device.type != "cpu":
        return f"a tensor without values (of the device {tensor.device.type!r})"
    if tensor.is_neg() or tensor.is_conj():
        return "a negated or conjugated view of a tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"a tensor {list(tensor.shape)} that repeats fewer stored values"
    return ""


def _archive(path: Path) -> tuple[str, str] | None:
    """What a zip file is, if it is known and not torch.save's, and what to do instead."""
    if _start(path) != ZIP_START or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError):
        return None  # a damaged one, which is read and named later
    for pattern, kind, remedy in ARCHIVES:
        if any(re.fullmatch(pattern, name) for name in names):
            return kind, remedy.format(name=str(path))
    return None


def _check_cost(path: Path) -> None:
    """Refuse what would take far more memory or time than the file's size.

    Raises:
        PickleCost: if it would.
    """
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            for _ in range(OLD_PICKLES):
                check_pickle(data, size)  # type: ignore[arg-type]
        return
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > MAX_INFLATED * size + FREE_INFLATED:
            raise PickleCost("is compressed, and would take far more memory than its size")
    import torch

    # The record that torch.load reads, by its own reader.
    check_pickle(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")), size)


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(path):
            raise
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if not named or not all(map(SETTINGS.fullmatch, named)):
            raise
        # Lightning's AttributeDict is filled like a dict, which torch allows only for dicts.
        replacements: list[Any] = [
            (dict if name.endswith(".AttributeDict") else Inert, name) for name in named
        ]
        with torch.serialization.safe_globals(replacements):
            return torch.load(path, map_location="cpu", weights_only=True)


def _damaged_part(path: Path) -> str:
    """The first damaged part of a torch file in zip form; empty if there is none.

    torch writes a CRC of each part, unless switched off, and does not check it on reading.
    """
    if _start(path) != ZIP_START:
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            checked = any(part.CRC for part in archive.infolist())
            return (checked and archive.testzip()) or ""
    # Damaged headers: zipfile's own errors, and those of any wrong field.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        return f"its directory ({error})"


def _described(path: Path, error: Exception) -> str:
    """What the refused file is; torch's own message advises running its code."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"one that names {named[1]}"
    if zipfile.is_zipfile(path):
        return "another zip archive, or a damaged one"
    size, start = path.stat().st_size, _start(path)
    if start == ZIP_START:
        return f"one that is cut off after {size:,} bytes"
    return f"{size:,} bytes starting {start.hex()}" if size else "an empty file"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(ZIP_START))
