"""Refinement of class centres by a margin head over frozen embeddings, and the fit of centres.

    z = scale * (cos - margin * [class = label]),   loss = mean of -log softmax(z) at the label

Centres keep length 1: a step follows the gradient of a batch's summed loss divided by ``scale``,
which is sum_i (p_ij - [j = y_i]) x_i, within the tangent space of the sphere, and the result is
normalised. Logits are computed twice, for a chunk of classes at a time, and never kept for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.pipeline.centers.files import RefineSpec
from gkd.storage.util.progress import progress

CHUNK_LOGITS = 1 << 24
BLOCK = 8192  # classes whose cosines are computed at once
SCALE, MARGIN = 64.0, 0.4
LEARNING_RATE = 0.1
BATCH_SIZE = 256

# Embeddings float32 [n, D] of any length, and labels int64 [n].
Labelled = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Fit:
    """How well centres fit embeddings.

    accuracy  share of the embeddings whose own centre is the nearest
    own       mean cosine to the own centre
    nearest   mean cosine to the nearest other centre
    loss      mean cross-entropy with the margin
    """

    accuracy: float
    own: float
    nearest: float
    loss: float


def refine_settings(epochs: int, seed: int = 0) -> RefineSpec:
    """Settings of a refinement with CosFace's scale and margin."""
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
    """Refined centres [C, D] of length 1; ``centers`` have length 1 and are not changed.

    Each epoch shuffles the parts, and the embeddings within each; the learning rate decreases
    linearly to 0. ``images`` is the number of embeddings in all parts. On one machine and with one
    number of threads the result depends on the seed alone, to the bit.
    """
    weight = torch.from_numpy(centers).to(device, copy=True)
    total, done = settings.epochs * images, 0
    with progress("refine centres", total, "embeddings") as advance:
        for epoch in range(settings.epochs):
            rng = np.random.default_rng([settings.seed, epoch])
            for part in rng.permutation(num_parts).tolist():
                embeddings, labels = load(part)
                order = rng.permutation(len(labels))
                for start in range(0, len(order), settings.batch_size):
                    rows = order[start : start + settings.batch_size]
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
    """How well centres [C, D] of length 1 fit embeddings [n, D] of classes ``labels`` [n]."""
    weight = torch.from_numpy(centers).to(device)
    sums = np.zeros(4)
    for start in range(0, len(labels), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        unit = F.normalize(torch.from_numpy(embeddings[batch]).to(device))
        own_class = torch.from_numpy(labels[batch]).to(device)
        own, nearest = own_and_nearest(unit, own_class, weight)
        loss = _log_sums(unit, own_class, weight, SCALE, MARGIN) - SCALE * (own - MARGIN)
        columns = ((own > nearest).float(), own, nearest, loss)
        sums += [float(values.double().sum()) for values in columns]
    return Fit(*(sums / max(1, len(labels))).tolist())


def own_and_nearest(unit: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of embeddings to the centre of their class and to the nearest other, each [n].

    ``unit`` float32 [n, D] and ``centers`` [C, D] are normalised, ``labels`` int64 [n]; if there is
    no other class the second cosine is -1.
    """
    own = (unit * centers[labels]).sum(1)
    nearest = torch.full_like(own, -1.0)
    for start in range(0, len(centers), BLOCK):
        cosines = unit @ centers[start : start + BLOCK].float().T
        cosines[_label_entries(labels, start, cosines.shape[1])] = -1.0
        nearest = torch.maximum(nearest, cosines.amax(1))
    return own, nearest


def _step(
    unit: Tensor, labels: Tensor, weight: Tensor, settings: RefineSpec, learning_rate: float
) -> None:
    """Move the centres ``weight`` [C, D], in place, for a batch of unit embeddings [B, D]."""
    scale, margin = settings.scale, settings.margin
    log_sums = _log_sums(unit, labels, weight, scale, margin)
    for start, logits in _logits(unit, labels, weight, scale, margin):
        error = (logits - log_sums[:, None]).exp_()
        error[_label_entries(labels, start, error.shape[1])] -= 1
        part = weight[start : start + error.shape[1]]
        gradient = error.T @ unit
        gradient -= (gradient * part).sum(1, keepdim=True) * part
        part.copy_(F.normalize(part - learning_rate * gradient))


def _log_sums(unit: Tensor, labels: Tensor, weight: Tensor, scale: float, margin: float) -> Tensor:
    chunks = _logits(unit, labels, weight, scale, margin)
    return torch.stack([logits.logsumexp(1) for _, logits in chunks]).logsumexp(0)


def _logits(
    unit: Tensor, labels: Tensor, weight: Tensor, scale: float, margin: float
) -> Iterator[tuple[int, Tensor]]:
    """The first class and the logits [B, n] of each chunk of classes."""
    chunk = max(1, CHUNK_LOGITS // len(unit))
    for start in range(0, len(weight), chunk):
        logits = scale * (unit @ weight[start : start + chunk].T)
        logits[_label_entries(labels, start, logits.shape[1])] -= scale * margin
        yield start, logits


def _label_entries(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the labels in a chunk of ``count`` classes from ``start`` on."""
    (rows,) = torch.nonzero((labels >= start) & (labels < start + count), as_tuple=True)
    return rows, labels[rows] - start
