"""What a teacher is: a network that turns aligned faces into embeddings."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import Preprocess, View
from gkd.storage.errors import GkdError
from gkd.storage.util.torch_device import Precision

FACE_SIZE = 112
IN_FLIGHT = 2  # batches that an accelerator is given ahead of the one that is waited for
Embeddings = Mapping[View, npt.NDArray[np.float32]]


class Embedder(ABC):
    """A network and everything that determines its output; ``sha256`` is of its weights file."""

    name: str
    arch: str
    sha256: str
    embedding_dim: int
    preprocess: Preprocess
    precision: Precision
    compiled: bool
    device: str

    @abstractmethod
    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Faces RGB uint8 [B, 112, 112, 3] to embeddings float32 [B, D], of any length."""

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        """Begin to embed faces in some views; the function returned waits for the embeddings.

        An accelerator works meanwhile; a CPU does everything in that function.
        """

        def wait() -> Embeddings:
            return {
                view: self(images if view == "original" else images[:, :, ::-1]) for view in views
            }

        return wait


def faulty_rows(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Rows of [B, D] that have no direction: not finite, or zero."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    return np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))


def probe_embedding_dim(embedder: Embedder) -> int:
    """Length of the embeddings, found with one grey image.

    Raises:
        GkdError: if the network fails on it, or its output is not [B, D].
    """
    try:
        return int(embedder(np.full((1, FACE_SIZE, FACE_SIZE, 3), 127, np.uint8)).shape[1])
    except GkdError:
        raise
    except Exception as error:  # an unknown network may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GkdError(
            f"{embedder.name}: the teacher fails on an image of 3 x {FACE_SIZE} x {FACE_SIZE}: "
            f"{reason}"
        ) from error


def check_embeddings(
    embeddings: npt.NDArray[Any], batch: int, name: str
) -> npt.NDArray[np.float32]:
    """Embeddings as float32 [batch, D].

    Raises:
        GkdError: if they have another shape.
    """
    if embeddings.ndim != 2 or len(embeddings) != batch:
        raise GkdError(
            f"{name}: expected embeddings [{batch}, D] for {batch} images, got shape "
            f"{list(embeddings.shape)}; the teacher must return one vector per image"
        )
    return np.ascontiguousarray(embeddings, np.float32)
