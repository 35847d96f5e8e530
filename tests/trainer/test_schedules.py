"""Schedules at their turning points."""

import math

import pytest
import torch

from gkd.trainer.config import OptimizerConfig, ScheduleConfig
from gkd.trainer.config_file import load_config
from gkd.trainer.schedules import kd_ramp, lr_factor, make_optimizer

STEPS, TOTAL = 10, 200


def rates(overrides: list[str]) -> list[float]:
    """The learning rate of each step of 20 epochs."""
    config = load_config(None, overrides)
    factor = lr_factor(
        config.schedule, lr=config.optimizer.lr, steps_per_epoch=STEPS, total_steps=TOTAL
    )
    return [config.optimizer.lr * factor(step) for step in range(TOTAL)]


def test_cosine_warms_up_for_four_epochs_and_ends_at_the_final_rate() -> None:
    seen = rates([])
    assert seen[0] == pytest.approx(0.1 / 41)
    assert seen[39] == pytest.approx(0.1 * 40 / 41)
    assert seen[40] == pytest.approx(0.1)
    middle = 40 + (TOTAL - 1 - 40) / 3
    assert seen[round(middle)] == pytest.approx(0.05 * (1 + math.cos(math.pi / 3)), rel=1e-3)
    assert seen[-1] == pytest.approx(2.5e-7)
    assert max(seen) == pytest.approx(0.1)


def test_poly_falls_in_a_straight_line_at_power_one() -> None:
    seen = rates(["schedule.kind=poly", "schedule.warmup_epochs=0", "schedule.final_lr=0"])
    assert seen == pytest.approx([0.1 * (1 - i / (TOTAL - 1)) for i in range(TOTAL)])


def test_poly_has_a_power() -> None:
    factor = lr_factor(
        ScheduleConfig(kind="poly", warmup_epochs=0, final_lr=0, power=2),
        lr=0.1,
        steps_per_epoch=STEPS,
        total_steps=101,
    )
    assert factor(50) == pytest.approx(0.25)


def test_step_falls_at_its_milestones() -> None:
    seen = rates(["schedule.kind=step", "schedule.milestones=[16, 10]", "schedule.gamma=0.5"])
    assert seen[40:100] == [0.1] * 60
    assert seen[100:160] == [0.05] * 60
    assert seen[160:] == [0.025] * 40


def test_a_schedule_of_one_step_is_finite() -> None:
    factor = lr_factor(ScheduleConfig(warmup_epochs=0), lr=0.1, steps_per_epoch=1, total_steps=1)
    assert factor(0) == 1.0


@pytest.mark.parametrize(
    ("step", "ramp", "weight"), [(0, 0.5, 0.0), (50, 0.5, 0.5), (100, 0.5, 1.0), (0, 0.0, 1.0)]
)
def test_distillation_ramps_up_over_its_share_of_the_training(
    step: int, ramp: float, weight: float
) -> None:
    assert kd_ramp(step, ramp=ramp, total_steps=200) == weight
    assert kd_ramp(199, ramp=ramp, total_steps=200) == 1.0


def test_optimizers_take_their_settings() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    sgd = make_optimizer(OptimizerConfig(), parameters)
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
    }
    adamw = make_optimizer(OptimizerConfig(kind="adamw", lr=1e-3, weight_decay=0.1), parameters)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["weight_decay"] == 0.1
