"""Verification sets: pairs of faces in ``.bin`` files, read without running their code.

A ``.bin`` is a pickle of ``(bins, issame_list)``: 2P encoded images for P pairs, and one truth
value per pair (``deepinsight/insightface:recognition/arcface_torch/eval/verification.py``). A
pickle may name any callable to be run, so the reader accepts only the few names that such files
contain, and replaces each by a stand-in: neither numpy's nor any other constructor is ever given
to the file.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.images import FACE_SHAPE, decode_face
from gkd.storage.util.files import write_file
from gkd.storage.util.input_files import read_small, refuse_foreign, require_local
from gkd.storage.util.pickles import PickleCost, check_pickle
from gkd.trainer.evaluation.embed import FaceSet, unit_rows
from gkd.trainer.evaluation.verification import FOLDS, VerificationResult, score


@dataclass(frozen=True)
class VerificationSet(FaceSet[VerificationResult]):
    """P pairs of faces: images 2i and 2i + 1 are pair i.

    path     the file
    images   2P encoded images; as faces of the set equal ones count once
    issame   bool [P], both of one identity
    """

    path: Path
    images: tuple[bytes, ...]
    issame: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.issame)

    @property
    def name(self) -> str:
        """Short name for tables: ``lfw`` of ``lfw.bin``."""
        return self.path.stem

    @cached_property
    def _distinct(self) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Number of the first image of each face, and the face of each image [2P]."""
        faces: dict[bytes, int] = {}
        of_images = [faces.setdefault(image, len(faces)) for image in self.images]
        _, first = np.unique(of_images, return_index=True)
        return first.tolist(), np.array(of_images)

    @property
    def num_faces(self) -> int:
        """The number of distinct images."""
        return len(self._distinct[0])

    def encoded(self, number: int) -> bytes:
        """The encoded image of a face."""
        return self.images[self._distinct[0][number]]

    def face(self, number: int) -> npt.NDArray[np.uint8]:
        """A face decoded, RGB uint8 [112, 112, 3]; raises as ``image``."""
        return self.image(self._distinct[0][number])

    def describe(self, number: int) -> str:
        """The number of the face's first image."""
        return f"image {self._distinct[0][number]}"

    def image(self, number: int) -> npt.NDArray[np.uint8]:
        """Image ``number`` (from 0) decoded, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: if it is no image or has another size; names file and image.
        """
        location = f"{self.path}, image {number} of {len(self.images)} (pair {number // 2})"
        try:
            return decode_face(self.images[number], location)
        except CorruptRecordError as error:
            raise CorruptRecordError(
                f"{error}; get the file again, or write it again from aligned faces"
            ) from error

    def unit_embeddings(self, sums: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Unit vectors of all images [2P, D] from the faces' ``flip_sums``."""
        return np.asarray(unit_rows(sums)[self._distinct[1]])

    def score(self, sums: npt.NDArray[np.float32]) -> VerificationResult:
        """Score the squared L2 distances of the pairs."""
        unit = self.unit_embeddings(sums)
        distances = np.square(unit[0::2] - unit[1::2]).sum(axis=1)
        return score(distances, self.issame, name=self.name)


def load_verification_set(path: Path) -> VerificationSet:
    """Read a ``.bin`` of Python 2 or 3; the images are decoded (and checked) later, on access.

    Raises:
        ConfigError: if there is no such file, or it has too few pairs for ten folds.
        CorruptRecordError: if the file is no verification set, or asks for more than data.
    """
    path = Path(path)
    require_local(str(path))  # settings of a training name it too
    if not path.exists():
        raise ConfigError(
            path=path, expected="a verification set (.bin)", got="no file", remedy="check the path"
        )
    bins, truths = _unpickle(path)
    images = tuple(_encoded(path, number, item) for number, item in enumerate(bins))
    issame = _truths(path, truths)
    if len(images) != 2 * len(issame):
        raise CorruptRecordError(
            path=path,
            expected="2 images per pair",
            got=f"{len(images)} images for {len(issame)} pairs",
            remedy="the file is damaged, get it again",
        )
    _check_pairs(path, issame)
    return VerificationSet(path, images, issame)


def write_verification_set(
    path: Path, images: Sequence[bytes], issame: npt.NDArray[np.bool_]
) -> None:
    """Write 2P encoded images and P truth values as a ``.bin`` (pickle protocol 2).

    Raises:
        ConfigError: if the counts do not fit, or are too small for ten folds.
    """
    if len(images) != 2 * len(issame):
        raise ConfigError(
            path=path,
            expected="2 images per pair",
            got=f"{len(images)} images for {len(issame)} pairs",
        )
    _check_pairs(path, issame)
    bins = [bytes(image) for image in images]
    write_file(path, pickle.dumps((bins, [bool(same) for same in issame]), protocol=2))


def _check_pairs(path: Path, issame: npt.NDArray[np.bool_]) -> None:
    same = int(issame.sum())
    if len(issame) < FOLDS or same in (0, len(issame)):
        raise ConfigError(
            path=path,
            expected=f"at least {FOLDS} pairs (one per fold), both genuine and impostor ones",
            got=f"{same} genuine and {len(issame) - same} impostor pairs",
            remedy="use a larger verification set",
        )


# --- the pickle -----------------------------------------------------------------------------------
# Every stand-in is a class with a __setstate__, so that the BUILD opcode cannot set attributes,
# neither on an instance nor on the class itself.


# What to do instead of what is refused.
_WRITE = (
    "write it as pickle.dump((images, truths), file): images a list of the bytes of encoded files, "
    "two for each pair, truths a list of True and False"
)
# Modules whose functions run what a stranger wrote; others only hold data, or what makes it.
_RUNS_CODE = re.compile(
    "os|posix|nt|subprocess|sys|builtins|__builtin__|importlib|runpy|pty|shutil|socket|ctypes|"
    "commands|webbrowser|_?pickle|code|operator|functools|types|marshal|asyncio|multiprocessing"
)


class _Forbidden(Exception):
    """The file asks for something that no verification set needs."""


class _StandIn:
    def __setstate__(self, state: Any) -> None:
        """Ignore the state: that of a dtype only repeats its code."""


class _Dtype(_StandIn):
    """``numpy.dtype`` of truth values, integers or floats."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if text not in DTYPES:
            raise _Forbidden(f"a numpy array of dtype {text!r}")
        self.kind: str = text

    def __setstate__(self, state: Any) -> None:
        """The byte order; the rest of the state only repeats the code."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
            self.kind = f">{self.kind}"


class _Array(_StandIn):
    """``numpy.ndarray``, filled by its state."""

    kind = ""
    data = b""
    shape: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, _fortran, data = state
        self._fill(dtype, data, shape)

    def _fill(self, dtype: Any, data: Any, shape: Any) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise _Forbidden("a numpy array of objects")
        self.kind = dtype.kind
        self.data = bytes(data)
        self.shape = shape if isinstance(shape, tuple) else ()

    def values(self) -> list[Any]:
        """The numbers, row by row."""
        return list(np.frombuffer(self.data, np.dtype(self.kind)).tolist())


class _BytesIO(_StandIn):
    """``io.BytesIO``: its content."""

    content = b""

    def __setstate__(self, state: Any) -> None:
        """Take the content of the state, which is followed by the position."""
        if isinstance(state, tuple) and state and isinstance(state[0], bytes):
            self.content = state[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``, by which Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Forbidden(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _reconstruct(*_shape_and_type: Any) -> _Array:
    """An empty array, filled by its state later."""
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any = (), *_order: Any) -> _Array:
    """An array in pickle protocol 5."""
    array = _Array()
    array._fill(dtype, data, shape)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    """One truth value, as a number."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise _Forbidden("a numpy scalar of objects")
    return np.frombuffer(data, np.dtype(dtype.kind), count=1)[0].item()


def _callable(function: Callable[..., Any]) -> type:
    """A stand-in that gives the function's result when it is called."""
    call = {"__new__": lambda _cls, *arguments: function(*arguments)}
    return type(function.__name__, (_StandIn,), call)


_STAND_INS: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _callable(_encode),
    ("numpy", "ndarray"): _Array,
    ("_io", "BytesIO"): _BytesIO,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("numpy.core", "numpy._core"):  # the name before numpy 2, and since
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _callable(_reconstruct)
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _callable(_scalar)
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _callable(_from_buffer)


# Of truth values and bytes.
DTYPES = frozenset(
    {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"}
)
# Of a verification set; larger ones are no sets of aligned faces.
MAX_BYTES = 1 << 33


# The unpickler in Python: for the one in C ten bytes, a high memo slot, allocate all memory.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise _Forbidden(f"{module}.{name}")
        return stand_in


def _unpickle(path: Path) -> tuple[Sequence[Any], Any]:
    refuse_foreign(path, "a verification set", error=CorruptRecordError)
    try:
        pickled = read_small(path, MAX_BYTES)
        check_pickle(io.BytesIO(pickled), len(pickled))
        content = _Unpickler(io.BytesIO(pickled), encoding="bytes").load()
    except PickleCost as error:
        raise CorruptRecordError(
            path=path,
            expected="a pickle of (images, truth values)",
            got=f"one that {error}",
            remedy="get it again, from a source that you trust",
        ) from error
    except _Forbidden as error:
        problem = f"the file asks for {error}, which no verification set needs"
        remedy = f"nothing of it was run; {_WRITE}"
        if _RUNS_CODE.fullmatch(str(error).partition(".")[0]):
            problem = f"the file asks for {error}, which would have run code of its author"
            remedy = "nothing of it was run; get it from a source that you trust"
        raise CorruptRecordError(problem, path=path, remedy=remedy) from error
    except Exception as error:  # unpickling damaged bytes raises almost any exception
        raise CorruptRecordError(
            f"{path}: expected a pickle of (images, truth values), got bytes that end in "
            f"{type(error).__name__}: {error}; the file is damaged, get it again"
        ) from error
    match content:
        case {"bins": bins, "issame": truths}:
            pass
        case [bins, truths, *_]:
            pass
        case _:
            _refuse(path, "a pair of (images, truth values)", content)
    if (
        isinstance(truths, list | tuple)
        and truths
        and not isinstance(truths[0], bool | int | float)
    ):
        bins, truths = truths, bins  # the other way round
    if isinstance(bins, list | tuple):
        return bins, truths
    _refuse(path, "a pair of (images, truth values)", content)


def _encoded(path: Path, number: int, item: Any) -> bytes:
    if isinstance(item, _Array) and item.kind == "u1":
        if item.shape == FACE_SHAPE and len(item.data) == math.prod(FACE_SHAPE):
            # A decoded face, taken as RGB: encoded without loss, and without much work.
            height, width, _ = FACE_SHAPE
            return b"P6 %d %d 255\n" % (width, height) + item.data
        if len(item.shape) < 3:  # cv2.imencode gives [n, 1] before OpenCV 4.5, and [n] since
            return item.data
        _refuse(path, f"image {number} as bytes, or decoded as RGB uint8 [112, 112, 3]", item)
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, _BytesIO):
        return item.content
    _refuse(path, f"image {number} as bytes", item)


def _truths(path: Path, truths: Any) -> npt.NDArray[np.bool_]:
    values = truths.values() if isinstance(truths, _Array) else truths
    if not isinstance(values, list | tuple):
        _refuse(path, "a list of truth values", truths)
    for number, truth in enumerate(values):
        if not isinstance(truth, bool | int | float) or truth not in (0, 1):
            _refuse(path, f"a truth value (True or False, 1 or 0) for pair {number}", truth)
    return np.array(values, bool)


def _refuse(path: Path, expected: str, got: Any) -> NoReturn:
    kind = type(got).__name__.lstrip("_").lower()
    raise CorruptRecordError(path=path, expected=expected, got=kind, remedy=_WRITE)
