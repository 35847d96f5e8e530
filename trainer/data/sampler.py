"""Which images make which batch: an order made from a seed, in full or in blocks of shards."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from gkd.storage.cache.targets import SparseTargets

# Streams of random numbers drawn from one seed.
_ORDER, _FLIPS, _SHARDS = 0, 1, 2


@dataclass(frozen=True)
class BatchIndices:
    """One batch before it is made.

    rows     int64 [B], of the records
    flipped  bool [B], which of them to mirror
    blocks   int64 [B], ascending: number in the whole training of each row's block; None without
    targets  what was looked up already, in the class numbers of the cache
    """

    rows: npt.NDArray[np.int64]
    flipped: npt.NDArray[np.bool_]
    blocks: npt.NDArray[np.int64] | None = None
    targets: SparseTargets | None = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Shards of the cache in which the images' targets stand, int64 [N]; ``size`` make a block."""

    shards: npt.NDArray[np.int64]
    size: int

    @functools.cached_property
    def occurring(self) -> npt.NDArray[np.int64]:
        """Shards that any of the images is in, ascending."""
        return np.flatnonzero(np.bincount(self.shards))

    def composition(self, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The shards of each block of an epoch; the last block may have fewer."""
        shuffled = rng.permutation(self.occurring)
        return [shuffled[at : at + self.size] for at in range(0, len(shuffled), self.size)]


@dataclass(frozen=True)
class BatchSampler(Sampler[BatchIndices]):
    """The batches of a training from step ``start`` to its end, one epoch after the other.

    Each epoch is a new permutation of all ``num_images``, less an incomplete last batch; with
    ``blocks`` one that goes through block after block. Of each batch of ``batch_size`` a rank makes
    every ``world_size``-th image.
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
        """Batches of the whole training."""
        return self.steps_per_epoch * self.epochs

    def starting_at(self, step: int) -> "BatchSampler":
        """The same training from another step on."""
        return replace(self, start=step)

    def __len__(self) -> int:
        return self.total_steps - self.start

    def __iter__(self) -> Iterator[BatchIndices]:
        step = self.start
        while step < self.total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = self._rng(epoch, _ORDER).permutation(self.num_images)
            blocks = self._blocks(epoch)
            if blocks is not None:
                order = order[np.argsort(blocks[order], kind="stable")]
            flipped = np.zeros(self.num_images, bool)
            if self.flip:
                flipped = self._rng(epoch, _FLIPS).random(self.num_images) < 0.5
            for place in range(first, self.steps_per_epoch):
                rows = order[place * self.batch_size : (place + 1) * self.batch_size]
                rows = rows[self.rank :: self.world_size]
                yield BatchIndices(rows, flipped[rows], None if blocks is None else blocks[rows])
            step = (epoch + 1) * self.steps_per_epoch

    def block_shards(self, number: int) -> list[int] | None:
        """The shards of a block by its number in the whole training; None after the last."""
        assert self.blocks is not None
        epoch, place = divmod(number, self._blocks_per_epoch())
        if epoch >= self.epochs:
            return None
        shards: list[int] = self.blocks.composition(self._rng(epoch, _SHARDS))[place].tolist()
        return shards

    def _blocks_per_epoch(self) -> int:
        assert self.blocks is not None
        return -(-len(self.blocks.occurring) // self.blocks.size)

    def _blocks(self, epoch: int) -> npt.NDArray[np.int64] | None:
        """Number of each image's block in the whole training, int64 [N]."""
        if self.blocks is None:
            return None
        composition = self.blocks.composition(self._rng(epoch, _SHARDS))
        numbers = np.zeros(int(self.blocks.shards.max()) + 1, np.int64)
        for place, shards in enumerate(composition):
            numbers[shards] = epoch * len(composition) + place
        return numbers[self.blocks.shards]

    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        # Numpy's seeds are blind to trailing zeros: the last word is never 0.
        return np.random.default_rng([self.seed, epoch, stream + 1])
