"""Joins caches of disjoint records, made by one teacher with equal settings, into one.

The samples of the caches follow each other in the order given, cut into new shards. A merged
key is the number of its cache, from 1, a slash and the key there.
"""

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.cache.derive import (
    DerivedShard,
    derive,
    software_versions,
)
from gkd.storage.cache.layout import METADATA
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import NAME_FIELDS, CacheSpec, DatasetSpec, DerivedSpec, View
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.util.text import describe_differences, first_few

# Fields in which merged caches may differ.
_FREE_FIELDS = (
    *NAME_FIELDS,
    *("num_samples", "shard_samples", "batch_size", "derived"),
    *("dataset.num_images", "dataset.num_classes", "dataset.fingerprint"),
)
_EXAMPLES = 3


def merge(
    caches: Sequence[Cache], out: Path, *, licence: str | None = None, note: str | None = None
) -> str:
    """Join finished caches into the cache ``out``, or resume it, and return its id.

    ``licence`` and ``note`` are for the card, by default those of the caches.

    Raises:
        ConfigError: if there are fewer than two caches, or another process writes ``out``.
        SpecMismatchError: if teacher, centres, classes or settings differ, if an image is in two
            of the caches, or if ``out`` holds another cache.
        CorruptShardError: if one of the caches is damaged.
    """
    spec = merged_spec(caches)
    if not (out / METADATA).exists():
        _require_disjoint(caches)
    source = _Source(caches)
    return derive(
        "merge",
        caches,
        out,
        spec,
        lambda shard: source.shard(spec, shard),
        workers=1,
        licence=licence,
        note=note,
    )


def merged_spec(caches: Sequence[Cache]) -> CacheSpec:
    """The spec of the merged cache.

    The fingerprint of its data set is the sha256 of the caches' fingerprints, one after the other.

    Raises:
        ConfigError: if there are fewer than two caches, or one of them twice.
        SpecMismatchError: naming the first fields that differ.
    """
    if len(caches) < 2:
        raise ConfigError(f"expected two or more caches to merge, got {len(caches)}")
    first = caches[0]
    for cache_id, count in Counter(cache.id for cache in caches).items():
        if count > 1:
            paths = ", ".join(str(cache.path) for cache in caches if cache.id == cache_id)
            raise ConfigError(
                f"the same cache {count} times",
                path=paths,
                remedy="give each part of the data once",
            )
    for other in caches[1:]:
        differences = describe_differences(
            first.spec, other.spec, old_name="first", new_name="second", ignore=_FREE_FIELDS
        )
        if differences:
            raise SpecMismatchError(
                f"{first.path} and {other.path} cannot be merged, they differ in "
                f"{'; '.join(sorted(differences)[:_EXAMPLES])}",
                remedy="merge caches of one teacher, one class space and equal settings",
            )
    datasets = [cache.spec.dataset for cache in caches]
    fingerprints = "".join(dataset.fingerprint for dataset in datasets)
    software = functools.reduce(dict.__or__, (cache.spec.software for cache in caches))
    return msgspec.structs.replace(
        first.spec,
        num_samples=sum(cache.spec.num_samples for cache in caches),
        batch_size=msgspec.UNSET,
        shard_samples=max(cache.spec.shard_samples for cache in caches),
        dataset=DatasetSpec(
            name="+".join(dict.fromkeys(dataset.name for dataset in datasets)),
            num_images=sum(dataset.num_images for dataset in datasets),
            num_classes=first.spec.dataset.num_classes,
            label_order=first.spec.dataset.label_order,
            fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
        ),
        derived=DerivedSpec("merge", tuple(cache.id for cache in caches)),
        software=software | software_versions(),
    )


def _require_disjoint(caches: Sequence[Cache]) -> None:
    """Refuse an image that is in two of the caches, by its digest."""
    samples = [cache.samples() for cache in caches]
    words = np.concatenate([s.digests[s.present].view(np.uint64) for s in samples])
    owners = np.repeat(np.arange(len(caches)), [int(s.present.sum()) for s in samples])
    rows = np.concatenate([np.flatnonzero(s.present) for s in samples])
    order = np.lexsort((owners, words[:, 1], words[:, 0]))
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    shared = np.flatnonzero(same & (owners[order[1:]] != owners[order[:-1]]))
    if not len(shared):
        return

    def name(sample: int) -> str:
        owner = int(owners[sample])
        return f"key {samples[owner].keys([rows[sample]])[0]} of {caches[owner].path}"

    first = shared[:_EXAMPLES]
    names = zip(order[first].tolist(), order[first + 1].tolist(), strict=True)
    pairs = [f"{name(one)} is {name(other)}" for one, other in names]
    raise SpecMismatchError(
        f"{len(shared)} images are in more than one of the caches: "
        f"{first_few(pairs, _EXAMPLES, count=len(shared))}",
        remedy="merge caches of disjoint records",
    )


@dataclass(frozen=True)
class _Piece:
    """Consecutive samples of one cache; ``truncated`` bool [n] by view."""

    targets: dict[View, SparseTargets]
    truncated: dict[View, npt.NDArray[np.bool_]]
    samples: ShardSamples

    def slice(self, rows: range) -> "_Piece":
        return _Piece(
            {view: targets.slice(rows) for view, targets in self.targets.items()},
            {view: values[rows.start : rows.stop] for view, values in self.truncated.items()},
            self.samples.slice(rows),
        )


class _Source:
    """The samples of all caches, one after the other, read shard by shard."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = caches
        self.starts = list(itertools.accumulate((c.spec.num_samples for c in caches), initial=0))
        # Merged shards are read in order, and two neighbours may share a shard of a cache.
        self._read = functools.lru_cache(maxsize=2)(self._read_shard)

    def shard(self, spec: CacheSpec, shard: int) -> DerivedShard:
        """A shard of the merged cache."""
        pieces = list(self._pieces(spec.shard_rows(shard)))
        return DerivedShard(
            {v: SparseTargets.concat([piece.targets[v] for piece in pieces]) for v in spec.views},
            ShardSamples.concat([piece.samples for piece in pieces]),
            {v: sum(int(piece.truncated[v].sum()) for piece in pieces) for v in spec.views},
        )

    def _pieces(self, rows: range) -> Iterator[_Piece]:
        for number, cache in enumerate(self.caches):
            for shard in range(cache.spec.num_shards):
                inside = cache.spec.shard_rows(shard)
                begin = self.starts[number] + inside.start
                piece = range(max(rows.start - begin, 0), min(rows.stop - begin, len(inside)))
                if piece:
                    yield self._read(number, shard).slice(piece)

    def _read_shard(self, number: int, shard: int) -> _Piece:
        cache = self.caches[number]
        commit = cache.commit(shard)
        samples = ShardSamples.from_table(cache.read_samples(shard), commit.skipped)
        targets: dict[View, SparseTargets] = {
            view: cache.read_verified(shard, view) for view in cache.spec.views
        }
        truncated: dict[View, npt.NDArray[np.bool_]] = {
            view: _truncated(targets[view], cache.spec, commit.views[view].truncated)
            for view in cache.spec.views
        }
        keys = [f"{number + 1}/{key}" for key in samples.keys]
        return _Piece(targets, truncated, replace(samples, keys=keys))


def _truncated(targets: SparseTargets, spec: CacheSpec, count: int) -> npt.NDArray[np.bool_]:
    """The ``count`` truncated groups, bool [n]: of the largest, those that hold the least mass.

    A cache has their number only; which they are matters if a shard is cut in two.
    """
    column = 0
    if spec.group_temperature in spec.temperatures:
        column = spec.temperatures.index(spec.group_temperature)
    outside = np.where(targets.sizes == spec.max_group, targets.secondary[:, column], -np.inf)
    chosen = np.zeros(len(targets), bool)
    chosen[np.argsort(-outside, kind="stable")[:count]] = True
    return chosen
