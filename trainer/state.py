"""The state that training changes: networks, optimiser, and the place in the data."""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.records import Records
from gkd.trainer.checkpoint import Identity, require_same_run, student_backbone
from gkd.trainer.config import RunConfig
from gkd.trainer.data import Batch, JoinedTargets
from gkd.trainer.devices import choose_device, choose_dtype
from gkd.trainer.fit import IdentityFit
from gkd.trainer.fused import grouped_margin_loss
from gkd.trainer.guards import Divergence, KeptBuffers, SkippedStep, gradient_norm
from gkd.trainer.heads import MarginHead
from gkd.trainer.losses import GkdLoss
from gkd.trainer.plans import Plans
from gkd.trainer.schedules import kd_ramp, make_optimizer, make_scheduler


@dataclass
class RunState:
    """One training, wherever it stands.

    step              number of steps done, the skipped ones too
    skipped           steps that were not finite and changed no weight
    skipped_in_a_row  how many of these were the last ones
    last_skipped      the last of them
    """

    config: RunConfig
    identity: Identity
    plans: Plans
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    head: MarginHead
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    kept: KeptBuffers
    fit: IdentityFit
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    last_skipped: SkippedStep | None = None
    divergence: Divergence = field(default_factory=Divergence)
    best: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls, config: RunConfig, records: Records, targets: JoinedTargets | None
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
        head = MarginHead(
            records.num_classes,
            config.student.embedding_dim,
            margin=config.head.margins,
            scale=config.head.scale,
        ).to(device)
        plans = Plans(
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
        identity = Identity(
            len(records),
            records.num_classes,
            records.fingerprint,
            targets.store.cache_id if targets else "",
        )
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        kept, fit = KeptBuffers(model), IdentityFit(len(records))
        return cls(
            *(config, identity, plans, device, dtype, model, head),
            *(optimizer, scheduler, scaler, kept, fit),
        )

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, as builtins and tensors."""
        cuda = self.device.type == "cuda"
        return {
            "config": msgspec.to_builtins(self.config),
            "identity": list(self.identity),
            "step": self.step,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "divergence": [self.divergence.first, self.divergence.mean],
            "best": self.best,
            "accuracy": self.accuracy,
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this very run.

        Raises:
            ConfigError: for another configuration, or weights of other shapes than it says.
            SpecMismatchError: where data or cache differ.
        """
        require_same_run(state, self.config, self.identity, path)
        try:
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
        except RuntimeError as error:
            raise ConfigError(
                f"{path}: its weights do not fit its own configuration (student "
                f"{self.config.student.name} of {self.config.student.embedding_dim} numbers an "
                f"embedding, {self.identity.num_classes} classes): {error}; go on from another "
                "checkpoint, or train into another folder"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step, self.best, self.accuracy = state["step"], state["best"], state["accuracy"]
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.divergence = Divergence(*state["divergence"])

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.plans.steps_per_epoch

    def take_step(self, batch: Batch, records: Records) -> GkdLoss:
        """One step on a batch.

        Where its loss or its gradients are not finite, it changes no weight and is counted in
        ``skipped``; float16 leaves that to the gradient scaler, which takes a smaller scale next.

        Raises:
            GkdError: after ``train.max_skipped`` such steps in a row, or where the cross-entropy
                has been far above its beginning for long.
        """
        kd = self.config.kd
        self.kept.keep()
        images = batch.images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        if not self.config.train.channels_last:
            images = images.contiguous()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeddings = self.model(images)
        loss = grouped_margin_loss(
            embeddings,
            self.head.weight,
            batch.labels,
            batch.targets,
            margin=self.head.margin,
            scale=self.head.scale,
            temperature=kd.temperature,
            w_binary=kd.w_binary,
            w_primary=kd.w_primary,
            ramp=kd_ramp(self.step, ramp=kd.ramp, total_steps=self.plans.total_steps),
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss.total).backward()
        norm = self._clip()
        # The only time that the host waits for the device.
        *parts, norm_value = torch.stack([*(part.detach() for part in loss), norm]).tolist()
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
                {**dict(zip(loss._fields, parts, strict=True)), "gradient_norm": norm_value},
                batch,
                records,
            )
            return loss
        self.skipped_in_a_row = 0
        self._judge(parts[1])
        if self.step > self.plans.total_steps - self.plans.steps_per_epoch:
            self.fit.add(batch, embeddings, self.head.weight)
        return loss

    def _clip(self) -> torch.Tensor:
        """Clip the backbone's gradients; the norm of all gradients before that."""
        limit = self.config.optimizer.clip_norm
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model.parameters())
        if limit:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return torch.hypot(norm, gradient_norm(self.head.parameters()))

    def _skip(self, parts: dict[str, float], batch: Batch, records: Records) -> None:
        """Put the running statistics back, count, and stop where it is one too many."""
        self.kept.put_back()
        self.skipped += 1
        self.skipped_in_a_row += 1
        keys = tuple(records.key(row) for row in batch.rows.tolist())
        self.last_skipped = SkippedStep(self.step, parts, keys)
        if self.skipped_in_a_row < self.config.train.max_skipped:
            return
        raise GkdError(
            f"the loss or the gradients were not finite in {self.skipped_in_a_row} steps in a row "
            f"(train.max_skipped), at a learning rate of {self._lr:g}; the last was "
            f"{self.last_skipped} of {records.path}; the last checkpoint stands as it was: begin "
            "again in another folder with a lower optimizer.lr or more schedule.warmup_epochs, or "
            "look at these images"
        )

    def _judge(self, ce: float) -> None:
        """Stop a training whose cross-entropy stays far above where it began."""
        self.divergence.add(ce)
        if self.divergence.found:
            raise GkdError(
                f"the training diverges: at step {self.step} of {self.plans.total_steps} the "
                f"cross-entropy's running mean is {self.divergence.mean:.4g}, it began at "
                f"{self.divergence.first:.4g}; the learning rate is {self._lr:g}: begin again in "
                "another folder with a lower optimizer.lr or more schedule.warmup_epochs"
            )

    @property
    def _lr(self) -> float:
        """The learning rate of the step to come."""
        return float(self.optimizer.param_groups[0]["lr"])
