"""A batch of all ranks, on each of them: what a class layer in parts works on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd.trainer.distributed import Ranks
from gkd.trainer.head.targets import GroupTargets


def gather_embeddings(part: Tensor, ranks: Ranks) -> Tensor:
    """The ranks' embeddings [b, D], each of the same number of samples, as one [B, D].

    The gradient of a rank's part is its part of the whole batch's, which every rank has in full,
    times the number of ranks.
    """
    if ranks.world_size == 1:
        return part
    whole: Tensor = _Gather.apply(part, ranks)  # type: ignore[no-untyped-call]
    return whole


def gather_targets(targets: GroupTargets, ranks: Ranks) -> GroupTargets:
    """The ranks' targets, each of the same number of samples, as one."""
    if ranks.world_size == 1:
        return targets
    sizes = ranks.gather(torch.diff(targets.offsets))
    counts = sizes.view(ranks.world_size, -1).sum(1).tolist()
    offsets = F.pad(sizes.cumsum(0), (1, 0))
    return GroupTargets(
        offsets=offsets,
        indices=_gather_varied(targets.indices, counts, ranks),
        log_probs=_gather_varied(targets.log_probs, counts, ranks),
        log_secondary=ranks.gather(targets.log_secondary),
        log_weights=(
            None
            if targets.log_weights is None
            else _gather_varied(targets.log_weights, counts, ranks)
        ),
    )


def classes_in_use(labels: Tensor, targets: GroupTargets | None, ranks: Ranks) -> Tensor:
    """Labels, and classes of the groups, of the whole batch: int64 [n], each once, ascending."""
    own = labels if targets is None else torch.cat([labels, targets.indices])
    if ranks.world_size > 1:
        own = torch.unique(own)
        counts = ranks.gather(torch.tensor([len(own)], device=own.device)).tolist()
        own = _gather_varied(own, counts, ranks)
    every: Tensor = torch.unique(own)
    return every


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.size = ranks, len(part)
        return ranks.gather(part)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.size
        return grads[0][start : start + ctx.size] * ctx.ranks.world_size, None


def _gather_varied(part: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
    """The ranks' vectors of ``counts`` elements, one after the other."""
    longest = max(counts)
    padded = ranks.gather(F.pad(part, (0, longest - len(part)))).view(len(counts), longest)
    return torch.cat([row[:count] for row, count in zip(padded, counts, strict=True)])
