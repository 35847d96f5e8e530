"""Partition of [256, 93431] logits against one logsumexp; memory and truth at 2,059,906 classes."""

import resource
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gkd.pipeline.groups.partition import partition
from gkd.pipeline.settings import DRAWS, PartitionSettings
from tests.benchmarks.harness import in_turns, report
from tests.pipeline.given_logits import partition_logits
from tests.reference import dense_group

ROUNDS = 9
BATCH, NUM_CLASSES, EMBEDDING_DIM = 256, 93_431, 512
MANY_BATCH, MANY_CLASSES, MANY_DIM = 64, 2_059_906, 128
CHECKED = 4
SPREAD = 0.1  # standard deviation of a trained teacher's impostor cosines, about
SHARP = PartitionSettings(group_temperature=1.0)
DRAWN = PartitionSettings(group_temperature=1.0, draws=DRAWS)
DRAW_ROUNDS = 25


def teacher_like(batch: int, num_classes: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, D] near their own of random unit centres [C, D], and labels [B]."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_classes, dim, generator=generator)
    centers /= torch.linalg.vector_norm(centers, dim=1, keepdim=True)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    noise = torch.randn(batch, dim, generator=generator) / dim**0.5
    return centers[labels] + noise, labels, centers


def teacher_logits() -> tuple[Tensor, Tensor]:
    """Logits [256, 93431] with impostors of SPREAD and labels from hopeless to clear."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, NUM_CLASSES, generator=generator).mul_(64 * SPREAD)
    labels = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
    logits[torch.arange(BATCH), labels] = 64 * torch.linspace(-0.1, 0.6, BATCH)
    return logits, labels


def sorted_softmax(logits: Tensor) -> Tensor:
    """What a direct partition does: softmax, full sort, cumulative sum."""
    probs, order = logits.softmax(1).sort(1, descending=True)
    return order[probs.cumsum(1) < SHARP.threshold]


def drawn_ratio(plain: Callable[[], object], drawn: Callable[[], object]) -> float:
    """Median of the time with draws / the time in the same turn without."""
    without, with_draws = in_turns([plain, drawn], DRAW_ROUNDS).T
    return float(np.median(with_draws / without))


def many_classes() -> tuple[float, int]:
    """GiB above the centres for a batch of 64, and rows of 4 unlike the dense reference."""
    embeddings, labels, centers = teacher_like(MANY_BATCH, MANY_CLASSES, MANY_DIM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = partition(embeddings, labels, centers, SHARP)
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    differing = 0
    for row in range(CHECKED):
        unit = embeddings[row].double() / embeddings[row].double().norm()
        logits = SHARP.scale * (centers.double() @ unit).numpy()
        label = int(labels[row])
        logits[label] -= SHARP.scale * SHARP.margin
        expected, _ = dense_group(
            logits,
            label,
            threshold=SHARP.threshold,
            group_temperature=SHARP.group_temperature,
            max_group=SHARP.max_group,
        )
        entries = slice(*result.targets.offsets[row : row + 2])
        differing += set(expected) != set(result.targets.indices[entries].astype(np.int64))
    return above, differing


def main() -> None:
    """Measure, report and compare with the bars."""
    gib, differing = many_classes()
    logits, labels = teacher_logits()
    soft = PartitionSettings(group_temperature=2.0)
    works: list[Callable[[], object]] = [
        partial(torch.logsumexp, logits, 1),
        partial(partition_logits, logits, labels, SHARP),
        partial(partition_logits, logits, labels, soft),
        partial(sorted_softmax, logits),
    ]
    one, sharp, softer, plain = in_turns(works, ROUNDS).min(0).tolist()
    for name, config, took in (("T=1", SHARP, sharp), ("T=2", soft, softer)):
        median = np.median(partition_logits(logits, labels, config).targets.sizes)
        print(
            f"{name}: {took * 1e3:.1f} ms, median group {median:,.0f}; "
            f"logsumexp {one * 1e3:.1f} ms",
            file=sys.stderr,
        )
    uniforms = np.random.default_rng(0).random((BATCH, 64))
    drawn = drawn_ratio(
        partial(partition_logits, logits, labels, SHARP),
        partial(partition_logits, logits, labels, DRAWN, uniforms=uniforms),
    )
    whole = teacher_like(BATCH, NUM_CLASSES, EMBEDDING_DIM)
    from_embeddings = drawn_ratio(
        partial(partition, *whole, SHARP), partial(partition, *whole, DRAWN, uniforms=uniforms)
    )
    report(
        "partition",
        {
            "partition / logsumexp, T=1": sharp / one,
            "partition / logsumexp, T=2": softer / one,
            "softmax + sort + cumsum / partition, T=1": plain / sharp,
            "with 64 draws / without, T=1": drawn,
            "with 64 draws / without, T=1, from embeddings": from_embeddings,
            "GiB above the centres, C=2,059,906, B=64": gib,
            "rows of 4 unlike the dense reference, C=2,059,906": differing,
        },
        {
            "partition / logsumexp, T=1": ("<=", 3.0),
            "softmax + sort + cumsum / partition, T=1": (">=", 10.0),
            "with 64 draws / without, T=1": ("<=", 1.25),
            "with 64 draws / without, T=1, from embeddings": ("<=", 1.25),
            "GiB above the centres, C=2,059,906, B=64": ("<=", 2.0),
            "rows of 4 unlike the dense reference, C=2,059,906": ("==", 0),
        },
    )


if __name__ == "__main__":
    main()
