"""Embeddings of many faces: each image and its mirror image, in batches, once for a model."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError
from gkd.storage.records.images import digest
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.progress import progress
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache

# RGB uint8 [B, 112, 112, 3] -> embeddings float32 [B, D], not normalised
Embed = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]

QUIET = 10_000
DECODE_THREADS = max(2, min(16, usable_cores()))


@dataclass(frozen=True)
class Faces:
    """N faces of a set, each asked for by its number from 0.

    path     where the set stands
    name     for progress and messages
    count    N
    encoded  encoded image of a number
    image    aligned face of a number, RGB uint8 [112, 112, 3]
    where    the face of a number in words, within ``path``
    places   what else than the encoded images decides their pixels: the faces' places in them
    """

    path: Path
    name: str
    count: int
    encoded: Callable[[int], bytes]
    image: Callable[[int], npt.NDArray[np.uint8]]
    where: Callable[[int], str]
    places: bytes = b""


def flip_sums(
    embed: Embed, faces: Faces, *, batch_size: int, store: EmbeddingCache | None = None
) -> npt.NDArray[np.float32]:
    """Embedding of each face plus that of its mirror image, not normalised; float32 [N, D].

    They are read from ``store`` where it has them for this model and these faces, and kept there
    otherwise.

    Raises:
        CorruptRecordError: naming a face that cannot be read.
        ConfigError: where the model's embeddings are not finite.
    """
    if store is None:
        return _embedded(embed, faces, batch_size)
    known_as = faces_digest(faces)
    found = store.load(known_as, faces.count)
    if found is None:
        found = _embedded(embed, faces, batch_size)
        store.save(known_as, found)
    return found


def faces_digest(faces: Faces) -> str:
    """Hex digest of all that decides the faces' pixels, in their order; reads every image.

    Raises:
        CorruptRecordError: naming an image that cannot be read.
    """
    joint = hashlib.sha256()
    with progress(f"Reading {faces.name}", faces.count, "images", quiet_below=QUIET) as advance:
        read = ordered_map(
            lambda number: digest(faces.encoded(number)),
            range(faces.count),
            workers=DECODE_THREADS,
        )
        for each in read:
            joint.update(each)
            advance()
    joint.update(faces.places)
    return joint.hexdigest()


def unit_rows(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Rows of [N, D] at length 1; a row of zeros stays one."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms > 0, norms, 1.0))


def _embedded(embed: Embed, faces: Faces, batch_size: int) -> npt.NDArray[np.float32]:
    sums: npt.NDArray[np.float32] | None = None
    done = 0
    with progress(f"Evaluating {faces.name}", faces.count, "images") as advance:
        for images in _decoded_batches(faces, batch_size):
            part = embed(images) + embed(np.ascontiguousarray(images[:, :, ::-1]))
            if sums is None:
                sums = np.empty((faces.count, part.shape[1]), np.float32)
            sums[done : done + len(part)] = part
            done += len(part)
            advance(len(part))
    assert sums is not None  # a set has faces
    strange = np.flatnonzero(~np.isfinite(sums).all(axis=1))
    if len(strange):
        raise ConfigError(
            f"{faces.path}: the model's embeddings of {len(strange)} images are not finite, the "
            f"first is {faces.where(int(strange[0]))}; the training diverged or the preprocessing "
            "does not fit"
        )
    return sums


def _decoded_batches(faces: Faces, batch_size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield batches uint8 [<= batch_size, 112, 112, 3]; images are decoded ahead of them."""
    images = ordered_map(faces.image, range(faces.count), workers=DECODE_THREADS)
    while batch := list(itertools.islice(images, batch_size)):
        yield np.stack(batch)
