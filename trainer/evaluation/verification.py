"""Face verification as the field does it: accuracy over ten folds, TAR at FAR, ROC."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import nn

from gkd.storage.cache.spec import Preprocess
from gkd.storage.errors import ConfigError
from gkd.storage.util.extras import require
from gkd.storage.util.plotting import write_png
from gkd.trainer.device import DTYPES, network_input
from gkd.trainer.evaluation.bin_file import FOLDS, VerificationSet
from gkd.trainer.evaluation.embed import Embed, Faces, flip_sums, unit_rows
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
THRESHOLDS = np.arange(0, 4, 0.01)


@dataclass(frozen=True)
class VerificationResult:
    """What one model scores on one verification set; fractions, not percent.

    accuracy, accuracy_std   mean and standard deviation over ten folds, each judged at the
                             threshold that is best on the other nine
    thresholds               float64 [10], squared L2 distance chosen for each fold
    tar_at_far               the largest share of genuine pairs accepted by any threshold, over all
                             pairs, that accepts at most this share of the impostor pairs; None
                             where there are fewer than 1/FAR impostor pairs to tell
    one_sided_folds          folds without genuine or without impostor pairs: where there are any,
                             the accuracy is biased, for thresholds are chosen on the other kind
    auc, eer                 area under the ROC; the error rate where both kinds are equal
    far, tar                 float64 [K], the ROC's points, both ascending from 0 to 1
    """

    name: str
    genuine_pairs: int
    impostor_pairs: int
    accuracy: float
    accuracy_std: float
    thresholds: npt.NDArray[np.float64]
    one_sided_folds: int
    tar_at_far: dict[float, float | None]
    auc: float
    eer: float
    far: npt.NDArray[np.float64]
    tar: npt.NDArray[np.float64]

    @property
    def label(self) -> str:
        """For the legend of a plot."""
        return f"{self.name}: {self.accuracy:.2%}, AUC {self.auc:.4f}"

    def to_builtins(self) -> dict[str, Any]:
        """For JSON: all but the points of the ROC."""
        return {
            "name": self.name,
            "genuine_pairs": self.genuine_pairs,
            "impostor_pairs": self.impostor_pairs,
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "thresholds": [round(float(threshold), 2) for threshold in self.thresholds],
            "one_sided_folds": self.one_sided_folds,
            "tar_at_far": {f"{far:.0e}": tar for far, tar in self.tar_at_far.items()},
            "auc": self.auc,
            "eer": self.eer,
        }


def module_embed(
    module: nn.Module, preprocess: Preprocess, device: torch.device, precision: str = "float32"
) -> Embed:
    """Make an ``Embed`` of a network that takes float [B, 3, 112, 112].

    Pixels travel as uint8 and are normalised on ``device``, where the module already is. Its mode
    is left alone: put it into eval mode before. ``precision`` is float32, float16 or
    bfloat16 (autocast).
    """
    if precision not in DTYPES:
        raise ConfigError(f"precision: expected {', '.join(DTYPES)}, got {precision!r}")
    dtype = DTYPES[precision]
    pixels = network_input(preprocess, device)

    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        moved = torch.from_numpy(images).to(device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), autocast:
            embeddings = module(pixels(moved).contiguous())
        return np.asarray(embeddings.float().cpu().numpy(), np.float32)

    return embed


def evaluate(
    embed: Embed,
    pairs: VerificationSet,
    *,
    batch_size: int = 128,
    store: EmbeddingCache | None = None,
) -> VerificationResult:
    """Embed every image of ``pairs`` and its mirror image, and score the pairs' distances.

    Embeddings that ``store`` has of this model and these images are not computed again.

    Raises:
        CorruptRecordError: naming file and image, where an image cannot be read.
        ConfigError: where the model's embeddings are not finite.
    """
    embeddings = flip_sum_embeddings(embed, pairs, batch_size=batch_size, store=store)
    return score(pair_distances(embeddings), pairs.issame, name=pairs.name)


def flip_sum_embeddings(
    embed: Embed,
    pairs: VerificationSet,
    *,
    batch_size: int,
    store: EmbeddingCache | None = None,
) -> npt.NDArray[np.float64]:
    """Embedding of each image plus that of its mirror image, then L2-normalised; [2P, D]."""
    # Sets show a face in several pairs; it is embedded once, under its first number.
    first: dict[bytes, int] = {}
    numbers = [first.setdefault(image, number) for number, image in enumerate(pairs.images)]
    distinct = list(first.values())
    faces = Faces(
        path=pairs.path,
        name=pairs.name,
        count=len(distinct),
        encoded=lambda number: pairs.images[distinct[number]],
        image=lambda number: pairs.image(distinct[number]),
        where=lambda number: f"image {distinct[number]}",
    )
    unit = unit_rows(flip_sums(embed, faces, batch_size=batch_size, store=store))
    return np.asarray(unit[np.searchsorted(distinct, numbers)])


def pair_distances(embeddings: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Squared L2 distances [P] of the pairs of rows of [2P, D]."""
    return np.asarray(np.square(embeddings[0::2] - embeddings[1::2]).sum(axis=1))


def score(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_], *, name: str
) -> VerificationResult:
    """Every number of a verification set from its pairs' distances [P] and truths [P]."""
    accuracies, thresholds = fold_accuracies(distances, issame)
    far, tar = roc(distances, issame)
    impostors = int((~issame).sum())
    return VerificationResult(
        name=name,
        genuine_pairs=int(issame.sum()),
        impostor_pairs=impostors,
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        thresholds=thresholds,
        one_sided_folds=sum(len(np.unique(part)) < 2 for part in np.array_split(issame, FOLDS)),
        tar_at_far={bound: tar_at(far, tar, bound, impostors) for bound in FARS},
        auc=float(np.trapezoid(tar, far)),
        eer=equal_error_rate(far, tar),
        far=far,
        tar=tar,
    )


def fold_accuracies(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Accuracy of each of ten contiguous folds at the threshold best on the other nine.

    A pair is accepted where its distance is below the threshold; thresholds 0, 0.01 ... 3.99, the
    first of the best. The first P % 10 folds hold one pair more. Returns accuracies and thresholds,
    each float64 [10]. Source: ``evaluate`` and ``calculate_roc`` of arcface_torch.
    """
    fold_sizes = np.full(FOLDS, len(distances) // FOLDS)
    fold_sizes[: len(distances) % FOLDS] += 1
    fold = np.repeat(np.arange(FOLDS), fold_sizes)
    # Every threshold from this one on accepts the pair.
    first_accepting = np.searchsorted(THRESHOLDS, distances, side="right")

    def accepted(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """How many of the chosen pairs each fold accepts at each threshold [10, thresholds]."""
        width = len(THRESHOLDS) + 1
        cells = fold[chosen] * width + first_accepting[chosen]
        counts = np.bincount(cells, minlength=FOLDS * width).reshape(FOLDS, width)
        return np.asarray(counts[:, :-1].cumsum(axis=1))

    impostors = np.bincount(fold[~issame], minlength=FOLDS)
    correct = accepted(issame) + impostors[:, None] - accepted(~issame)
    best = (correct.sum(axis=0) - correct).argmax(axis=1)
    return correct[np.arange(FOLDS), best] / fold_sizes, THRESHOLDS[best]


def roc(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Share of impostor (FAR) and of genuine pairs (TAR) at each distance or below; from 0 to 1."""
    order = np.argsort(distances, kind="stable")
    ascending, same = distances[order], issame[order]
    last_of_equals = np.append(np.flatnonzero(np.diff(ascending)), len(ascending) - 1)
    tar = same.cumsum()[last_of_equals] / same.sum()
    far = (~same).cumsum()[last_of_equals] / (~same).sum()
    return np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])


def tar_at(
    far: npt.NDArray[np.float64], tar: npt.NDArray[np.float64], bound: float, impostors: int
) -> float | None:
    """Largest TAR at a FAR of at most ``bound``; None where ``impostors`` are too few to tell."""
    # A bound of 1e-2 and 100 impostors: 1e-2 * 100 is a hair from 1 in floating point.
    if impostors * bound < 1 - 1e-9:
        return None
    return float(tar[np.searchsorted(far, bound + 1e-12, side="right") - 1])


def equal_error_rate(far: npt.NDArray[np.float64], tar: npt.NDArray[np.float64]) -> float:
    """The rate at which false accepts equal false rejects, between the ROC's points linearly."""
    gap = far - (1.0 - tar)  # ascends from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def results_table(results: Sequence[VerificationResult]) -> Table:
    """A row for each result, for people; a dash where a set has too few impostors to tell.

    Rates for which every set has too few are left out.
    """
    table = Table(title="Verification")
    table.add_column("set", overflow="fold")
    headings = ("pairs", "accuracy", "± over folds", "AUC", "EER")
    told = [far for far in FARS if any(result.tar_at_far[far] is not None for result in results)]
    for heading in (*headings, *(f"TAR at {far:.0e}" for far in told)):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.genuine_pairs + result.impostor_pairs:,}",
            f"{result.accuracy:.2%}",
            f"{result.accuracy_std:.2%}",
            f"{result.auc:.4f}",
            f"{result.eer:.2%}",
            *("-" if tar is None else f"{tar:.2%}" for tar in map(result.tar_at_far.get, told)),
        )
    return table


class Curve(Protocol):
    """A ROC to be drawn."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def impostor_pairs(self) -> int: ...  # noqa: D102
    @property
    def far(self) -> npt.NDArray[np.float64]: ...  # noqa: D102
    @property
    def tar(self) -> npt.NDArray[np.float64]: ...  # noqa: D102


def plot_roc(results: Sequence[Curve], out: Path) -> None:
    """Draw the ROC of each result into a PNG, FAR in logarithmic scale.

    Raises:
        ConfigError: where matplotlib is not installed, or ``out`` cannot be written.
    """
    figure_module = require("matplotlib.figure", "plot")
    figure = figure_module.Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        # One impostor pair is the least FAR that the set can show.
        floor = 1.0 / result.impostor_pairs
        axes.step(np.maximum(result.far, floor), result.tar, where="post", label=result.label)
    axes.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_png(figure, out, dpi=150)
