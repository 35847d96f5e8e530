"""Targets of many samples in flat arrays, on disk or in memory: filling them and looking up."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.targets import SparseTargets, offsets_from_sizes
from gkd.storage.util.parallel import ordered_map

# Above this mean group size copying slices beats one gather of all entries (measured).
_SLICE_ENTRIES = 256
_PACKED = ("indices", "log2_probs")
_OPTIONAL = ("draws", "draw_log2_probs", "draw_secondary")
Shape = tuple[np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True)
class TargetArrays:
    """Targets of n samples, E entries in all.

    offsets    int64   [n + 1]
    indices    uint32  [E]
    log2_probs uint16  [E]
    secondary  float32 [n, t]
    draws, draw_log2_probs  [n, d] where the spec has draws
    draw_secondary  [n] where they are of the primary group
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.uint32]
    log2_probs: npt.NDArray[np.uint16]
    secondary: npt.NDArray[np.float32]
    draws: npt.NDArray[np.uint32] | None = None
    draw_log2_probs: npt.NDArray[np.uint16] | None = None
    draw_secondary: npt.NDArray[np.float32] | None = None

    @classmethod
    def named(cls, spec: CacheSpec, array: Callable[[str], npt.NDArray[Any]]) -> Self:
        """The arrays that a spec has, each as ``array`` gives it for its name."""
        return cls(**{name: array(name) for name in array_names(spec)})

    def take(self, places: npt.NDArray[np.int64]) -> SparseTargets:
        """Targets of the samples at ``places`` [B], which must be inside."""
        starts = _take(self.offsets, places)
        sizes = _take(self.offsets, places + 1) - starts
        offsets = offsets_from_sizes(sizes)
        return SparseTargets(
            offsets,
            *self._entries(starts, sizes, offsets),
            _take(self.secondary, places),
            *optional_arrays(self, lambda values: _take(values, places)),
        )

    def _entries(
        self,
        starts: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
        if offsets[-1] > len(starts) * _SLICE_ENTRIES:
            spans = zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
            slices = [slice(*span) for span in spans]
            return (
                np.concatenate([self.indices[s] for s in slices]),
                np.concatenate([self.log2_probs[s] for s in slices]),
            )
        places = (starts - offsets[:-1]).repeat(sizes)
        places += np.arange(offsets[-1])
        return _take(self.indices, places), _take(self.log2_probs, places)


def optional_arrays(
    targets: "TargetArrays | SparseTargets", pick: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> Iterator[npt.NDArray[Any] | None]:
    """What ``pick`` makes of each optional array, None for those that are not there."""
    for name in _OPTIONAL:
        values = getattr(targets, name)
        yield None if values is None else pick(values)


def _take(array: npt.NDArray[Any], places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    # The places are inside already; "clip" spares the copy that checking them again takes.
    return array.take(places, axis=0, mode="clip")


def array_names(spec: CacheSpec) -> list[str]:
    """Fields of ``TargetArrays`` that a cache of this spec fills."""
    names = layout.arrays(spec, spec.views[0])
    return ["offsets", *(name for name in names if name != "sizes")]


@dataclass(frozen=True)
class Part:
    """One shard of one view, and where its samples and entries begin in the flat arrays."""

    shard: int
    view: View
    first_row: int
    first_entry: int


def lay_out(cache: Cache, shards: Sequence[int], views: Sequence[View]) -> Iterator[Part]:
    """The parts of some shards, one view after the other."""
    assert cache.manifest is not None
    row = entry = 0
    for view in views:
        for shard in shards:
            yield Part(shard, view, row, entry)
            row += len(cache.spec.shard_rows(shard))
            entry += cache.manifest.shards[shard].entries[view]


def array_shapes(cache: Cache, shards: Sequence[int], views: Sequence[View]) -> dict[str, Shape]:
    """Type and shape of each array that holds some shards of some views."""
    assert cache.manifest is not None
    rows = len(views) * sum(len(cache.spec.shard_rows(shard)) for shard in shards)
    entries = sum(cache.manifest.shards[shard].entries[view] for shard in shards for view in views)
    layouts = layout.arrays(cache.spec, views[0])
    shapes: dict[str, Shape] = {"offsets": (np.dtype(np.int64), (rows + 1,))}
    for name in array_names(cache.spec)[1:]:
        array = layouts[name]
        shapes[name] = array.dtype, (entries,) if array.packed else (rows, *array.shape[2:])
    return shapes


def fill(
    cache: Cache, parts: Iterable[Part], arrays: Mapping[str, npt.NDArray[Any]], *, workers: int
) -> Iterator[None]:
    """Read every part, held against its hashes, into its place; yields after each.

    Raises:
        CorruptShardError: where the cache is damaged.
    """
    arrays["offsets"][0] = 0

    def copy(part: Part) -> None:
        targets = cache.read_verified(part.shard, part.view)
        rows = slice(part.first_row, part.first_row + len(targets))
        entries = slice(part.first_entry, part.first_entry + len(targets.indices))
        for name, array in arrays.items():
            if name == "offsets":
                array[rows.start + 1 : rows.stop + 1] = targets.offsets[1:] + part.first_entry
            else:
                array[entries if name in _PACKED else rows] = getattr(targets, name)

    yield from ordered_map(copy, parts, workers=workers)


def cut_out(targets: SparseTargets, rows: range) -> SparseTargets:
    """Some consecutive samples of targets."""
    offsets = targets.offsets[rows.start : rows.stop + 1]
    entries = slice(offsets[0], offsets[-1])
    place = slice(rows.start, rows.stop)
    return SparseTargets(
        offsets - offsets[0],
        targets.indices[entries],
        targets.log2_probs[entries],
        targets.secondary[place],
        *optional_arrays(targets, lambda values: values[place]),
    )


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Targets of the samples of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    sizes = np.concatenate([part.sizes for part in parts])
    return SparseTargets(
        offsets_from_sizes(sizes), *map(joined, (*_PACKED, "secondary", *_OPTIONAL))
    )
