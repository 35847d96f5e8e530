"""Which images make which batch: an order drawn from a seed, over all images or block by block."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from gkd.storage.cache.targets import SparseTargets

# Independent streams of random numbers from one seed.
_ORDER, _FLIPS, _SHARDS = 0, 1, 2


@dataclass(frozen=True)
class BatchIndices:
    """What a batch is made of.

    rows     int64 [B], of the records
    flipped  bool [B], which of them to mirror
    blocks   int64 [B], ascending: each row's block, numbered over the training; None without
    targets  looked up already, in the class numbers of the cache; None otherwise
    """

    rows: npt.NDArray[np.int64]
    flipped: npt.NDArray[np.bool_]
    blocks: npt.NDArray[np.int64] | None = None
    targets: SparseTargets | None = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """The cache's shard that holds each image's targets, int64 [N]; ``size`` shards are a block."""

    shards: npt.NDArray[np.int64]
    size: int

    @functools.cached_property
    def used(self) -> npt.NDArray[np.int64]:
        """Shards of at least one image, ascending."""
        return np.flatnonzero(np.bincount(self.shards))

    @property
    def per_epoch(self) -> int:
        """Number of blocks of an epoch."""
        return -(-len(self.used) // self.size)

    def compose(self, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The shards of each block of an epoch; the last block may have fewer."""
        shuffled = rng.permutation(self.used)
        return [shuffled[start : start + self.size] for start in range(0, len(shuffled), self.size)]


@dataclass(frozen=True)
class BatchSampler(Sampler[BatchIndices]):
    """The batches of a training from step ``start`` to its end, epoch after epoch.

    Each epoch is a new permutation of all ``num_images``, without its incomplete last batch; with
    ``blocks`` one that visits block after block. A rank gets every ``world_size``-th image of each
    batch of ``batch_size``.
    """

    num_images: int
    batch_size: int
    epochs: int
    seed: int
    flip: bool
    start: int = 0
    blocks: Blocks | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.num_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Batches of the training."""
        return self.steps_per_epoch * self.epochs

    def starting_at(self, step: int) -> "BatchSampler":
        """The same training from another step on."""
        return replace(self, start=step)

    def __len__(self) -> int:
        return self.total_steps - self.start

    def __iter__(self) -> Iterator[BatchIndices]:
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = self._rng(epoch, _ORDER).permutation(self.num_images)
            blocks = None
            if self.blocks is not None:
                blocks = self._number_blocks(self.blocks, epoch)
                order = order[np.argsort(blocks[order], kind="stable")]
            flipped = np.zeros(self.num_images, bool)
            if self.flip:
                flipped = self._rng(epoch, _FLIPS).random(self.num_images) < 0.5
            first = max(self.start - epoch * self.steps_per_epoch, 0)
            for index in range(first, self.steps_per_epoch):
                rows = order[index * self.batch_size : (index + 1) * self.batch_size]
                rows = rows[self.rank :: self.world_size]
                yield BatchIndices(rows, flipped[rows], None if blocks is None else blocks[rows])

    def block_shards(self, number: int) -> list[int] | None:
        """The shards of a block, numbered over the training; None after the last."""
        assert self.blocks is not None
        epoch, index = divmod(number, self.blocks.per_epoch)
        if epoch >= self.epochs:
            return None
        shards: list[int] = self.blocks.compose(self._rng(epoch, _SHARDS))[index].tolist()
        return shards

    def _number_blocks(self, blocks: Blocks, epoch: int) -> npt.NDArray[np.int64]:
        """The block of each image in an epoch, numbered over the training, int64 [N]."""
        numbers = np.zeros(int(blocks.shards.max()) + 1, np.int64)
        for index, shards in enumerate(blocks.compose(self._rng(epoch, _SHARDS))):
            numbers[shards] = epoch * blocks.per_epoch + index
        return numbers[blocks.shards]

    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        # numpy's seeds ignore trailing zeros: the last word is never 0.
        return np.random.default_rng([self.seed, epoch, stream + 1])
