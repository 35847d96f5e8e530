"""Class means against their definition, and the classes that they do not exist for."""

import numpy as np
import numpy.typing as npt
import pytest

from gkd.pipeline.centers.means import class_means
from gkd.pipeline.embed import EmbeddedBatch, split_rows
from gkd.storage.errors import ConfigError

C, D = 12, 8


def batches(
    embeddings: npt.NDArray[np.float32], kept: npt.NDArray[np.int64], size: int
) -> list[EmbeddedBatch]:
    """Batches of rows of which only ``kept`` have an embedding."""
    found = []
    for rows in split_rows(range(len(embeddings)), size):
        own = kept[(kept >= rows.start) & (kept < rows.stop)]
        views = {"original": embeddings[own], "flipped": 3 * embeddings[own] + 1}
        digests = np.zeros((len(rows), 16), np.uint8)
        found.append(EmbeddedBatch(rows, own - rows.start, digests, {}, views))  # type: ignore[arg-type]
    return found


def test_every_embedding_of_every_view_has_the_same_weight() -> None:
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(C), rng.integers(0, C, 100)])
    embeddings = (rng.normal(size=(len(labels), D)) + 1).astype(np.float32)
    kept = np.setdiff1d(np.arange(len(labels)), np.arange(17, 34))  # one batch without an image
    means = class_means(batches(embeddings, kept, 17), labels, C)
    both = np.concatenate([embeddings[kept], 3 * embeddings[kept] + 1]).astype(np.float64)
    directions = both / np.linalg.norm(both, axis=1, keepdims=True)
    own = np.tile(labels[kept], 2)
    expected = np.stack([directions[own == c].mean(0) for c in range(C)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(means, expected, atol=1e-6)


def test_classes_without_images_are_named() -> None:
    embeddings = np.ones((3, D), np.float32)
    message = (
        r"9 of 12 classes have no image, such as 1, 4, 5, 6, 7 and 4 more; give the teacher's own"
    )
    with pytest.raises(ConfigError, match=message):
        class_means(batches(embeddings, np.arange(3), 2), np.array([0, 2, 3]), C)


def test_classes_whose_embeddings_cancel_are_named() -> None:
    raw = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    (batch,) = batches(np.stack([raw[0], raw[1], -raw[1]]), np.arange(3), 3)
    batch.embeddings["flipped"][:] = batch.embeddings["original"]
    with pytest.raises(ConfigError, match="embeddings of 1 classes cancel to zero, such as 1"):
        class_means([batch], np.array([0, 1, 1]), 2)
