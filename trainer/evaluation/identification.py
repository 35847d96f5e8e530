"""Closed-set identification 1:N, as TinyFace is measured: at which rank a probe's person comes.

The layout is TinyFace's, of its ``Testing_Set`` or a folder around it:

    Gallery_Match/        faces of the people that are looked for
    Probe/                faces to look for
    Gallery_Distractor/   faces of others, may be absent

In the first two a file is named by its person's number, ``IDENTITY_anything.jpg``. Images are
aligned faces of 112x112.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.storage.records.folder import SUFFIXES, natural_key
from gkd.storage.records.images import decode_face
from gkd.trainer.evaluation.embed import Embed, Faces, flip_sums, unit_rows
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache

GALLERY, PROBE, DISTRACTORS = "Gallery_Match", "Probe", "Gallery_Distractor"
TESTING = "Testing_Set"
RANKS = (1, 5, 20)
CMC_RANKS = 50
CHUNK = 256
NOBODY = -1


@dataclass(frozen=True)
class IdentificationSet:
    """P probes to be found among G faces.

    path        the folder that holds the three
    files       of all G + P faces below it, the gallery's first
    identities  int64 [G + P], ``NOBODY`` for distractors
    gallery     G
    """

    path: Path
    files: tuple[str, ...]
    identities: npt.NDArray[np.int64]
    gallery: int

    @property
    def name(self) -> str:
        """Short name for tables."""
        return self.path.parent.name if self.path.name == TESTING else self.path.name

    def faces(self) -> Faces:
        """The faces, to be embedded."""
        return Faces(
            path=self.path,
            name=self.name,
            count=len(self.files),
            encoded=self._encoded,
            image=self._image,
            where=lambda number: self.files[number],
        )

    def _image(self, number: int) -> npt.NDArray[np.uint8]:
        try:
            return decode_face(self._encoded(number), str(self.path / self.files[number]))
        except CorruptRecordError as error:
            raise CorruptRecordError(f"{error}; get it again, or align the set's faces") from error

    def _encoded(self, number: int) -> bytes:
        return (self.path / self.files[number]).read_bytes()


@dataclass(frozen=True)
class IdentificationResult:
    """What one model scores; fractions, not percent.

    gallery, distractors  faces that are searched: of the people looked for, and of others
    probes                faces looked for that have a mate in the gallery
    without_mate          probes without one; they are left out
    cmc                   float64 [50], share of the probes that are found at rank 1, 2 ... 50 or
                          before
    """

    name: str
    gallery: int
    distractors: int
    probes: int
    without_mate: int
    cmc: npt.NDArray[np.float64]

    @property
    def rates(self) -> dict[int, float]:
        """Share of the probes found at ranks 1, 5 and 20 or before."""
        return {rank: float(self.cmc[rank - 1]) for rank in RANKS}

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


def is_identification(folder: Path) -> bool:
    """Whether a folder has the layout of TinyFace."""
    return any((folder / inner / PROBE).is_dir() for inner in ("", TESTING))


def load_identification_set(folder: Path) -> IdentificationSet:
    """The set in a folder that ``is_identification``; images are read when they are asked for.

    Raises:
        ConfigError: where a folder is missing or empty, or a name does not begin with a number.
    """
    if not (folder / PROBE).is_dir():
        folder = folder / TESTING
    match, probe = _listed(folder, GALLERY), _listed(folder, PROBE)
    others = _listed(folder, DISTRACTORS) if (folder / DISTRACTORS).is_dir() else []
    known = [_identity(folder, file) for file in match]
    sought = [_identity(folder, file) for file in probe]
    if not set(known) & set(sought):
        raise ConfigError(
            f"{folder}: expected people of {PROBE} in {GALLERY}, got none in common; files are "
            "named IDENTITY_anything.jpg in both"
        )
    return IdentificationSet(
        folder,
        (*match, *others, *probe),
        np.array([*known, *[NOBODY] * len(others), *sought], np.int64),
        len(match) + len(others),
    )


def _listed(folder: Path, name: str) -> list[str]:
    """Images of one of the folders, and of folders within it, in natural order."""
    if not (folder / name).is_dir():
        raise ConfigError(f"{folder}: expected a folder {name} in it, got none")
    found = [
        path.relative_to(folder).as_posix()
        for path in (folder / name).rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise ConfigError(f"{folder / name}: expected images, got none")
    return sorted(found, key=natural_key)


def _identity(folder: Path, file: str) -> int:
    number = Path(file).name.partition("_")[0]
    if not number.isdecimal():
        raise ConfigError(
            f"{folder / file}: expected a name that begins with its person's number and an "
            f"underscore, such as 17_2.jpg, got {Path(file).name}; rename it"
        )
    return int(number)


def identify(
    embed: Embed,
    faces: IdentificationSet,
    *,
    batch_size: int = 128,
    store: EmbeddingCache | None = None,
) -> IdentificationResult:
    """Embed every face and its mirror image, and look for each probe in the gallery by cosine.

    Raises:
        CorruptRecordError: naming an image that cannot be read.
        ConfigError: where the model's embeddings are not finite.
    """
    sums = flip_sums(embed, faces.faces(), batch_size=batch_size, store=store)
    vectors = unit_rows(sums).astype(np.float32)
    split = faces.gallery
    people = faces.identities
    ranks = first_ranks(vectors[:split], people[:split], vectors[split:], people[split:])
    found = ranks[ranks > 0]
    return IdentificationResult(
        name=faces.name,
        gallery=int((people[:split] != NOBODY).sum()),
        distractors=int((people[:split] == NOBODY).sum()),
        probes=len(found),
        without_mate=len(ranks) - len(found),
        cmc=np.array([(found <= rank).mean() for rank in range(1, CMC_RANKS + 1)]),
    )


def first_ranks(
    gallery: npt.NDArray[np.float32],
    gallery_people: npt.NDArray[np.int64],
    probes: npt.NDArray[np.float32],
    people: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Rank [P], from 1, of the first face of the probe's own person in the gallery; 0 without one.

    Rows of ``gallery`` [G, D] and ``probes`` [P, D] are unit vectors. A face of another that is
    just as near comes first.
    """
    ranks = np.empty(len(probes), np.int64)
    for start in range(0, len(probes), CHUNK):
        rows = slice(start, start + CHUNK)
        cosines = probes[rows] @ gallery.T
        own = people[rows, None] == gallery_people
        best = np.where(own, cosines, -np.inf).max(axis=1)
        nearer = (~own & (cosines >= best[:, None])).sum(axis=1)
        ranks[rows] = np.where(own.any(axis=1), nearer + 1, 0)
    return ranks


def identification_table(results: Sequence[IdentificationResult]) -> Table:
    """A row for each result, for people."""
    table = Table(title="Identification")
    table.add_column("set", overflow="fold")
    for heading in ("gallery", "distractors", "probes", *(f"rank {rank}" for rank in RANKS)):
        table.add_column(heading, justify="right")
    for result in results:
        counts = (result.gallery, result.distractors, result.probes)
        table.add_row(
            result.name,
            *(f"{count:,}" for count in counts),
            *(f"{rate:.2%}" for rate in result.rates.values()),
        )
    return table
