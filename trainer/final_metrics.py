"""``report.json``: the metrics of a finished training, from which its report is made."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from gkd.storage.errors import ConfigError
from gkd.storage.util.files import write_file
from gkd.storage.util.input_files import read_small
from gkd.trainer.data.dataset import JoinedTargets
from gkd.trainer.evaluation.verification import VerificationResult
from gkd.trainer.identity_cosines import CosineSummary

FINAL_METRICS = "report.json"
# Enough for a printed curve.
ROC_POINTS = 400


class SetScore(msgspec.Struct, frozen=True):
    """The last evaluation on one set, see ``VerificationResult``; ``roc`` is (FAR, TAR) points."""

    name: str
    genuine_pairs: int
    impostor_pairs: int
    accuracy: float
    accuracy_std: float
    one_sided_folds: int
    tar_at_far: dict[str, float | None]
    auc: float
    eer: float
    roc: tuple[tuple[float, float], ...]


class FinalMetrics(msgspec.Struct, frozen=True):
    """``report.json``.

    sets              the last evaluation
    groups            by view of the cache: (group size, samples), ascending; size 0 means skipped
    identity_cosines  the identities with the lowest cosines; None if no last epoch was observed
    """

    step: int
    sets: tuple[SetScore, ...] = ()
    groups: dict[str, tuple[tuple[int, int], ...]] = {}
    identity_cosines: CosineSummary | None = msgspec.field(default=None, name="fit")


def collect(
    step: int,
    results: Sequence[VerificationResult],
    targets: JoinedTargets | None,
    identity_cosines: CosineSummary | None,
) -> FinalMetrics:
    """The metrics at the end of a training.

    Raises:
        CorruptShardError: if the cache is read in blocks and damaged.
    """
    groups = {}
    if targets is not None:
        for view in targets.store.views:
            counts = targets.store.size_counts(view)
            groups[str(view)] = tuple(
                (size, int(counts[size])) for size in np.flatnonzero(counts).tolist()
            )
    return FinalMetrics(step, tuple(map(_score, results)), groups, identity_cosines)


def write_final_metrics(run: Path, metrics: FinalMetrics) -> None:
    """Write ``report.json`` into the run folder atomically."""
    write_file(run / FINAL_METRICS, msgspec.json.encode(metrics))


def read_final_metrics(run: Path) -> FinalMetrics | None:
    """``report.json`` of a run folder; None if the training has not ended.

    Raises:
        ConfigError: if the file is not one that a training wrote.
    """
    path = run / FINAL_METRICS
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(read_small(path, follow_links=False), type=FinalMetrics)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: expected the metrics of a finished training, got other content ({error}); "
            "remove it to have a report without them"
        ) from error


def _score(result: VerificationResult) -> SetScore:
    # From one impostor pair on: below it a logarithmic axis has nothing to show.
    bounds = np.geomspace(1 / result.impostor_pairs, 1.0, ROC_POINTS)
    reached = result.tar[np.searchsorted(result.far, bounds + 1e-12, side="right") - 1]
    return SetScore(
        name=result.name,
        genuine_pairs=result.genuine_pairs,
        impostor_pairs=result.impostor_pairs,
        accuracy=result.accuracy,
        accuracy_std=result.accuracy_std,
        one_sided_folds=result.one_sided_folds,
        tar_at_far={f"{far:.0e}": tar for far, tar in result.tar_at_far.items()},
        auc=result.auc,
        eer=result.eer,
        roc=tuple(zip(bounds.tolist(), reached.tolist(), strict=True)),
    )
