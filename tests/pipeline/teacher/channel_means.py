"""What the networks of these tests compute: the mean of each channel."""

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import preprocess_preset

ARCFACE = preprocess_preset("arcface")


def images(count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3)).astype(np.uint8)


def means_by_hand(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """What the networks of these tests compute: the mean of each channel."""
    means: npt.NDArray[np.float64] = (batch / 127.5 - 1).mean((1, 2))
    return means
