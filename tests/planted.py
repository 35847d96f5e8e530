"""Label errors planted in real records, and how many of them the label-noise report finds."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.analysis.confusions import Confusions
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.records.base import Records, Subset
from tests.paths import SHARED_DATA

MIN_IMAGES = 4  # of an identity that takes part in a swap
MIN_SPLIT = 8  # of one whose images are divided among two labels
FIRST = 100


@dataclass(frozen=True)
class Planted:
    """Labels with errors: ``swapped`` rows [n], and pairs of classes that are one person."""

    records: Records
    labels_before: npt.NDArray[np.int64]
    swapped: npt.NDArray[np.int64]
    split: list[tuple[int, int]]


def plant(records: Records, seed: int, *, swaps: int = 50, splits: int = 5) -> Planted:
    """Swap labels two by two, at most one of an identity, and split some other identities."""
    rng = np.random.default_rng(seed)
    before = records.labels
    labels, counts = before.copy(), np.bincount(before)
    divided = rng.choice(np.flatnonzero(counts >= MIN_SPLIT), splits, replace=False)
    others = np.setdiff1d(np.flatnonzero(counts >= MIN_IMAGES), divided)
    chosen = rng.choice(others, swaps, replace=False)
    rows = np.array([rng.choice(np.flatnonzero(before == label)) for label in chosen])
    labels[rows[0::2]], labels[rows[1::2]] = before[rows[1::2]], before[rows[0::2]]
    split = []
    for number, label in enumerate(divided.tolist()):
        own = rng.permutation(np.flatnonzero(before == label))
        labels[own[: len(own) // 2]] = records.num_classes + number
        split.append((label, records.num_classes + number))
    planted = Subset(records, np.arange(len(records)), records.num_classes + splits)
    planted.labels = labels
    return Planted(planted, before, rows, split)


def figures(found: Confusions, planted: Planted) -> dict[str, float]:
    """How many of the planted errors are found, and at which rank."""
    listed = found.label_noise.slice(0, FIRST).to_pylist()
    named = {item["row"]: item["other"] for item in listed}
    ranks = {
        (item["a"], item["b"]): rank
        for rank, item in enumerate(found.identities.to_pylist(), start=1)
    }
    swapped = planted.swapped.tolist()
    return {
        "swapped labels among the first 100": sum(row in named for row in swapped),
        "of them named after their own identity": sum(
            named.get(row) == int(planted.labels_before[row]) for row in swapped
        ),
        "lowest rank of a split identity": max(
            ranks.get(pair, len(ranks) + 1) for pair in planted.split
        ),
    }


class RememberingTeacher(OnnxEmbedder):
    """The shared teacher, which embeds each image once and remembers the result."""

    def __init__(self) -> None:
        self._known: dict[bytes, npt.NDArray[np.float32]] = {}
        path = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
        super().__init__(path, preprocess_preset("imagenet"), device="cpu")

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        new = [index for index, digest in enumerate(digests) if digest not in self._known]
        if new:
            for index, embedding in zip(new, super().__call__(images[new]), strict=True):
                self._known[digests[index]] = embedding
        return np.stack([self._known[digest] for digest in digests])
