"""IJB-B and IJB-C on disk: faces, their templates and media, and the pairs of templates.

The layout is the one that insightface publishes (recognition/arcface_torch/eval_ijbc.py):

    loose_crop/                          images of faces with a wide border
    meta/ijbc_face_tid_mid.txt           NAME TEMPLATE MEDIUM
    meta/ijbc_name_5pts_score.txt        NAME X1 Y1 ... X5 Y5 SCORE, in the same order
    meta/ijbc_template_pair_label.txt    TEMPLATE TEMPLATE 1 (one person) or 0

and ``ijbb`` for IJB-B.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.images import decode
from gkd.trainer.evaluation.alignment import align_face
from gkd.trainer.evaluation.embed import Faces

META, CROPS = "meta", "loose_crop"
PAIRS, MEDIA, POINTS = "template_pair_label.txt", "face_tid_mid.txt", "name_5pts_score.txt"


@dataclass(frozen=True)
class IjbSet:
    """N faces in T templates, and P pairs of templates.

    path        the folder
    name        ``ijbc``
    files       names of the N images, below loose_crop/
    points      float64 [N, 5, 2], x and y of eyes, nose and corners of the mouth
    scores      float64 [N], of the detector
    templates   int64 [N], from 0 to T - 1
    media       int64 [N]; faces of one template and medium are frames of one video
    pairs       int64 [P, 2], templates
    issame      bool [P], both of one person
    """

    path: Path
    name: str
    files: tuple[str, ...]
    points: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    templates: npt.NDArray[np.int64]
    media: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    issame: npt.NDArray[np.bool_]

    @property
    def num_templates(self) -> int:
        """T."""
        return int(self.templates.max()) + 1

    def image(self, number: int) -> npt.NDArray[np.uint8]:
        """Face ``number`` aligned by its five points, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: naming the file, where it is missing or no image.
            ConfigError: naming file and line of points that are no face's.
        """
        try:
            crop = decode(self._encoded(number))
        except CorruptRecordError as error:
            raise CorruptRecordError(
                f"{self.path / CROPS / self.files[number]}: {error}; get the set again"
            ) from error
        try:
            return align_face(crop, self.points[number])
        except ConfigError as error:
            raise CorruptRecordError(
                f"{self._points_path}, face {number + 1} ({self.files[number]}): {error}; get the "
                "set again"
            ) from error

    def faces(self) -> Faces:
        """The faces, to be embedded."""
        return Faces(
            path=self.path,
            name=self.name,
            count=len(self.files),
            encoded=self._encoded,
            image=self.image,
            where=lambda number: f"{CROPS}/{self.files[number]}",
            places=self.points.tobytes(),
        )

    @property
    def _points_path(self) -> Path:
        return self.path / META / f"{self.name}_{POINTS}"

    def _encoded(self, number: int) -> bytes:
        path = self.path / CROPS / self.files[number]
        try:
            return path.read_bytes()
        except OSError as error:
            raise CorruptRecordError(
                f"{path}: expected the image that line {number + 1} of {self._points_path} names, "
                f"got: {error.strerror}; unpack {CROPS}/ again"
            ) from error


def is_ijb(folder: Path) -> bool:
    """Whether a folder has the layout of IJB-B or IJB-C."""
    return bool(list((folder / META).glob(f"*_{PAIRS}")))


def load_ijb(folder: Path) -> IjbSet:
    """The set in a folder that ``is_ijb``; images are read and checked when they are asked for.

    Raises:
        ConfigError: where the folder holds several sets, or a file is missing.
        CorruptRecordError: naming file and line of what cannot be.
    """
    found = sorted((folder / META).glob(f"*_{PAIRS}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(
            f"{folder / META}: expected one file *_{PAIRS}, got {names}; give a folder a set"
        )
    name = found[0].name.removesuffix(f"_{PAIRS}")
    meta = [folder / META / f"{name}_{each}" for each in (MEDIA, POINTS, PAIRS)]
    for path in meta:
        if not path.is_file():
            raise ConfigError(f"{path}: expected this file beside {found[0].name}, got none")
    files, ids, media = _read_media(meta[0])
    points, scores = _read_points(meta[1], files, meta[0])
    known, templates = np.unique(ids, return_inverse=True)
    pairs, issame = _read_pairs(meta[2], known)
    return IjbSet(folder, name, files, points, scores, templates, media, pairs, issame)


def _read_media(
    path: Path,
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """File, template id and medium id of each face."""
    files: list[str] = []
    numbers: list[tuple[int, int]] = []
    for line, words in _lines(path):
        try:
            file, template, medium = words
            numbers.append((int(template), int(medium)))
        except ValueError:
            _refuse(path, line, "NAME TEMPLATE MEDIUM", words)
        files.append(file)
    if not files:
        raise CorruptRecordError(f"{path}: expected a line for each face, got none")
    ids, media = np.array(numbers, np.int64).T
    return tuple(files), ids, media


def _read_points(
    path: Path, files: Sequence[str], listed: Path
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Five points [N, 5, 2] and the detector's score [N] of each of the files."""
    values = np.empty((len(files), 11))
    count = 0
    for line, words in _lines(path):
        if count < len(files) and words[0] != files[count]:
            _refuse(path, line, f"{files[count]}, as in {listed.name}", words[:1])
        try:
            numbers = np.array([float(word) for word in words[1:]])
        except ValueError:
            numbers = np.empty(0)
        if numbers.shape != (11,) or not np.isfinite(numbers).all():
            _refuse(path, line, "NAME X1 Y1 ... X5 Y5 SCORE", words)
        if count < len(files):
            values[count] = numbers
        count += 1
    if count != len(files):
        raise CorruptRecordError(
            f"{path}: expected {len(files):,} faces, as many as {listed.name} has, got {count:,}; "
            "one of the files is cut off, get the set again"
        )
    return values[:, :10].reshape(-1, 5, 2), values[:, 10]


def _read_pairs(
    path: Path, known: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Pairs [P, 2] as places in ``known``, the sorted template ids, and their truths [P]."""
    table = _table(path)
    if table.shape[1] != 3 or not len(table):
        for line, words in _lines(path):
            if len(words) != 3 or not all(word.lstrip("-").isdecimal() for word in words):
                _refuse(path, line, "TEMPLATE TEMPLATE LABEL", words)
        raise CorruptRecordError(f"{path}: expected a line for each pair, got none")
    ids, labels = table[:, :2], table[:, 2]
    pairs = np.searchsorted(known, ids).clip(max=len(known) - 1)
    strange = (known[pairs] != ids).any(axis=1) | (labels < 0) | (labels > 1)
    if strange.any():
        row = int(strange.argmax())
        line, words = next(each for at, each in enumerate(_lines(path)) if at == row)
        _refuse(path, line, "two templates that have faces, and 1 or 0", words)
    issame = labels == 1
    if issame.all() or not issame.any():
        raise CorruptRecordError(
            f"{path}: expected pairs of one person and of two, got {int(issame.sum()):,} and "
            f"{int((~issame).sum()):,}; the file is cut off, get it again"
        )
    return pairs, issame


def _table(path: Path) -> npt.NDArray[np.int64]:
    """The whole numbers in a file, a row a line; empty where it holds anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a file without a line
        try:
            return np.loadtxt(path, np.int64, comments=None, ndmin=2)
        except ValueError:
            return np.empty((0, 0), np.int64)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number from 1 and words of every line that is not empty."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if words:
                yield number, words


def _refuse(path: Path, line: int, expected: str, words: Sequence[str]) -> NoReturn:
    raise CorruptRecordError(
        f"{path}, line {line}: expected {expected}, got {' '.join(words)!r}; get the set again"
    )
