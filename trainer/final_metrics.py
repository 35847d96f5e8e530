"""What a finished training found out beside its log, kept in the run folder for its report."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from gkd.storage.errors import ConfigError
from gkd.storage.util.files import write_file
from gkd.trainer.data.dataset import JoinedTargets
from gkd.trainer.evaluation.verification import VerificationResult
from gkd.trainer.identity_cosines import FitSummary

FINDINGS = "report.json"
# A curve on paper shows no more.
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


class Findings(msgspec.Struct, frozen=True):
    """``report.json``.

    sets    the last evaluation
    groups  of each view of the cache, (group size, samples), ascending; size 0 was skipped
    fit     the identities that fit worst; None where the last epoch was not seen
    """

    step: int
    sets: tuple[SetScore, ...] = ()
    groups: dict[str, tuple[tuple[int, int], ...]] = {}
    fit: FitSummary | None = None


def gather(
    step: int,
    results: Sequence[VerificationResult],
    targets: JoinedTargets | None,
    fit: FitSummary | None,
) -> Findings:
    """The findings at the end of a training.

    Raises:
        CorruptShardError: where the cache is read in blocks and damaged.
    """
    groups = {}
    if targets is not None:
        for view in targets.store.views:
            counts = targets.store.size_counts(view)
            groups[str(view)] = tuple(
                (size, int(counts[size])) for size in np.flatnonzero(counts).tolist()
            )
    return Findings(step, tuple(map(_score, results)), groups, fit)


def write_findings(run: Path, findings: Findings) -> None:
    """Write ``report.json`` into the run folder, whole or not at all."""
    write_file(run / FINDINGS, msgspec.json.encode(findings))


def read_findings(run: Path) -> Findings | None:
    """The findings of a run folder; None where the training has not ended.

    Raises:
        ConfigError: for a file that is none of gkd's.
    """
    path = run / FINDINGS
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Findings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: expected what a training of gkd found, got another content ({error}); "
            "remove it to have a report without it"
        ) from error


def _score(result: VerificationResult) -> SetScore:
    # From one impostor pair up: below it a logarithmic axis has nothing to show.
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
