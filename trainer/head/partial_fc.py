"""A sample of the class layer's centres for each step, as PartialFC (An et al., 2022) takes one.

Every label of the batch and every class of its primary groups takes part for certain. Of the N
other classes n = ceil(rate * N) are drawn, uniformly and without replacement, and each stands for
N/n. Sums over all classes in the gradient, such as that by an embedding x of the loss L,

    dL/dx = sum_j g_j w_j,   g_j = dL/dz_j,   w_j the direction of class j's centre

are estimated by  sum over certain j of g_j w_j + N/n * sum over drawn j of g_j w_j,  and a drawn
centre's own gradient is N/n times what it is. Both are unbiased (Horvitz and Thompson, 1952),
because g_j itself is exact: the softmax's denominator and the tail's mass are still summed over all
classes, which is one of the layer's four matrix products. PartialFC estimates them from the sample
too; but the reciprocal of an unbiased sum is biased, by as much as a few large terms decide it,
and at a scale of 64 they do.

Only the sample's centres have a gradient and change: memory and the other three products shrink
with the rate; weight decay and momentum act on a centre when it is next drawn.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# Beside the streams of the data's order, see gkd.trainer.data.sampler.
_STREAM = 4


@dataclass(frozen=True)
class ClassSample:
    """Some of the centres of a part of the class layer.

    rows     int64 [m]  among all of the part: the certain ones, ascending, then the drawn ones
    certain  how many are certain
    weight   the number of centres that each drawn one stands for
    """

    rows: Tensor
    certain: int
    weight: float

    def locate(self, places: Tensor) -> Tensor:
        """Places int64 [n] among the part's centres to places in the sample.

        They are certain ones, or of another part: those come behind all.
        """
        if not self.certain:
            return torch.full_like(places, len(self.rows))
        known = self.rows[: self.certain]
        found = torch.searchsorted(known, places).clamp_(max=self.certain - 1)
        return torch.where(known[found] == places, found, len(self.rows))


@dataclass(frozen=True)
class SampledCenters:
    """A sample, and its centres [m, D], which learn."""

    sample: ClassSample
    centers: Tensor


def sample_classes(
    wanted: Tensor, classes: range, rate: float, *, seed: tuple[int, ...]
) -> ClassSample:
    """The centres of ``classes``, one part of the layer, that learn in a step.

    wanted  int64 [n]  classes of the batch, of any part of the layer
    rate    share of the other classes that is drawn, above 0
    seed    decides the draw: equal numbers give equal samples on one kind of device
    """
    device = wanted.device
    here = wanted[(wanted >= classes.start) & (wanted < classes.stop)] - classes.start
    is_certain = torch.zeros(len(classes), dtype=torch.bool, device=device)
    is_certain[here] = True
    certain, others = torch.nonzero(is_certain)[:, 0], torch.nonzero(~is_certain)[:, 0]
    count = math.ceil(rate * len(others))
    word = np.random.SeedSequence([*seed, _STREAM]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(word))
    drawn = others[torch.randperm(len(others), generator=generator, device=device)[:count]]
    return ClassSample(
        torch.cat([certain, drawn.sort().values]), len(certain), len(others) / max(count, 1)
    )


@contextmanager
def borrowed(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, rows: Tensor
) -> Iterator[nn.Parameter]:
    """Some rows int64 [m] of the optimizer's last parameter as a parameter in its place.

    With the rows go those of what the optimizer keeps for each; at the end all are put back.
    """
    parameters = optimizer.param_groups[-1]["params"]
    assert parameters[-1] is weight
    kept = optimizer.state.pop(weight, {})
    some = nn.Parameter(weight.detach().index_select(0, rows))

    def of_rows(value: object, like: Tensor) -> bool:
        return isinstance(value, Tensor) and value.shape == like.shape

    parameters[-1] = some
    optimizer.state[some] = {
        name: value.index_select(0, rows) if of_rows(value, weight) else value
        for name, value in kept.items()
    }
    try:
        yield some
    finally:
        weight.detach().index_copy_(0, rows, some.detach())
        for name, value in optimizer.state.pop(some).items():
            if of_rows(value, some):
                whole = kept.get(name)
                whole = torch.zeros_like(weight) if whole is None else whole
                value = whole.index_copy_(0, rows, value)
            kept[name] = value
        if kept:
            optimizer.state[weight] = kept
        parameters[-1] = weight
