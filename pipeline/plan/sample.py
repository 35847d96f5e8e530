"""The sample that a plan is made from, and the centres that its images are compared with.

With centres from a file the sample is random images. Class means need all images of a class, so
there it is complete identities, and synthetic centres replace those of the other identities. No
synthetic centre must be derived from an image's own identity: the identities are halved, and the
images of each half are compared with synthetic centres derived from the other.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkd.pipeline.centers.means import class_means
from gkd.pipeline.checks.sample import embed_rows
from gkd.pipeline.embed import EmbeddedBatch
from gkd.pipeline.teacher.embedder import Embedder, Embeddings
from gkd.storage.cache.spec import View
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.progress import progress

SEED = 0
# For class means, images embedded for each image whose groups are computed.
EMBEDDED_EACH = 4
# An identity's mean has settled after MAX_OF_IDENTITY images.
MAX_OF_IDENTITY, MIN_IDENTITIES = 32, 64
BLOCK = 2**16
# Share of a synthetic centre's variance that comes from one known centre; the rest comes from a
# normal distribution with the covariance of all. So look-alikes remain, and no centre is repeated.
KNOWN_SHARE = 0.5


class Clock:
    """Seconds for each image; the first batch warms up and counts only if it is the only one."""

    def __init__(self) -> None:
        self._batches: list[tuple[int, float]] = []
        self.restart()

    def restart(self) -> None:
        """Start to measure a batch."""
        self._began = time.perf_counter()

    def stop(self, images: int) -> None:
        """Count a batch of ``images``; the next one starts now."""
        self._batches.append((images, time.perf_counter() - self._began))
        self.restart()

    @property
    def per_image(self) -> float:
        """Mean over all batches."""
        counted = self._batches[1:] or self._batches
        return sum(seconds for _, seconds in counted) / sum(images for images, _ in counted)


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings view -> float32 [n, D], digests uint8 [n, 16] and labels int64 [n] of images."""

    embeddings: Embeddings
    digests: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64], views: Sequence[View]) -> "EmbeddedImages":
        """A selection of the images, in some of the views."""
        embeddings: Embeddings = {view: self.embeddings[view][indices] for view in views}
        return EmbeddedImages(embeddings, self.digests[indices], self.labels[indices])

    def batch(self) -> EmbeddedBatch:
        """The images as embeddings of n consecutive rows."""
        count = len(self)
        return EmbeddedBatch(range(count), np.arange(count), self.digests, {}, self.embeddings)


# Images in parts, each with the centres float32 [C, D] that it is compared with.
Parts = Iterable[tuple[EmbeddedImages, npt.NDArray[np.float32]]]


def embed_images(
    records: Records,
    rows: npt.NDArray[np.int64],
    embedder: Embedder,
    views: Sequence[View],
    clock: Clock,
    *,
    batch_size: int,
    workers: int,
) -> EmbeddedImages:
    """The readable images of ``rows`` [n]; ``clock`` measures their batches.

    Raises:
        ConfigError: if none can be read.
        GkdError: if the teacher's output is unusable.
    """
    with progress("run teacher", len(rows), "images") as advance:

        def count(images: int) -> None:
            clock.stop(images)
            advance(images)

        clock.restart()
        batch = embed_rows(
            records,
            rows,
            embedder,
            views,
            batch_size=batch_size,
            workers=workers,
            after_batch=count,
        )
    if not len(batch.kept):
        raise ConfigError(
            f"{records.path}: none of {len(rows):,} sampled records could be read; "
            "`gkd records verify` reports what is wrong with each"
        )
    labels = records.labels[rows[batch.kept]]
    return EmbeddedImages(batch.embeddings, batch.digests[batch.kept], labels)


def identities_rows(records: Records, count: int) -> npt.NDArray[np.int64]:
    """At least ``count`` rows, at most ``MAX_OF_IDENTITY`` of each of random identities; or all."""
    rng = np.random.default_rng(SEED)
    labelled = np.flatnonzero(records.labels >= 0)
    if count >= len(labelled):
        return labelled
    shuffled = rng.permutation(labelled)
    order = shuffled[np.argsort(records.labels[shuffled], kind="stable")]
    images = np.bincount(records.labels[labelled], minlength=records.num_classes)
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(images) - images, images)
    classes = rng.permutation(records.num_classes)
    available = np.cumsum(np.minimum(images[classes], MAX_OF_IDENTITY))
    enough = int(np.searchsorted(available, count)) + 1
    chosen = np.zeros(records.num_classes, bool)
    chosen[classes[: max(enough, MIN_IDENTITIES)]] = True
    return np.sort(order[(ranks < MAX_OF_IDENTITY) & chosen[records.labels[order]]])


def images_of_means(
    pool: EmbeddedImages, num_classes: int, samples: int, views: Sequence[View]
) -> tuple[Parts, str]:
    """``samples`` images with the class means of the pool, and synthetic centres for the others.

    Returns the parts and a description of the sample.

    Raises:
        ConfigError: if the embeddings of a class cancel.
    """
    rng = np.random.default_rng(SEED)
    classes, local = np.unique(pool.labels, return_inverse=True)
    known = class_means([pool.batch()], local, len(classes))
    chosen = np.sort(rng.choice(len(pool), min(samples, len(pool)), replace=False))
    basis = f"group sizes are estimated from {len(chosen):,} random images; centres are "
    missing = num_classes - len(classes)
    if not missing:
        basis += f"the class means of all {len(pool):,} images"
        return [(pool.take(chosen, views), known)], basis
    basis += (
        f"the class means of {len(classes):,} of {num_classes:,} identities "
        f"({len(pool):,} images), and synthetic centres with the same distribution for the others"
    )
    second = np.zeros(len(classes), bool)
    second[rng.permutation(len(classes))[: len(classes) // 2]] = True

    def halves() -> Parts:
        unknown = np.setdiff1d(np.arange(num_classes), classes)
        for half in (second, ~second):
            centers = np.empty((num_classes, known.shape[1]), np.float32)
            centers[classes] = known
            centers[unknown] = synthetic_centers(known[~half], missing, rng)
            yield pool.take(chosen[half[local[chosen]]], views), centers

    return halves(), basis


def synthetic_centers(
    known: npt.NDArray[np.float32], count: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """``count`` unit centres [count, D] with the distribution of the known ones [m, D].

    Each is mean + sqrt(s) (a known one - mean) + sqrt(1 - s) normal(0, covariance), which has the
    known centres' mean and covariance for any s; then normalised. Each known centre is used equally
    often, as far as possible.
    """
    mean = known.mean(0, dtype=np.float64)
    deviations = known - mean
    values, vectors = np.linalg.eigh(deviations.T @ deviations / len(known))
    root = (vectors * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
    deviations = (np.sqrt(KNOWN_SHARE) * deviations).astype(np.float32)
    order = np.resize(rng.permutation(len(known)), count)
    made = np.empty((count, known.shape[1]), np.float32)
    for start in range(0, count, BLOCK):
        used = order[start : start + BLOCK]
        noise = rng.standard_normal((len(used), len(root)), np.float32) @ root
        block = mean.astype(np.float32) + deviations[used]
        block = block + np.float32(np.sqrt(1 - KNOWN_SHARE)) * noise
        made[start : start + len(used)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return made
