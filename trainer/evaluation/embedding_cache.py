"""Embeddings kept on disk, so that one model sees one set of faces once."""

import hashlib
import sys
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

# Counts up whenever the same images would come to a network otherwise.
FORMAT = 1
ARRAY = "embeddings"


def default_embeddings() -> Path:
    """Where embeddings stand unless told otherwise: in ``$GKD_CACHE_DIR`` or ``~/.cache/gkd``."""
    return default_folder() / EMBEDDINGS


@dataclass(frozen=True)
class EmbeddingCache:
    """The embeddings that one model gave, a safetensors file for each set of faces.

    A file's name is the sha256 of all that decides its content: the model's weights, its
    preprocessing and arithmetic, and the faces. It holds ``embeddings`` float32 [N, D] and, as
    metadata, their sha256.

    folder      made where it is missing
    model       sha256 of the weights file
    preprocess  of the network's input
    precision   of its arithmetic
    """

    folder: Path
    model: str
    preprocess: Preprocess
    precision: str

    def path(self, faces: str) -> Path:
        """The file of the set of faces that has this digest."""
        decisive = [FORMAT, self.model, self.preprocess, self.precision, faces]
        key = hashlib.sha256(msgspec.json.encode(decisive)).hexdigest()
        return self.folder / f"{key}.safetensors"

    def load(self, faces: str, count: int) -> npt.NDArray[np.float32] | None:
        """The embeddings float32 [count, D]; None where there are none, or none to be read."""
        path = self.path(faces)
        try:
            if not path.is_file():
                return None
            embeddings = _read(path, count)
        except (CorruptDataError, safetensors.SafetensorError) as error:
            print(f"{path}: damaged ({error}); the images are embedded again", file=sys.stderr)
            return None
        except OSError as error:
            told = f"cannot be read ({error.strerror}); the images are embedded again"
            print(f"{path}: {told}", file=sys.stderr)
            return None
        touch(path)
        return embeddings

    def save(self, faces: str, embeddings: npt.NDArray[np.float32]) -> None:
        """Keep the embeddings, whole or not at all; a note where the disk takes none of them."""
        metadata = {"sha256": _sha256(embeddings), "model": self.model, "faces": faces}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with publish_file(self.path(faces)) as aside:
                safetensors.numpy.save_file({ARRAY: embeddings}, aside, metadata)
        except (OSError, safetensors.SafetensorError) as error:
            # What they were made for goes on: the result is worth more than the next time's speed.
            print(
                f"{self.folder}: the embeddings cannot be kept ({error}); set GKD_CACHE_DIR or "
                "--cache to a folder that you may write to, or leave this with --no-cache",
                file=sys.stderr,
            )


def _read(path: Path, count: int) -> npt.NDArray[np.float32]:
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        names = list(file.keys())
        if names != [ARRAY]:
            raise CorruptDataError(f"expected {ARRAY} alone, got {', '.join(names) or 'nothing'}")
        embeddings = np.asarray(file.get_tensor(ARRAY))
    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != count:
        raise CorruptDataError(
            f"expected float32 [{count}, D], got {embeddings.dtype} {list(embeddings.shape)}"
        )
    if _sha256(embeddings) != metadata.get("sha256"):
        raise CorruptDataError("its bytes are not those that were written")
    return embeddings


def _sha256(embeddings: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(embeddings).data).hexdigest()
