"""The state that training changes: networks, optimiser, and the place in the data."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from gkd.storage.errors import GkdError
from gkd.storage.records import Records
from gkd.trainer.checkpoint import Identity, require_same_run, student_backbone
from gkd.trainer.config import RunConfig
from gkd.trainer.data import Batch, JoinedTargets
from gkd.trainer.devices import choose_device, choose_dtype
from gkd.trainer.fused import grouped_margin_loss
from gkd.trainer.heads import MarginHead
from gkd.trainer.losses import GkdLoss
from gkd.trainer.plans import Plans
from gkd.trainer.schedules import kd_ramp, make_optimizer, make_scheduler

SHOWN_KEYS = 5


@dataclass
class RunState:
    """One training, wherever it stands; ``step`` is the number of steps done."""

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
    step: int = 0
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
        return cls(
            config, identity, plans, device, dtype, model, head, optimizer, scheduler, scaler
        )

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, as builtins and tensors."""
        cuda = self.device.type == "cuda"
        return {
            "config": msgspec.to_builtins(self.config),
            "identity": list(self.identity),
            "step": self.step,
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
        """Go on from a checkpoint of this very run."""
        require_same_run(state, self.config, self.identity, path)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step, self.best, self.accuracy = state["step"], state["best"], state["accuracy"]

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.plans.steps_per_epoch

    def take_step(self, batch: Batch, records: Records) -> GkdLoss:
        """One step on a batch.

        Raises:
            GkdError: where the loss is not finite, naming the step and the batch's first records.
        """
        kd = self.config.kd
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
        self._require_finite(loss, batch, records)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss.total).backward()
        if self.config.optimizer.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.step += 1
        return loss

    def _require_finite(self, loss: GkdLoss, batch: Batch, records: Records) -> None:
        if math.isfinite(loss.total.item()):
            return
        parts = ", ".join(f"{name} {value.item():g}" for name, value in loss._asdict().items())
        keys = ", ".join(records.key(row) for row in batch.rows[:SHOWN_KEYS].tolist())
        raise GkdError(
            f"the loss of step {self.step} is not finite ({parts}); the batch begins with records "
            f"{keys} of {records.path}; go on from the last checkpoint with a lower optimizer.lr "
            "in another folder, or look at these images"
        )
