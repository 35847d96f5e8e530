"""The loss of a batch by torchrun's ranks, against that of one process; run by test_ranks."""

import numpy as np
import torch
import torch.nn.functional as F

from gkd.trainer.fused import grouped_margin_loss
from gkd.trainer.heads import Margin
from gkd.trainer.losses import GroupTargets
from gkd.trainer.ranks import ALONE, Ranks, joined_ranks

BATCH, CLASSES, DIM = 12, 29, 8


def problem(
    part: slice = slice(None),
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
    targets = GroupTargets(
        offsets=F.pad(counts.cumsum(0), (1, 0)),
        rows=torch.repeat_interleave(counts),
        indices=torch.from_numpy(np.concatenate([groups[row] for row in chosen])),
        log_probs=torch.cat([log_probs[row] for row in chosen]),
        log_secondary=torch.full((len(chosen),), float(np.log(-np.expm1(-0.05)))).double(),
    )
    return embeddings[part], centers, labels[part], targets


def evaluate(ranks: Ranks, *, kd: bool) -> tuple[torch.Tensor, ...]:
    """Loss, its parts, and this rank's gradients by embeddings and centres."""
    size = BATCH // ranks.world_size
    embeddings, centers, labels, targets = problem(
        slice(ranks.rank * size, (ranks.rank + 1) * size)
    )
    rows = ranks.rows(CLASSES)
    embeddings.requires_grad_()
    mine = centers[rows.start : rows.stop].clone().requires_grad_()
    loss = grouped_margin_loss(
        embeddings,
        mine,
        labels,
        targets if kd else None,
        margin=Margin(m2=0.3, m3=0.1),
        scale=16.0,
        ranks=ranks,
        first_class=rows.start,
    )
    loss.total.backward()
    assert embeddings.grad is not None
    assert mine.grad is not None
    return torch.stack([part.detach() for part in loss]), embeddings.grad, mine.grad


def main() -> None:
    with joined_ranks("cpu") as ranks:
        size = BATCH // ranks.world_size
        rows = ranks.rows(CLASSES)
        for kd in (True, False):
            values, by_embeddings, by_centers = evaluate(ranks, kd=kd)
            alone = evaluate(ALONE, kd=kd)
            part = alone[1][ranks.rank * size : (ranks.rank + 1) * size]
            torch.testing.assert_close(values, alone[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                by_embeddings / ranks.world_size, part, rtol=1e-9, atol=1e-12
            )
            torch.testing.assert_close(
                by_centers, alone[2][rows.start : rows.stop], rtol=1e-9, atol=1e-12
            )
        if ranks.first:
            print("the same on", ranks.world_size)


if __name__ == "__main__":
    main()
