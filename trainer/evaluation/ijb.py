"""IJB-B and IJB-C, 1:1 verification: faces to templates, templates to cosines, TAR at FAR.

The layout is the one that insightface publishes (recognition/arcface_torch/eval_ijbc.py):

    loose_crop/                          images of faces with a wide border
    meta/ijbc_face_tid_mid.txt           NAME TEMPLATE MEDIUM
    meta/ijbc_name_5pts_score.txt        NAME X1 Y1 ... X5 Y5 SCORE, in the same order
    meta/ijbc_template_pair_label.txt    TEMPLATE TEMPLATE 1 (one person) or 0

and ``ijbb`` for IJB-B.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.images import decode
from gkd.storage.util.input_files import resolve_below
from gkd.storage.util.progress import progress
from gkd.trainer.evaluation.alignment import align_face
from gkd.trainer.evaluation.embed import FolderSet, unit_rows
from gkd.trainer.evaluation.roc import RocResult, measure_roc

META, CROPS = "meta", "loose_crop"
PAIRS, MEDIA, POINTS = "template_pair_label.txt", "face_tid_mid.txt", "name_5pts_score.txt"
# Pairs per chunk: both sides stay in a core's cache.
CHUNK = 1 << 10
QUIET_PAIRS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class IjbResult(RocResult):
    """What one model scores on IJB-B or IJB-C; fractions, not percent."""

    protocol: ClassVar[str] = "templates"
    title: ClassVar[str] = "IJB 1:1 verification"
    images: int
    templates: int

    def to_builtins(self) -> dict[str, Any]:
        """For JSON: all but the points of the ROC."""
        return {
            "name": self.name,
            "images": self.images,
            "templates": self.templates,
            **super().to_builtins(),
        }

    def metrics(self) -> dict[str, str]:
        """Counts, and the metrics of the ROC."""
        return {
            "images": f"{self.images:,}",
            "templates": f"{self.templates:,}",
            "pairs": f"{self.genuine_pairs + self.impostor_pairs:,}",
            **super().metrics(),
        }


@dataclass(frozen=True)
class IjbSet(FolderSet[IjbResult]):
    """N faces in T templates, and P pairs of templates.

    files       of the N images, below ``path``
    prefix      of the files in meta/, and name: ``ijbc``
    points      float64 [N, 5, 2], x and y of eyes, nose and corners of the mouth
    scores      float64 [N], of the detector
    templates   int64 [N], from 0 to T - 1
    media       int64 [N]; faces of one template and medium are frames of one video
    pairs       int64 [P, 2], templates
    issame      bool [P], both of one person
    """

    prefix: str
    points: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    templates: npt.NDArray[np.int64]
    media: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    issame: npt.NDArray[np.bool_]

    @property
    def name(self) -> str:
        """Short name for tables."""
        return self.prefix

    @property
    def num_templates(self) -> int:
        """T."""
        return int(self.templates.max()) + 1

    @property
    def geometry(self) -> bytes:
        """The five points, by which the faces are aligned."""
        return self.points.tobytes()

    def face(self, number: int) -> npt.NDArray[np.uint8]:
        """A face aligned by its five points, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: if the image or the points are unusable; names file and line.
        """
        encoded, location = self.encoded(number), f"{self.path / self.files[number]}"
        try:
            crop = decode(encoded)
            points = self.path / META / f"{self.prefix}_{POINTS}"
            location = f"{points}, face {number + 1} ({self.files[number]})"
            return align_face(crop, self.points[number])
        except (CorruptRecordError, ConfigError) as error:
            raise CorruptRecordError(f"{location}: {error}; get the set again") from error

    def score(self, sums: npt.NDArray[np.float32]) -> IjbResult:
        """Make templates of the faces and score their pairs by cosine.

        Source: ``eval_ijbc.py`` of arcface_torch with flip test, feature norm and detector score.
        """
        vectors = template_vectors(sums, self.scores, self.templates, self.media)
        return self.score_pairs(pair_cosines(vectors, self.pairs))

    def score_pairs(self, cosines: npt.NDArray[np.float64]) -> IjbResult:
        """The result from the cosines [P] of the pairs."""
        return IjbResult(
            name=self.name,
            **measure_roc(-cosines, self.issame),
            images=len(self.files),
            templates=self.num_templates,
        )


def template_vectors(
    sums: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float64],
    templates: npt.NDArray[np.int64],
    media: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Unit vectors [T, D] of the templates 0 to T - 1.

    A template is the sum over its media of the mean over a medium's faces of score * embedding,
    then L2-normalised. ``sums`` [N, D] are the faces' embeddings, not normalised, so that faces
    of which the network is unsure weigh less; ``scores`` [N] are the detector's.
    """
    _, group, size = np.unique(
        np.column_stack([templates, media]), axis=0, return_inverse=True, return_counts=True
    )
    weights = scores / size[group.ravel()]
    order = np.argsort(templates, kind="stable")
    ends = np.cumsum(np.bincount(templates))
    vectors = np.zeros((len(ends), sums.shape[1]))
    for template, rows in enumerate(np.split(order, ends[:-1])):
        vectors[template] = weights[rows] @ sums[rows].astype(np.float64)
    return unit_rows(vectors)


def pair_cosines(
    vectors: npt.NDArray[np.float64], pairs: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Cosines [P] of pairs [P, 2] of rows of ``vectors`` [T, D], ``CHUNK`` pairs at a time."""
    cosines = np.empty(len(pairs))
    with progress("Comparing", len(pairs), "pairs", quiet_below=QUIET_PAIRS) as advance:
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            left, right = vectors[chunk[:, 0]], vectors[chunk[:, 1]]
            cosines[start : start + len(chunk)] = np.einsum("pd,pd->p", left, right)
            advance(len(chunk))
    return cosines


def is_ijb(folder: Path) -> bool:
    """Whether a folder has the layout of IJB-B or IJB-C."""
    return bool(list((folder / META).glob(f"*_{PAIRS}")))


def load_ijb(folder: Path) -> IjbSet:
    """The set in a folder that ``is_ijb``; images are read and checked later, on access.

    Raises:
        ConfigError: if the folder holds several sets, or a file is missing.
        CorruptRecordError: if a list is damaged; names file and line.
    """
    found = sorted((folder / META).glob(f"*_{PAIRS}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(
            path=folder / META,
            expected=f"one file *_{PAIRS}",
            got=names,
            remedy="keep each set in its own folder",
        )
    name = found[0].name.removesuffix(f"_{PAIRS}")
    meta = [folder / META / f"{name}_{suffix}" for suffix in (MEDIA, POINTS, PAIRS)]
    for path in meta:
        if not path.is_file():
            raise ConfigError(path=path, expected=f"this file beside {found[0].name}", got="none")
    files, ids, media = _read_media(meta[0])
    points, scores = _read_points(meta[1], files, meta[0])
    known, templates = np.unique(ids, return_inverse=True)
    pairs, issame = _read_pairs(meta[2], known)
    return IjbSet(folder, files, name, points, scores, templates, media, pairs, issame)


def _read_media(
    path: Path,
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """File, template id and medium id of each face."""
    rows = []
    for line, row in _rows(path, "NAME TEMPLATE MEDIUM", (str, int, int)):
        try:
            resolve_below(path.parent.parent / CROPS, row[0])
        except ValueError:
            _refuse(path, line, f"the name of an image below {CROPS}/", row[0])
        rows.append(row)
    if not rows:
        raise CorruptRecordError(path=path, expected="a line for each face", got="none")
    ids, media = np.array([row[1:] for row in rows], np.int64).T
    return tuple(f"{CROPS}/{row[0]}" for row in rows), ids, media


def _read_points(
    path: Path, files: Sequence[str], listed: Path
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Five points [N, 5, 2] and the detector's score [N] of each of the files."""
    rows = list(_rows(path, "NAME X1 Y1 ... X5 Y5 SCORE", (str, *[_finite] * 11)))
    for (line, row), file in zip(rows, files, strict=False):
        expected = file.removeprefix(f"{CROPS}/")
        if row[0] != expected:
            _refuse(path, line, f"{expected}, as in {listed.name}", row[0])
    if len(rows) != len(files):
        raise CorruptRecordError(
            path=path,
            expected=f"{len(files):,} faces, as in {listed.name}",
            got=f"{len(rows):,}",
            remedy="one of the files is truncated, get the set again",
        )
    values = np.array([row[1:] for _, row in rows])
    return values[:, :10].reshape(-1, 5, 2), values[:, 10]


def _read_pairs(
    path: Path, known: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Pairs [P, 2] as positions in ``known``, the sorted template ids, and their truths [P]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about an empty file
        try:
            table = np.loadtxt(path, np.int64, comments=None, ndmin=2)
        except ValueError:
            table = np.empty((0, 0), np.int64)
    if table.shape[1] != 3 or not len(table):
        list(_rows(path, "TEMPLATE TEMPLATE LABEL", (int, int, int)))  # names the line
        raise CorruptRecordError(path=path, expected="a line for each pair", got="none")
    ids, labels = table[:, :2], table[:, 2]
    pairs = np.searchsorted(known, ids).clip(max=len(known) - 1)
    invalid = (known[pairs] != ids).any(axis=1) | (labels < 0) | (labels > 1)
    if invalid.any():
        row = int(invalid.argmax())
        line, values = next(itertools.islice(_rows(path, "", (int, int, int)), row, None))
        _refuse(path, line, "two templates that have faces, and 1 or 0", *values)
    issame = labels == 1
    if issame.all() or not issame.any():
        raise CorruptRecordError(
            path=path,
            expected="pairs of one person and of two",
            got=f"{int(issame.sum()):,} and {int((~issame).sum()):,}",
            remedy="the file is truncated, get it again",
        )
    return pairs, issame


def _rows(
    path: Path, expected: str, kinds: Sequence[Callable[[str], Any]]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield number (from 1) and values of every line that is not empty."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line, text in enumerate(file, 1):
            words = text.split()
            if not words:
                continue
            try:
                yield line, tuple(kind(word) for kind, word in zip(kinds, words, strict=True))
            except ValueError:
                _refuse(path, line, expected, *words)


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


def _refuse(path: Path, line: int, expected: str, *got: object) -> NoReturn:
    words = " ".join(map(str, got))
    raise CorruptRecordError(
        path=f"{path}, line {line}", expected=expected, got=repr(words), remedy="get the set again"
    )
