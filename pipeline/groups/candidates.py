"""Candidates for a group as sortable keys."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
LOW_BITS = 0xFFFFFFFF
VOID_KEY = (-2139095041 << 32) | LOW_BITS  # no key of a logit above -inf is as small


def make_keys(logits: Tensor, classes: Tensor) -> Tensor:
    """One int64 for (logit, class): larger for a larger logit, or at a tie for a lower class."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one logit
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (LOW_BITS - classes)


def key_logits(keys: Tensor) -> Tensor:
    """Logits of keys, float32."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def key_classes(keys: Tensor) -> Tensor:
    """Classes of keys, int64; of a void one anything."""
    return LOW_BITS - (keys & LOW_BITS)


@dataclass(frozen=True)
class Taken:
    """Some entries [n] of a chunk and their logits; in the chunk -inf stands in their place."""

    rows: Tensor
    columns: Tensor
    logits: Tensor

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(
            torch.cat([self.rows, other.rows]),
            torch.cat([self.columns, other.columns]),
            torch.cat([self.logits, other.logits]),
        )


class Candidates:
    """Keys of each row's candidates so far, in any order, filled up with void ones."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._held = torch.zeros(batch, dtype=torch.int64, device=device)
        self._keys = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.width = 0

    @property
    def keys(self) -> Tensor:
        """int64 [B, width]."""
        return self._keys[:, : self.width]

    def take(self, chunk: Tensor, start: int, floor: Tensor) -> Taken:
        """Take the logits at or above the floor [B] out of the chunk."""
        rows, columns = _places(chunk >= floor[:, None])
        values = chunk[rows, columns]
        chunk[rows, columns] = -math.inf
        counts = torch.bincount(rows, minlength=len(chunk))
        first = counts.cumsum(0) - counts
        places = torch.arange(len(rows), device=rows.device) + (self._held - first)[rows]
        self._held += counts
        self.width = int(self._held.max())
        if self.width > self._keys.shape[1]:
            room = self._keys.new_full((len(chunk), 2 * self.width), VOID_KEY)
            room[:, : self._keys.shape[1]] = self._keys
            self._keys = room
        self._keys[rows, places] = make_keys(values, columns + start)
        return Taken(rows, columns, values)

    def keep_largest(self, count: int) -> tuple[Tensor, Tensor]:
        """Keep the ``count`` largest of each row: the last one's logit [B], the keys dropped."""
        ordered = self.keys.sort(1, descending=True).values
        self._keys = ordered[:, :count].contiguous()
        self._held.clamp_(max=count)
        self.width = count
        return key_logits(ordered[:, count - 1]), ordered[:, count:]


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is true in a mask [B, n], row by row."""
    if mask.shape[1] % 8:
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    # Few are true: looking at eight at once is several times faster.
    rows, words = mask.view(torch.int64).nonzero(as_tuple=True)
    hits, bits = mask.view(len(mask), -1, 8)[rows, words].nonzero(as_tuple=True)
    return rows[hits], words[hits] * 8 + bits
