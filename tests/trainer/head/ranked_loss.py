"""Losses and steps by torchrun's ranks, against those of one process; run by test_distributed."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gkd.trainer.distributed import ALONE, Ranks, joined_ranks
from gkd.trainer.head.class_lookup import classes_in_use
from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec, Margin
from gkd.trainer.head.partial_fc import SampledCenters, sample_classes
from gkd.trainer.head.targets import GroupTargets

BATCH, CLASSES, DIM = 12, 29, 8
STEPS, INPUTS = 50, 20


def problem(
    part: slice = slice(None), *, drawn: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, GroupTargets]:
    """Embeddings, centres, labels and targets; of ``part`` of the batch and all classes."""
    rng = np.random.default_rng(7)
    embeddings = torch.from_numpy(rng.normal(size=(BATCH, DIM)))
    centers = torch.from_numpy(rng.normal(size=(CLASSES, DIM)))
    labels = torch.from_numpy(rng.integers(0, CLASSES, BATCH))
    sizes = rng.integers(1, CLASSES + 1, BATCH)
    sizes[3] = 0  # the teacher skipped it
    groups = [rng.permutation(CLASSES)[:size] for size in sizes]
    log_probs = [F.log_softmax(torch.from_numpy(rng.normal(size=size)), 0) - 0.05 for size in sizes]
    chosen = range(BATCH)[part]
    counts = torch.tensor([sizes[row] for row in chosen])
    stand_for = [torch.from_numpy(rng.normal(size=size)) for size in sizes]
    targets = GroupTargets(
        offsets=F.pad(counts.cumsum(0), (1, 0)),
        indices=torch.from_numpy(np.concatenate([groups[row] for row in chosen])),
        log_probs=torch.cat([log_probs[row] for row in chosen]),
        log_secondary=torch.full((len(chosen),), float(np.log(-np.expm1(-0.05)))).double(),
        log_weights=torch.cat([stand_for[row] for row in chosen]) if drawn else None,
    )
    return embeddings[part], centers, labels[part], targets


def evaluate(ranks: Ranks, *, kd: bool, drawn: bool = False) -> tuple[torch.Tensor, ...]:
    """Loss, its parts, and this rank's gradients by embeddings and centres."""
    size = BATCH // ranks.world_size
    embeddings, centers, labels, targets = problem(
        slice(ranks.rank * size, (ranks.rank + 1) * size), drawn=drawn
    )
    rows = ranks.rows(CLASSES)
    embeddings.requires_grad_()
    mine = centers[rows.start : rows.stop].clone().requires_grad_()
    loss = grouped_margin_loss(
        embeddings,
        mine,
        labels,
        targets if kd else None,
        HeadSpec(margin=Margin(m2=0.3, m3=0.1), scale=16.0, ranks=ranks, first_class=rows.start),
    )
    loss.total.backward()
    assert embeddings.grad is not None
    assert mine.grad is not None
    return torch.stack([part.detach() for part in loss.means]), embeddings.grad, mine.grad


def check_sample(ranks: Ranks, labels: torch.Tensor, by_centers: torch.Tensor) -> None:
    """Each rank samples its own part; the gradient of drawn centres is weighted."""
    size, rows = BATCH // ranks.world_size, ranks.rows(CLASSES)
    embeddings, centers, own_labels, _ = problem(slice(ranks.rank * size, (ranks.rank + 1) * size))
    wanted = classes_in_use(own_labels, None, ranks)
    assert torch.equal(wanted, torch.unique(labels))
    sample = sample_classes(wanted, rows, 0.5, seed=(ranks.rank,))
    mine = centers[rows.start : rows.stop]
    learning = mine[sample.rows].clone().requires_grad_()
    loss = grouped_margin_loss(
        embeddings,
        mine,
        own_labels,
        None,
        HeadSpec(margin=Margin(m2=0.3, m3=0.1), scale=16.0, ranks=ranks, first_class=rows.start),
        sampled=SampledCenters(sample, learning),
    )
    loss.total.backward()
    weights = torch.full((len(sample.rows), 1), sample.weight, dtype=torch.float64)
    weights[: sample.certain] = 1.0
    expected = weights * by_centers[rows.start : rows.stop][sample.rows]
    torch.testing.assert_close(learning.grad, expected, rtol=1e-9, atol=1e-12)


def losses_of_steps(ranks: Ranks) -> torch.Tensor:
    """Of SGD on a small network without statistics of its batch, in single precision."""
    torch.manual_seed(3)
    rng = np.random.default_rng(5)
    network = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, DIM))
    model = ranks.parallel(network, allreduce_dtype="float32")
    size, rows = BATCH // ranks.world_size, ranks.rows(CLASSES)
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    _, centers, labels, targets = problem(mine)
    targets = replace(
        targets,
        log_probs=targets.log_probs.float(),
        log_secondary=targets.log_secondary.float(),
    )
    weight = nn.Parameter(centers[rows.start : rows.stop].float())
    optimizer = torch.optim.SGD([*network.parameters(), weight], 0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        inputs = torch.from_numpy(rng.normal(size=(BATCH, INPUTS))).float()[mine]
        loss = grouped_margin_loss(
            model(inputs),
            weight,
            labels,
            targets,
            HeadSpec(margin=Margin(m3=0.2), scale=16.0, ranks=ranks, first_class=rows.start),
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.detach())
    return torch.stack(losses)


def check_allreduce_dtypes(ranks: Ranks) -> None:
    """Gradients rounded on the way are the mean of the ranks' own to that dtype's precision."""
    inputs = torch.from_numpy(np.random.default_rng(9).normal(size=(BATCH, INPUTS))).float()
    size = BATCH // ranks.world_size
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    for dtype in (torch.float16, torch.bfloat16):
        network = nn.Linear(INPUTS, 1, bias=False)
        model = ranks.parallel(network, allreduce_dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
        model(inputs[mine]).sum().backward()
        gradient = network.weight.grad
        assert gradient is not None
        assert torch.equal(gradient, gradient.to(dtype).float())
        exact = inputs.double().sum(0, keepdim=True) / ranks.world_size
        largest = inputs.abs().sum(0).max().item()
        bound = 2 * torch.finfo(dtype).eps * largest
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=bound)


def main() -> None:
    with joined_ranks("cpu") as ranks:
        size = BATCH // ranks.world_size
        rows = ranks.rows(CLASSES)
        for kd, drawn in ((True, False), (True, True), (False, False)):
            values, by_embeddings, by_centers = evaluate(ranks, kd=kd, drawn=drawn)
            alone = evaluate(ALONE, kd=kd, drawn=drawn)
            part = alone[1][ranks.rank * size : (ranks.rank + 1) * size]
            torch.testing.assert_close(values, alone[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                by_embeddings / ranks.world_size, part, rtol=1e-9, atol=1e-12
            )
            torch.testing.assert_close(
                by_centers, alone[2][rows.start : rows.stop], rtol=1e-9, atol=1e-12
            )
        check_allreduce_dtypes(ranks)
        check_sample(ranks, problem()[2], evaluate(ALONE, kd=False)[2])
        ours, alone_losses = losses_of_steps(ranks), losses_of_steps(ALONE)
        assert alone_losses[-5:].mean() < 0.8 * alone_losses[:5].mean()
        torch.testing.assert_close(ours, alone_losses, rtol=1e-5, atol=0)
        if ranks.first:
            print("the same on", ranks.world_size)


if __name__ == "__main__":
    main()
