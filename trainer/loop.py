"""The training loop. After an interruption the same command resumes the run."""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.base import Records
from gkd.storage.util.files import delete_temporaries, disk_errors, write_file
from gkd.storage.util.progress import progress
from gkd.storage.util.signals import Stop, stop_signals
from gkd.storage.util.torchrun_env import log_rank0
from gkd.trainer.checkpoint import FOLDER, LAST, publish, read_checkpoint, settle
from gkd.trainer.config import RunConfig
from gkd.trainer.config_file import to_toml
from gkd.trainer.data.checks import check_data
from gkd.trainer.data.dataset import Batch, FaceBatches, JoinedTargets
from gkd.trainer.data.loader import BatchLoader
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
from gkd.trainer.state import RunState

# What a rank reports to the others before a step; the highest counts.
_CONTINUE, _STOP, _FAILED = 0, 1, 2


@dataclass(frozen=True)
class Summary:
    """The result of a training.

    steps     number of all steps
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
    """Train a student into the folder ``out``, or resume the training that is there.

    With several ``ranks`` each of them calls this. The run is the same for any number of them,
    except that each rank has its own statistics of BatchNorm, and may be resumed with another
    number.

    ``out`` holds config.toml, run.json (``command``, versions, data, sizes), metrics.jsonl,
    tensorboard/ and checkpoints/, and at the end report.json and report.html. ``STOP_SIGNALS`` end
    the training after a checkpoint.

    Raises:
        ConfigError: if settings or data cannot be trained on, or ``out`` is another run's.
        SpecMismatchError: if the run was started with another data set or cache.
        CorruptRecordError: naming file, key and offset of an image that cannot be read.
        GkdError: if the training diverged, or a signal ended it.
    """

    def check() -> tuple[JoinedTargets | None, list[VerificationSet]]:
        used = check_data(config, records, targets, world_size=ranks.world_size)
        if used and isinstance(used.store, ShardStore) and config.data.order != "blocks":
            raise ConfigError(
                "data.order: the targets were joined for reading in blocks; set data.order=blocks, "
                "or join them for reading in full"
            )
        return used, _load_sets(config.evaluation.sets)

    targets, sets = ranks.run_all_or_abort(check)
    run = RunState(config, records, targets, ranks)

    def open_log() -> AbstractContextManager[RunLog | None]:
        if not ranks.first:
            return nullcontext()
        # The rest of the folder is made to fit its last checkpoint.
        folder = out / FOLDER
        info = _describe(run, records, targets, command)
        write_file(out / RUN, msgspec.json.format(msgspec.json.encode(info)))
        write_file(out / CONFIG, to_toml(config).encode())
        folder.mkdir(exist_ok=True)
        delete_temporaries(folder)
        if run.saved >= 0:
            keep = config.checkpoint.keep
            settle(folder, step=run.saved, best_step=run.best_step, keep=keep)
        return RunLog(out, step=run.step)

    with locked(out, ranks):
        checkpoint = out / FOLDER / LAST
        if checkpoint.exists():
            run.restore(ranks.run_all_or_abort(lambda: read_checkpoint(checkpoint)), checkpoint)
        with (
            ranks.run_all_or_abort(open_log) as log,
            stop_signals() as stop,
            matmul_precision(run.dtype, run.device),
        ):
            _Training(run, records, targets, sets, out, log, stop).run_to_end()
        if ranks.first:
            write_report(out)
    return Summary(run.step, run.accuracy, run.best)


@dataclass(frozen=True)
class _Training:
    """A training in this process, to its end or to a signal."""

    run: RunState
    records: Records
    targets: JoinedTargets | None
    sets: Sequence[VerificationSet]
    out: Path
    log: RunLog | None
    stop: Stop
    results: dict[str, VerificationResult] = field(default_factory=dict)

    def run_to_end(self) -> None:
        """Train, evaluate and write checkpoints when they are due."""
        run, kd = self.run, self.run.config.kd
        loader = BatchLoader(
            FaceBatches(self.records, self.targets, temperature=kd.temperature, signal=kd.signal),
            run.sampler.starting_at(run.step),
            workers=run.config.data.workers,
            pin=run.device.type == "cuda",
        )
        with self._report_dead_workers(loader), closing(loader):
            while run.step < run.sampler.total_steps or self._evaluation_due():
                if not self._evaluation_due():
                    self._train_epoch(loader)
                    self._write_final_metrics()
                    if self._checkpoint_due():
                        self._save()
                # After the checkpoint: if killed here, the run resumes with the evaluation.
                if self._evaluation_due():
                    improved = self._evaluate()
                    self._write_final_metrics()
                    if improved or run.saved == run.step:
                        self._save(again=True)
                if self.stop.agreed:
                    self._save()
                    run.ranks.fail(
                        f"stopped by {self.stop.received or 'another rank'} after step {run.step} "
                        f"of {run.sampler.total_steps}; there is a checkpoint in "
                        f"{self.out / FOLDER}: run the same command again to resume"
                    )

    @contextmanager
    def _report_dead_workers(self, loader: BatchLoader) -> Iterator[None]:
        """Report that data workers died; torch raises an error anywhere in this process then."""
        try:
            yield
        except (RuntimeError, CheckpointException, OSError) as error:
            dead = loader.dead_workers()
            if not dead:
                raise
            raise GkdError(
                f"{dead}, and run the same command again; {self.run.last_checkpoint}"
            ) from error

    def _train_epoch(self, loader: BatchLoader) -> None:
        """Train to the end of the epoch or to a signal, with the checkpoints due before."""
        run, config = self.run, self.run.config.train
        size, steps = config.batch_size, run.sampler.steps_per_epoch
        epoch, done = divmod(run.step, steps)
        total = steps * size
        run.model.train()
        with progress(
            f"epoch {epoch + 1}/{config.epochs}",
            total,
            "images",
            done * size,
            quiet_below=0 if run.ranks.first else total + 1,
        ) as advance:
            while run.step < (epoch + 1) * steps:
                started = time.perf_counter()
                batch = self._next(loader)
                if batch is None:
                    break
                waited, lr = time.perf_counter() - started, run.lr
                loss = run.take_step(batch, self.records)
                seconds, skipped = time.perf_counter() - started, run.skipped_in_a_row > 0
                run.window.add(loss, seconds=seconds, waited=waited, skipped=skipped)
                if skipped and run.last_skipped is not None:
                    self._write_log(run.last_skipped.to_log())
                run.require_sound(self.records)
                # At the end of an epoch too, so that each line is about one epoch.
                log_due = run.step % config.log_every == 0 or run.step % steps == 0
                advance(size, self._log_window(lr) if log_due else "")
                if run.step % steps and self._checkpoint_due():
                    self._save()

    def _next(self, loader: BatchLoader) -> Batch | None:
        """The next batch; None if any rank received a signal to stop."""
        error: Exception | None = None
        batch: Batch | None = None
        if not self.stop.received:
            try:
                batch = loader.take(lambda: bool(self.stop.received))
            except (GkdError, OSError, RuntimeError) as met:  # torch's RuntimeError: a dead worker
                error = met
        status = _FAILED if error else _STOP if self.stop.received else _CONTINUE
        worst = self.run.ranks.all_reduce_max(status)
        if worst == _FAILED:
            raise error or SystemExit(1)  # the rank that failed gives the reason
        self.stop.agreed = worst == _STOP
        return None if batch is None or self.stop.agreed else batch.to(self.run.device)

    def _log_window(self, lr: float) -> str:
        """Log the steps since the last line, and return them as words."""
        run, size = self.run, self.run.config.train.batch_size
        means = run.window.means(size)
        run.window = Window()
        self._write_log({"epoch": run.epoch, **means, "lr": lr, "skipped": run.skipped})
        left = (run.sampler.total_steps - run.step) * size / means["images_per_second"]
        return describe_window(means, lr=lr, skipped=run.skipped, seconds_left=left)

    def _write_log(self, values: dict[str, Any]) -> None:
        log, step = self.log, self.run.step
        self.run.ranks.run_all_or_abort(
            lambda: log.write(step, values, group="train") if log else None
        )

    def _evaluation_due(self) -> bool:
        run = self.run
        if not self.sets or run.evaluated == run.step:
            return False
        every = run.config.evaluation.every_epochs * run.sampler.steps_per_epoch
        return run.step % every == 0 or run.step == run.sampler.total_steps

    def _checkpoint_due(self) -> bool:
        run = self.run
        every = max(1, round(run.config.checkpoint.every_epochs * run.sampler.steps_per_epoch))
        return run.step % every == 0 or run.step == run.sampler.total_steps

    def _evaluate(self) -> bool:
        """Evaluate all sets on the first rank; returns whether their mean is the best so far."""
        run = self.run
        run.ranks.run_all_or_abort(lambda: self._evaluate_here() if run.ranks.first else None)
        evaluated = run.accuracy, run.best, run.best_step
        run.accuracy, run.best, run.best_step = run.ranks.broadcast(evaluated)
        run.evaluated = run.step
        return run.best_step == run.step

    def _evaluate_here(self) -> None:
        run = self.run
        run.model.eval()
        embed = module_embed(run.model, preprocess_preset("arcface"), run.device)
        self.results.update({pairs.name: evaluate(embed, pairs) for pairs in self.sets})
        run.accuracy = {name: result.accuracy for name, result in self.results.items()}
        if self.log:
            values = {"epoch": run.epoch, "accuracy": run.accuracy}
            self.log.write(run.step, values, group="evaluation")
        mean = sum(run.accuracy.values()) / len(run.accuracy)
        best = f" (best mean {run.best or 0:.2%})"
        if run.best is None or mean > run.best:
            run.best, run.best_step, best = mean, run.step, " (the best so far)"
        shown = ", ".join(f"{name} {value:.2%}" for name, value in run.accuracy.items())
        log_rank0(f"accuracy after epoch {run.epoch:g}: {shown}{best}")

    def _write_final_metrics(self) -> None:
        """Write report.json once the training has ended, before its last checkpoint."""
        run = self.run
        if run.step < run.sampler.total_steps or self._evaluation_due():
            return
        cosines = run.identity_cosines.summary(self.records)

        def write() -> None:
            if run.ranks.first:
                results = list(self.results.values())
                with disk_errors(self.out):
                    metrics = collect(run.step, results, self.targets, cosines)
                    write_final_metrics(self.out, metrics)

        run.ranks.run_all_or_abort(write)

    def _save(self, *, again: bool = False) -> None:
        """Write a checkpoint if this step has none, or ``again`` with the evaluation's result."""
        run = self.run
        if run.saved == run.step and not again:
            return
        if run.ranks.all_reduce_max(int(not finite_weights((run.model, run.head)))):
            run.ranks.fail(
                f"after step {run.step} the weights are not finite, so no checkpoint of them "
                f"was written to {self.out / FOLDER}; {run.last_checkpoint}: start again in "
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
            run.ranks.fail(f"{error}, and run the same command again; {run.last_checkpoint}")
        run.saved = run.step


def describe_window(means: dict[str, Any], *, lr: float, skipped: int, seconds_left: float) -> str:
    """The means of a ``Window`` in words; ``seconds_left`` of the training, not of its epoch.

    A loss of exactly 0 is not part of the training, and is left out.
    """
    digits = {"loss": 3, "ce": 3, "primary": 4, "binary": 4}
    parts = [
        f"{name} -" if means[name] is None else f"{name} {means[name]:.{places}f}"
        for name, places in digits.items()
        if means[name] != 0
    ]
    parts += [f"lr {lr:.2g}", f"data wait {means['data_wait']:.0%}"]
    parts += [f"ends in {timedelta(seconds=round(seconds_left))}"]
    parts += [f"skipped {skipped}"] if skipped else []
    return "  ".join(parts)


def _load_sets(paths: Sequence[str]) -> list[VerificationSet]:
    sets = [load_verification_set(Path(path)) for path in paths]
    for name, count in Counter(pairs.name for pairs in sets).items():
        if count > 1:
            raise ConfigError(
                f"evaluation.sets: {count} files are named {name}, and the log cannot distinguish "
                "them; rename all but one"
            )
    return sets


def _describe(
    run: RunState, records: Records, targets: JoinedTargets | None, command: Sequence[str]
) -> RunInfo:
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
        total_steps=run.sampler.total_steps,
    )
