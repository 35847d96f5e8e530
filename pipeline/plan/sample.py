"""Images of which a plan is made, and the centres that they are held against.

With centres from a file any random images do. Class means need all images of a class, so there the
sample is of whole identities, and stand-ins take the place of the centres that it does not know. No
stand-in is made of an image's own identity: the identities are halved, and the images of each half
see stand-ins of the other.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkd.pipeline.centers.load import Centers
from gkd.pipeline.centers.means import class_means
from gkd.pipeline.embed import EmbeddedBatch, embed, join_batches, split_rows
from gkd.pipeline.plan.synthetic_centers import synthetic_centers
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import View
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records, Subset
from gkd.storage.util.progress import progress

SEED = 0
# For class means so many images are embedded for each whose groups are made ...
EMBEDDED_EACH = 4
# ... of each identity at most these, by which its mean has settled; and of at least so many.
MOST_OF_IDENTITY, FEWEST_IDENTITIES = 32, 64


class Clock:
    """Seconds an image; the first batch warms up and counts only where there is no other."""

    def __init__(self) -> None:
        self._batches: list[tuple[int, float]] = []

    def add(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self._batches.append((images, seconds))

    @property
    def per_image(self) -> float:
        """Mean of all batches."""
        counted = self._batches[1:] or self._batches
        return sum(seconds for _, seconds in counted) / sum(images for images, _ in counted)


@dataclass(frozen=True)
class EmbeddedImages:
    """Some images: embeddings view -> float32 [n, D], digests uint8 [n, 16], labels int64 [n]."""

    embeddings: Mapping[View, npt.NDArray[np.float32]]
    digests: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: npt.NDArray[np.int64], views: Sequence[View]) -> "EmbeddedImages":
        """Some of them, in some views."""
        return EmbeddedImages(
            {view: self.embeddings[view][places] for view in views},
            self.digests[places],
            self.labels[places],
        )

    def batch(self) -> EmbeddedBatch:
        """The images as a run's embeddings of so many rows."""
        count = len(self)
        return EmbeddedBatch(range(count), np.arange(count), self.embeddings, self.digests, {})


@dataclass(frozen=True)
class Sample:
    """Images in parts, each with the centres float32 [C, D] that it sees.

    ``embedded`` images went through the teacher; ``basis`` says in words what stands for what.
    """

    parts: Iterator[tuple[EmbeddedImages, npt.NDArray[np.float32]]]
    embedded: int
    basis: str


def embed_rows(
    records: Records,
    rows: npt.NDArray[np.int64],
    embedder: Embedder,
    views: Sequence[View],
    clock: Clock,
    *,
    batch_size: int,
    workers: int,
) -> EmbeddedImages:
    """Those of ``rows`` [n] that can be read.

    Raises:
        ConfigError: where none can.
    """
    sample, spans = Subset(records, rows), split_rows(range(len(rows)), batch_size)
    batches: list[EmbeddedBatch] = []
    made = embed(sample, spans, embedder, views, workers=workers, skip_corrupt=True)
    with progress("run teacher", len(rows), "images") as advance, closing(made) as embedded:
        began = time.perf_counter()
        for batch in embedded:
            now = time.perf_counter()
            clock.add(len(batch.rows), now - began)
            began = now
            batches.append(batch)
            advance(len(batch.rows))
    whole = join_batches(batches)
    if not len(whole.kept):
        raise ConfigError(
            f"{records.path}: none of {len(rows):,} sampled records could be read; "
            "`gkd records verify` says what is wrong with each"
        )
    labels = records.labels[rows[whole.kept]]
    return EmbeddedImages(whole.embeddings, whole.digests[whole.kept], labels)


def random_rows(records: Records, count: int) -> npt.NDArray[np.int64]:
    """``count`` random rows with a label, or all."""
    known = np.flatnonzero(records.labels >= 0)
    rng = np.random.default_rng(SEED)
    return np.sort(rng.choice(known, min(count, len(known)), replace=False))


def identities_rows(records: Records, count: int) -> npt.NDArray[np.int64]:
    """At least ``count`` rows: those of random identities, at most so many each; or all."""
    rng = np.random.default_rng(SEED)
    known = np.flatnonzero(records.labels >= 0)
    if count >= len(known):
        return known
    shuffled = rng.permutation(known)
    order = shuffled[np.argsort(records.labels[shuffled], kind="stable")]
    images = np.bincount(records.labels[known], minlength=records.num_classes)
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(images) - images, images)
    classes = rng.permutation(records.num_classes)
    taken = np.cumsum(np.minimum(images[classes], MOST_OF_IDENTITY))
    enough = int(np.searchsorted(taken, count)) + 1
    chosen = np.zeros(records.num_classes, bool)
    chosen[classes[: max(enough, FEWEST_IDENTITIES)]] = True
    return np.sort(order[(ranks < MOST_OF_IDENTITY) & chosen[records.labels[order]]])


def images_of_file(pool: EmbeddedImages, centers: Centers, views: Sequence[View]) -> Sample:
    """All images against centres that are known."""
    whole = pool.take(np.arange(len(pool)), views)
    basis = f"the groups of {len(pool):,} random images stand for those of all"
    return Sample(iter([(whole, centers.array)]), len(pool), basis)


def images_of_means(
    pool: EmbeddedImages, num_classes: int, samples: int, views: Sequence[View]
) -> Sample:
    """Some of the images against the means of the pool's identities, and stand-ins for others.

    Raises:
        ConfigError: where the embeddings of a class cancel.
    """
    rng = np.random.default_rng(SEED)
    classes, local = np.unique(pool.labels, return_inverse=True)
    known = class_means([pool.batch()], local, len(classes))
    asked = np.sort(rng.choice(len(pool), min(samples, len(pool)), replace=False))
    basis = f"the groups of {len(asked):,} random images stand for those of all; "
    missing = num_classes - len(classes)
    if not missing:
        basis += f"class means of all {len(pool):,} images"
        return Sample(iter([(pool.take(asked, views), known)]), len(pool), basis)
    basis += (
        f"class means of {len(classes):,} of {num_classes:,} identities "
        f"({len(pool):,} images), and centres spread like them in the place of the others"
    )
    second = np.zeros(len(classes), bool)
    second[rng.permutation(len(classes))[: len(classes) // 2]] = True

    def halves() -> Iterator[tuple[EmbeddedImages, npt.NDArray[np.float32]]]:
        unknown = np.setdiff1d(np.arange(num_classes), classes)
        for half in (second, ~second):
            centers = np.empty((num_classes, known.shape[1]), np.float32)
            centers[classes] = known
            centers[unknown] = synthetic_centers(known[~half], missing, rng)
            yield pool.take(asked[half[local[asked]]], views), centers

    return Sample(halves(), len(pool), basis)
