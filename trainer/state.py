"""The state that training changes: networks, optimiser, and the place in the data."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.records.open import Records
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
from gkd.trainer.schedules import kd_ramp, make_optimizer, make_scheduler


@dataclass
class RunState:
    """One rank's part of a training, wherever it stands.

    step              number of steps done, the skipped ones too
    skipped           steps that were not finite and changed no weight
    skipped_in_a_row  how many of these were the last ones
    last_skipped      the last of them
    saved             the step of the last checkpoint
    evaluated         the step of the last evaluation, and ``best_step`` that of the best
    highest_lr        learning rate so far
    window            the steps that are in no line of the log yet

    ``forward`` is ``model`` as all ranks run it, on what ``pixels`` makes of images; ``head`` holds
    this rank's class centres.
    """

    config: RunConfig
    data: RunData
    plans: BatchSampler
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    forward: nn.Module
    pixels: Callable[[Tensor], Tensor]
    head: ClassCenters
    head_spec: HeadSpec
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ranks: Ranks
    kept: BufferSnapshot
    fit: IdentityCosineStatistics
    step: int = 0
    saved: int = -1
    skipped: int = 0
    skipped_in_a_row: int = 0
    last_skipped: SkippedStep | None = None
    divergence: Divergence = field(default_factory=Divergence)
    best: float | None = None
    best_step: int = -1
    evaluated: int = 0
    highest_lr: float = 0.0
    window: Window = field(default_factory=Window)
    accuracy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        config: RunConfig,
        records: Records,
        targets: JoinedTargets | None,
        ranks: Ranks = ALONE,
    ) -> "RunState":
        """The state at the beginning, from the configuration and its seed.

        Raises:
            ConfigError: for a student or a device that cannot be.
        """
        device = choose_device(config.train.device)
        dtype = choose_dtype(config.train.precision, device)
        torch.manual_seed(config.train.seed)
        model = student_backbone(config.student).to(device)
        if config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        head = ClassCenters(
            records.num_classes,
            config.student.embedding_dim,
            rows=ranks.rows(records.num_classes),
        ).to(device)
        head_spec = HeadSpec(
            margin=config.head.margins,
            scale=config.head.scale,
            temperature=config.kd.temperature,
            w_binary=config.kd.w_binary,
            w_primary=config.kd.w_primary,
            compiled=config.train.compile,
            ranks=ranks,
            first_class=head.rows.start,
        )
        plans = BatchSampler(
            len(records),
            config.train.batch_size,
            config.train.epochs,
            config.train.seed,
            config.data.flip,
            blocks=(
                targets.blocks(config.data.block_shards)
                if targets and config.data.order == "blocks"
                else None
            ),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
        optimizer = make_optimizer(config.optimizer, parameters)
        scheduler = make_scheduler(
            optimizer,
            config.schedule,
            lr=config.optimizer.lr,
            steps_per_epoch=plans.steps_per_epoch,
            total_steps=plans.total_steps,
        )
        data = RunData(
            len(records),
            records.num_classes,
            records.fingerprint,
            targets.store.cache_id if targets else "",
        )
        return cls(
            config=config,
            data=data,
            plans=plans,
            device=device,
            dtype=dtype,
            model=model,
            forward=ranks.parallel(model, allreduce_dtype=config.train.allreduce_dtype),
            pixels=preprocess_preset("arcface").on_device(device),
            head=head,
            head_spec=head_spec,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=ranks.scaler(device, enabled=dtype == torch.float16),
            ranks=ranks,
            kept=BufferSnapshot(model),
            fit=IdentityCosineStatistics(len(records), ranks),
        )

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on but the class centres.

        Builtins and tensors, the same on all ranks but for the statistics of BatchNorm: those of
        the first are kept.
        """
        cuda = self.device.type == "cuda"
        optimizer = self.optimizer.state_dict()
        centers = optimizer["state"].pop(self._centers_place, {})
        return {
            "config": msgspec.to_builtins(self.config),
            "data": list(self.data),
            "step": self.step,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "divergence": [self.divergence.first, self.divergence.mean, self.divergence.above],
            "best": self.best,
            "best_step": self.best_step,
            "evaluated": self.evaluated,
            "highest_lr": self.highest_lr,
            "window": self.window.state(),
            "fit": self.fit.state(),
            "accuracy": self.accuracy,
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "centers_optimizer": {n: v for n, v in centers.items() if not self._of_centers(v)},
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def centers(self) -> dict[str, Tensor]:
        """The class centres and what the optimizer keeps for each, sharded over the ranks."""
        kept = self.optimizer.state.get(self.head.weight, {})
        tensors = {"weight": self.head.weight.detach()}
        tensors |= {name: value for name, value in kept.items() if self._of_centers(value)}
        count = self.data.num_classes
        return {name: self.ranks.sharded(tensor, count) for name, tensor in tensors.items()}

    @property
    def _centers_place(self) -> int:
        """Number of the class centres among the optimizer's parameters: they are the last."""
        return len(self.optimizer.param_groups[0]["params"]) - 1

    def _of_centers(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.shape == self.head.weight.shape

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this very run, of any number of ranks.

        Raises:
            ConfigError: for another configuration, or weights of other shapes than it says.
            SpecMismatchError: where data or cache differ.
        """
        self.ranks.run_all_or_abort(lambda: require_same_run(state, self.config, self.data, path))
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ConfigError(
                f"{path}: its weights do not fit its own configuration (student "
                f"{self.config.student.name} of {self.config.student.embedding_dim} numbers an "
                f"embedding, {self.data.num_classes} classes): {error}; go on from another "
                "checkpoint, or train into another folder"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        kept = dict(state["centers_optimizer"])
        kept |= {
            name: torch.empty_like(self.head.weight)
            for name in state["centers"]["tensors"]
            if name != "weight"
        }
        if kept:
            self.optimizer.state[self.head.weight] = kept
        folder, digests = centers_of(state, path)
        read_centers(folder, self.centers(), self.ranks, sha256=digests)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step, self.best, self.accuracy = state["step"], state["best"], state["accuracy"]
        self.best_step, self.evaluated = state["best_step"], state["evaluated"]
        self.saved = self.step
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.divergence = Divergence(*state["divergence"])
        self.highest_lr = state["highest_lr"]
        self.window = Window(state["window"])
        self.fit.restore(state["fit"])

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.plans.steps_per_epoch

    def take_step(self, batch: Batch, records: Records) -> GkdLoss:
        """One step on a batch.

        Where its loss or its gradients are not finite, it changes no weight and is counted in
        ``skipped``; float16 leaves that to the gradient scaler, which takes a smaller scale next.

        """
        self.kept.keep()
        self.highest_lr = max(self.highest_lr, float(self.optimizer.param_groups[0]["lr"]))
        with self._sampled(batch) as sampled:
            loss = self._loss(batch, sampled)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss.total).backward()
            norm = self._clip()
            # The host waits for the device here, and where it looks classes up.
            *parts, norm_value = torch.stack([*map(torch.detach, loss.means), norm]).tolist()
            finite = math.isfinite(parts[0]) and math.isfinite(norm_value)
            if finite or self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        with warnings.catch_warnings():
            # Where the first steps are skipped the schedule goes on; torch takes it for a slip.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        self.step += 1
        if not finite:
            self._skip(
                {**dict(zip(loss.means._fields, parts, strict=True)), "gradient_norm": norm_value},
                batch,
                records,
            )
            return loss.means
        self.skipped_in_a_row = 0
        warmup = self.config.schedule.warmup_epochs * self.plans.steps_per_epoch
        self.divergence.add(parts[1], settled=self.step > warmup)
        if self.step > self.plans.total_steps - self.plans.steps_per_epoch:
            self.fit.add(batch.rows, loss.label_cosines)
        return loss.means

    @contextmanager
    def _sampled(self, batch: Batch) -> Iterator[SampledCenters | None]:
        """The centres that learn in a step, in the optimizer's hands; None for all of them."""
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
        kd, weight, labels, targets = self.config.kd, self.head.weight, batch.labels, batch.targets
        # The host waits for the device here, so it comes before the backbone's work.
        lookup = look_up_classes(labels, targets, weight, self.head_spec, sampled=sampled)
        images = self.pixels(batch.images)
        if not self.config.train.channels_last:
            images = images.contiguous()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeddings = self.forward(images)
        return grouped_margin_loss(
            embeddings,
            weight,
            labels,
            targets,
            self.head_spec,
            ramp=kd_ramp(self.step, ramp=kd.ramp, total_steps=self.plans.total_steps),
            sampled=sampled,
            lookup=lookup,
        )

    def _clip(self) -> Tensor:
        """Clip the backbone's gradients; the norm of all gradients before that."""
        limit = self.config.optimizer.clip_norm
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model.parameters())
        if limit:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        of_centers = gradient_norm(self.optimizer.param_groups[0]["params"][-1:])
        return torch.hypot(norm, self.ranks.sum(of_centers.square()).sqrt())

    def _skip(self, parts: dict[str, float], batch: Batch, records: Records) -> None:
        """Put the running statistics back, and count."""
        self.kept.restore()
        self.skipped += 1
        self.skipped_in_a_row += 1
        rows = self.ranks.gather(batch.rows.to(self.device)).tolist()
        keys = tuple(records.key(row) for row in rows)
        self.last_skipped = SkippedStep(self.step, parts, keys)

    def require_sound(self, records: Records) -> None:
        """Stop a training that the last step shows to be lost.

        Raises:
            GkdError: after ``train.max_skipped`` skipped steps in a row, or where the cross-entropy
                has been far above its beginning for long.
        """
        remedy = (
            "begin again in another folder with a lower optimizer.lr or more schedule.warmup_epochs"
        )
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            self.ranks.fail(
                "the loss or the gradients were not finite in "
                f"{self.skipped_in_a_row} steps in a row (train.max_skipped), the highest learning "
                f"rate so far was {self.highest_lr:g}; the last was {self.last_skipped} of "
                f"{records.path}; {self.standing}: {remedy}, or look at these images"
            )
        if self.divergence.found:
            self.ranks.fail(
                f"the training diverges: at step {self.step} of {self.plans.total_steps} the "
                f"cross-entropy's running mean is {self.divergence.mean:.4g}, it began at "
                f"{self.divergence.first:.4g}; the highest learning rate so far was "
                f"{self.highest_lr:g}: {remedy}"
            )

    @property
    def standing(self) -> str:
        """The last checkpoint, in words."""
        if self.saved < 0:
            return "no checkpoint was written before"
        return f"the checkpoint of step {self.saved} stands as it was"
