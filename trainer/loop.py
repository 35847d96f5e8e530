"""Trains a student: any interruption, and the same command goes on from there."""

import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import filelock
import msgspec
import torch
from torch import Tensor

from gkd.storage.atomic import write_file
from gkd.storage.blocks import ShardStore
from gkd.storage.errors import ConfigError, GkdError, SpecMismatchError
from gkd.storage.progress import progress
from gkd.storage.records import Records
from gkd.storage.spec import preprocess_preset
from gkd.trainer.checkpoint import FOLDER, LAST, publish, read_checkpoint
from gkd.trainer.config import RunConfig, to_toml
from gkd.trainer.data import Batch, FaceBatches, JoinedTargets, check_data, load_batches
from gkd.trainer.evaluation import evaluate, module_embed
from gkd.trainer.logging import RunLog
from gkd.trainer.losses import GkdLoss
from gkd.trainer.ranks import ALONE, Ranks
from gkd.trainer.state import RunState
from gkd.trainer.verification_set import VerificationSet, load_verification_set

RUN = "run.json"
PACKAGES = ("gkd", "torch", "numpy")
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
    tensorboard/ and checkpoints/. SIGTERM and SIGINT end the training after a checkpoint.

    Raises:
        ConfigError: for settings or data that cannot be trained on, or an ``out`` of another run.
        SpecMismatchError: for another data set or cache than the run began with.
        CorruptRecordError: naming file, key and offset of an image that cannot be read.
        GkdError: where the loss is not finite, or a signal ended the training.
    """
    targets = _targets_in_use(config, records, targets)
    check_data(
        records,
        targets,
        batch_size=config.train.batch_size,
        flip=config.data.flip,
        temperature=config.kd.temperature,
        world_size=ranks.world_size,
    )
    sets = _load_sets(config.evaluation.sets)
    run = RunState.build(config, records, targets, ranks)
    with _claimed(out, ranks):
        checkpoint = out / FOLDER / LAST
        if checkpoint.exists():
            run.restore(read_checkpoint(checkpoint), checkpoint)
        if ranks.first:
            write_file(out / RUN, msgspec.json.format(_describe(run, records, command)))
            write_file(out / "config.toml", to_toml(config).encode())
            (out / FOLDER).mkdir(exist_ok=True)
        opened: AbstractContextManager[RunLog | None] = (
            RunLog(out, step=run.step) if ranks.first else nullcontext()
        )
        with opened as log, _stop_signals() as stop:
            _Training(run, records, sets, out, log, stop).go(
                FaceBatches(records, targets, temperature=config.kd.temperature)
            )
    return Summary(run.step, run.accuracy, run.best)


@dataclass
class _Stop:
    """The signal that asked this rank to end, and whether all ranks know that one was asked."""

    received: str = ""
    agreed: bool = False


@dataclass
class _Window:
    """Sums since the last line of the log."""

    began: float
    losses: Tensor | None = None
    steps: int = 0
    waited: float = 0.0

    def add(self, loss: GkdLoss, waited: float) -> None:
        parts = torch.stack([part.detach() for part in loss])
        self.losses = parts if self.losses is None else self.losses + parts
        self.steps += 1
        self.waited += waited

    def means(self, batch_size: int) -> dict[str, float]:
        """Mean losses, images a second, and the share of the time spent waiting for data."""
        assert self.losses is not None
        seconds = time.perf_counter() - self.began
        names = ("loss", "ce", "primary", "binary")
        losses = dict(zip(names, (self.losses / self.steps).tolist(), strict=True))
        return {
            **losses,
            "images_per_second": self.steps * batch_size / seconds,
            "data_wait": self.waited / seconds,
        }


@dataclass(frozen=True)
class _Training:
    """One go at a training, to its end or to a signal."""

    run: RunState
    records: Records
    sets: Sequence[VerificationSet]
    out: Path
    log: RunLog | None
    stop: _Stop

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
        with closing(batches):
            while run.step < run.plans.total_steps:
                self._rest_of_epoch(batches)
                improved = self._evaluate() if self._evaluation_due() else False
                if improved or self._checkpoint_due():
                    self._save(best=improved)
                if self.stop.agreed:
                    self._leave()

    def _rest_of_epoch(self, batches: Iterator[Batch]) -> None:
        """Steps up to the next epoch, checkpoint within the epoch, or signal."""
        run, config = self.run, self.run.config
        size, steps = config.train.batch_size, run.plans.steps_per_epoch
        epoch, done = divmod(run.step, steps)
        what = f"epoch {epoch + 1}/{config.train.epochs}"
        run.model.train()
        window = _Window(time.perf_counter())
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
                window.add(run.take_step(batch, self.records), waited)
                note = ""
                if run.step % config.train.log_every == 0:
                    values = {"epoch": run.epoch, **window.means(size), "lr": lr}
                    if self.log:
                        self.log.write(run.step, values, group="train")
                    note = _note(values)
                    window = _Window(time.perf_counter())
                advance(size, note)
                if run.step % steps and self._checkpoint_due():
                    self._save(best=False)

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None where any rank was asked to end."""
        error: Exception | None = None
        batch: Batch | None = None
        if not self.stop.received:
            try:
                batch = next(batches)
            except (GkdError, OSError) as met:
                error = met
        told = _FAILED if error else _ASKED if self.stop.received else 0
        worst = self.run.ranks.highest(told)
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
        improved = self._evaluate_here() if run.ranks.first else False
        improved, run.accuracy, run.best = run.ranks.of_first((improved, run.accuracy, run.best))
        return improved

    def _evaluate_here(self) -> bool:
        run = self.run
        run.model.eval()
        embed = module_embed(run.model, preprocess_preset("arcface"), run.device)
        results = {pairs.name: evaluate(embed, pairs) for pairs in self.sets}
        run.accuracy = {name: result.accuracy for name, result in results.items()}
        values = {"epoch": run.epoch, "accuracy": run.accuracy}
        if self.log:
            self.log.write(run.step, values, group="evaluation")
        mean = sum(run.accuracy.values()) / len(run.accuracy)
        improved = run.best is None or mean > run.best
        run.best = mean if improved else run.best
        return improved

    def _save(self, *, best: bool) -> None:
        run = self.run
        if run.saved == run.step:
            return
        publish(
            self.out / FOLDER,
            run.state(),
            run.centers(),
            run.ranks,
            step=run.step,
            best=best,
            keep=run.config.checkpoint.keep,
        )
        run.saved = run.step

    def _leave(self) -> None:
        """Write a checkpoint, and say how to go on."""
        if self.run.step == self.run.plans.total_steps:
            return
        self._save(best=False)
        if not self.run.ranks.first:
            raise SystemExit(1)
        raise GkdError(
            f"stopped by {self.stop.received or 'another rank'} after step {self.run.step} of "
            f"{self.run.plans.total_steps}; a checkpoint stands in {self.out / FOLDER}: run the "
            "same command again to go on"
        )


def _note(values: dict[str, float]) -> str:
    return (
        f"loss {values['loss']:.3f}  ce {values['ce']:.3f}  primary {values['primary']:.4f}  "
        f"binary {values['binary']:.4f}  lr {values['lr']:.2g}  wait {values['data_wait']:.0%}"
    )


def _targets_in_use(
    config: RunConfig, records: Records, targets: JoinedTargets | None
) -> JoinedTargets | None:
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
    if isinstance(targets.store, ShardStore) and config.data.order != "blocks":
        raise ConfigError(
            "data.order: the targets were joined to be read in blocks; set data.order=blocks, or "
            "join them to be read in full"
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


def _describe(run: RunState, records: Records, command: Sequence[str]) -> bytes:
    """``run.json``: what ran, on what."""

    backbone = sum(parameter.numel() for parameter in run.model.parameters())
    centers = run.identity.num_classes * run.config.student.embedding_dim

    return msgspec.json.encode(
        {
            "command": list(command),
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES},
            },
            "ranks": run.ranks.world_size,
            "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
            "precision": str(run.dtype).removeprefix("torch."),
            "dataset": {"name": records.name, "path": str(records.path), **run.identity._asdict()},
            "parameters": {"backbone": backbone, "head": centers},
            "total_steps": run.plans.total_steps,
        }
    )


@contextmanager
def _claimed(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder for these ranks alone.

    Raises:
        ConfigError: where it holds something else, or another process trains into it.
    """
    error: Exception | None = None
    lock = filelock.FileLock(out / ".lock", timeout=0)
    if ranks.first:
        try:
            _require_place(out)
            lock.acquire()
        except filelock.Timeout as held:
            error = ConfigError(
                f"{out}: another process is training into this folder; wait for it, or name another"
            )
            error.__cause__ = held
        except (ConfigError, OSError) as met:
            error = met
    if ranks.highest(int(error is not None)):
        raise error or SystemExit(1)  # the first rank says why
    try:
        yield
    finally:
        lock.release()


def _require_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder to train into, got a file; name another")
    out.mkdir(parents=True, exist_ok=True)
    strangers = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if strangers and RUN not in strangers:
        raise ConfigError(
            f"{out}: expected a new folder or one of an earlier training, got one that holds "
            f"{', '.join(sorted(strangers)[:3])}; name another folder"
        )


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Let SIGTERM and SIGINT end the training at a step's end; a second one is not waited for."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.received = signal.Signals(number).name
        signal.signal(number, previous[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {int(number): signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
