"""Class centres trained on by a margin head over frozen embeddings, and how well centres fit them.

    z = scale * (cos - margin * [class = label]),   loss = mean of -log softmax(z) at the label

Centres stay of length one: a step goes along the sphere, against the gradient of a batch's sum
over ``scale``, which is sum_i (p_ij - [j = y_i]) x_i, and is normalised. Logits are made for some
classes at a time, twice, and never held for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.pipeline.centers.files import RefineSpec
from gkd.pipeline.centers.load import own_and_nearest
from gkd.storage.util.progress import progress

CHUNK_LOGITS = 1 << 24
SCALE, MARGIN = 64.0, 0.4
LEARNING_RATE = 0.1
BATCH_SIZE = 256

# Embeddings float32 [n, D] of any length, and labels int64 [n].
Labelled = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Fit:
    """How centres fit embeddings.

    accuracy  share whose own centre is the nearest
    own       mean cosine to the own centre
    nearest   mean cosine to the nearest other
    loss      mean cross-entropy with the margin
    """

    accuracy: float
    own: float
    nearest: float
    loss: float


def refine_settings(epochs: int, seed: int = 0) -> RefineSpec:
    """What decides a refinement; CosFace's scale and margin."""
    return RefineSpec(epochs, seed, SCALE, MARGIN, LEARNING_RATE, BATCH_SIZE)


def refine(
    centers: npt.NDArray[np.float32],
    num_parts: int,
    load: Callable[[int], Labelled],
    settings: RefineSpec,
    *,
    images: int,
    device: str = "cpu",
) -> npt.NDArray[np.float32]:
    """Refined centres [C, D] of length one; ``centers`` are of length one and stay as they are.

    Each epoch takes the parts in another order, and the embeddings of each in another order; the
    learning rate falls in a straight line to 0. ``images`` are the embeddings of all parts. On one
    machine with one number of threads, a seed gives the same bits every time.
    """
    weight = torch.from_numpy(centers).to(device, copy=True)
    total, done = settings.epochs * images, 0
    with progress("refine centres", total, "embeddings") as advance:
        for epoch in range(settings.epochs):
            rng = np.random.default_rng([settings.seed, epoch])
            for part in rng.permutation(num_parts).tolist():
                embeddings, labels = load(part)
                order = rng.permutation(len(labels))
                for at in range(0, len(order), settings.batch_size):
                    rows = order[at : at + settings.batch_size]
                    unit = F.normalize(torch.from_numpy(embeddings[rows]).to(device))
                    rate = settings.learning_rate * (1 - done / total)
                    _step(unit, torch.from_numpy(labels[rows]).to(device), weight, settings, rate)
                    done += len(rows)
                    advance(len(rows))
    return weight.cpu().numpy()


def measure(
    centers: npt.NDArray[np.float32],
    embeddings: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    *,
    device: str = "cpu",
) -> Fit:
    """How centres [C, D] of length one fit embeddings [n, D] of classes ``labels`` [n]."""
    weight = torch.from_numpy(centers).to(device)
    sums = np.zeros(4)
    for at in range(0, len(labels), BATCH_SIZE):
        unit = F.normalize(torch.from_numpy(embeddings[at : at + BATCH_SIZE]).to(device))
        own_class = torch.from_numpy(labels[at : at + BATCH_SIZE]).to(device)
        own, nearest = own_and_nearest(unit, own_class, weight)
        loss = _log_sums(unit, own_class, weight, SCALE, MARGIN) - SCALE * (own - MARGIN)
        each = ((own > nearest).float(), own, nearest, loss)
        sums += [float(values.double().sum()) for values in each]
    return Fit(*(sums / max(1, len(labels))).tolist())


def _step(
    unit: Tensor, labels: Tensor, weight: Tensor, settings: RefineSpec, learning_rate: float
) -> None:
    """Move the centres ``weight`` [C, D], in place, for a batch of unit embeddings [B, D]."""
    scale, margin = settings.scale, settings.margin
    log_sums = _log_sums(unit, labels, weight, scale, margin)
    for start, logits in _logits(unit, labels, weight, scale, margin):
        error = (logits - log_sums[:, None]).exp_()
        rows, places = _own(labels, start, error.shape[1])
        error[rows, places] -= 1
        part = weight[start : start + error.shape[1]]
        gradient = error.T @ unit
        gradient -= (gradient * part).sum(1, keepdim=True) * part
        part.copy_(F.normalize(part - learning_rate * gradient))


def _log_sums(unit: Tensor, labels: Tensor, weight: Tensor, scale: float, margin: float) -> Tensor:
    sums = [z.logsumexp(1) for _, z in _logits(unit, labels, weight, scale, margin)]
    return torch.stack(sums).logsumexp(0)


def _logits(
    unit: Tensor, labels: Tensor, weight: Tensor, scale: float, margin: float
) -> Iterator[tuple[int, Tensor]]:
    """Logits [B, n] of some classes at a time, and the first of these classes."""
    chunk = max(1, CHUNK_LOGITS // len(unit))
    for start in range(0, len(weight), chunk):
        logits = scale * (unit @ weight[start : start + chunk].T)
        rows, places = _own(labels, start, logits.shape[1])
        logits[rows, places] -= scale * margin
        yield start, logits


def _own(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows whose label is among ``count`` classes from ``start`` on, and its place there."""
    (rows,) = torch.nonzero((labels >= start) & (labels < start + count), as_tuple=True)
    return rows, labels[rows] - start
