"""Statistics of a cache, as numbers and as a plot: group sizes, masses, bytes on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import View
from gkd.storage.cache.targets import MAX_CODE, decode_log_probs, encode_log_probs
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
class ViewStats:
    """Statistics of one view; skipped samples count only in ``skipped``.

    histogram    (group size, samples) of all sizes that occur, ascending
    truncated    groups that were cut at ``max_group``
    secondary    mass outside the group at each temperature
    label        probability of the label at ``group_temperature``
    draws        None if the cache has none
    array_bytes  size on disk of each array
    """

    view: View
    samples: int
    skipped: int
    entries: int
    truncated: int
    min_size: int
    median_size: float
    mean_size: float
    p95_size: float
    max_size: int
    histogram: tuple[tuple[int, int], ...]
    secondary: dict[float, MassStats]
    label: MassStats
    draws: DrawStats | None
    array_bytes: dict[str, int]
    bytes_per_sample: float


@dataclass(frozen=True)
class CacheStats:
    """Statistics of a cache; ``bytes`` of all files in its manifest, so of all views together."""

    path: Path
    id: str
    num_samples: int
    num_classes: int
    bytes: int
    bytes_per_sample: float
    views: tuple[ViewStats, ...]


def stats(cache: Cache) -> CacheStats:
    """Statistics of a finished cache, with one shard in memory at a time.

    Quantiles of group sizes are exact, those of masses have the stored precision.

    Raises:
        IncompleteCacheError: if the cache is not finished.
        CorruptShardError: if a shard is damaged.
    """
    cache_id, spec = cache.id, cache.spec
    assert cache.manifest is not None
    with progress("stats", len(spec.views) * spec.num_shards, "shards") as advance:
        counts = {view: _Counts(len(spec.temperatures), spec.max_group) for view in spec.views}
        for shard in range(spec.num_shards):
            labels = cache.read_samples(shard)["label"].to_numpy()
            for view in spec.views:
                counts[view].add(cache, shard, view, labels)
                advance()
    return CacheStats(
        path=cache.path,
        id=cache_id,
        num_samples=spec.num_samples,
        num_classes=spec.num_classes,
        bytes=cache.manifest.bytes,
        bytes_per_sample=cache.manifest.bytes / spec.num_samples,
        views=tuple(counts[view].summary(cache, view) for view in spec.views),
    )


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
    sizes, masses = figure.subplots(1, 2)
    draw_group_sizes(sizes, {view.view: view.histogram for view in stats.views})
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
        self.array_bytes: dict[str, int] = {}
        self.truncated = 0
        self.drawn_classes = 0

    def add(self, cache: Cache, shard: int, view: View, labels: npt.NDArray[np.int64]) -> None:
        targets = cache.read_shard(shard, view)
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

        commit = cache.commit(shard)
        record = commit.views[view]
        self.truncated += record.truncated
        for file, array in layout.view_files(cache.spec, shard, view, record.entries).items():
            before = self.array_bytes.get(array.name, 0)
            self.array_bytes[array.name] = before + commit.files[file].bytes

    def summary(self, cache: Cache, view: View) -> ViewStats:
        skipped = int(self.sizes[0])
        sizes = self.sizes.copy()
        sizes[0] = 0
        occurring = np.flatnonzero(sizes)
        samples = int(sizes.sum())
        entries = int(sizes @ np.arange(len(sizes)))
        quantile = _quantiles(sizes, (0.5, 0.95))
        draws = cache.spec.draws
        return ViewStats(
            view=view,
            samples=samples,
            skipped=skipped,
            entries=entries,
            truncated=self.truncated,
            min_size=int(occurring[0]) if samples else 0,
            median_size=float(quantile[0]),
            mean_size=entries / max(samples, 1),
            p95_size=float(quantile[1]),
            max_size=int(occurring[-1]) if samples else 0,
            histogram=tuple((int(size), int(sizes[size])) for size in occurring),
            secondary={
                temperature: _mass(counts)
                for temperature, counts in zip(cache.spec.temperatures, self.secondary, strict=True)
            },
            label=_mass(self.label),
            draws=None
            if draws is None
            else DrawStats(
                draws.count, draws.temperature, draws.source, self.drawn_classes / max(samples, 1)
            ),
            array_bytes=self.array_bytes,
            bytes_per_sample=sum(self.array_bytes.values()) / cache.spec.num_samples,
        )


def _quantiles(counts: npt.NDArray[np.int64], quantiles: Sequence[float]) -> npt.NDArray[np.int64]:
    """Quantiles of values 0, 1, ... that occur ``counts`` times: always values that occur."""
    cumulative = np.cumsum(counts)
    ranks = np.ceil(np.asarray(quantiles) * cumulative[-1])
    found: npt.NDArray[np.int64] = np.searchsorted(cumulative, np.maximum(ranks, 1))
    return np.minimum(found, len(counts) - 1)


def _mass(code_counts: npt.NDArray[np.int64]) -> MassStats:
    # A higher code is a lower probability.
    codes = _quantiles(code_counts, [1 - quantile for quantile in QUANTILES])
    probs = np.exp(decode_log_probs(np.arange(len(code_counts), dtype=np.uint16)), dtype=np.float64)
    probs[MAX_CODE] = 0.0  # the code of 0 and of all that is too small for a code
    return MassStats(
        mean=float(code_counts @ probs) / max(int(code_counts.sum()), 1),
        quantiles=tuple(probs[codes].tolist()),
    )


def _draw_masses(axes: Any, views: Sequence[ViewStats]) -> None:
    for number, view in enumerate(views):
        boxes = [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), mass.quantiles, strict=True))
            for mass in view.secondary.values()
        ]
        positions = np.arange(len(boxes)) + 0.35 * (number - (len(views) - 1) / 2)
        colour = {"color": f"C{number}"}
        axes.bxp(
            boxes,
            positions=positions,
            widths=0.3,
            showfliers=False,
            boxprops=colour,
            medianprops=colour,
            whiskerprops=colour,
            capprops=colour,
        )
    axes.set_xticks(np.arange(len(views[0].secondary)), [f"T={t:g}" for t in views[0].secondary])
    axes.set(ylabel="secondary mass (5, 25, 50, 75, 95 %)", ylim=(0, 1))
