"""Closed-set identification 1:N as with TinyFace: at which rank a probe's person is found.

The layout is TinyFace's, of its ``Testing_Set`` or a folder around it:

    Gallery_Match/        faces of the people to find
    Probe/                faces to identify
    Gallery_Distractor/   faces of others, optional

In the first two a file is named by its person's number, ``IDENTITY_anything.jpg``. Images are
aligned faces of 112x112.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.folder import SUFFIXES, natural_key
from gkd.storage.records.images import decode_face
from gkd.trainer.evaluation.embed import FolderSet, unit_rows
from gkd.trainer.evaluation.results import Result

GALLERY, PROBE, DISTRACTORS = "Gallery_Match", "Probe", "Gallery_Distractor"
TESTING = "Testing_Set"
RANKS = (1, 5, 20)
CMC_RANKS = 50
# Probes per chunk.
CHUNK = 256
NOBODY = -1


@dataclass(frozen=True)
class IdentificationResult(Result):
    """What one model scores; fractions, not percent.

    gallery, distractors  faces that are searched: of the people to find, and of others
    probes                faces to identify that have a mate in the gallery
    without_mate          probes without one; they are left out
    cmc                   float64 [50], share of the probes found at ranks up to 1, 2 ... 50
    """

    protocol: ClassVar[str] = "identification"
    title: ClassVar[str] = "Identification"
    name: str
    gallery: int
    distractors: int
    probes: int
    without_mate: int
    cmc: npt.NDArray[np.float64]

    @property
    def rates(self) -> dict[int, float]:
        """Share of the probes found at ranks up to 1, 5 and 20."""
        return {rank: float(self.cmc[rank - 1]) for rank in RANKS}

    @property
    def warning(self) -> str:
        """That probes are left out, if some are."""
        if not self.without_mate:
            return ""
        return f"{self.without_mate:,} probes have no mate in the gallery and are left out"

    def to_builtins(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "gallery": self.gallery,
            "distractors": self.distractors,
            "probes": self.probes,
            "probes_without_mate": self.without_mate,
            "rank": {str(rank): rate for rank, rate in self.rates.items()},
            "cmc": self.cmc.tolist(),
        }

    def metrics(self) -> dict[str, str]:
        """Counts and rates."""
        return {
            "gallery": f"{self.gallery:,}",
            "distractors": f"{self.distractors:,}",
            "probes": f"{self.probes:,}",
            **{f"rank {rank}": f"{rate:.2%}" for rank, rate in self.rates.items()},
        }


@dataclass(frozen=True)
class IdentificationSet(FolderSet[IdentificationResult]):
    """P probes to find among G faces.

    path        the folder that holds the three
    files       of all G + P faces, the gallery's first
    identities  int64 [G + P], ``NOBODY`` for distractors
    gallery     G
    """

    identities: npt.NDArray[np.int64]
    gallery: int

    @property
    def name(self) -> str:
        """Short name for tables."""
        return self.path.parent.name if self.path.name == TESTING else self.path.name

    def face(self, number: int) -> npt.NDArray[np.uint8]:
        """A face decoded, RGB uint8 [112, 112, 3].

        Raises:
            CorruptRecordError: if it is no aligned face; names the file.
        """
        encoded = self.encoded(number)
        try:
            return decode_face(encoded, str(self.path / self.files[number]))
        except CorruptRecordError as error:
            raise CorruptRecordError(f"{error}; get it again, or align the set's faces") from error

    def score(self, sums: npt.NDArray[np.float32]) -> IdentificationResult:
        """Look for each probe in the gallery by cosine."""
        vectors = unit_rows(sums).astype(np.float32)
        split, people = self.gallery, self.identities
        ranks = first_ranks(vectors[:split], people[:split], vectors[split:], people[split:])
        found = ranks[ranks > 0]
        return IdentificationResult(
            name=self.name,
            gallery=int((people[:split] != NOBODY).sum()),
            distractors=int((people[:split] == NOBODY).sum()),
            probes=len(found),
            without_mate=len(ranks) - len(found),
            cmc=np.array([(found <= rank).mean() for rank in range(1, CMC_RANKS + 1)]),
        )


def is_identification(folder: Path) -> bool:
    """Whether a folder has the layout of TinyFace."""
    return any((folder / inner / PROBE).is_dir() for inner in ("", TESTING))


def load_identification_set(folder: Path) -> IdentificationSet:
    """The set in a folder that ``is_identification``; images are read later, on access.

    Raises:
        ConfigError: if a folder is missing or empty, or a name does not begin with a number.
    """
    if not (folder / PROBE).is_dir():
        folder = folder / TESTING
    match, probe = _listed(folder, GALLERY), _listed(folder, PROBE)
    others = _listed(folder, DISTRACTORS) if (folder / DISTRACTORS).is_dir() else []
    enrolled = [_identity(folder, file) for file in match]
    sought = [_identity(folder, file) for file in probe]
    if not set(enrolled) & set(sought):
        raise ConfigError(
            path=folder,
            expected=f"people of {PROBE} in {GALLERY}",
            got="none in common",
            remedy="files are named IDENTITY_anything.jpg in both",
        )
    return IdentificationSet(
        folder,
        (*match, *others, *probe),
        np.array([*enrolled, *[NOBODY] * len(others), *sought], np.int64),
        len(match) + len(others),
    )


def _listed(folder: Path, name: str) -> list[str]:
    """Images anywhere below one of the folders, in natural order."""
    if not (folder / name).is_dir():
        raise ConfigError(path=folder, expected=f"a folder {name} in it", got="none")
    found = [
        path.relative_to(folder).as_posix()
        for path in (folder / name).rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise ConfigError(path=folder / name, expected="images", got="none")
    return sorted(found, key=natural_key)


def _identity(folder: Path, file: str) -> int:
    number = Path(file).name.partition("_")[0]
    if not number.isdecimal():
        raise ConfigError(
            path=folder / file,
            expected="a name that begins with its person's number, such as 17_2.jpg",
            got=Path(file).name,
            remedy="rename it",
        )
    return int(number)


def first_ranks(
    gallery: npt.NDArray[np.float32],
    gallery_people: npt.NDArray[np.int64],
    probes: npt.NDArray[np.float32],
    people: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Rank [P], from 1, of the first gallery face of the probe's person; 0 if there is none.

    Rows of ``gallery`` [G, D] and ``probes`` [P, D] are unit vectors. Among faces at the same
    distance other people's rank first.
    """
    ranks = np.empty(len(probes), np.int64)
    for start in range(0, len(probes), CHUNK):
        rows = slice(start, start + CHUNK)
        cosines = probes[rows] @ gallery.T
        own = people[rows, None] == gallery_people
        best = np.where(own, cosines, -np.inf).max(axis=1)
        closer = (~own & (cosines >= best[:, None])).sum(axis=1)
        ranks[rows] = np.where(own.any(axis=1), closer + 1, 0)
    return ranks
