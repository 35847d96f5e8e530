"""A teacher's class centres: read from files, or made as the means of each class's embeddings."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gkd.pipeline.centers.files import BuiltCenters, CenterFile, read_center_files
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import CenterPrecision, CentersKind, CentersSpec
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.util.torchrun_env import log_rank0

CLASS_MEAN: Literal["class-mean"] = "class-mean"
BLOCK = 8192  # classes worked on at once
NAMED = 5  # classes listed in a message
ROUNDING = 1e-6  # of the length of a float32 vector that was normalised before
NORMALISED_ROWS = 1 << 16  # at a time, in float64


@dataclass(frozen=True)
class Centers:
    """Class centres float32 [C, D], L2-normalised, and what the cache says of them."""

    array: npt.NDArray[np.float32]
    kind: CentersKind
    name: str

    @cached_property
    def spec(self) -> CentersSpec:
        """Kind, name and digest of the centres as little-endian float32, row by row."""
        digest = hashlib.sha256(np.ascontiguousarray(self.array, "<f4").data).hexdigest()
        return CentersSpec(self.kind, self.name, digest)


def round_centers(array: npt.NDArray[np.float32], precision: CenterPrecision) -> torch.Tensor:
    """Centres [C, D] in a precision, as logits are computed from them."""
    return torch.from_numpy(array).to(getattr(torch, precision))


def on_device(
    centers: npt.NDArray[np.float32],
    embedder: Embedder,
    precision: CenterPrecision = "float32",
) -> torch.Tensor:
    """Centres [C, D] where they are to be multiplied: on the teacher's GPU, if it has one."""
    array = round_centers(centers, precision)
    on_gpu = embedder.device.startswith("cuda") and torch.cuda.is_available()
    return array.to(embedder.device) if on_gpu else array


def rounding(array: npt.NDArray[np.float32], precision: CenterPrecision) -> float:
    """The most that a cosine to any centre changes: the longest of the roundings as vectors."""
    most = 0.0
    for start in range(0, len(array), BLOCK):
        block = torch.from_numpy(array[start : start + BLOCK])
        change = round_centers(array[start : start + BLOCK], precision).float() - block
        most = max(most, float(torch.linalg.vector_norm(change, dim=1).max()))
    return most


def own_and_nearest(unit: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of embeddings to the centre of their class and to the nearest other, each [n].

    ``unit`` float32 [n, D] and ``centers`` [C, D] are normalised, ``labels`` int64 [n]; where there
    is no other class its cosine is -1.
    """
    own = (unit * centers[labels]).sum(1)
    nearest = torch.full_like(own, -1.0)
    for start in range(0, len(centers), BLOCK):
        cosines = unit @ centers[start : start + BLOCK].float().T
        inside = ((labels >= start) & (labels < start + cosines.shape[1])).nonzero()[:, 0]
        cosines[inside, labels[inside] - start] = -1.0
        nearest = torch.maximum(nearest, cosines.amax(1))
    return own, nearest


def centers_path(out: Path) -> Path:
    """Where class-mean centres are kept: NAME.centers.npy beside NAME.gkd."""
    return out.with_name(f"{out.name.removesuffix('.gkd')}.centers.npy")


def open_centers(paths: Sequence[Path], records: Records, embedder: Embedder) -> Centers:
    """Class centres from files for these records and this teacher, of the kind that they say.

    Raises:
        ConfigError: where they cannot be read, as ``load_centers`` says.
        SpecMismatchError: where they are not as many as the identities, or ``gkd centers build``
            made them for another teacher or another numbering of the identities.
    """
    files = read_center_files(paths, embedder.embedding_dim)
    built = [file.built for file in files if file.built is not None]
    for each in built:
        _require_same_origin(files[0].path, each, records, embedder)
    array = join_centers(files, records.num_classes)
    kind: CentersKind = built[0].kind if len(built) == len(files) == 1 else "file"
    return Centers(array, kind, " ".join(file.path.name for file in files))


def load_centers(
    paths: Path | Sequence[Path], num_classes: int, embedding_dim: int
) -> npt.NDArray[np.float32]:
    """Class centres [C, D] of files, joined as ``read_center_files`` says, L2-normalised.

    Raises:
        ConfigError: where a file cannot be read, holds no such matrix or several, or a centre
            has no direction.
        SpecMismatchError: where the centres are not ``num_classes``.
    """
    files = read_center_files([paths] if isinstance(paths, Path) else paths, embedding_dim)
    return join_centers(files, num_classes)


def join_centers(files: Sequence[CenterFile], num_classes: int) -> npt.NDArray[np.float32]:
    """Class centres [C, D] of all files, L2-normalised; padding at the end is cut off, and told.

    Raises:
        ConfigError: where a centre has no direction.
        SpecMismatchError: where the centres are not ``num_classes``.
    """
    place = ", ".join(str(file.path) for file in files)
    centers = np.concatenate([file.array for file in files])
    padding = padding_of(files, num_classes)
    if padding:
        centers = centers[:num_classes]
        log_rank0(
            f"{files[-1].path}: the last {padding} of {num_classes + padding:,} centres are left "
            f"out: {files[0].source} pads them to a multiple of its {len(files)} ranks"
        )
    if len(centers) != num_classes:
        raise SpecMismatchError(_count_mismatch(place, num_classes, files))
    bad: list[int] = []
    for start in range(0, num_classes, NORMALISED_ROWS):
        part = centers[start : start + NORMALISED_ROWS]
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        usable = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
        bad += (start + np.flatnonzero(~usable)).tolist()
        # Dividing by a length that is one but for rounding would change the digest at every pass.
        lengths[(np.abs(lengths - 1) < ROUNDING) | ~usable[:, None]] = 1
        part[:] = part / lengths
    if bad:
        raise ConfigError(
            f"{place}: {len(bad):,} of {num_classes:,} centres are zero or not finite, "
            f"the first of class {bad[0]}; expected a direction for every class"
        )
    return centers


@dataclass(frozen=True)
class CentersInfo:
    """What files of class centres hold, as they stand there.

    source       training code that keeps them so; plain where none is known
    orientation  C x D, or D x C
    shapes       by file, in the order of joining
    centers      of all files; ``padding`` of them at the end stand for no identity of the records
    unusable     of these, zero or not finite, with which `cache-teacher` takes none of them
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
    """What files of class centres hold.

    Raises:
        ConfigError: where their embeddings have several lengths.
        SpecMismatchError: where they are not as many as the identities of ``records``.
    """
    dims = {file.array.shape[1] for file in files}
    if len(dims) > 1:
        raise ConfigError(
            f"{files[0].path}: expected centres of one embedding, got lengths of "
            f"{', '.join(map(str, sorted(dims)))}; join parts of one checkpoint"
        )
    lengths = np.concatenate([np.linalg.norm(file.array, axis=1) for file in files])
    first, total = files[0], len(lengths)
    usable = lengths[np.isfinite(lengths) & (lengths > 0)]
    if not len(usable):
        raise ConfigError(f"{first.path}: all of {total:,} centres are zero or not finite")
    padding = 0 if records is None else padding_of(files, records.num_classes)
    if records is not None and total - padding != records.num_classes:
        place = ", ".join(str(file.path) for file in files)
        raise SpecMismatchError(_count_mismatch(place, records.num_classes, files))
    return CentersInfo(
        kind="file" if first.built is None else first.built.kind,
        source=first.source,
        key=first.key,
        orientation="D x C" if first.turned else "C x D",
        shapes={str(file.path): file.shape for file in files},
        centers=total,
        embedding_dim=first.array.shape[1],
        unusable=total - len(usable),
        shortest=float(usable.min()),
        median=float(np.median(usable)),
        longest=float(usable.max()),
        padding=padding,
        built=first.built,
    )


def padding_of(files: Sequence[CenterFile], num_classes: int) -> int:
    """Centres at the end of all files that stand for no class: fewer than there are ranks."""
    surplus = sum(len(file.array) for file in files) - num_classes
    return surplus if files[-1].padded and 0 < surplus < len(files) else 0


def _require_same_origin(
    path: Path, built: BuiltCenters, records: Records, embedder: Embedder
) -> None:
    dataset = built.dataset
    named = {
        "teacher's sha256": (built.teacher.sha256, embedder.sha256),
        "preprocess": (built.preprocess, embedder.preprocess),
        "identities": (dataset.num_classes, records.num_classes),
        "label order": (dataset.label_order, records.label_order),
    }
    differing = [
        f"  {what}: of the centres {theirs}, given {ours}"
        for what, (theirs, ours) in named.items()
        if theirs != ours
    ]
    if differing:
        raise SpecMismatchError(
            f"{path}: these centres were made by `gkd centers build` with the teacher "
            f"{built.teacher.name} and the records {dataset.name}, others are given:\n"
            + "\n".join(differing)
            + "\nGive those, or make centres of these: gkd centers build."
        )
    if dataset.fingerprint != records.fingerprint:
        log_rank0(
            f"{path}: made from {dataset.num_images:,} images of {dataset.name}, which are not "
            "these very records; the centres are right only where identities have the same numbers"
        )


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


def require_all_classes(records: Records) -> None:
    """Check that every identity of the records has an image, so that class means can be.

    Raises:
        ConfigError: naming identities without one.
    """
    labels = records.labels
    # Counted by class, the classes of a wrong `property` would fill any memory.
    if records.num_classes > len(labels):
        raise ConfigError(
            f"class-mean centres: {records.num_classes:,} classes, but only "
            f"{len(labels):,} images, so that some class has none; give the teacher's own "
            "centres by --centers FILE, or correct the first line of `property`"
        )
    require_images(np.bincount(labels[labels >= 0], minlength=records.num_classes))


def _some(classes: npt.NDArray[np.int64]) -> str:
    return ", ".join(str(c) for c in classes[:NAMED]) + (", ..." if len(classes) > NAMED else "")


def _count_mismatch(place: str, num_classes: int, files: Sequence[CenterFile]) -> str:
    counts = [len(file.array) for file in files]
    got = sum(counts)
    message = f"{place}: {got:,} centres, but the records have {num_classes:,} identities"
    if len(files) > 1:
        message += f" (files of {', '.join(f'{count:,}' for count in counts)})"
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
