"""Reads shards of a cache into flat arrays, on disk or in memory, that hold all their samples."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import View
from gkd.storage.util.parallel import ordered_map

OFFSETS = "offsets"
Shape = tuple[np.dtype[Any], tuple[int, ...]]


def array_shapes(cache: Cache, shards: Sequence[int], views: Sequence[View]) -> dict[str, Shape]:
    """Type and shape of each array that holds some shards of some views, and of their offsets."""
    assert cache.manifest is not None
    rows = len(views) * sum(len(cache.spec.shard_rows(shard)) for shard in shards)
    entries = sum(cache.manifest.shards[shard].entries[view] for shard in shards for view in views)
    shapes: dict[str, Shape] = {OFFSETS: (np.dtype(np.int64), (rows + 1,))}
    for name, array in layout.arrays(cache.spec, views[0]).items():
        if name != "sizes":
            shapes[name] = array.dtype, (entries,) if array.packed else (rows, *array.shape[2:])
    return shapes


def read_shards(
    cache: Cache,
    shards: Sequence[int],
    views: Sequence[View],
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    workers: int,
) -> Iterator[None]:
    """Fill ``arrays``, of the shapes of ``array_shapes``; yields after each shard of each view.

    The samples of a view follow each other in the order of ``shards``, view after view. All files
    are verified against their hashes.

    Raises:
        CorruptShardError: if the cache is damaged.
    """
    assert cache.manifest is not None
    parts = list(itertools.product(views, shards))
    rows = [0, *itertools.accumulate(len(cache.spec.shard_rows(shard)) for _, shard in parts)]
    sizes = (cache.manifest.shards[shard].entries[view] for view, shard in parts)
    entries = [0, *itertools.accumulate(sizes)]
    packed = {n for n, a in layout.arrays(cache.spec, views[0]).items() if a.packed}
    arrays[OFFSETS][0] = 0

    def copy(part: int) -> None:
        view, shard = parts[part]
        targets = cache.read_verified(shard, view)
        rows_here = slice(rows[part], rows[part + 1])
        entries_here = slice(entries[part], entries[part + 1])
        arrays[OFFSETS][rows[part] + 1 : rows[part + 1] + 1] = targets.offsets[1:] + entries[part]
        for name, values in targets.arrays().items():
            arrays[name][entries_here if name in packed else rows_here] = values

    yield from ordered_map(copy, range(len(parts)), workers=workers)
