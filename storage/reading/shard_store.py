"""Targets read from the cache's shards, a few at a time: no disk and little memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, CacheSpec, View
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.reading.flat_arrays import OFFSETS, array_shapes, read_shards


@dataclass(frozen=True, eq=False)
class Block:
    """A few shards of a cache in memory, with the lookup of a ``TargetStore``.

    first  int64 [views, K], first row of each loaded shard in ``targets``, -1 for the others
    """

    spec: CacheSpec
    targets: SparseTargets
    first: npt.NDArray[np.int64]

    def lookup(self, rows: npt.NDArray[np.int64], flipped: npt.NDArray[np.bool_]) -> SparseTargets:
        """Targets of samples ``rows`` [B], of the flipped view if ``flipped`` [B], else original.

        Raises:
            IndexError: if a row is of another shard, or of a view that the cache does not have.
        """
        shards, samples = np.divmod(np.asarray(rows, np.int64), self.spec.shard_samples)
        first = self.first[np.asarray(flipped, np.intp), shards]
        if len(first) and first.min() < 0:
            raise IndexError(f"row {rows[first.argmin()]} is in no shard of this block")
        return self.targets.take(first + samples)


class ShardStore:
    """A cache's targets for readers that follow the order of shards, loaded block by block."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.spec = cache.spec
        self.cache_id = cache.id
        self.views: tuple[View, ...] = cache.spec.views

    def load(self, shards: Sequence[int]) -> Block:
        """Read all views of shards, verified against their hashes.

        Raises:
            CorruptShardError: if the cache is damaged.
        """
        shapes = array_shapes(self.cache, shards, self.views)
        arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in shapes.items()}
        for _ in read_shards(self.cache, shards, self.views, arrays, workers=1):
            pass
        counts = [len(self.spec.shard_rows(shard)) for shard in shards] * len(self.views)
        starts = (np.cumsum(counts) - counts).reshape(len(self.views), -1)
        first = np.full((len(VIEWS), self.spec.num_shards), -1)
        first[np.ix_([VIEWS.index(view) for view in self.views], shards)] = starts
        return Block(self.spec, SparseTargets.from_arrays(arrays.pop(OFFSETS), arrays), first)

    def size_counts(self, view: View) -> npt.NDArray[np.int64]:
        """Number of samples of a view with each group size, int64 [max_group + 1].

        Raises:
            CorruptShardError: if the cache is damaged.
        """
        counts = np.zeros(self.spec.max_group + 1, np.int64)
        for shard in range(self.spec.num_shards):
            counts += np.bincount(self.cache.read_sizes(shard, view), minlength=len(counts))
        return counts
