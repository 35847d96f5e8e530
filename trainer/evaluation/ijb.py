"""IJB 1:1 verification: faces to templates, templates to cosines, TAR at FAR."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from gkd.storage.util.progress import progress
from gkd.trainer.evaluation.embed import Embed, flip_sums, unit_rows
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache
from gkd.trainer.evaluation.ijb_set import IjbSet
from gkd.trainer.evaluation.verification import FARS, equal_error_rate, roc, tar_at

# Small enough for both sides of a chunk to stay in a core's cache.
CHUNK = 1 << 10
QUIET_PAIRS = 1_000_000


@dataclass(frozen=True)
class IjbResult:
    """What one model scores on IJB-B or IJB-C; fractions, not percent.

    tar_at_far  the largest share of genuine pairs accepted by any threshold that accepts at most
                this share of the impostor pairs; None where there are fewer than 1/FAR of those.
                (eval_ijbc.py takes the point of the ROC nearest to the FAR, above it or below.)
    auc, eer    area under the ROC; the error rate where both kinds are equal
    far, tar    float64 [K], the corners of the ROC, both ascending from 0 to 1
    """

    name: str
    images: int
    templates: int
    genuine_pairs: int
    impostor_pairs: int
    tar_at_far: dict[float, float | None]
    auc: float
    eer: float
    far: npt.NDArray[np.float64]
    tar: npt.NDArray[np.float64]

    @property
    def label(self) -> str:
        """For the legend of a plot."""
        return f"{self.name}: AUC {self.auc:.4f}"

    def to_builtins(self) -> dict[str, Any]:
        """For JSON: all but the points of the ROC."""
        return {
            "name": self.name,
            "images": self.images,
            "templates": self.templates,
            "genuine_pairs": self.genuine_pairs,
            "impostor_pairs": self.impostor_pairs,
            "tar_at_far": {f"{far:.0e}": tar for far, tar in self.tar_at_far.items()},
            "auc": self.auc,
            "eer": self.eer,
        }


def evaluate_ijb(
    embed: Embed, faces: IjbSet, *, batch_size: int = 128, store: EmbeddingCache | None = None
) -> IjbResult:
    """Embed every face and its mirror image, make templates of them and score their pairs.

    Source: ``eval_ijbc.py`` of arcface_torch with flip test, feature norm and detector score.

    Raises:
        CorruptRecordError: naming an image that cannot be read.
        ConfigError: where the model's embeddings are not finite.
    """
    sums = flip_sums(embed, faces.faces(), batch_size=batch_size, store=store)
    templates = template_vectors(sums, faces.scores, faces.templates, faces.media)
    return score_ijb(pair_cosines(templates, faces.pairs), faces)


def template_vectors(
    sums: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float64],
    templates: npt.NDArray[np.int64],
    media: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Unit vectors [T, D] of the templates 0 to T - 1.

    A template is the sum over its media of the mean over a medium's faces of score * embedding,
    then L2-normalised. ``sums`` [N, D] are the faces' embeddings, not normalised, so that faces
    of which the network is unsure weigh less; ``scores`` [N] the detector's.
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


def score_ijb(cosines: npt.NDArray[np.float64], faces: IjbSet) -> IjbResult:
    """Every number of a set from its pairs' cosines [P]."""
    far, tar = roc(-cosines, faces.issame)
    impostors = int((~faces.issame).sum())
    corner = corners(far, tar)
    return IjbResult(
        name=faces.name,
        images=len(faces.files),
        templates=faces.num_templates,
        genuine_pairs=int(faces.issame.sum()),
        impostor_pairs=impostors,
        tar_at_far={bound: tar_at(far, tar, bound, impostors) for bound in FARS},
        auc=float(np.trapezoid(tar, far)),
        eer=equal_error_rate(far, tar),
        far=far[corner],
        tar=tar[corner],
    )


def corners(far: npt.NDArray[np.float64], tar: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which points [K] of a ROC to keep: both ends, and where it does not go straight on.

    Millions of impostor pairs make millions of points, nearly all within level stretches.
    """
    kept = np.ones(len(far), bool)
    level, upright = np.diff(tar) == 0, np.diff(far) == 0
    kept[1:-1] = ~((level[:-1] & level[1:]) | (upright[:-1] & upright[1:]))
    return kept


def ijb_table(results: Sequence[IjbResult]) -> Table:
    """A row for each result, for people; a dash where a set has too few impostors to tell."""
    table = Table(title="IJB 1:1 verification")
    table.add_column("set", overflow="fold")
    told = [far for far in FARS if any(result.tar_at_far[far] is not None for result in results)]
    headings = ("images", "templates", "pairs", "AUC", "EER")
    for heading in (*headings, *(f"TAR at {far:.0e}" for far in told)):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.images:,}",
            f"{result.templates:,}",
            f"{result.genuine_pairs + result.impostor_pairs:,}",
            f"{result.auc:.4f}",
            f"{result.eer:.2%}",
            *("-" if tar is None else f"{tar:.2%}" for tar in map(result.tar_at_far.get, told)),
        )
    return table
