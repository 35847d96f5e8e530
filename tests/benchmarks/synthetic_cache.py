"""Large caches of made-up targets, for measuring what reads them."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.targets import SparseTargets, encode_log_probs, offsets_from_sizes
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.progress import progress
from tests.caches import make_spec


def make_cache(
    path: Path,
    *,
    num_samples: int,
    num_classes: int,
    mean_group: float,
    max_group: int,
    views: tuple[View, ...] = ("original",),
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0),
    shard_samples: int = 65_536,
    workers: int = 2,
) -> Cache:
    """A finished cache whose group sizes are log-normal with a heavy tail up to ``max_group``.

    Classes are uniform, which is the hardest to compress; probabilities fall as powers of the rank.
    """
    spec = make_spec(
        num_samples=num_samples,
        num_classes=num_classes,
        shard_samples=min(shard_samples, num_samples),
        max_group=max_group,
        threshold=0.93,
        temperatures=temperatures,
        views=views,
    )
    writer = CacheWriter(path, spec)

    def write(shard: int) -> None:
        rng = np.random.default_rng(shard)
        samples = samples_of(spec, shard)
        targets: dict[View, SparseTargets] = {
            view: random_targets(spec, rng, samples.labels, mean_group) for view in views
        }
        truncated: dict[View, int] = dict.fromkeys(views, 0)
        writer.write_shard(shard, targets, samples, truncated=truncated)

    with progress("make cache", spec.num_shards, "shards") as advance:
        for _ in ordered_map(write, writer.pending(), workers=workers):
            advance()
    writer.finish()
    return Cache.open(path)


def samples_of(spec: CacheSpec, shard: int) -> ShardSamples:
    """Keys "1" and on, labels that ascend with the rows, digests that differ."""
    rows = spec.shard_rows(shard)
    labels = np.arange(rows.start, rows.stop) * spec.num_classes // spec.num_samples
    return ShardSamples([str(row + 1) for row in rows], labels, digests_of(spec, shard), {})


def digests_of(spec: CacheSpec, shard: int) -> npt.NDArray[np.uint8]:
    """As good as digests of images: random bytes that follow from the shard."""
    seed = int.from_bytes(hashlib.blake2b(b"%d" % shard, digest_size=8).digest())
    n = len(spec.shard_rows(shard))
    return np.random.default_rng(seed).integers(0, 256, (n, 16), np.uint8)


def random_targets(
    spec: CacheSpec, rng: np.random.Generator, labels: npt.NDArray[np.int64], mean_group: float
) -> SparseTargets:
    """Groups whose first class is the label; all classes outside a group have the same mass."""
    n, spread = len(labels), 1.2
    sizes = rng.lognormal(np.log(mean_group) - spread**2 / 2, spread, n) if mean_group > 1 else 1
    sizes = np.clip(np.rint(np.broadcast_to(sizes, n)), 1, spec.max_group).astype(np.int64)
    sizes = np.minimum(sizes, spec.num_classes)
    offsets = offsets_from_sizes(sizes)
    samples = np.repeat(np.arange(n), sizes)
    ranks = np.arange(offsets[-1]) - offsets[:-1][samples] + 1
    gaps = np.where(ranks == 1, 0.3, rng.exponential(1.1, len(ranks)) / ranks)
    running = np.cumsum(gaps)
    falls = running - (running - gaps)[offsets[:-1]][samples]
    outside = rng.uniform(0.01, 0.07, n)
    inside = np.add.reduceat(np.exp(-falls), offsets[:-1])
    log_probs = np.log((1 - outside) / inside)[samples] - falls
    codes = encode_log_probs(log_probs)
    # One stride through the classes a sample: all different within it, and spread evenly.
    strides = rng.integers(1, spec.num_classes // (spec.max_group + 1) + 1, n)
    shuffled = rng.permutation(spec.num_classes).astype(np.uint32)
    starts = np.argsort(shuffled)[labels]
    classes = (starts[samples] + strides[samples] * (ranks - 1)) % spec.num_classes
    secondary = np.empty((n, len(spec.temperatures)), np.float32)
    others = np.maximum(spec.num_classes - sizes, 1)
    for column, temperature in enumerate(spec.temperatures):
        power = spec.group_temperature / temperature
        tail = others * (outside / others) ** power
        group = np.add.reduceat(np.exp(power * log_probs), offsets[:-1])
        secondary[:, column] = np.log(tail / (tail + group))
    return SparseTargets(offsets, shuffled[classes], codes, secondary)
