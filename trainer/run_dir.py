"""The run folder: how it is locked, which files ``train`` writes to it, and their types."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.spec import TeacherSpec
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import disk_errors
from gkd.storage.util.input_files import read_small
from gkd.storage.util.lock import WriteLock
from gkd.trainer.distributed import Ranks
from gkd.trainer.final_metrics import FinalMetrics, read_final_metrics
from gkd.trainer.logging import METRICS, read_lines

T = TypeVar("T")

RUN = "run.json"
CONFIG = "config.toml"


@contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[None]:
    """Create the run folder if needed and keep other processes from training into it.

    Raises:
        ConfigError: if it holds something else, is inside a cache or cannot be written, or another
            process is training into it.
    """
    lock = WriteLock(out)

    def lock_folder() -> None:
        if ranks.first:
            with disk_errors(out):
                _prepare(out)
            lock.acquire()

    ranks.run_all_or_abort(lock_folder)
    try:
        yield
    finally:
        lock.release()


def _prepare(out: Path) -> None:
    if os.path.lexists(out) and not out.is_dir():
        found = "a link that leads nowhere" if out.is_symlink() else "a file"
        raise ConfigError(f"{out}: expected a folder to train into, got {found}; name another")
    require_outside_caches(out)
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if names and RUN not in names:
        raise ConfigError(
            f"{out}: expected a new folder or a gkd run folder, got one that holds "
            f"{', '.join(names[:3])}; name another folder"
        )
    for path in sorted(out.iterdir()):
        if path.is_symlink():  # what is written through it would replace files elsewhere
            raise ConfigError(
                f"{path}: expected a run folder without links, got one that leads to "
                f"{path.readlink()}; remove the link, or name another folder"
            )


class Dataset(msgspec.Struct, frozen=True):
    """Records and cache in ``run.json``; ``dataset`` is the records' fingerprint."""

    name: str
    path: str
    num_images: int
    num_classes: int
    dataset: str
    cache_id: str


class RunInfo(msgspec.Struct, frozen=True):
    """``run.json``; ``teacher`` is None without distillation."""

    command: tuple[str, ...]
    versions: dict[str, str]
    ranks: int
    device: str
    precision: str
    dataset: Dataset
    teacher: TeacherSpec | None
    parameters: dict[str, int]
    total_steps: int


class _Line(msgspec.Struct, frozen=True):
    step: int


class TrainingLine(_Line, frozen=True):
    """A line of metrics.jsonl about a window of steps; losses are None if all were skipped."""

    epoch: float
    loss: float | None
    ce: float | None
    primary: float | None
    binary: float | None
    lr: float
    images_per_second: float
    data_wait: float


class EvaluationLine(_Line, frozen=True):
    """A line of metrics.jsonl about an evaluation; accuracy by verification set."""

    epoch: float
    accuracy: dict[str, float]


class SkippedLine(_Line, frozen=True):
    """A line of metrics.jsonl about a skipped step, see ``SkippedStep``."""

    not_finite: dict[str, str]
    records: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    training, evaluations, skipped  lines of metrics.jsonl, by kind
    final_metrics                   None until the training has ended
    """

    path: Path
    info: RunInfo
    config: str
    training: Sequence[TrainingLine]
    evaluations: Sequence[EvaluationLine]
    skipped: Sequence[SkippedLine]
    final_metrics: FinalMetrics | None

    @property
    def step(self) -> int:
        """The last step that the folder knows of."""
        lines = [*self.training[-1:], *self.evaluations[-1:], *self.skipped[-1:]]
        final = self.final_metrics.step if self.final_metrics else 0
        return max([final, *(line.step for line in lines)])


def read_run(run: Path) -> Run:
    """The content of a run folder.

    Raises:
        ConfigError: if a file is absent, or not one that a training wrote.
    """
    try:
        info = read_run_info(run)
        config = read_small(run / CONFIG, follow_links=False).decode()
        lines = list(read_lines(run / METRICS))
    except OSError as error:
        raise ConfigError(
            f"{run}: not a gkd run folder: {error.filename} cannot be read ({error.strerror}); "
            "name the folder of a run of `gkd train-student`"
        ) from error
    except UnicodeDecodeError as error:
        raise _foreign_file(run / CONFIG, error) from error
    return Run(
        path=run.absolute(),
        info=info,
        config=config,
        training=_convert(lines, "loss", TrainingLine, run / METRICS),
        evaluations=_convert(lines, "accuracy", EvaluationLine, run / METRICS),
        skipped=_convert(lines, "not_finite", SkippedLine, run / METRICS),
        final_metrics=read_final_metrics(run),
    )


def read_run_info(run: Path) -> RunInfo:
    """``run.json`` of a run folder.

    Raises:
        ConfigError: if it is not one that a training wrote.
    """
    path = run / RUN
    try:
        return msgspec.json.decode(read_small(path, follow_links=False), type=RunInfo)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _foreign_file(path, error) from error


def _foreign_file(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: expected a file of `gkd train-student`, got other content ({error}); run the "
        "same training again to rewrite it"
    )


def _convert(
    lines: Sequence[tuple[int, dict[str, Any], bytes]], key: str, kind: type[T], path: Path
) -> list[T]:
    """The lines that have ``key``, as ``kind``."""
    converted = []
    for number, content, _ in lines:
        if key in content:
            try:
                converted.append(msgspec.convert(content, kind))
            except msgspec.ValidationError as error:
                raise ConfigError(
                    f"{path}: line {number}: not a line of metrics ({error}); remove the line"
                ) from error
    return converted
