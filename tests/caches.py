"""Small caches of random but valid targets, for tests of everything that reads one."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import (
    VIEWS,
    CacheSpec,
    CentersSpec,
    DatasetSpec,
    DrawsSpec,
    TeacherSpec,
    View,
    preprocess_preset,
)
from gkd.storage.cache.targets import Draws, SparseTargets, encode_log_probs, offsets_from_sizes
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.sharing.push import CLAIM

NO_SKIPS: dict[int, str] = {}


def make_spec(
    *,
    num_samples: int = 100,
    num_classes: int = 50,
    shard_samples: int = 40,
    max_group: int = 20,
    threshold: float = 0.9,
    group_temperature: float = 2.0,
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0),
    views: tuple[View, ...] = VIEWS,
    draws: DrawsSpec | None = None,
) -> CacheSpec:
    """A spec of made-up teacher, centres and data set."""
    return CacheSpec(
        num_samples=num_samples,
        num_classes=num_classes,
        shard_samples=shard_samples,
        max_group=max_group,
        threshold=threshold,
        group_temperature=group_temperature,
        temperatures=temperatures,
        scale=64.0,
        margin=0.4,
        views=views,
        preprocess=preprocess_preset("arcface"),
        precision="float32",
        teacher=TeacherSpec("teacher.onnx", "onnx", "1" * 64, 128),
        centers=CentersSpec("class-mean", "centers.npy", "2" * 64),
        dataset=DatasetSpec("faces", num_samples, num_classes, "recordio", "3" * 64),
        draws=draws,
        software={"gkd": "0.1.0"},
    )


def labels_of(spec: CacheSpec) -> npt.NDArray[np.int64]:
    """Labels int64 [N] that go round the classes."""
    return np.arange(spec.num_samples, dtype=np.int64) * 7 % spec.num_classes


def digest_of(row: int) -> bytes:
    """The digest that row ``row`` of a made cache has."""
    return hashlib.blake2b(b"image %d" % row, digest_size=16).digest()


def make_logits(spec: CacheSpec, view: View, seed: int = 0) -> npt.NDArray[np.float64]:
    """Dense teacher logits float64 [N, C] in which the label usually ranks high."""
    rng = np.random.default_rng([seed, VIEWS.index(view)])
    logits = rng.normal(0, 4, (spec.num_samples, spec.num_classes))
    logits[np.arange(spec.num_samples), labels_of(spec)] += 6
    return logits


def dense_targets(
    logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], spec: CacheSpec
) -> tuple[SparseTargets, int]:
    """Primary groups of dense logits [n, C] by a full sort, and how many were cut."""
    softened = logits / spec.group_temperature
    log_probs = softened - np.logaddexp.reduce(softened, axis=1, keepdims=True)
    groups, truncated = [], 0
    for row, label in zip(log_probs, labels, strict=True):
        order = np.argsort(-row, kind="stable")
        needed = int(np.searchsorted(np.cumsum(np.exp(row[order])), spec.threshold)) + 1
        group = order[:needed]
        if label not in group:
            group = np.append(group, label)
        if len(group) > spec.max_group:
            truncated += 1
            inside = group[: spec.max_group]
            group = inside if label in inside else np.append(inside[:-1], label)
        groups.append(group)
    secondary = np.empty((len(logits), len(spec.temperatures)), np.float32)
    for i, group in enumerate(groups):
        outside = np.delete(logits[i], group)
        for j, temperature in enumerate(spec.temperatures):
            total = np.logaddexp.reduce(logits[i] / temperature)
            inside_mass = np.exp(np.logaddexp.reduce(logits[i][group] / temperature) - total)
            tail = np.logaddexp.reduce(outside / temperature, initial=-np.inf)
            # Each form where it does not cancel.
            secondary[i, j] = np.log1p(-inside_mass) if inside_mass < 0.5 else tail - total
    offsets = offsets_from_sizes(np.array([len(group) for group in groups], np.int64))
    indices = np.concatenate(groups)
    rows = np.repeat(np.arange(len(groups)), np.diff(offsets))
    return (
        SparseTargets(
            offsets,
            indices.astype(np.uint32),
            encode_log_probs(log_probs[rows, indices]),
            np.minimum(secondary, 0),
        ),
        truncated,
    )


def without(targets: SparseTargets, skipped: list[int]) -> SparseTargets:
    """The targets with some samples' groups made empty, as skipped samples have them."""
    keep = ~np.isin(np.arange(len(targets)), skipped)
    entries = np.repeat(keep, targets.sizes)
    arrays = {}
    for name, values in targets.arrays().items():
        if name in ("indices", "log2_probs"):
            arrays[name] = values[entries]
        else:
            arrays[name] = values.copy()
            arrays[name][~keep] = 0
    return SparseTargets.from_arrays(offsets_from_sizes(targets.sizes * keep), arrays)


def write_shard(
    writer: CacheWriter, shard: int, *, seed: int = 0, skipped: dict[int, str] = NO_SKIPS
) -> None:
    """Write one shard of the targets that ``make_cache`` gives; ``skipped`` by row -> reason."""
    spec = writer.spec
    rows = spec.shard_rows(shard)
    inside = {row - rows.start: reason for row, reason in skipped.items() if row in rows}
    labels = labels_of(spec)[rows.start : rows.stop]
    views, truncated = {}, {}
    for view in spec.views:
        logits = make_logits(spec, view, seed)[rows.start : rows.stop]
        targets, truncated[view] = dense_targets(logits, labels, spec)
        views[view] = without(add_draws(targets, logits, spec), list(inside))
    digests = np.frombuffer(b"".join(map(digest_of, rows)), np.uint8).reshape(-1, 16)
    samples = ShardSamples([str(row + 1) for row in rows], labels, digests, inside)
    writer.write_shard(shard, views, samples, truncated=truncated)


def add_draws(
    targets: SparseTargets, logits: npt.NDArray[np.float64], spec: CacheSpec
) -> SparseTargets:
    """With draws from dense logits [n, C] where the spec has them.

    Of the primary group they are of the stored entries: caches with cut groups need ``all``.
    """
    if spec.draws is None:
        return targets
    rng = np.random.default_rng(spec.draws.seed)
    softened = logits / spec.draws.temperature
    log_probs = softened - np.logaddexp.reduce(softened, axis=1, keepdims=True)
    weights = np.exp(log_probs)
    masses = None
    if spec.draws.source == "primary":
        inside = np.zeros(weights.shape, bool)
        inside[np.repeat(np.arange(len(targets)), targets.sizes), targets.indices] = True
        with np.errstate(divide="ignore"):
            masses = np.log((weights * ~inside).sum(1)).astype(np.float32)
        weights = weights * inside
    draws = np.stack(
        [rng.choice(spec.num_classes, spec.draws.count, p=row / row.sum()) for row in weights]
    )
    return replace(
        targets,
        draws=Draws(
            draws.astype(np.uint32),
            encode_log_probs(np.take_along_axis(log_probs, draws, 1)),
            masses,
        ),
    )


def make_cache(
    path: Path,
    *,
    num_samples: int = 100,
    num_classes: int = 50,
    shard_samples: int = 40,
    max_group: int = 20,
    views: tuple[View, ...] = VIEWS,
    draws: DrawsSpec | None = None,
    seed: int = 0,
    skipped: dict[int, str] = NO_SKIPS,
) -> Cache:
    """A finished cache of random targets: keys from "1", labels ``labels_of``, ``digest_of``."""
    spec = make_spec(
        num_samples=num_samples,
        num_classes=num_classes,
        shard_samples=shard_samples,
        max_group=max_group,
        views=views,
        draws=draws,
    )
    writer = CacheWriter(path, spec)
    for shard in writer.pending():
        write_shard(writer, shard, seed=seed, skipped=skipped)
    writer.finish()
    return Cache.open(path)


def make_cache_with_card(path: Path) -> Cache:
    """Three shards, a skipped sample and a card."""
    writer = CacheWriter(path, make_spec())
    for shard in range(3):
        write_shard(writer, shard, skipped={41: "no image"})
    (path / layout.CARD).write_text("# Faces\n")
    writer.finish()
    return Cache.open(path)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a cache by its name, but for what a push leaves beside them."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != CLAIM
    }
