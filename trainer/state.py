"""The state that training changes: networks, optimiser, and the place in the data."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from gkd.storage.errors import GkdError
from gkd.storage.records import Records
from gkd.trainer.checkpoint import Identity, read_centers, require_same_run, student_backbone
from gkd.trainer.config import RunConfig
from gkd.trainer.data import Batch, JoinedTargets
from gkd.trainer.devices import choose_device, choose_dtype
from gkd.trainer.heads import MarginHead
from gkd.trainer.losses import GkdLoss, gkd_loss
from gkd.trainer.plans import Plans
from gkd.trainer.ranks import ALONE, Ranks
from gkd.trainer.schedules import kd_ramp, make_optimizer, make_scheduler

SHOWN_KEYS = 5


@dataclass
class RunState:
    """One rank's part of a training, wherever it stands; ``step`` is the number of steps done,
    ``saved`` that of the last checkpoint.

    ``forward`` is ``model`` as all ranks run it; ``head`` holds this rank's class centres.
    """

    config: RunConfig
    identity: Identity
    plans: Plans
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    forward: nn.Module
    head: MarginHead
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ranks: Ranks
    step: int = 0
    saved: int = -1
    best: float | None = None
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
        head = MarginHead(
            records.num_classes,
            config.student.embedding_dim,
            margin=config.head.margins,
            scale=config.head.scale,
            rows=ranks.rows(records.num_classes),
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
        identity = Identity(
            len(records),
            records.num_classes,
            records.fingerprint,
            targets.store.cache_id if targets else "",
        )
        return cls(
            config=config,
            identity=identity,
            plans=plans,
            device=device,
            dtype=dtype,
            model=model,
            forward=ranks.parallel(model, hook=config.train.gradient_hook),
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=ranks.scaler(device, enabled=dtype == torch.float16),
            ranks=ranks,
        )

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on but the class centres.

        Builtins and tensors, the same on all ranks.
        """
        cuda = self.device.type == "cuda"
        optimizer = self.optimizer.state_dict()
        centers = optimizer["state"].pop(self._centers_place, {})
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
        count = self.identity.num_classes
        return {name: self.ranks.sharded(tensor, count) for name, tensor in tensors.items()}

    @property
    def _centers_place(self) -> int:
        """Number of the class centres among the optimizer's parameters: they are the last."""
        return len(self.optimizer.param_groups[0]["params"]) - 1

    def _of_centers(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.shape == self.head.weight.shape

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this very run, of any number of ranks."""
        require_same_run(state, self.config, self.identity, path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        kept = dict(state["centers_optimizer"])
        kept |= {
            name: torch.empty_like(self.head.weight)
            for name in state["centers"]["tensors"]
            if name != "weight"
        }
        if kept:
            self.optimizer.state[self.head.weight] = kept
        read_centers(path.parent / state["centers"]["folder"], self.centers())
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step, self.best, self.accuracy = state["step"], state["best"], state["accuracy"]
        self.saved = self.step

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
            embeddings = self.forward(images)
        logits = self.head(embeddings, batch.labels)
        loss = gkd_loss(
            logits,
            batch.labels,
            batch.targets,
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
