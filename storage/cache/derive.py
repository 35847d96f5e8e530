"""Makes a cache from other caches, without a teacher; shared by ``retarget`` and ``merge``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from gkd.storage.cache.card import write_card
from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.util.files import delete_temporaries
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.progress import progress


@dataclass(frozen=True)
class DerivedShard:
    """The arguments of ``CacheWriter.write_shard`` for one shard."""

    views: Mapping[View, SparseTargets]
    samples: ShardSamples
    truncated: Mapping[View, int]


def derive(
    operation: str,
    sources: Sequence[Cache],
    out: Path,
    spec: CacheSpec,
    compute: Callable[[int], DerivedShard],
    *,
    workers: int,
    licence: str | None,
    note: str | None,
) -> str:
    """Make or resume the cache ``out`` of ``spec`` and return its id.

    ``compute`` is called for each missing shard, in order, by ``workers`` threads. ``licence`` and
    ``note`` are for the card, by default those of the sources.

    Raises:
        ConfigError: if another process writes ``out``, or ``out`` cannot be written.
        SpecMismatchError: if ``out`` holds another cache.
    """
    out = out.absolute()
    require_outside_caches(out, may_be_cache=True)
    with WriteLock(out) as lock:
        delete_temporaries(out.parent, out.name)
        writer = CacheWriter(out, spec, guard=lock.check)
        pending = writer.pending()

        def write(shard: int) -> None:
            made = compute(shard)
            writer.write_shard(shard, made.views, made.samples, truncated=made.truncated)

        done = spec.num_shards - len(pending)
        with progress(operation, spec.num_shards, "shards", done) as advance:
            for _ in ordered_map(write, pending, workers=workers):
                advance()
        write_card(out, licence=licence, note=note, sources=[cache.path for cache in sources])
        return writer.finish()


def software_versions() -> dict[str, str]:
    """Versions of the packages that write a derived cache."""
    return {package: version(package) for package in ("gkd", "numpy", "zarr")}
