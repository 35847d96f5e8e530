"""What a run folder holds, read back: the files that ``train`` leaves, by type."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gkd.storage.cache.spec import TeacherSpec
from gkd.storage.errors import ConfigError
from gkd.trainer.final_metrics import Findings, read_findings
from gkd.trainer.logging import METRICS

RUN = "run.json"
CONFIG = "config.toml"


class Dataset(msgspec.Struct, frozen=True):
    """Records and cache in ``run.json``; ``dataset`` is the records' fingerprint."""

    name: str
    path: str
    num_images: int
    num_classes: int
    dataset: str
    cache_id: str


class Described(msgspec.Struct, frozen=True):
    """``run.json``, as ``train`` writes it; ``teacher`` is None without distillation."""

    command: tuple[str, ...]
    versions: dict[str, str]
    ranks: int
    device: str
    precision: str
    dataset: Dataset
    teacher: TeacherSpec | None
    parameters: dict[str, int]
    total_steps: int


class TrainingLine(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl on a window of steps; a loss is None where all were skipped."""

    step: int
    epoch: float
    loss: float | None
    ce: float | None
    primary: float | None
    binary: float | None
    lr: float
    images_per_second: float
    data_wait: float


class EvaluationLine(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl on an evaluation; accuracy by verification set."""

    step: int
    epoch: float
    accuracy: dict[str, float]


class SkippedLine(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl on a step that was skipped, see ``SkippedStep``."""

    step: int
    not_finite: dict[str, str]
    records: tuple[str, ...]


Line = TrainingLine | EvaluationLine | SkippedLine
# What tells the lines apart.
KINDS: dict[str, Any] = {
    "loss": TrainingLine,
    "accuracy": EvaluationLine,
    "not_finite": SkippedLine,
}


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    training, evaluations, skipped  lines of metrics.jsonl, by what they tell
    findings                        None until the training has ended
    """

    path: Path
    described: Described
    config: str
    training: Sequence[TrainingLine]
    evaluations: Sequence[EvaluationLine]
    skipped: Sequence[SkippedLine]
    findings: Findings | None

    @property
    def step(self) -> int:
        """The last step that the log knows."""
        lines: tuple[Line, ...] = (*self.training, *self.evaluations, *self.skipped)
        return max([*(line.step for line in lines), self.findings.step if self.findings else 0])


def read_run(run: Path) -> Run:
    """The files of a run folder.

    Raises:
        ConfigError: where one is absent or none of gkd's.
    """
    try:
        described = read_described(run)
        config = (run / CONFIG).read_text()
        lines = list(_lines(run / METRICS))
    except OSError as error:
        raise ConfigError(
            f"{run}: expected the folder of a run of `gkd train-student`, {error.filename} cannot "
            f"be read ({error.strerror}); name such a folder"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_ours(run / CONFIG, error) from error
    return Run(
        run.absolute(),
        described,
        config,
        [line for line in lines if isinstance(line, TrainingLine)],
        [line for line in lines if isinstance(line, EvaluationLine)],
        [line for line in lines if isinstance(line, SkippedLine)],
        read_findings(run),
    )


def read_described(run: Path) -> Described:
    """``run.json`` of a run folder.

    Raises:
        ConfigError: where it is none of gkd's.
    """
    path = run / RUN
    try:
        return msgspec.json.decode(path.read_bytes(), type=Described)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_ours(path, error) from error


def _not_ours(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: expected what `gkd train-student` writes, got another content ({error}); run the "
        "same training again to have it written again"
    )


def _lines(path: Path) -> Iterator[Line]:
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return  # cut off by a kill
        try:
            content = json.loads(line)
            for key in KINDS.keys() & content.keys():
                yield msgspec.convert(content, KINDS[key])
        except (ValueError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
            raise ConfigError(
                f"{path}: line {number} is not what a training logs ({error}); remove the line"
            ) from error
