"""A teacher's class centres from files: joined, normalised, and checked against the records."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from gkd.pipeline.centers.files import BuiltCenters, CenterFile, read_center_files
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import CenterPrecision, CentersKind, CentersSpec
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.util.text import describe_differences
from gkd.storage.util.torchrun_env import log_rank0

CLASS_MEAN: Literal["class-mean"] = "class-mean"
BLOCK = 1 << 16  # centres processed at once
UNIT_TOLERANCE = 1e-6  # deviation of the length of a float32 vector that was normalised before


@dataclass(frozen=True)
class Centers:
    """Class centres float32 [C, D], L2-normalised, and how the cache's metadata names them."""

    array: npt.NDArray[np.float32]
    kind: CentersKind
    name: str

    @cached_property
    def spec(self) -> CentersSpec:
        """Kind, name and digest of the centres as little-endian float32, row by row."""
        digest = hashlib.sha256(np.ascontiguousarray(self.array, "<f4").data).hexdigest()
        return CentersSpec(self.kind, self.name, digest)


def round_centers(array: npt.NDArray[np.float32], precision: CenterPrecision) -> torch.Tensor:
    """Centres [C, D] in the precision from which logits are computed."""
    return torch.from_numpy(array).to(getattr(torch, precision))


def on_device(
    centers: npt.NDArray[np.float32],
    embedder: Embedder,
    precision: CenterPrecision,
) -> torch.Tensor:
    """Centres [C, D] on the device of the matrix product: the teacher's GPU, if it has one."""
    array = round_centers(centers, precision)
    on_gpu = embedder.device.startswith("cuda") and torch.cuda.is_available()
    return array.to(embedder.device) if on_gpu else array


def max_cosine_error(array: npt.NDArray[np.float32], precision: CenterPrecision) -> float:
    """Bound on the change of a cosine by rounding the centres: the longest rounding error."""
    blocks = (array[start : start + BLOCK] for start in range(0, len(array), BLOCK))
    errors = (round_centers(block, precision).float() - torch.from_numpy(block) for block in blocks)
    return max(float(torch.linalg.vector_norm(error, dim=1).max()) for error in errors)


def open_centers(paths: Sequence[Path], records: Records, embedder: Embedder) -> Centers:
    """Class centres from files, for these records and this teacher.

    Raises:
        ConfigError: if they cannot be read, see ``load_centers``.
        SpecMismatchError: if their number is not that of the identities, or ``gkd centers build``
            made them for another teacher or another numbering of the identities.
    """
    files = read_center_files(paths, embedder.embedding_dim)
    for file in files:
        if file.built is not None:
            _require_same_origin(files[0].path, file.built, records, embedder)
    array = join_centers(files, records.num_classes)
    built = files[0].built if len(files) == 1 else None
    return Centers(
        array, built.kind if built else "file", " ".join(file.path.name for file in files)
    )


def load_centers(
    paths: Path | Sequence[Path], num_classes: int, embedding_dim: int
) -> npt.NDArray[np.float32]:
    """Class centres [C, D] of files, joined as by ``read_center_files``, L2-normalised.

    Raises:
        ConfigError: if a file cannot be read, contains no such matrix or several, or a centre has
            no direction.
        SpecMismatchError: if the number of centres is not ``num_classes``.
    """
    files = read_center_files([paths] if isinstance(paths, Path) else paths, embedding_dim)
    return join_centers(files, num_classes)


def join_centers(files: Sequence[CenterFile], num_classes: int) -> npt.NDArray[np.float32]:
    """Class centres [C, D] of all files, L2-normalised; padding at the end is dropped and logged.

    Raises:
        ConfigError: if a centre has no direction.
        SpecMismatchError: if the number of centres is not ``num_classes``.
    """
    padding = _padding(files, num_classes)
    if padding:
        log_rank0(
            f"{files[-1].path}: dropped the last {padding} of {num_classes + padding:,} centres: "
            f"{files[0].layout.source} pads them to a multiple of its {len(files)} ranks"
        )
    centers = np.concatenate([file.array for file in files])[:num_classes]
    unusable: list[int] = []
    for start in range(0, num_classes, BLOCK):
        block = centers[start : start + BLOCK]
        lengths = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
        usable = np.isfinite(lengths) & (lengths > 0)
        unusable += (start + np.flatnonzero(~usable)).tolist()
        # Dividing by a length that differs from 1 by rounding only would change the digest.
        lengths[(np.abs(lengths - 1) < UNIT_TOLERANCE) | ~usable] = 1
        block[:] = block / lengths
    if unusable:
        raise ConfigError(
            f"{_paths(files)}: {len(unusable):,} of {num_classes:,} centres are zero or not "
            f"finite, the first of class {unusable[0]}; expected a direction for every class"
        )
    return centers


@dataclass(frozen=True)
class CentersInfo:
    """Content of files of class centres, as stored.

    source       training code that stores them so; plain if unknown
    orientation  C x D, or D x C
    shapes       by file, in the order of joining
    centers      of all files; the last ``padding`` of them belong to no identity of the records
    unusable     number of centres that are zero or not finite; `cache-teacher` refuses these files
    shortest, median, longest   lengths of the others
    """

    kind: CentersKind
    source: str
    key: str
    orientation: str
    shapes: dict[str, tuple[int, int]]
    centers: int
    embedding_dim: int
    unusable: int
    shortest: float
    median: float
    longest: float
    padding: int
    built: BuiltCenters | None


def describe_centers(files: Sequence[CenterFile], records: Records | None) -> CentersInfo:
    """What files of class centres contain.

    Raises:
        ConfigError: if their embeddings have several lengths, or all centres are unusable.
        SpecMismatchError: if their number is not that of the identities of ``records``.
    """
    dims = {file.array.shape[1] for file in files}
    if len(dims) > 1:
        raise ConfigError(
            f"{files[0].path}: expected embeddings of one length, got lengths of "
            f"{', '.join(map(str, sorted(dims)))}; join parts of one checkpoint"
        )
    padding = 0 if records is None else _padding(files, records.num_classes)
    lengths = np.concatenate([np.linalg.norm(file.array, axis=1) for file in files])
    usable = lengths[np.isfinite(lengths) & (lengths > 0)]
    first = files[0]
    if not len(usable):
        raise ConfigError(f"{first.path}: all of {len(lengths):,} centres are zero or not finite")
    return CentersInfo(
        kind=first.built.kind if first.built else "file",
        source=first.layout.source,
        key=first.key,
        orientation="D x C" if first.transposed else "C x D",
        shapes={str(f.path): f.array.shape[:: -1 if f.transposed else 1] for f in files},
        centers=len(lengths),
        embedding_dim=first.array.shape[1],
        unusable=len(lengths) - len(usable),
        shortest=float(usable.min()),
        median=float(np.median(usable)),
        longest=float(usable.max()),
        padding=padding,
        built=first.built,
    )


def _padding(files: Sequence[CenterFile], num_classes: int) -> int:
    """Number of centres at the end that belong to no class: fewer than there are ranks.

    Raises:
        SpecMismatchError: if the centres without padding are not ``num_classes``.
    """
    counts = [len(file.array) for file in files]
    surplus = sum(counts) - num_classes
    if surplus == 0 or (files[-1].layout.padded and 0 < surplus < len(files)):
        return surplus
    of_files = f" (files of {', '.join(f'{count:,}' for count in counts)})" * (len(files) > 1)
    reason = (
        "a shard of another rank may be missing, or the teacher was trained on a smaller or older "
        "copy of the data set (published MS1MV3 shards sum to 91,180 for 93,431)"
        if surplus < 0
        else "the teacher was trained on more identities, or its centres are padded to a multiple "
        "of its ranks"
    )
    raise SpecMismatchError(
        f"{_paths(files)}: {sum(counts):,} centres, but the records have {num_classes:,} "
        f"identities{of_files}; {reason}. Give the centres of these records, or --centers "
        "class-mean"
    )


def _paths(files: Sequence[CenterFile]) -> str:
    return ", ".join(str(file.path) for file in files)


def _require_same_origin(
    path: Path, built: BuiltCenters, records: Records, embedder: Embedder
) -> None:
    dataset, fields = built.dataset, ("teacher's sha256", "preprocess", "identities", "label order")
    made = built.teacher.sha256, built.preprocess, dataset.num_classes, dataset.label_order
    given = embedder.sha256, embedder.preprocess, records.num_classes, records.label_order
    differences = describe_differences(
        dict(zip(fields, made, strict=True)), dict(zip(fields, given, strict=True))
    )
    if differences:
        raise SpecMismatchError(
            f"{path}: `gkd centers build` made these centres with the teacher "
            f"{built.teacher.name} and the records {dataset.name}, which differ from the given "
            "ones:\n  " + "\n  ".join(differences) + "\nGive the same teacher and records, or make "
            "centres for the given ones: gkd centers build."
        )
    if dataset.fingerprint != records.fingerprint:
        log_rank0(
            f"{path}: made from {dataset.num_images:,} images of {dataset.name}, not from exactly "
            "these records; the centres are right only if the identities are numbered alike"
        )
