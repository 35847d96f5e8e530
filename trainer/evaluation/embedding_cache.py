"""Embeddings saved on disk, so that a model embeds a set of faces only once."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from gkd.storage.cache.spec import Preprocess
from gkd.storage.errors import CorruptDataError
from gkd.storage.reading.mmap_store import EMBEDDINGS, default_folder, touch
from gkd.storage.util.files import publish_file
from gkd.storage.util.torchrun_env import log_rank0

# Increased whenever the same images would reach a network as different input.
FORMAT = 2
ARRAY = "embeddings"


def default_embeddings() -> Path:
    """The default folder of embeddings, in ``$GKD_CACHE_DIR`` or ``~/.cache/gkd``."""
    return default_folder() / EMBEDDINGS


@dataclass(frozen=True)
class EmbeddingCache:
    """The embeddings of one model, a safetensors file for each set of faces.

    A file's name is the sha256 of all that determines its content: the model's weights, its
    preprocessing and arithmetic, and the faces. It holds ``embeddings`` float32 [N, D] and, as
    metadata, their sha256.

    folder      created if it is missing
    model       sha256 of the weights file
    preprocess  of the network's input
    precision   of its arithmetic
    """

    folder: Path
    model: str
    preprocess: Preprocess
    precision: str

    def path(self, faces: str) -> Path:
        """The file of the set of faces with this digest."""
        inputs = [FORMAT, self.model, self.preprocess, self.precision, faces]
        key = hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()
        return self.folder / f"{key}.safetensors"

    def load(self, faces: str, count: int) -> npt.NDArray[np.float32] | None:
        """The embeddings float32 [count, D]; None if there are none, or they cannot be read."""
        path = self.path(faces)
        try:
            if not path.is_file():
                return None
            embeddings = _read(path, count)
        except (CorruptDataError, safetensors.SafetensorError, OSError) as error:
            log_rank0(f"{path}: damaged or unreadable ({error}); the images are embedded again")
            return None
        touch(path)
        return embeddings

    def save(self, faces: str, embeddings: npt.NDArray[np.float32]) -> None:
        """Save the embeddings atomically; if they cannot be written, print a warning."""
        metadata = {"sha256": _sha256(embeddings), "model": self.model, "faces": faces}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with publish_file(self.path(faces)) as temporary:
                safetensors.numpy.save_file({ARRAY: embeddings}, temporary, metadata)
        except (OSError, safetensors.SafetensorError) as error:
            # Only the speed of the next evaluation depends on them.
            log_rank0(
                f"{self.folder}: the embeddings cannot be saved ({error}); set GKD_CACHE_DIR or "
                "--cache to a folder that you may write to, or use --no-cache"
            )


def _read(path: Path, count: int) -> npt.NDArray[np.float32]:
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        names = list(file.keys())
        if names != [ARRAY]:
            raise CorruptDataError(f"expected only {ARRAY}, got {', '.join(names) or 'nothing'}")
        embeddings = np.asarray(file.get_tensor(ARRAY))
    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != count:
        raise CorruptDataError(
            f"expected float32 [{count}, D], got {embeddings.dtype} {list(embeddings.shape)}"
        )
    if _sha256(embeddings) != metadata.get("sha256"):
        raise CorruptDataError("its bytes differ from those that were written")
    return embeddings


def _sha256(embeddings: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(embeddings).data).hexdigest()
