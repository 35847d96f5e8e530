"""One cache out of several of disjoint records, made by one teacher with equal settings.

The samples of the caches follow each other in the order given, and shards are cut anew. A merged
key is the number of its cache, from 1, a slash and the key there.
"""

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.cache.card import write_card
from gkd.storage.cache.layout import METADATA
from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.retarget import shard_samples, software_versions
from gkd.storage.cache.spec import CacheSpec, DatasetSpec, DerivedSpec, View, settings_of
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.cache.writer import CacheWriter, ShardSamples, delete_leftovers
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.progress import progress

# Fields in which caches that are merged may differ.
_FREE = ("num_samples", "shard_samples", "dataset", "derived")
_EXAMPLES = 3


def merge(
    caches: Sequence[Cache], out: Path, *, licence: str | None = None, note: str | None = None
) -> str:
    """Join finished caches into the cache ``out``, or go on with it; its id.

    ``licence`` and ``note`` are words for the card, by default those of the caches.

    Raises:
        ConfigError: for fewer than two caches, or where another process writes ``out``.
        SpecMismatchError: where teacher, centres, classes or settings differ, where one image is
            in two of the caches, or where ``out`` holds another cache.
        CorruptShardError: where one of the caches is damaged.
    """
    spec = merged_spec(caches)
    out = out.absolute()
    if not (out / METADATA).exists():
        _require_disjoint(caches)
    require_outside_caches(out, may_be_cache=True)
    with WriteLock(out) as lock:
        delete_leftovers(out)
        writer = CacheWriter(out, spec, guard=lock.check)
        pending = writer.pending()
        source = _Source(caches)
        done = spec.num_shards - len(pending)
        with progress("merge", spec.num_shards, "shards", done) as advance:
            for shard in pending:
                _write_merged(source, writer, shard)
                advance()
        write_card(out, licence=licence, note=note, sources=[cache.path for cache in caches])
        return writer.finish()


def _write_merged(source: "_Source", writer: CacheWriter, shard: int) -> None:
    spec = writer.spec
    pieces = list(source.pieces(spec.shard_rows(shard)))
    views: dict[View, SparseTargets] = {
        view: SparseTargets.concat([piece.targets[view] for piece in pieces]) for view in spec.views
    }
    truncated: dict[View, int] = {
        view: sum(int(piece.truncated[view].sum()) for piece in pieces) for view in spec.views
    }
    writer.write_shard(shard, views, _join_samples(pieces), truncated=truncated)


def merged_spec(caches: Sequence[Cache]) -> CacheSpec:
    """What the merged cache is.

    The fingerprint of its data set is the sha256 of the caches' fingerprints, one after the other.

    Raises:
        ConfigError: for fewer than two caches, or one of them twice.
        SpecMismatchError: naming the first fields that differ.
    """
    if len(caches) < 2:
        raise ConfigError(f"expected two or more caches to merge, got {len(caches)}")
    first = caches[0]
    for cache, times in Counter(cache.id for cache in caches).items():
        if times > 1:
            paths = ", ".join(str(each.path) for each in caches if each.id == cache)
            raise ConfigError(
                f"{paths}: the same cache {times} times; give each part of the data once"
            )
    for other in caches[1:]:
        _require_same_settings(first, other)
    datasets = [cache.spec.dataset for cache in caches]
    fingerprints = "".join(dataset.fingerprint for dataset in datasets)
    software = functools.reduce(dict.__or__, (cache.spec.software for cache in caches))
    return msgspec.structs.replace(
        first.spec,
        num_samples=sum(cache.spec.num_samples for cache in caches),
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


def _require_same_settings(first: Cache, other: Cache) -> None:
    ours, theirs = _common(first.spec), _common(other.spec)
    differences = [
        f"{field}: {ours.get(field)!r} and {theirs.get(field)!r}"
        for field in ours.keys() | theirs.keys()
        if ours.get(field) != theirs.get(field)
    ]
    if differences:
        named = "; ".join(sorted(differences)[:_EXAMPLES])
        raise SpecMismatchError(
            f"{first.path} and {other.path} cannot be one cache, they differ in {named}; merge "
            "caches of one teacher, one class space and equal settings"
        )


def _common(spec: CacheSpec) -> dict[str, Any]:
    """What caches must have in common."""
    return {
        field: value
        for field, value in settings_of(spec).items()
        if field.partition(".")[0] not in _FREE or field == "dataset.label_order"
    }


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
    examples = []
    for place in shared[:_EXAMPLES].tolist():
        pair = order[[place, place + 1]]
        found = zip(owners[pair].tolist(), rows[pair].tolist(), strict=True)
        named = (f"key {samples[i].keys([row])[0]} of {caches[i].path}" for i, row in found)
        examples.append(" is ".join(named))
    raise SpecMismatchError(
        f"{len(shared)} images are in more than one of the caches, the first: "
        f"{'; '.join(examples)}; merge caches of disjoint records"
    )


@dataclass(frozen=True)
class _Piece:
    """Some consecutive samples; ``truncated`` bool [n] by view."""

    targets: dict[View, SparseTargets]
    truncated: dict[View, npt.NDArray[np.bool_]]
    samples: ShardSamples

    def cut(self, rows: slice) -> "_Piece":
        place = range(len(self.samples.keys))[rows]
        return _Piece(
            {view: targets.slice(place) for view, targets in self.targets.items()},
            {view: truncated[rows] for view, truncated in self.truncated.items()},
            ShardSamples(
                self.samples.keys[rows],
                self.samples.labels[rows],
                self.samples.digests[rows],
                {i - place.start: why for i, why in self.samples.skipped.items() if i in place},
            ),
        )


class _Source:
    """The samples of all caches, one after the other, read shard by shard."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = caches
        self.starts = list(itertools.accumulate((c.spec.num_samples for c in caches), initial=0))
        # A shard is cut into two or more neighbours: reading in order finds it again.
        self._read = functools.lru_cache(maxsize=2)(self._read_shard)

    def pieces(self, rows: range) -> Iterator[_Piece]:
        """What ``rows`` of the merged cache are."""
        for number, cache in enumerate(self.caches):
            start = self.starts[number]
            for shard in range(cache.spec.num_shards):
                inside = cache.spec.shard_rows(shard)
                first = max(rows.start, start + inside.start)
                last = min(rows.stop, start + inside.stop)
                if first < last:
                    begin = start + inside.start
                    yield self._read(number, shard).cut(slice(first - begin, last - begin))

    def _read_shard(self, number: int, shard: int) -> _Piece:
        cache = self.caches[number]
        commit = cache.commit(shard)
        samples = shard_samples(cache, shard, commit)
        targets: dict[View, SparseTargets] = {
            view: cache.read_verified(shard, view) for view in cache.spec.views
        }
        truncated: dict[View, npt.NDArray[np.bool_]] = {
            view: _truncated(targets[view], cache.spec, commit.views[view].truncated)
            for view in cache.spec.views
        }
        return _Piece(
            targets,
            truncated,
            ShardSamples(
                [f"{number + 1}/{key}" for key in samples.keys],
                samples.labels,
                samples.digests,
                samples.skipped,
            ),
        )


def _truncated(targets: SparseTargets, spec: CacheSpec, count: int) -> npt.NDArray[np.bool_]:
    """The ``count`` groups that were cut, bool [n]: of the fullest those that hold the least mass.

    A cache counts them by shard only; which they are matters where a shard is cut in two.
    """
    column = 0
    if spec.group_temperature in spec.temperatures:
        column = spec.temperatures.index(spec.group_temperature)
    outside = np.where(targets.sizes == spec.max_group, targets.secondary[:, column], -np.inf)
    chosen = np.zeros(len(targets), bool)
    chosen[np.argsort(-outside, kind="stable")[:count]] = True
    return chosen


def _join_samples(pieces: Sequence[_Piece]) -> ShardSamples:
    parts = [piece.samples for piece in pieces]
    starts = itertools.accumulate((len(part.keys) for part in parts), initial=0)
    return ShardSamples(
        [key for part in parts for key in part.keys],
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.digests for part in parts]),
        {
            start + i: why
            for start, part in zip(starts, parts, strict=False)
            for i, why in part.skipped.items()
        },
    )
