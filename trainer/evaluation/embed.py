"""Embeddings of a set of faces: each image plus its mirror image, in batches, once per model."""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkd.storage.cache.spec import Preprocess
from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.images import digest
from gkd.storage.util.input_files import read_small
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.progress import progress
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.device import DTYPES
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache
from gkd.trainer.evaluation.results import Result

# RGB uint8 [B, 112, 112, 3] -> embeddings float32 [B, D], not normalised
Embed = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
R = TypeVar("R", bound=Result)
R_co = TypeVar("R_co", bound=Result, covariant=True)

# Number of images below which reading shows no progress.
QUIET = 10_000


class FaceSet(ABC, Generic[R_co]):
    """N faces that a model is evaluated on, numbered from 0."""

    path: Path

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and progress."""

    @property
    @abstractmethod
    def num_faces(self) -> int:
        """N."""

    @abstractmethod
    def encoded(self, number: int) -> bytes:
        """The encoded image that a face is read from."""

    @abstractmethod
    def face(self, number: int) -> npt.NDArray[np.uint8]:
        """A face decoded and aligned, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: if the image cannot be read; the message names it.
        """

    @abstractmethod
    def describe(self, number: int) -> str:
        """Where a face is within ``path``, for messages."""

    @abstractmethod
    def score(self, sums: npt.NDArray[np.float32]) -> R_co:
        """The result of a model with these ``flip_sums`` [N, D]."""

    @property
    def geometry(self) -> bytes:
        """What determines the pixels of the faces beside the encoded images."""
        return b""


@dataclass(frozen=True)
class FolderSet(FaceSet[R_co]):
    """Faces in N image ``files`` below the folder ``path``."""

    path: Path
    files: tuple[str, ...]

    @property
    def num_faces(self) -> int:
        """N."""
        return len(self.files)

    def describe(self, number: int) -> str:
        """The file of a face."""
        return self.files[number]

    def encoded(self, number: int) -> bytes:
        """The content of a face's file.

        Raises:
            CorruptRecordError: if it cannot be read; names the file.
        """
        path = self.path / self.files[number]
        try:
            return read_small(path)
        except OSError as error:
            raise CorruptRecordError(
                path=path,
                expected=f"the image of face {number + 1} of {self.name}",
                got=error.strerror,
                remedy="unpack the set again",
            ) from error


def evaluate(
    embed: Embed, faces: FaceSet[R], *, batch_size: int = 128, store: EmbeddingCache | None = None
) -> R:
    """Embed every face of a set and its mirror image, and score them by the set's protocol.

    Raises:
        CorruptRecordError: if an image cannot be read; the message names it.
        ConfigError: if the model's embeddings are not finite.
    """
    return faces.score(flip_sums(embed, faces, batch_size=batch_size, store=store))


def flip_sums(
    embed: Embed, faces: FaceSet[Result], *, batch_size: int, store: EmbeddingCache | None = None
) -> npt.NDArray[np.float32]:
    """Embedding of each face plus that of its mirror image, not normalised; float32 [N, D].

    They are read from ``store`` if it has them for this model and these faces, else saved there.

    Raises:
        CorruptRecordError: if an image cannot be read; the message names it.
        ConfigError: if the model's embeddings are not finite.
    """
    if store is None:
        return _embedded(embed, faces, batch_size)
    key = faces_digest(faces)
    sums = store.load(key, faces.num_faces)
    if sums is None:
        sums = _embedded(embed, faces, batch_size)
        store.save(key, sums)
    return sums


def faces_digest(faces: FaceSet[Result]) -> str:
    """Hex digest of all that determines the faces' pixels, in order; reads every image.

    Raises:
        CorruptRecordError: if an image cannot be read; the message names it.
    """
    joint = hashlib.sha256()
    count = faces.num_faces
    with progress(f"Reading {faces.name}", count, "images", quiet_below=QUIET) as advance:
        digests = ordered_map(
            lambda number: digest(faces.encoded(number)), range(count), workers=_threads()
        )
        for image_digest in digests:
            joint.update(image_digest)
            advance()
    joint.update(faces.geometry)
    return joint.hexdigest()


def unit_rows(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Rows of [N, D] scaled to length 1; a row of zeros stays zero."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms > 0, norms, 1.0))


def module_embed(
    module: nn.Module, preprocess: Preprocess, device: torch.device, precision: str = "float32"
) -> Embed:
    """Make an ``Embed`` of a network that takes float [B, 3, 112, 112].

    Pixels travel as uint8 and are normalised on ``device``, where the module already is. Its mode
    is not changed: put it into eval mode before. ``precision`` is float32, float16 or
    bfloat16 (autocast).
    """
    if precision not in DTYPES:
        raise ConfigError(f"precision: expected {', '.join(DTYPES)}, got {precision!r}")
    dtype = DTYPES[precision]
    pixels = preprocess.on_device(device)

    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        moved = torch.from_numpy(images).to(device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), autocast:
            embeddings = module(pixels(moved).contiguous())
        return np.asarray(embeddings.float().cpu().numpy(), np.float32)

    return embed


def _embedded(embed: Embed, faces: FaceSet[Result], batch_size: int) -> npt.NDArray[np.float32]:
    sums: npt.NDArray[np.float32] | None = None
    done = 0
    with progress(f"Evaluating {faces.name}", faces.num_faces, "images") as advance:
        for images in _decoded_batches(faces, batch_size):
            part = embed(images) + embed(np.ascontiguousarray(images[:, :, ::-1]))
            if sums is None:
                sums = np.empty((faces.num_faces, part.shape[1]), np.float32)
            sums[done : done + len(part)] = part
            done += len(part)
            advance(len(part))
    assert sums is not None  # a set has faces
    not_finite = np.flatnonzero(~np.isfinite(sums).all(axis=1))
    if len(not_finite):
        raise ConfigError(
            f"{faces.path}: the model's embeddings of {len(not_finite)} images are not finite, the "
            f"first is {faces.describe(int(not_finite[0]))}; the training diverged or the "
            "preprocessing does not fit"
        )
    return sums


def _decoded_batches(faces: FaceSet[Result], batch_size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield batches uint8 [<= batch_size, 112, 112, 3], decoded ahead."""
    images = ordered_map(faces.face, range(faces.num_faces), workers=_threads())
    while batch := list(itertools.islice(images, batch_size)):
        yield np.stack(batch)


def _threads() -> int:
    return max(2, min(16, usable_cores()))
