"""A teacher's class centres: read from files, or made as the means of each class's embeddings."""

import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.spec import CenterPrecision, CentersSpec

BLOCK = 8192  # classes worked on at once
NAMED = 5  # classes listed in a message
ROUNDING = 1e-6  # of the length of a float32 vector that was normalised before


def load_centers(
    paths: Path | Sequence[Path], num_classes: int, embedding_dim: int
) -> npt.NDArray[np.float32]:
    """Class centres [C, D] of a file, or of several joined in the order given, L2-normalised.

    ``.npy``; ``.pt`` or ``.pth``, read as weights only: a tensor, or a (nested) dict with exactly
    one matrix whose rows or columns have the embedding's length; ``.safetensors`` likewise. A
    matrix [D, C] is turned around; where both sides fit, it is taken as [C, D].

    Raises:
        ConfigError: where a file cannot be read, holds no such matrix or several, or a centre
            has no direction.
        SpecMismatchError: where the centres are not ``num_classes``.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    parts = [_read_matrix(path, embedding_dim) for path in files]
    centers = np.concatenate(parts)
    place = ", ".join(str(path) for path in files)
    if len(centers) != num_classes:
        raise SpecMismatchError(_count_mismatch(place, len(centers), num_classes, parts))
    lengths = np.linalg.norm(centers.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if len(bad):
        raise ConfigError(
            f"{place}: {len(bad):,} of {num_classes:,} centres are zero or not finite, "
            f"the first of class {bad[0]}; expected a direction for every class"
        )
    # Dividing by a length that is one but for rounding would change the digest at every pass.
    lengths[np.abs(lengths - 1) < ROUNDING] = 1
    return np.asarray(centers / lengths, np.float32)


@dataclass(frozen=True)
class Centers:
    """Class centres float32 [C, D], L2-normalised, and what the cache says of them."""

    array: npt.NDArray[np.float32]
    kind: Literal["file", "class-mean"]
    name: str

    @property
    def spec(self) -> CentersSpec:
        """Kind, name and digest of the centres as little-endian float32, row by row."""
        digest = hashlib.sha256(self.array.astype("<f4").tobytes()).hexdigest()
        return CentersSpec(self.kind, self.name, digest)


def round_centers(array: npt.NDArray[np.float32], precision: CenterPrecision) -> torch.Tensor:
    """Centres [C, D] in a precision, as logits are computed from them."""
    return torch.from_numpy(array).to(getattr(torch, precision))


def rounding(array: npt.NDArray[np.float32], precision: CenterPrecision) -> float:
    """The most that a cosine to any centre changes: the longest of the roundings as vectors."""
    most = 0.0
    for start in range(0, len(array), BLOCK):
        block = torch.from_numpy(array[start : start + BLOCK])
        change = round_centers(array[start : start + BLOCK], precision).float() - block
        most = max(most, float(torch.linalg.vector_norm(change, dim=1).max()))
    return most


class ClassMeans:
    """Class centres as means of L2-normalised embeddings, summed in float64.

    Every embedding counts once, so adding both views of each image averages over the flip.
    """

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        self._sums = np.zeros((num_classes, embedding_dim))
        self._counts = np.zeros(num_classes, np.int64)

    def add(self, embeddings: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """Add embeddings [B, D], of any length above zero, of classes ``labels`` [B]."""
        exact = embeddings.astype(np.float64)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        order = np.argsort(labels, kind="stable")
        classes, first = np.unique(labels[order], return_index=True)
        self._sums[classes] += np.add.reduceat(exact[order], first)
        self._counts += np.bincount(labels, minlength=len(self._counts))

    def finish(self) -> npt.NDArray[np.float32]:
        """Centres [C, D], L2-normalised.

        Raises:
            ConfigError: where classes had no image, or their embeddings cancel.
        """
        require_images(self._counts)
        lengths = np.linalg.norm(self._sums, axis=1, keepdims=True)
        cancelled = np.flatnonzero(lengths[:, 0] <= 1e-9 * self._counts)
        if len(cancelled):
            raise ConfigError(
                f"class-mean centres: the embeddings of {len(cancelled):,} classes cancel to zero, "
                f"such as {_some(cancelled)}; is this the right teacher and preprocessing?"
            )
        return np.asarray(self._sums / lengths, np.float32)


def require_images(counts: npt.NDArray[np.int64]) -> None:
    """Check that every class has an image; ``counts`` [C] are the images of each class.

    Raises:
        ConfigError: naming classes without one.
    """
    without = np.flatnonzero(counts == 0)
    if len(without):
        raise ConfigError(
            f"class-mean centres: {len(without):,} of {len(counts):,} classes have no image, such "
            f"as {_some(without)}; give the teacher's own centres by --centers FILE, or number "
            "the classes without gaps"
        )


def _some(classes: npt.NDArray[np.int64]) -> str:
    return ", ".join(str(c) for c in classes[:NAMED]) + (", ..." if len(classes) > NAMED else "")


def _count_mismatch(
    place: str, got: int, num_classes: int, parts: Sequence[npt.NDArray[Any]]
) -> str:
    message = f"{place}: {got:,} centres, but the records have {num_classes:,} identities"
    if len(parts) > 1:
        message += f" (files of {', '.join(f'{len(part):,}' for part in parts)})"
    if got < num_classes:
        reason = (
            "a shard of another rank may be missing, or the teacher was trained on a smaller or "
            "older copy of the data set (published MS1MV3 shards sum to 91,180 for 93,431)"
        )
    else:
        reason = (
            "the teacher was trained on more identities, or its centres are padded to a multiple "
            "of its ranks"
        )
    return f"{message}; {reason}. Give the centres of these very records, or --centers class-mean"


def _read_matrix(path: Path, embedding_dim: int) -> npt.NDArray[np.float32]:
    """The one matrix of a file as [C, D]."""
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file of class centres, got nothing there")
    found = {
        name: array
        for name, array in _read_arrays(path)
        if array.ndim == 2 and embedding_dim in array.shape
    }
    if len(found) != 1:
        held = ", ".join(f"{name} {list(array.shape)}" for name, array in found.items())
        seen = held or ", ".join(
            f"{name or 'an array'} {list(array.shape)}" for name, array in _read_arrays(path)
        )
        raise ConfigError(
            f"{path}: expected exactly one matrix of centres [C, {embedding_dim}] for the "
            f"teacher's embeddings of length {embedding_dim}, got {len(found)}: "
            f"{seen[:400] or 'no array'}"
        )
    (array,) = found.values()
    matrix = array if array.shape[1] == embedding_dim else array.T
    return np.ascontiguousarray(matrix, np.float32)


def _read_arrays(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    match path.suffix:
        case ".npy":
            yield "", read_npy(path)
        case ".pt" | ".pth":
            for name, tensor in _tensors("", _read_torch(path)):
                yield name, tensor.detach().float().numpy()
        case ".safetensors":
            try:
                tensors = load_file(path)
            except SafetensorError as error:
                raise ConfigError(f"{path}: expected a safetensors file, got {error}") from error
            for name, tensor in tensors.items():
                yield name, tensor.float().numpy()
        case suffix:
            raise ConfigError(
                f"{path}: expected class centres as .npy, .pt, .pth or .safetensors, got {suffix!r}"
            )


def read_npy(path: Path) -> npt.NDArray[Any]:
    """An array of floats from a ``.npy`` file.

    Raises:
        ConfigError: for another file.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: expected a .npy array of numbers, got {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        got = getattr(array, "dtype", type(array).__name__)
        raise ConfigError(f"{path}: expected a .npy array of floats, got {got}")
    return array


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols that it does not expect, then reads or refuses them.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not in torch's words: they advise to load without the guard against foreign code.
        raise ConfigError(
            f"{path}: holds more than tensors and plain containers, so that loading it could run "
            "code, or is no torch file; save the centres alone, as a tensor or .npy"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or "a file that is cut off").splitlines()[0].split(". ")[0]
        raise ConfigError(
            f"{path}: expected a torch file, got one that cannot be read ({reason}); get it "
            "again, or save the centres as .npy"
        ) from error


def _tensors(prefix: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating tensors of nested dicts, by dotted name."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{prefix}.{key}" if prefix else str(key), item)
