"""A student's step from the cache against the same step without distillation.

``python -m tests.benchmarks.student_step`` times whole steps (forward, class layer, loss,
backward, clipping, optimiser) of MobileFaceNet on 112x112 images, with and without targets, turn
by turn, and with an online IResNet-50 teacher for comparison. Processor time of one thread, so
that neighbours on the machine do not count, and the median of the turns' ratios.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gkd.trainer.backbones import build_backbone
from gkd.trainer.config_file import load_config
from gkd.trainer.head.centers import ClassCenters
from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec
from gkd.trainer.head.targets import GroupTargets
from gkd.trainer.schedules import make_optimizer
from tests.benchmarks.harness import Bar, in_turns, report

BATCH = 32
ROUNDS = 41
CPU = torch.device("cpu")
# Classes and entries a sample: the LFW recipe, and MS1MV3 with a small and a large group.
SHAPES = {"lfw": (4859, 1853), "ms1mv3 small": (93431, 19), "ms1mv3 large": (93431, 2000)}


def random_targets(num_classes: int, entries: int, batch: int = BATCH) -> GroupTargets:
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randperm(num_classes, generator=generator)[:entries] for _ in range(batch)]
    log_probs = torch.randn(batch, entries, generator=generator).log_softmax(1)
    inside = torch.tensor(0.95)
    return GroupTargets(
        offsets=torch.arange(batch + 1) * entries,
        indices=torch.cat(indices),
        log_probs=(log_probs + inside.log()).flatten(),
        log_secondary=torch.full((batch,), torch.log1p(-inside).item()),
    )


def make_step(
    num_classes: int,
    batch: int = BATCH,
    device: torch.device = CPU,
    precision: torch.dtype = torch.float32,
) -> Callable[[GroupTargets | None], None]:
    torch.manual_seed(0)
    config = load_config()
    model = build_backbone("mobilefacenet").to(device).to(memory_format=torch.channels_last)
    head = ClassCenters(num_classes, 512).to(device)
    spec = HeadSpec(margin=config.head.margins)
    learning = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = make_optimizer(config.optimizer, learning)
    images = torch.randn(batch, 3, 112, 112).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch,)).to(device)

    def step(targets: GroupTargets | None) -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            embeddings = model(images)
        loss = grouped_margin_loss(embeddings, head.weight, labels, targets, spec)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


def teacher_seconds() -> float:
    teacher = build_backbone("iresnet50").eval()
    images: Tensor = torch.randn(BATCH, 3, 112, 112)
    with torch.no_grad():
        return float(np.median(in_turns([lambda: teacher(images)], 3, time.process_time)))


def step_seconds(num_classes: int, entries: int) -> tuple[float, float]:
    """Seconds of a step without targets, and the median of many turns' ratios with / without."""
    step, targets = make_step(num_classes), random_targets(num_classes, entries)
    step(None)
    step(targets)
    pair = [lambda: step(None), lambda: step(targets)]
    plain, with_kd = in_turns(pair, ROUNDS, time.process_time).T
    return float(np.median(plain)), float(np.median(with_kd / plain))


def main() -> None:
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    online = teacher_seconds()
    for name, (num_classes, entries) in SHAPES.items():
        plain, ratio = step_seconds(num_classes, entries)
        print(f"{name}: {plain:.3f} s without distillation, x{ratio:.3f} with", file=sys.stderr)
        ratios[f"step with / without, {name}"] = ratio
        ratios[f"step with an online IResNet-50 / without, {name}"] = 1 + online / plain
        bars[f"step with / without, {name}"] = ("<=", 1.03)
    report("student_step", ratios, bars)


if __name__ == "__main__":
    main()
