"""Face verification: accuracy over ten folds, TAR at FAR, ROC."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gkd.trainer.evaluation.roc import RocResult, measure_roc

FOLDS = 10
THRESHOLDS = np.arange(0, 4, 0.01)


@dataclass(frozen=True, kw_only=True)
class VerificationResult(RocResult):
    """What one model scores on one verification set; fractions, not percent.

    accuracy, accuracy_std   mean and standard deviation over ten folds, each judged at the
                             threshold that is best on the other nine
    thresholds               float64 [10], squared L2 distance chosen for each fold
    one_sided_folds          folds without genuine or without impostor pairs: if there are any,
                             the accuracy is biased, for thresholds are chosen on the other kind
    """

    protocol: ClassVar[str] = "pairs"
    title: ClassVar[str] = "Verification"
    accuracy: float
    accuracy_std: float
    thresholds: npt.NDArray[np.float64]
    one_sided_folds: int

    @property
    def label(self) -> str:
        """For the legend of a plot."""
        return f"{self.name}: {self.accuracy:.2%}, AUC {self.auc:.4f}"

    @property
    def warning(self) -> str:
        """That the accuracy is biased, if it is."""
        if not self.one_sided_folds:
            return ""
        return (
            f"{self.one_sided_folds} of {FOLDS} folds hold genuine or impostor pairs only, which "
            "biases the accuracy; compare by AUC and EER"
        )

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
            **super().to_builtins(),
        }

    def metrics(self) -> dict[str, str]:
        """Accuracy, and the metrics of the ROC."""
        return {
            "pairs": f"{self.genuine_pairs + self.impostor_pairs:,}",
            "accuracy": f"{self.accuracy:.2%}",
            "± over folds": f"{self.accuracy_std:.2%}",
            **super().metrics(),
        }


def score(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_], *, name: str
) -> VerificationResult:
    """The result of a set from the squared L2 distances [P] and truths [P] of its pairs."""
    accuracies, thresholds = fold_accuracies(distances, issame)
    return VerificationResult(
        name=name,
        **measure_roc(distances, issame),
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        thresholds=thresholds,
        one_sided_folds=sum(len(np.unique(part)) < 2 for part in np.array_split(issame, FOLDS)),
    )


def fold_accuracies(
    distances: npt.NDArray[np.float64], issame: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Accuracy of each of ten contiguous folds at the threshold best on the other nine.

    A pair is accepted if its distance is below the threshold; thresholds 0, 0.01 ... 3.99, the
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
