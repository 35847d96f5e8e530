"""The class layer with its loss against its own matrix products and a plain margin head.

``python -m tests.benchmarks.fused_head`` times forward and backward of ``grouped_margin_loss`` for
a batch of 128, 93,431 classes and 512 dimensions, turn by turn with the layer's three matrix
products and with a margin head of cross-entropy alone in autograd: processor time of one thread,
so that neighbours on the machine do not count. Draws and groups of as many entries cost the same
but for noise, so the median of many turns compares them. The memory above the centres and their
gradient is the growth of a child process's peak.

``python -m tests.benchmarks.fused_head webface42m`` runs one step at 2,059,906 classes, says the
peak of memory, and what the plain head's tensors would take: its step on tensors without memory.

``python -m tests.benchmarks.fused_head sampled`` times the layer with a tenth of the centres
learning against the whole of it.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.trainer.dry_run import PeakBytes
from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec, Margin
from gkd.trainer.head.partial_fc import SampledCenters, sample_classes
from gkd.trainer.head.targets import GroupTargets
from tests.benchmarks.harness import Bar, in_turns, report

BATCH, NUM_CLASSES, EMBEDDING_DIM = 128, 93_431, 512
WEBFACE42M = 2_059_906
MARGIN, SCALE = Margin(m3=0.4), 64.0
ROUNDS, PAIR_ROUNDS = 7, 25
MEGABYTE, GIBIBYTE = 1e6, 2**30


def random_targets(num_classes: int, mean: int, labels: Tensor) -> GroupTargets:
    """Groups of geometric size, a heavy tail, that hold the label."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.geometric(1 / mean, BATCH), num_classes)
    groups = [rng.choice(num_classes, size, replace=False) for size in sizes]
    for group, label in zip(groups, labels.tolist(), strict=True):
        if label not in group:
            group[0] = label
    log_probs = [np.log(rng.dirichlet(np.ones(size)) * 0.95 + 1e-12) for size in sizes]
    return GroupTargets(
        offsets=torch.from_numpy(np.concatenate([[0], sizes.cumsum()]).astype(np.int64)),
        indices=torch.from_numpy(np.concatenate(groups).astype(np.int64)),
        log_probs=torch.from_numpy(np.concatenate(log_probs).astype(np.float32)),
        log_secondary=torch.full((BATCH,), 0.05).log(),
    )


class Layer:
    """Embeddings, centres and labels of one step."""

    def __init__(self, num_classes: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.embeddings = torch.randn(BATCH, EMBEDDING_DIM, device=device, requires_grad=True)
        centers = torch.randn(num_classes, EMBEDDING_DIM, device=device).mul_(0.01)
        self.centers = centers.requires_grad_()
        self.labels = torch.randint(0, num_classes, (BATCH,), device=device)

    def fused(self, targets: GroupTargets | None, *, compiled: bool = False) -> None:
        self.forget()
        grouped_margin_loss(
            self.embeddings,
            self.centers,
            self.labels,
            targets,
            HeadSpec(margin=MARGIN, scale=SCALE, compiled=compiled),
        ).total.backward()

    def plain(self) -> None:
        """Cross-entropy alone in autograd, the margin by indexing."""
        self.forget()
        cosines = F.linear(F.normalize(self.embeddings), F.normalize(self.centers))
        rows = torch.arange(BATCH, device=cosines.device)
        logits = cosines.clone()
        logits[rows, self.labels] = cosines[rows, self.labels] - MARGIN.m3
        F.cross_entropy(logits * SCALE, self.labels).backward()

    def products(self) -> None:
        """The three matrix products: logits, and the gradients by embeddings and centres."""
        self.forget()
        with torch.no_grad():
            logits = self.embeddings @ self.centers.T
            self.embeddings.grad = logits @ self.centers
            self.centers.grad = logits.T @ self.embeddings

    def sampled(self, targets: GroupTargets, rate: float) -> None:
        self.forget()
        wanted = torch.unique(torch.cat([self.labels, targets.indices]))
        sample = sample_classes(wanted, range(len(self.centers)), rate, seed=(0,))
        learning = self.centers.detach()[sample.rows].requires_grad_()
        grouped_margin_loss(
            self.embeddings,
            self.centers,
            self.labels,
            targets,
            HeadSpec(margin=MARGIN, scale=SCALE),
            sampled=SampledCenters(sample, learning),
        ).total.backward()

    def forget(self) -> None:
        self.embeddings.grad = self.centers.grad = None


def least_seconds(works: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Least time of each, measured alternately: noise only adds."""
    least = in_turns(list(works.values()), ROUNDS, time.process_time).min(0)
    return dict(zip(works, least.tolist(), strict=True))


def memory(what: str) -> int:
    """Bytes of this process that are resident now (VmRSS) or were at the peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status")


def measure_extra_bytes() -> int:
    """Peak above the centres and their gradient of one step, in this process."""
    torch.set_num_threads(1)
    layer = Layer(NUM_CLASSES)
    targets = random_targets(NUM_CLASSES, 19, layer.labels)
    small = Layer(2048)  # the libraries' own buffers, once
    small.fused(random_targets(2048, 19, small.labels))
    before = memory("VmRSS")
    layer.fused(targets)
    assert layer.centers.grad is not None
    return memory("VmHWM") - before - layer.centers.grad.nbytes


def in_a_child(work: Callable[[], int]) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


def compare() -> None:
    torch.set_num_threads(1)
    layer = Layer(NUM_CLASSES)
    groups = {mean: random_targets(NUM_CLASSES, mean, layer.labels) for mean in (19, 64, 2000)}
    weights = torch.zeros_like(groups[64].log_probs)
    everything = torch.full((BATCH,), -torch.inf)
    drawn = replace(groups[64], log_weights=weights, log_secondary=everything)
    seconds = least_seconds(
        {
            "products": layer.products,
            "plain": layer.plain,
            "without targets": lambda: layer.fused(None),
            "mean 19": lambda: layer.fused(groups[19]),
            "mean 2000": lambda: layer.fused(groups[2000]),
        }
    )
    pair = [lambda: layer.fused(groups[64]), lambda: layer.fused(drawn)]
    exact, draws = in_turns(pair, PAIR_ROUNDS, time.process_time).T
    print({name: round(value, 3) for name, value in seconds.items()}, file=sys.stderr)
    products, plain = seconds["products"], seconds["plain"]
    ratios = {
        "mean 19 / three products": seconds["mean 19"] / products,
        "mean 2000 / three products": seconds["mean 2000"] / products,
        "mean 19 / plain head without targets": seconds["mean 19"] / plain,
        "64 draws / groups of 64": float(np.median(draws / exact)),
        "without targets / three products": seconds["without targets"] / products,
        "plain head without targets / three products": plain / products,
        "MB above centres and gradient": in_a_child(measure_extra_bytes) / MEGABYTE,
    }
    bars: dict[str, Bar] = {
        "mean 19 / three products": ("<=", 1.6),
        "mean 2000 / three products": ("<=", 2.0),
        "mean 19 / plain head without targets": ("<=", 0.75),
        "64 draws / groups of 64": ("<=", 1.1),
        "MB above centres and gradient": ("<=", 64.0),
    }
    report("fused_head", ratios, bars)


def run_webface42m() -> None:
    layer = Layer(WEBFACE42M)
    targets = random_targets(WEBFACE42M, 19, layer.labels)
    began = time.process_time()
    layer.fused(targets)
    print(f"{time.process_time() - began:.1f} s of processor time", file=sys.stderr)
    peak = memory("VmHWM")
    plain = Layer(WEBFACE42M, "meta")
    with PeakBytes() as without_memory:
        plain.plain()
    needed = without_memory.highest + plain.centers.nbytes
    ratios = {
        "GiB at the peak, 2,059,906 classes": peak / GIBIBYTE,
        "GiB of the plain head's tensors at the peak": needed / GIBIBYTE,
    }
    bars: dict[str, Bar] = dict(zip(ratios, [("<=", 24.0), (">", 24.0)], strict=True))
    report("fused_head_webface42m", ratios, bars)


def compare_sampled() -> None:
    torch.set_num_threads(1)
    layer = Layer(NUM_CLASSES)
    targets = random_targets(NUM_CLASSES, 19, layer.labels)
    seconds = least_seconds(
        {
            "whole": lambda: layer.fused(targets),
            "sampled": lambda: layer.sampled(targets, 0.1),
        }
    )
    what = "a tenth of the centres learning / all of them"
    report("fused_head_sampled", {what: seconds["sampled"] / seconds["whole"]}, {})


if __name__ == "__main__":
    works = {"webface42m": run_webface42m, "sampled": compare_sampled}
    works[sys.argv[1]]() if sys.argv[1:] else compare()
