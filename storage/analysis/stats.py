"""Statistics of a cache, as numbers and as a plot: group sizes, masses, bytes on disk."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit, Manifest
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.targets import MAX_CODE, SparseTargets, decode_log_probs, encode_log_probs
from gkd.storage.errors import ConfigError
from gkd.storage.util.plotting import new_figure, write_png
from gkd.storage.util.progress import progress

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class MassStats:
    """Distribution of a probability over the samples; ``quantiles`` at ``QUANTILES``."""

    mean: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class DrawStats:
    """Draws of one view; ``mean_classes`` is the mean number of distinct classes of a sample."""

    count: int
    temperature: float
    source: str
    mean_classes: float


@dataclass(frozen=True)
class ViewSizes:
    """Statistics of one view that need no array; skipped samples count only in ``skipped``.

    truncated    groups that were cut at ``max_group``
    array_bytes  size on disk of each array
    """

    view: View
    samples: int
    skipped: int
    entries: int
    truncated: int
    mean_size: float
    array_bytes: dict[str, int]
    bytes_per_sample: float


@dataclass(frozen=True)
class CacheSizes:
    """Statistics of a cache that need no array; ``bytes`` of all files in its manifest."""

    id: str
    num_samples: int
    num_classes: int
    bytes: int
    bytes_per_sample: float
    views: Sequence[ViewSizes]


@dataclass(frozen=True)
class ViewStats(ViewSizes):
    """Statistics of one view.

    histogram  (group size, samples) of all sizes that occur, ascending
    secondary  mass outside the group at each temperature
    label      probability of the label at ``group_temperature``
    draws      None if the cache has none
    """

    min_size: int
    median_size: float
    p95_size: float
    max_size: int
    histogram: tuple[tuple[int, int], ...]
    secondary: dict[float, MassStats]
    label: MassStats
    draws: DrawStats | None


@dataclass(frozen=True)
class CacheStats(CacheSizes):
    """Statistics of a local cache."""

    path: Path
    views: Sequence[ViewStats]


def sizes(id: str, spec: CacheSpec, manifest: Manifest, commits: Iterable[Commit]) -> CacheSizes:
    """Statistics of a finished cache from its metadata alone."""
    commits = list(commits)
    return CacheSizes(
        id=id,
        num_samples=spec.num_samples,
        num_classes=spec.num_classes,
        bytes=manifest.bytes,
        bytes_per_sample=manifest.bytes / spec.num_samples,
        views=[_view_sizes(spec, manifest, commits, view) for view in spec.views],
    )


def _view_sizes(
    spec: CacheSpec, manifest: Manifest, commits: Iterable[Commit], view: View
) -> ViewSizes:
    array_bytes: Counter[str] = Counter()
    entries = truncated = 0
    for commit in commits:
        record = commit.views[view]
        entries += record.entries
        truncated += record.truncated
        for file, array in layout.view_files(spec, commit.shard, view, record.entries).items():
            array_bytes[array.name] += commit.files[file].bytes
    samples = spec.num_samples - manifest.skipped
    return ViewSizes(
        view=view,
        samples=samples,
        skipped=manifest.skipped,
        entries=entries,
        truncated=truncated,
        mean_size=entries / max(samples, 1),
        array_bytes=dict(array_bytes),
        bytes_per_sample=array_bytes.total() / spec.num_samples,
    )


def stats(cache: Cache) -> CacheStats:
    """Statistics of a finished cache, with one shard in memory at a time.

    Quantiles of group sizes are exact, those of masses have the stored precision.

    Raises:
        IncompleteCacheError: if the cache is not finished.
        CorruptShardError: if a shard is damaged.
    """
    id, spec = cache.id, cache.spec
    assert cache.manifest is not None
    commits = (cache.commit(shard) for shard in range(spec.num_shards))
    total = sizes(id, spec, cache.manifest, commits)
    counts = {view: _Counts(len(spec.temperatures), spec.max_group) for view in spec.views}
    with progress("stats", len(spec.views) * spec.num_shards, "shards") as advance:
        for shard in range(spec.num_shards):
            labels = cache.read_samples(shard)["label"].to_numpy()
            for view in spec.views:
                counts[view].add(cache.read_shard(shard, view), labels)
                advance()
    views = [counts[view.view].summary(view, spec) for view in total.views]
    return CacheStats(**vars(total) | {"path": cache.path, "views": views})


def plot_stats(stats: CacheStats, out: Path) -> None:
    """Draw group sizes and secondary masses of every view into a PNG.

    Raises:
        ConfigError: if matplotlib is not installed, or ``out`` cannot be written.
    """
    if not out.parent.is_dir() or out.is_dir():
        problem = "a folder" if out.is_dir() else f"no such folder as {out.parent}"
        raise ConfigError(
            f"{out}: expected a file name in an existing folder, got {problem}; choose another name"
        )
    figure = new_figure(10, 4)
    groups, masses = figure.subplots(1, 2)
    draw_group_sizes(groups, {view.view: view.histogram for view in stats.views})
    _draw_masses(masses, stats.views)
    cost = f"{stats.bytes_per_sample:,.0f} bytes a sample"
    figure.suptitle(f"{stats.path.name}: {stats.num_samples:,} samples, {cost}")
    write_png(figure, out)


def draw_group_sizes(axes: Any, views: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """Draw samples by group size, (size, samples) of each view, in logarithmic bins."""
    largest = max((size for counts in views.values() for size, _ in counts), default=1)
    bins = np.unique(np.geomspace(1, max(largest, 2), 40).round()) - 0.5
    for view, counts in views.items():
        sizes, samples = np.array(counts).T if counts else ([], [])
        axes.hist(sizes, [*bins, largest + 0.5], weights=samples, histtype="step", label=view)
    axes.set(xscale="log", xlabel="classes in the primary group", ylabel="samples")
    powers = [1 << power for power in range(largest.bit_length())]
    axes.set_xticks(powers, [f"{size:,}" for size in powers], rotation=45 * (len(powers) > 9))
    axes.minorticks_off()
    axes.legend()


class _Counts:
    """Counts of group sizes and of probability codes over the shards read so far."""

    def __init__(self, temperatures: int, max_group: int) -> None:
        self.sizes = np.zeros(max_group + 1, np.int64)
        self.secondary = np.zeros((temperatures, MAX_CODE + 1), np.int64)
        self.label = np.zeros(MAX_CODE + 1, np.int64)
        self.drawn_classes = 0

    def add(self, targets: SparseTargets, labels: npt.NDArray[np.int64]) -> None:
        filled = targets.sizes > 0
        self.sizes += np.bincount(targets.sizes, minlength=len(self.sizes))
        for column, counts in enumerate(self.secondary):
            codes = encode_log_probs(targets.secondary[filled, column])
            counts += np.bincount(codes, minlength=MAX_CODE + 1)
        is_label = targets.indices == np.repeat(labels, targets.sizes)
        self.label += np.bincount(targets.log2_probs[is_label], minlength=MAX_CODE + 1)
        if targets.draws is not None:
            drawn = np.sort(targets.draws.classes[filled], axis=1)
            self.drawn_classes += len(drawn) + int((drawn[:, 1:] != drawn[:, :-1]).sum())

    def summary(self, view: ViewSizes, spec: CacheSpec) -> ViewStats:
        counts = self.sizes.copy()
        counts[0] = 0  # skipped samples
        occurring = np.flatnonzero(counts)
        median, p95 = _quantiles(np.arange(len(counts)), counts, (0.5, 0.95))
        draws = None
        if spec.draws is not None:
            mean_classes = self.drawn_classes / max(view.samples, 1)
            draws = DrawStats(
                spec.draws.count, spec.draws.temperature, spec.draws.source, mean_classes
            )
        return ViewStats(
            **vars(view),
            min_size=int(occurring[0]) if len(occurring) else 0,
            median_size=median,
            p95_size=p95,
            max_size=int(occurring[-1]) if len(occurring) else 0,
            histogram=tuple((int(size), int(counts[size])) for size in occurring),
            secondary={
                temperature: _mass(counts)
                for temperature, counts in zip(spec.temperatures, self.secondary, strict=True)
            },
            label=_mass(self.label),
            draws=draws,
        )


def _quantiles(
    values: npt.NDArray[Any], counts: npt.NDArray[np.int64], quantiles: Sequence[float]
) -> tuple[float, ...]:
    """Quantiles of ``values`` that occur ``counts`` times each; 0 if there are none."""
    if not counts.any():
        return (0.0,) * len(quantiles)
    found = np.quantile(values, quantiles, weights=counts, method="inverted_cdf")
    return tuple(found.astype(float).tolist())


def _mass(code_counts: npt.NDArray[np.int64]) -> MassStats:
    probs = np.exp(decode_log_probs(np.arange(len(code_counts), dtype=np.uint16)), dtype=np.float64)
    probs[MAX_CODE] = 0.0  # the code of 0 and of all that is too small for a code
    return MassStats(
        mean=float(code_counts @ probs) / max(int(code_counts.sum()), 1),
        quantiles=_quantiles(probs, code_counts, QUANTILES),
    )


def _draw_masses(axes: Any, views: Sequence[ViewStats]) -> None:
    for number, view in enumerate(views):
        boxes = [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), mass.quantiles, strict=True))
            for mass in view.secondary.values()
        ]
        positions = np.arange(len(boxes)) + 0.35 * (number - (len(views) - 1) / 2)
        lines = ("boxprops", "medianprops", "whiskerprops", "capprops")
        axes.bxp(
            boxes,
            positions=positions,
            widths=0.3,
            showfliers=False,
            **{line: {"color": f"C{number}"} for line in lines},
        )
    axes.set_xticks(np.arange(len(views[0].secondary)), [f"T={t:g}" for t in views[0].secondary])
    axes.set(ylabel="secondary mass (5, 25, 50, 75, 95 %)", ylim=(0, 1))
