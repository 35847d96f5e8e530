"""The receiver operating characteristic of scored pairs: TAR at FAR, area, equal error rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.util import plotting
from gkd.trainer.evaluation.results import Result

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True, kw_only=True)
class RocResult(Result):
    """The rates of genuine and impostor pairs.

    tar_at_far  the largest share of genuine pairs accepted by any threshold, over all pairs, that
                accepts at most this share of the impostor pairs; None if there are fewer than
                1/FAR impostor pairs, too few to measure it. (eval_ijbc.py takes the point of the
                ROC nearest to the FAR, above or below.)
    auc, eer    area under the ROC; the error rate at which both kinds of error are equal
    far, tar    float64 [K], the corners of the ROC, both ascending from 0 to 1
    """

    name: str
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
            "genuine_pairs": self.genuine_pairs,
            "impostor_pairs": self.impostor_pairs,
            "tar_at_far": {f"{far:.0e}": tar for far, tar in self.tar_at_far.items()},
            "auc": self.auc,
            "eer": self.eer,
        }

    def metrics(self) -> dict[str, str]:
        """AUC, EER, and TAR at each FAR that the set is large enough for."""
        tars = {f"TAR at {far:.0e}": tar for far, tar in self.tar_at_far.items()}
        return {
            "AUC": f"{self.auc:.4f}",
            "EER": f"{self.eer:.2%}",
            **{name: f"{tar:.2%}" for name, tar in tars.items() if tar is not None},
        }


def measure_roc(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """The fields of a ``RocResult`` but its name, from the distances [P] and truths [P] of pairs.

    The greater the distance, the less alike is a pair.
    """
    far, tar = roc(distances, issame)
    impostors = int((~issame).sum())
    corner = corners(far, tar)
    return {
        "genuine_pairs": int(issame.sum()),
        "impostor_pairs": impostors,
        "tar_at_far": {bound: tar_at(far, tar, bound, impostors) for bound in FARS},
        "auc": float(np.trapezoid(tar, far)),
        "eer": equal_error_rate(far, tar),
        "far": far[corner],
        "tar": tar[corner],
    }


def roc(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Share of impostor (FAR) and genuine pairs (TAR) up to each distance; both from 0 to 1."""
    order = np.argsort(distances, kind="stable")
    ascending, same = distances[order], issame[order]
    last_of_equals = np.append(np.flatnonzero(np.diff(ascending)), len(ascending) - 1)
    tar = same.cumsum()[last_of_equals] / same.sum()
    far = (~same).cumsum()[last_of_equals] / (~same).sum()
    return np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])


def tar_at(
    far: npt.NDArray[np.float64], tar: npt.NDArray[np.float64], bound: float, impostors: int
) -> float | None:
    """Largest TAR at a FAR of at most ``bound``; None if there are too few ``impostors``."""
    # A bound of 1e-2 and 100 impostors: 1e-2 * 100 is not exactly 1 in floating point.
    if impostors * bound < 1 - 1e-9:
        return None
    return float(tar[np.searchsorted(far, bound + 1e-12, side="right") - 1])


def equal_error_rate(far: npt.NDArray[np.float64], tar: npt.NDArray[np.float64]) -> float:
    """The rate at which false accepts equal false rejects, interpolated linearly."""
    gap = far - (1.0 - tar)  # ascends from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def corners(far: npt.NDArray[np.float64], tar: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which points [K] of a ROC to keep: both ends, and those where its direction changes.

    Millions of impostor pairs give millions of points, nearly all on horizontal stretches.
    """
    kept = np.ones(len(far), bool)
    level, upright = np.diff(tar) == 0, np.diff(far) == 0
    kept[1:-1] = ~((level[:-1] & level[1:]) | (upright[:-1] & upright[1:]))
    return kept


def plot_roc(results: Sequence[RocResult], out: Path) -> None:
    """Draw the ROC of each result into a PNG, FAR in logarithmic scale.

    Raises:
        ConfigError: if matplotlib is not installed, or ``out`` cannot be written.
    """
    figure = plotting.new_figure(6, 4.5)
    axes = figure.add_subplot()
    for result in results:
        # One impostor pair is the smallest FAR that the set can show.
        floor = 1.0 / result.impostor_pairs
        axes.step(np.maximum(result.far, floor), result.tar, where="post", label=result.label)
    axes.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    plotting.write_png(figure, out, dpi=150)
