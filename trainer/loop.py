"""Trains a student: any interruption, and the same command goes on from there."""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError, GkdError, SpecMismatchError
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.open import Records
from gkd.storage.util.files import delete_temporaries, disk_errors, write_file
from gkd.storage.util.progress import progress
from gkd.trainer.checkpoint import (
    FOLDER,
    LAST,
    publish,
    read_checkpoint,
    settle,
    worker_death,
)
from gkd.trainer.config import RunConfig
from gkd.trainer.config_file import to_toml
from gkd.trainer.data.dataset import Batch, FaceBatches, JoinedTargets, check_data
from gkd.trainer.data.loader import load_batches
from gkd.trainer.device import matmul_precision
from gkd.trainer.distributed import ALONE, Ranks
from gkd.trainer.evaluation.bin_file import VerificationSet, load_verification_set
from gkd.trainer.evaluation.embed import evaluate, module_embed
from gkd.trainer.evaluation.verification import VerificationResult
from gkd.trainer.final_metrics import collect, write_final_metrics
from gkd.trainer.guards import finite_weights
from gkd.trainer.logging import RunLog, Window
from gkd.trainer.report.page import write_report
from gkd.trainer.run_dir import CONFIG, RUN, Dataset, RunInfo, locked
from gkd.trainer.signals import Stop, stop_signals
from gkd.trainer.state import RunState

# What a rank tells the others before a step.
_ASKED, _FAILED = 1, 2


@dataclass(frozen=True)
class Summary:
    """How a training ended.

    steps     taken in all
    accuracy  of the last evaluation, by verification set
    best      highest mean accuracy over the sets, None without sets
    """

    steps: int
    accuracy: dict[str, float]
    best: float | None


def train(
    config: RunConfig,
    records: Records,
    targets: JoinedTargets | None,
    out: Path,
    *,
    command: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Summary:
    """Train a student into the folder ``out``, or go on with the training that stands there.

    With several ``ranks`` each of them calls this; the run is the same for any number of them but
    for the statistics of BatchNorm, which are each rank's own, and may go on with another number.

    ``out`` holds config.toml, run.json (``command``, versions, data, sizes), metrics.jsonl,
    tensorboard/ and checkpoints/, and at the end report.json and report.html. SIGTERM and SIGINT
    end the training after a checkpoint.

    Raises:
        ConfigError: for settings or data that cannot be trained on, or an ``out`` of another run.
        SpecMismatchError: for another data set or cache than the run began with.
        CorruptRecordError: naming file, key and offset of an image that cannot be read.
        GkdError: where the training diverged, or a signal ended it.
    """

    def checked() -> tuple[JoinedTargets | None, Sequence[VerificationSet]]:
        used = targets_in_use(config, records, targets)
        _check(config, records, used, ranks.world_size)
        return used, _load_sets(config.evaluation.sets)

    targets, sets = ranks.run_all_or_abort(checked)
    run = RunState.build(config, records, targets, ranks)

    def opened() -> AbstractContextManager[RunLog | None]:
        if not ranks.first:
            return nullcontext()
        _describe_folder(out, run, _describe(run, records, targets, command))
        return RunLog(out, step=run.step)

    with locked(out, ranks):
        checkpoint = out / FOLDER / LAST
        if checkpoint.exists():
            run.restore(ranks.run_all_or_abort(lambda: read_checkpoint(checkpoint)), checkpoint)
        with (
            ranks.run_all_or_abort(opened) as log,
            stop_signals() as stop,
            matmul_precision(run.dtype, run.device),
        ):
            _Training(run, records, sets, out, log, stop).go(
                FaceBatches(
                    records,
                    targets,
                    temperature=config.kd.temperature,
                    signal=config.kd.signal,
                )
            )
        if ranks.first:
            write_report(out)
    return Summary(run.step, run.accuracy, run.best)


@dataclass(frozen=True)
class _Training:
    """One go at a training, to its end or to a signal."""

    run: RunState
    records: Records
    sets: Sequence[VerificationSet]
    out: Path
    log: RunLog | None
    stop: Stop
    results: dict[str, VerificationResult] = field(default_factory=dict)

    def go(self, dataset: FaceBatches) -> None:
        """Train on, evaluate and write checkpoints as they fall due."""
        run = self.run
        batches = load_batches(
            dataset,
            run.plans.starting_at(run.step),
            workers=run.config.data.workers,
            pin=run.device.type == "cuda",
        )
        # Closed here and now: workers that live on into the interpreter's end would block it.
        with self._worker_deaths(), closing(batches):
            while run.step < run.plans.total_steps or self._evaluation_due():
                if not self._evaluation_due():
                    self._rest_of_epoch(batches)
                    self._find(dataset.targets)
                    if self._checkpoint_due():
                        self._save()
                # After the checkpoint: whoever is killed here goes on with the evaluation.
                if self._evaluation_due():
                    improved = self._evaluate()
                    self._find(dataset.targets)
                    if improved or run.saved == run.step:
                        self._save(again=True)
                if self.stop.agreed:
                    self._leave()

    @contextmanager
    def _worker_deaths(self) -> Iterator[None]:
        """Name a worker's death, which torch raises wherever the training stands just then."""
        try:
            yield
        except (RuntimeError, CheckpointException, ConnectionResetError) as error:
            reason = worker_death(error)
            if not reason:
                raise
            raise GkdError(
                f"a process that prepares data died ({reason}); often memory ran out: set fewer "
                "data.workers or give more memory, and run the same command again; "
                f"{self.run.standing}"
            ) from error

    def _find(self, targets: JoinedTargets | None) -> None:
        """Write the findings where the training has ended, before its last checkpoint does."""
        run = self.run
        if run.step < run.plans.total_steps or self._evaluation_due():
            return
        fit = run.fit.summary(self.records)

        def write() -> None:
            results = list(self.results.values())
            with disk_errors(self.out):
                write_final_metrics(self.out, collect(run.step, results, targets, fit))

        run.ranks.run_all_or_abort(lambda: write() if run.ranks.first else None)

    def _rest_of_epoch(self, batches: Iterator[Batch]) -> None:
        """Steps up to the next epoch or a signal, with the checkpoints that fall between."""
        run, config = self.run, self.run.config
        size, steps = config.train.batch_size, run.plans.steps_per_epoch
        epoch, done = divmod(run.step, steps)
        what = f"epoch {epoch + 1}/{config.train.epochs}"
        run.model.train()
        total = steps * size
        quiet = 0 if run.ranks.first else total + 1
        with progress(what, total, "images", done * size, quiet_below=quiet) as advance:
            while run.step < (epoch + 1) * steps:
                asked = time.perf_counter()
                batch = self._next(batches)
                if batch is None:
                    break
                waited = time.perf_counter() - asked
                lr = run.optimizer.param_groups[0]["lr"]
                loss = run.take_step(batch, self.records)
                skipped = run.skipped_in_a_row > 0
                seconds = time.perf_counter() - asked
                run.window.add(loss, seconds=seconds, waited=waited, skipped=skipped)
                if skipped and run.last_skipped is not None:
                    self._write_log(run.last_skipped.to_log())
                run.require_sound(self.records)
                note = ""
                # At each epoch's end too, so that every step is in a line of its epoch.
                if run.step % config.train.log_every == 0 or run.step % steps == 0:
                    means = run.window.means(size)
                    values = {"epoch": run.epoch, **means, "lr": lr, "skipped": run.skipped}
                    self._write_log(values)
                    left = (run.plans.total_steps - run.step) * size / means["images_per_second"]
                    note = _note(values, left)
                    run.window = Window()
                advance(size, note)
                if run.step % steps and self._checkpoint_due():
                    self._save()

    def _write_log(self, values: dict[str, Any]) -> None:
        log, step = self.log, self.run.step
        self.run.ranks.run_all_or_abort(
            lambda: log.write(step, values, group="train") if log else None
        )

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None where any rank was asked to end."""
        error: Exception | None = None
        batch: Batch | None = None
        if not self.stop.received:
            try:
                batch = next(batches)
            except (GkdError, OSError, RuntimeError) as met:
                error = met  # torch tells of a worker's death by a RuntimeError
        told = _FAILED if error else _ASKED if self.stop.received else 0
        worst = self.run.ranks.all_reduce_max(told)
        if worst == _FAILED:
            raise error or SystemExit(1)  # the rank that failed says why
        self.stop.agreed = worst == _ASKED
        return None if batch is None or self.stop.agreed else batch.to(self.run.device)

    def _evaluation_due(self) -> bool:
        run = self.run
        epoch, rest = divmod(run.step, run.plans.steps_per_epoch)
        last = run.step == run.plans.total_steps
        return (
            not rest
            and run.evaluated < run.step
            and bool(self.sets)
            and (last or epoch % run.config.evaluation.every_epochs == 0)
        )

    def _checkpoint_due(self) -> bool:
        run = self.run
        every = max(1, round(run.config.checkpoint.every_epochs * run.plans.steps_per_epoch))
        return run.step % every == 0 or run.step == run.plans.total_steps

    def _evaluate(self) -> bool:
        """Log the accuracy on every set; whether their mean is the best so far."""
        run = self.run
        improved = run.ranks.run_all_or_abort(lambda: run.ranks.first and self._evaluate_here())
        improved, run.accuracy, run.best = run.ranks.broadcast((improved, run.accuracy, run.best))
        run.evaluated = run.step
        if improved:
            run.best_step = run.step
        return improved

    def _evaluate_here(self) -> bool:
        run = self.run
        run.model.eval()
        embed = module_embed(run.model, preprocess_preset("arcface"), run.device)
        self.results.update({pairs.name: evaluate(embed, pairs) for pairs in self.sets})
        run.accuracy = {name: result.accuracy for name, result in self.results.items()}
        values = {"epoch": run.epoch, "accuracy": run.accuracy}
        if self.log:
            self.log.write(run.step, values, group="evaluation")
        mean = sum(run.accuracy.values()) / len(run.accuracy)
        improved = run.best is None or mean > run.best
        run.best = mean if improved else run.best
        return improved

    def _save(self, *, again: bool = False) -> None:
        """Write a checkpoint where none stands of this step, or ``again`` with the evaluation."""
        run = self.run
        if run.saved == run.step and not again:
            return
        if run.ranks.all_reduce_max(int(not finite_weights((run.model, run.head)))):
            run.ranks.fail(
                f"after step {run.step} the weights are not finite, so no checkpoint of them "
                f"was written to {self.out / FOLDER}; {run.standing}: begin again in "
                "another folder with a lower optimizer.lr or more schedule.warmup_epochs"
            )
        try:
            publish(
                self.out / FOLDER,
                run.state(),
                run.centers(),
                run.ranks,
                step=run.step,
                best_step=run.best_step,
                keep=run.config.checkpoint.keep,
                written=run.saved == run.step,
            )
        except ConfigError as error:
            run.ranks.fail(f"{error}, and run the same command again; {run.standing}")
        run.saved = run.step

    def _leave(self) -> NoReturn:
        """Write a checkpoint, and say how to go on."""
        self._save()
        self.run.ranks.fail(
            f"stopped by {self.stop.received or 'another rank'} after step {self.run.step} of "
            f"{self.run.plans.total_steps}; a checkpoint stands in {self.out / FOLDER}: run the "
            "same command again to go on"
        )


def _note(values: dict[str, Any], seconds_left: float) -> str:
    """One window of the log in words; ``seconds_left`` of the whole training, not of its epoch."""

    def loss(name: str, digits: int) -> str:
        return f"{name} -" if values[name] is None else f"{name} {values[name]:.{digits}f}"

    parts = [
        loss("loss", 3),
        loss("ce", 3),
        loss("primary", 4),
        loss("binary", 4),
        f"lr {values['lr']:.2g}",
        f"data wait {values['data_wait']:.0%}",
        f"ends in {timedelta(seconds=round(seconds_left))}",
    ]
    parts += [f"skipped {values['skipped']}"] if values["skipped"] else []
    return "  ".join(parts)


def _check(
    config: RunConfig, records: Records, targets: JoinedTargets | None, world_size: int
) -> None:
    if targets and isinstance(targets.store, ShardStore) and config.data.order != "blocks":
        raise ConfigError(
            "data.order: the targets were joined to be read in blocks; set data.order=blocks, or "
            "join them to be read in full"
        )
    check_data(config, records, targets, world_size=world_size)


def _describe_folder(out: Path, run: RunState, described: RunInfo) -> None:
    """Write what the run is, and make the rest of the folder fit its last checkpoint."""
    write_file(out / RUN, msgspec.json.format(msgspec.json.encode(described)))
    write_file(out / CONFIG, to_toml(run.config).encode())
    folder, keep = out / FOLDER, run.config.checkpoint.keep
    folder.mkdir(exist_ok=True)
    delete_temporaries(folder)
    if run.saved >= 0:
        settle(folder, step=run.saved, best_step=run.best_step, keep=keep)


def targets_in_use(
    config: RunConfig, records: Records, targets: JoinedTargets | None
) -> JoinedTargets | None:
    """The targets that a training would take; None without distillation.

    Raises:
        ConfigError: where there must be some, and are not.
        SpecMismatchError: where they are joined for other records.
    """
    if not config.kd.enabled:
        return None
    if targets is None:
        raise ConfigError(
            "kd.enabled: no targets were given; name a cache of targets, or train without "
            "distillation (--without-kd)"
        )
    if len(targets.rows) != len(records) or targets.num_classes != records.num_classes:
        raise SpecMismatchError(
            f"{records.path} has {len(records)} images of {records.num_classes} classes, the "
            f"targets are joined for {len(targets.rows)} images of {targets.num_classes}; "
            "join the records with the cache that was made from them"
        )
    return targets


def _load_sets(paths: Sequence[str]) -> list[VerificationSet]:
    sets = [load_verification_set(Path(path)) for path in paths]
    for name, count in Counter(pairs.name for pairs in sets).items():
        if count > 1:
            raise ConfigError(
                f"evaluation.sets: {count} files are named {name}, which the log cannot tell "
                "apart; rename all but one"
            )
    return sets


def _describe(
    run: RunState, records: Records, targets: JoinedTargets | None, command: Sequence[str]
) -> RunInfo:
    """What ran, on what."""
    backbone = sum(parameter.numel() for parameter in run.model.parameters())
    centers = run.data.num_classes * run.config.student.embedding_dim
    return RunInfo(
        command=tuple(command),
        versions={
            "python": platform.python_version(),
            "gkd": version("gkd"),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        ranks=run.ranks.world_size,
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        precision=str(run.dtype).removeprefix("torch."),
        dataset=Dataset(records.name, str(records.path), **run.data._asdict()),
        teacher=targets.spec.teacher if targets else None,
        parameters={"backbone": backbone, "head": centers},
        total_steps=run.plans.total_steps,
    )
