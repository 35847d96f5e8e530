"""Class centres as the means of each class's embeddings."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.pipeline.embed import EmbeddedBatch
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.text import first_few


def centers_path(out: Path) -> Path:
    """Path of a cache's class means: NAME.centers.npy beside NAME.gkd."""
    return out.with_name(f"{out.name.removesuffix('.gkd')}.centers.npy")


def class_means(
    batches: Iterable[EmbeddedBatch], labels: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.float32]:
    """L2-normalised sums [C, D] of each class's L2-normalised embeddings, in float64.

    Every embedding counts once, so both views of each image average over the flip. ``labels`` are
    those of all records, by row.

    Raises:
        ConfigError: if there is a class without an image, or whose embeddings cancel.
    """
    sums: npt.NDArray[np.float64] | None = None
    counts = np.zeros(num_classes, np.int64)
    for batch in batches:
        own = labels[batch.rows.start + batch.kept]
        order = np.argsort(own, kind="stable")
        classes, first = np.unique(own[order], return_index=True)
        for embeddings in batch.embeddings.values():
            unit = embeddings.astype(np.float64)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            if sums is None:
                sums = np.zeros((num_classes, unit.shape[1]))
            sums[classes] += np.add.reduceat(unit[order], first)
            counts += np.bincount(own, minlength=num_classes)
    _require_images(counts)
    assert sums is not None
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    cancelled = np.flatnonzero(lengths[:, 0] <= 1e-9 * counts)
    if len(cancelled):
        raise ConfigError(
            f"class-mean centres: the embeddings of {len(cancelled):,} classes cancel to zero, "
            f"such as {first_few(cancelled.tolist(), 5)}; is this the right teacher and "
            "preprocessing?"
        )
    return np.asarray(sums / lengths, np.float32)


def require_all_classes(records: Records) -> None:
    """Check that every identity of the records has an image, so that class means exist.

    Raises:
        ConfigError: if not, naming identities without one.
    """
    labels = records.labels
    # Counting by class would exhaust the memory if `property` gives a wrong number of classes.
    if records.num_classes > len(labels):
        raise ConfigError(
            f"class-mean centres: {records.num_classes:,} classes, but only {len(labels):,} "
            "images, so some classes have none; give the teacher's own centres by --centers FILE, "
            "or correct the first line of `property`"
        )
    _require_images(np.bincount(labels[labels >= 0], minlength=records.num_classes))


def _require_images(counts: npt.NDArray[np.int64]) -> None:
    if len(without := np.flatnonzero(counts == 0)):
        raise ConfigError(
            f"class-mean centres: {len(without):,} of {len(counts):,} classes have no image, such "
            f"as {first_few(without.tolist(), 5)}; give the teacher's own centres by --centers "
            "FILE, or number the classes without gaps"
        )
