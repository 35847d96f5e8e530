"""Stand-ins for networks: embeddings that are easy to compute otherwise."""

import numpy as np
import numpy.typing as npt


def grid_embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Means of a 4x4 grid, so that the mirror image has another embedding."""
    cells = images.reshape(len(images), 4, 28, 4, 28, 3).mean(axis=(2, 4))
    return np.asarray(cells.reshape(len(images), -1) - 127, np.float32)
