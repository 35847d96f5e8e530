"""The optimizer, and its learning rate and the weight of distillation in each step."""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gkd.trainer.config import OptimizerConfig, ScheduleConfig


def lr_factor(
    schedule: ScheduleConfig, *, lr: float, steps_per_epoch: int, total_steps: int
) -> Callable[[int], float]:
    """A function of the step: the fraction of ``lr`` that the step trains with, in [0, 1].

    The warm-up rises linearly over ``warmup_epochs`` and reaches 1 at its end. Then
    cosine: falls to ``final_lr`` along half a cosine; poly: falls to ``final_lr`` as
    (remaining share)^power; step: times ``gamma`` at each milestone, counted from the start.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    floor = schedule.final_lr / lr
    milestones = [round(epoch * steps_per_epoch) for epoch in sorted(schedule.milestones)]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        # 1 for the last step: it trains at the final rate.
        done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
        match schedule.kind:
            case "cosine":
                return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
            case "poly":
                return float(floor + (1 - floor) * (1 - done) ** schedule.power)
            case "step":
                return float(schedule.gamma ** bisect.bisect_right(milestones, step))

    return factor


def kd_ramp(step: int, *, ramp: float, total_steps: int) -> float:
    """Weight of distillation in a step: from 0, linearly, to 1 after ``ramp`` of all steps."""
    return min(1.0, step / (ramp * total_steps)) if ramp else 1.0


def make_optimizer(
    config: OptimizerConfig, parameters: Sequence[torch.nn.Parameter] | list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer of parameters or of parameter groups."""
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
