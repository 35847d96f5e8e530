"""The state that training changes: networks, optimizer, and the position in the data."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.trainer.checkpoint import (
    RunData,
    centers_of,
    read_centers,
    require_same_run,
    student_backbone,
)
from gkd.trainer.config import RunConfig
from gkd.trainer.data.dataset import Batch, JoinedTargets
from gkd.trainer.data.sampler import BatchSampler
from gkd.trainer.device import choose_device, choose_dtype
from gkd.trainer.distributed import ALONE, Ranks
from gkd.trainer.guards import BufferSnapshot, Divergence, SkippedStep, gradient_norm
from gkd.trainer.head.centers import ClassCenters
from gkd.trainer.head.class_lookup import classes_in_use, look_up_classes
from gkd.trainer.head.fused import LayerLoss, grouped_margin_loss
from gkd.trainer.head.loss import GkdLoss
from gkd.trainer.head.margin import HeadSpec
from gkd.trainer.head.partial_fc import SampledCenters, borrowed, sample_classes
from gkd.trainer.identity_cosines import IdentityCosineStatistics
from gkd.trainer.logging import Window
from gkd.trainer.saved import SavedRun, as_declared, load_weights, misfit
from gkd.trainer.schedules import kd_ramp, lr_factor, make_optimizer

# Plain values that a checkpoint holds under their names.
_PLAIN = ("step", "best", "best_step", "evaluated", "accuracy")


class RunState:
    """One rank's part of a training, at its beginning: from a configuration and its seed.

    step              steps done, including skipped ones
    skipped           steps that were not finite and changed no weight
    skipped_in_a_row  how many of these were the last steps
    last_skipped      the last of them
    saved             step of the last checkpoint, -1 before the first
    evaluated         step of the last evaluation
    best, best_step   highest mean accuracy and its step; None and -1 before an evaluation
    window            the steps that are in no line of the log yet

    ``forward`` is ``model`` as all ranks run it, on the result of ``pixels`` for images; ``head``
    holds this rank's class centres. The optimizer has two groups, named backbone and centers.

    Raises:
        ConfigError: if the student or the device is impossible.
    """

    def __init__(
        self,
        config: RunConfig,
        records: Records,
        targets: JoinedTargets | None,
        ranks: Ranks = ALONE,
    ) -> None:
        train, classes = config.train, records.num_classes
        self.config, self.ranks = config, ranks
        cache_id = targets.store.cache_id if targets else ""
        self.data = RunData(len(records), classes, records.fingerprint, cache_id)
        self.device = choose_device(train.device)
        self.dtype = choose_dtype(train.precision, self.device)
        torch.manual_seed(train.seed)
        self.model = student_backbone(config.student).to(self.device)
        if train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        rows = ranks.rows(classes)
        self.head = ClassCenters(classes, config.student.embedding_dim, rows=rows).to(self.device)
        blocks = None
        if targets and config.data.order == "blocks":
            blocks = targets.blocks(config.data.block_shards)
        self.sampler = BatchSampler(
            len(records),
            train.batch_size,
            train.epochs,
            train.seed,
            config.data.flip,
            blocks=blocks,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(
            config.optimizer,
            [
                {"name": "backbone", "params": trainable},
                {"name": "centers", "params": [self.head.weight]},
            ],
        )
        self.forward = ranks.parallel(self.model, allreduce_dtype=train.allreduce_dtype)
        self.pixels = preprocess_preset("arcface").on_device(self.device)
        self.head_spec = HeadSpec(
            margin=config.head.margins,
            scale=config.head.scale,
            temperature=config.kd.temperature,
            w_binary=config.kd.w_binary,
            w_primary=config.kd.w_primary,
            compiled=train.compile,
            ranks=ranks,
            first_class=self.head.rows.start,
        )
        self.lr_factor = lr_factor(
            config.schedule,
            lr=config.optimizer.lr,
            steps_per_epoch=self.sampler.steps_per_epoch,
            total_steps=self.sampler.total_steps,
        )
        self.scaler = ranks.scaler(self.device, enabled=self.dtype == torch.float16)
        self.buffers = BufferSnapshot(self.model)
        self.identity_cosines = IdentityCosineStatistics(len(records), ranks)
        self.step = self.evaluated = self.skipped = self.skipped_in_a_row = 0
        self.saved = self.best_step = -1
        self.last_skipped: SkippedStep | None = None
        self.divergence = Divergence()
        self.best: float | None = None
        self.window = Window()
        self.accuracy: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, except the class centres.

        Builtins and tensors, equal on all ranks except for the statistics of BatchNorm, of which
        the first rank's are saved.
        """
        cuda = self.device.type == "cuda"
        optimizer = self.optimizer.state_dict()
        (centers_index,) = optimizer["param_groups"][-1]["params"]
        centers = optimizer["state"].pop(centers_index, {})
        return {
            "config": msgspec.to_builtins(self.config),
            "data": list(self.data),
            **{name: getattr(self, name) for name in _PLAIN},
            "skipped": [self.skipped, self.skipped_in_a_row],
            "divergence": [self.divergence.first, self.divergence.mean, self.divergence.above],
            "window": self.window.state(),
            "fit": self.identity_cosines.state(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
            "model": self.model.state_dict(),
            "optimizer": {"state": optimizer["state"]},  # the rest is the configuration's
            "centers_optimizer": {n: v for n, v in centers.items() if not self._per_center(v)},
            "scaler": self.scaler.state_dict(),
        }

    def centers(self) -> dict[str, Tensor]:
        """The class centres and the optimizer's state of each, sharded over the ranks."""
        kept = self.optimizer.state.get(self.head.weight, {})
        tensors = {"weight": self.head.weight.detach()}
        tensors |= {name: value for name, value in kept.items() if self._per_center(value)}
        count = self.data.num_classes
        return {name: self.ranks.sharded(tensor, count) for name, tensor in tensors.items()}

    def _per_center(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.shape == self.head.weight.shape

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint of this run, written by any number of ranks.

        The configuration decides how it goes on: of the optimizer only its state is taken.

        Raises:
            ConfigError: if its configuration is another, or its content does not fit it.
            SpecMismatchError: if data or cache differ.
        """
        saved = self.ranks.run_all_or_abort(lambda: self._checked(state, path))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved.optimizer.state, "param_groups": groups})
        kept = dict(saved.centers_optimizer)
        for name in saved.centers.tensors:
            if name != "weight":
                kept[name] = torch.empty_like(self.head.weight)
        if kept:
            self.optimizer.state[self.head.weight] = kept
        folder, digests = centers_of(state, path)
        read_centers(folder, self.centers(), self.ranks, sha256=digests)
        if self.device.type == "cuda" and saved.rng.cuda is not None:
            torch.cuda.set_rng_state(saved.rng.cuda, self.device)
        for name in _PLAIN:
            setattr(self, name, getattr(saved, name))
        self.saved = self.step
        self.skipped, self.skipped_in_a_row = saved.skipped
        self.divergence = Divergence(*saved.divergence)
        self.window = Window(state["window"])
        self.identity_cosines.restore(saved.fit)

    def _checked(self, state: dict[str, Any], path: Path) -> SavedRun:
        """The checkpoint if it fits this run; loads what raises an error if it does not."""
        saved = as_declared(state, SavedRun, path)
        require_same_run(state, self.config, self.data, path)
        load_weights(self.model, saved.model, path)
        optimizer = self.config.optimizer
        names = {"momentum_buffer"} if optimizer.momentum else set()
        names = {"step", "exp_avg", "exp_avg_sq"} if optimizer.kind == "adamw" else names
        numbers = self.optimizer.param_groups[0]["params"]
        faults = [
            f"{name}: {fault}"
            for name, tensor, shape in saved.tensors(numbers, self.data.num_images)
            if (fault := misfit(tensor, torch.float32, shape))
        ]
        of_centers = {*saved.centers_optimizer, *saved.centers.tensors} - {"weight"}
        for held in (*map(set, saved.optimizer.state.values()), of_centers):
            if held and held != names:
                faults.append(f"optimizer: expected {sorted(names)}, got {sorted(held)}")
        if not set(saved.optimizer.state) <= set(range(len(numbers))):
            faults.append(f"optimizer: expected the state of {len(numbers)} parameters, got others")
        steps = (saved.best_step, saved.evaluated, saved.window.taken, *saved.skipped)
        if max(steps) > saved.step or saved.step > self.sampler.total_steps:
            faults.append(
                f"step: expected at most {self.sampler.total_steps}, and none after it, got "
                f"{saved.step} and {max(steps)}"
            )
        try:
            self.scaler.load_state_dict(saved.scaler)
            torch.set_rng_state(saved.rng.cpu)
        except (RuntimeError, TypeError, KeyError) as error:
            faults.append(f"rng and scaler: {error}")
        if faults:
            raise ConfigError(
                f"{path}: not as gkd writes it: {faults[0]}; resume from another checkpoint "
                "beside it, or train into another folder"
            )
        return saved

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.sampler.steps_per_epoch

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.optimizer.lr * self.lr_factor(self.step)

    def take_step(self, batch: Batch, records: Records) -> GkdLoss:
        """Train on a batch.

        If its loss or its gradients are not finite, no weight changes and the step counts as
        skipped; in float16 the gradient scaler decides, and chooses a smaller scale for the next.
        """
        self.buffers.keep()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        with self._sampled(batch) as sampled:
            loss = self._loss(batch, sampled)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss.total).backward()
            norm = self._clip()
            # The host waits for the device here, and where classes are looked up.
            *parts, norm_value = torch.stack([*map(torch.detach, loss.means), norm]).tolist()
            finite = math.isfinite(parts[0]) and math.isfinite(norm_value)
            if finite or self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        self.step += 1
        if not finite:
            named = dict(zip(loss.means._fields, parts, strict=True))
            self._skip({**named, "gradient_norm": norm_value}, batch, records)
            return loss.means
        self.skipped_in_a_row = 0
        warmup = self.config.schedule.warmup_epochs * self.sampler.steps_per_epoch
        self.divergence.add(parts[1], settled=self.step > warmup)
        if self.step > self.sampler.total_steps - self.sampler.steps_per_epoch:
            self.identity_cosines.add(batch.rows, loss.label_cosines)
        return loss.means

    @contextmanager
    def _sampled(self, batch: Batch) -> Iterator[SampledCenters | None]:
        """The centres that a step trains, known to the optimizer; None for all of them."""
        rate = self.config.head.sample_rate
        if rate == 1.0:
            yield None
            return
        wanted = classes_in_use(batch.labels, batch.targets, self.ranks)
        seed = self.config.train.seed, self.step, self.ranks.rank
        sample = sample_classes(wanted, self.head.rows, rate, seed=seed)
        with borrowed(self.optimizer, self.head.weight, sample.rows) as centers:
            yield SampledCenters(sample, centers)

    def _loss(self, batch: Batch, sampled: SampledCenters | None) -> LayerLoss:
        weight, labels, targets = self.head.weight, batch.labels, batch.targets
        spec = self.head_spec
        # The host waits for the device here, so this comes before the backbone's work.
        lookup = look_up_classes(labels, targets, weight, spec, sampled=sampled)
        images = self.pixels(batch.images)
        if not self.config.train.channels_last:
            images = images.contiguous()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeddings = self.forward(images)
        ramp = kd_ramp(self.step, ramp=self.config.kd.ramp, total_steps=self.sampler.total_steps)
        return grouped_margin_loss(
            embeddings, weight, labels, targets, spec, ramp=ramp, sampled=sampled, lookup=lookup
        )

    def _clip(self) -> Tensor:
        """Clip the backbone's gradients; returns the norm of all gradients before that."""
        limit = self.config.optimizer.clip_norm
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model.parameters())
        if limit:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        of_centers = gradient_norm(self.optimizer.param_groups[-1]["params"])
        return torch.hypot(norm, self.ranks.sum(of_centers.square()).sqrt())

    def _skip(self, parts: dict[str, float], batch: Batch, records: Records) -> None:
        self.buffers.restore()
        self.skipped += 1
        self.skipped_in_a_row += 1
        rows = self.ranks.gather(batch.rows.to(self.device)).tolist()
        self.last_skipped = SkippedStep(self.step, parts, tuple(map(records.key, rows)))

    def require_sound(self, records: Records) -> None:
        """Stop a training that cannot succeed any more.

        Raises:
            GkdError: after ``train.max_skipped`` skipped steps in a row, or if the cross-entropy
                has long been far above its first value.
        """
        excess = self.skipped_in_a_row >= self.config.train.max_skipped
        if not excess and not self.divergence.found:
            return
        highest_lr = self.config.optimizer.lr * max(map(self.lr_factor, range(self.step)))
        fault = (
            f"the training diverges: at step {self.step} of {self.sampler.total_steps} the running "
            f"mean of the cross-entropy is {self.divergence.mean:.4g}, it began at "
            f"{self.divergence.first or 0:.4g}"
        )
        if excess:
            fault = (
                f"the loss or the gradients were not finite in {self.skipped_in_a_row} steps in a "
                f"row (train.max_skipped); the last was {self.last_skipped} of {records.path}, "
                "check these images too"
            )
        self.ranks.fail(
            f"{fault}; the highest learning rate so far was {highest_lr:g}; "
            f"{self.last_checkpoint}: start again in another folder with a lower optimizer.lr or "
            "more schedule.warmup_epochs"
        )

    @property
    def last_checkpoint(self) -> str:
        """Which checkpoint there is, for messages."""
        if self.saved < 0:
            return "no checkpoint was written before"
        return f"the checkpoint of step {self.saved} is unchanged"
