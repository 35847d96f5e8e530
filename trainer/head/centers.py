"""The class layer's parameter: one centre for each class, or this process's part of them."""

import torch
from torch import Tensor, nn

# Number of centres drawn at once.
INIT_ROWS = 1 << 16


class ClassCenters(nn.Module):
    """``weight`` float32 [len(rows), embedding_dim], un-normalised centres of the classes ``rows``.

    Without ``rows`` they are the centres of all classes. They are drawn from N(0, 0.01^2) for all
    classes, so that processes with a part each begin with the same centres as one with all.
    """

    def __init__(self, num_classes: int, embedding_dim: int, *, rows: range | None = None) -> None:
        super().__init__()
        self.rows = range(num_classes) if rows is None else rows
        self.weight = nn.Parameter(_initial_centers(num_classes, embedding_dim, self.rows))


def _initial_centers(num_classes: int, embedding_dim: int, rows: range) -> Tensor:
    centers = torch.empty(len(rows), embedding_dim)
    for start in range(0, num_classes, INIT_ROWS):
        block = torch.empty(min(INIT_ROWS, num_classes - start), embedding_dim).normal_(std=0.01)
        first, last = max(start, rows.start), min(start + len(block), rows.stop)
        if first < last:
            centers[first - rows.start : last - rows.start] = block[first - start : last - start]
    return centers
