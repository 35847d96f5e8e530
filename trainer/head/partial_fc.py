"""A sample of the class layer's centres for each step, as in PartialFC (An et al., 2022).

Every label of the batch and every class of its targets is included with certainty. Of the N
other classes n = ceil(rate * N) are drawn, uniformly and without replacement, and each counts
N/n times. Sums over all classes in the gradient, such as that by an embedding x of the loss L,

    dL/dx = sum_j g_j w_j,   g_j = dL/dz_j,   w_j the direction of class j's centre

are estimated by  sum over certain j of g_j w_j + N/n * sum over drawn j of g_j w_j,  and a drawn
centre's own gradient is multiplied by N/n. Both are unbiased (Horvitz and Thompson, 1952),
because g_j itself is exact: the softmax's denominator and the tail's mass are still summed over all
classes, which is one of the layer's four matrix products. PartialFC estimates them from the sample
too; but the reciprocal of an unbiased sum is biased, the more a few large terms dominate it,
and at a scale of 64 they do.

Only the sample's centres have a gradient and change: memory and the other three products shrink
with the rate; weight decay and momentum act on a centre only in the steps that it is included in.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# Distinct from the random streams of gkd.trainer.data.sampler.
_STREAM = 4


@dataclass(frozen=True)
class ClassSample:
    """A subset of one process's centres.

    rows     int64 [m]  positions among the centres: the certain ones, ascending, then the drawn
    certain  number of certain ones
    weight   the number of centres that each drawn one represents, N/n
    """

    rows: Tensor
    certain: int
    weight: float

    def locate(self, positions: Tensor) -> Tensor:
        """Positions int64 [n] among the centres to positions in the sample.

        Each is a certain one's, or outside the process's centres: then the result is m.
        """
        if not self.certain:
            return torch.full_like(positions, len(self.rows))
        known = self.rows[: self.certain]
        found = torch.searchsorted(known, positions).clamp_(max=self.certain - 1)
        return torch.where(known[found] == positions, found, len(self.rows))


@dataclass(frozen=True)
class SampledCenters:
    """A sample, and its centres [m, D], which are trained."""

    sample: ClassSample
    centers: Tensor


def sample_classes(
    wanted: Tensor, classes: range, rate: float, *, seed: tuple[int, ...]
) -> ClassSample:
    """Draw the centres of ``classes``, one process's part of the layer, that a step trains.

    wanted  int64 [n]  classes of the batch, of any part of the layer
    rate    share of the other classes to draw, above 0
    seed    determines the sample, on one kind of device
    """
    device = wanted.device
    own = wanted[(wanted >= classes.start) & (wanted < classes.stop)] - classes.start
    is_certain = torch.zeros(len(classes), dtype=torch.bool, device=device)
    is_certain[own] = True
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
    """Replace ``weight``, alone in the optimizer's last group, by its rows int64 [m] for a while.

    The optimizer's per-row state follows. At the end rows and state are written back.
    """
    parameters = optimizer.param_groups[-1]["params"]
    assert [id(parameter) for parameter in parameters] == [id(weight)]
    state = optimizer.state.pop(weight, {})
    subset = nn.Parameter(weight.detach().index_select(0, rows))

    def is_per_row(value: object, like: Tensor) -> bool:
        return isinstance(value, Tensor) and value.shape == like.shape

    parameters[0] = subset
    optimizer.state[subset] = {
        name: value.index_select(0, rows) if is_per_row(value, weight) else value
        for name, value in state.items()
    }
    try:
        yield subset
    finally:
        weight.detach().index_copy_(0, rows, subset.detach())
        for name, value in optimizer.state.pop(subset).items():
            if is_per_row(value, subset):
                full = state.get(name)
                full = torch.zeros_like(weight) if full is None else full
                value = full.index_copy_(0, rows, value)
            state[name] = value
        if state:
            optimizer.state[weight] = state
        parameters[0] = weight
