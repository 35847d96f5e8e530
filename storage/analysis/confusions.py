"""Finds confused identities, suspected label errors and hard images, from a cache alone.

With p' of ``gkd.storage.analysis.posteriors``, the prediction without the label's margin:

    identities   of classes a and b, mass_ab = mean of p'_b over the images x of a and their views,
                 B_ab = mean of sqrt(p'_a p'_b), and overlap = sqrt(B_ab B_ba). An image counts if
                 both classes have probability, not if it simply belongs to the other class. So
                 overlap distinguishes one person under two labels from a wrong label.
    label noise  lead = c_o - c_y in cosines, averaged over the views, where o is the class with
                 the largest lead among the likeliest other class of each view: above 0 the teacher
                 assigns the image to o. In a view whose group lacks o, its upper bound is used, but
                 never a larger lead than in the other view.
    hard images  claim = the larger of p'_y and p'_o, each averaged over the views: below 1/2 no
                 class has the image. captured = the probability of all stored classes, entropy in
                 nats, both averaged over the views.

Memory: 29 bytes a sample, one shard, ``max_rows`` rows a list, and at most ``max_pairs`` sums over
ordered pairs of classes. The first 16 entries of a sample and view count towards pairs, if p' or
sqrt(p'_y p') is at least 1e-4. If there are too many pairs, those with the smallest means so far
are dropped; ``left_out`` bounds what the mass or B of a pair can lack because of it, usually 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gkd.storage.analysis.posteriors import Posteriors
from gkd.storage.cache.reader import Cache, Samples
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.targets import SparseTargets, in_blocks
from gkd.storage.records.images import DIGEST_BYTES
from gkd.storage.util.progress import progress

MAX_ROWS = 100_000
MAX_PAIRS = 1 << 23
_PAIR_ENTRIES = 16  # of a sample and view
_MIN_PAIR_MASS = 1e-4
_BLOCK_ENTRIES = 1 << 22
_CLASS_BITS = 32
_MAX_PENDING = 1 << 22
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Confusions:
    """What was found; every list has the worst first.

    identities   a, b, images_a, images_b, overlap, mass_ab, mass_ba, key_a, key_b: the keys are
                 those of the image with the highest p' of its label
    label_noise  row, key, label, digest, images (of the label), own (p' of the label), other,
                 other_prob (its p'), other_images, lead, swapped: an image labelled ``other`` in
                 this list is assigned to ``label``
    hard         row, key, label, digest, images, claim, captured, entropy, likeliest
    own          float32 [N]  p' of each sample's label, averaged over the views; -1 if skipped
    left_out     bound on what a pair's figures lack because there were too many pairs
    """

    samples: Samples
    identities: pa.Table
    label_noise: pa.Table
    hard: pa.Table
    own: npt.NDArray[np.float32]
    left_out: float


def confusions(cache: Cache, *, max_rows: int = MAX_ROWS, max_pairs: int = MAX_PAIRS) -> Confusions:
    """Read a finished cache once, shard by shard; at most ``max_rows`` rows a list.

    Raises:
        CorruptShardError: if the cache is damaged.
    """
    spec, samples = cache.spec, cache.samples()
    images = np.bincount(samples.labels[samples.present], minlength=spec.num_classes)
    own = np.full(spec.num_samples, -1, np.float32)
    pairs = _PairSums(images, max_pairs)
    noise, hard = _TopRows("lead", max_rows), _TopRows("doubt", max_rows)
    with progress("label-noise report", spec.num_shards, "shards") as advance:
        for shard in range(spec.num_shards):
            views = [cache.read_verified(shard, view) for view in spec.views]
            for block in _blocks(views):
                rows = spec.shard_rows(shard)[block.start : block.stop]
                labels = samples.labels[rows.start : rows.stop]
                posteriors = [
                    Posteriors.from_targets(targets.slice(block), labels, spec) for targets in views
                ]
                for view in posteriors:
                    pairs.add(view, labels, 1 / len(posteriors))
                columns = _compare_with_labels(posteriors, labels, spec)
                columns["row"] = np.arange(rows.start, rows.stop)
                present = samples.present[rows.start : rows.stop]
                own[rows.start : rows.stop][present] = columns["own"][present]
                noise.add(columns, present & (columns["lead"] > 0))
                hard.add(columns, present & (columns["claim"] < 0.5))
            advance()
    doubtful = hard.finish()
    return Confusions(
        samples,
        _identities(pairs.finish(max_rows), samples, images, own),
        _label_noise(noise.finish(), samples, images),
        pa.table(
            _sample_columns(doubtful["row"], samples, images)
            | {name: doubtful[name] for name in ("claim", "captured", "entropy", "likeliest")}
        ),
        own,
        pairs.left_out,
    )


def _blocks(views: Sequence[SparseTargets]) -> Iterator[range]:
    """Ranges of samples with few enough entries and draws in all views."""
    offsets = np.sum([targets.offsets for targets in views], axis=0)
    draws = views[0].draws
    if draws is not None:
        offsets = offsets + len(views) * draws.classes.shape[1] * np.arange(len(offsets))
    return in_blocks(offsets, _BLOCK_ENTRIES)


def _compare_with_labels(
    views: Sequence[Posteriors], labels: npt.NDArray[np.int64], spec: CacheSpec
) -> Columns:
    """The label and the leading other class of each sample; undefined for skipped samples."""
    with np.errstate(invalid="ignore"):
        own = np.mean([np.exp(view.log_own) for view in views], axis=0)
        lead = np.full(len(labels), -np.inf)
        other, other_prob = np.full(len(labels), -1), np.zeros(len(labels))
        for candidate in [view.top_others(labels) for view in views]:
            leads, probs = _lead_over_label(views, candidate, spec)
            better = (candidate >= 0) & (leads > lead)
            lead, other = np.where(better, leads, lead), np.where(better, candidate, other)
            other_prob = np.where(better, probs, other_prob)
        claim = np.maximum(own, other_prob)
        return {
            "own": own,
            "lead": lead,
            "other": other,
            "other_prob": other_prob,
            "claim": claim,
            "doubt": -claim,
            "likeliest": np.where(own >= other_prob, labels, other),
            "captured": 1 - np.mean([np.exp(view.log_rest) for view in views], axis=0),
            "entropy": np.mean([view.entropy() for view in views], axis=0),
        }


def _lead_over_label(
    views: Sequence[Posteriors], classes: npt.NDArray[np.int64], spec: CacheSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Cosine lead over the label and p' of one class a sample, averaged over the views."""
    stored = np.stack([view.log_probs_of(classes) - view.log_own for view in views])
    bounds = np.stack([view.log_absent - view.log_own for view in views])
    smallest = np.fmin.reduce(stored)
    ratios = np.where(np.isnan(stored), np.minimum(bounds, smallest), stored)
    probs = np.exp(ratios + np.stack([view.log_own for view in views])).mean(axis=0)
    return spec.group_temperature / spec.scale * ratios.mean(axis=0), probs


class _TopRows:
    """Keeps the rows with the highest ``score`` of all that are added."""

    def __init__(self, score: str, max_rows: int) -> None:
        self.score, self.max_rows = score, max_rows
        self._columns: Columns = {}

    def add(self, columns: Columns, chosen: npt.NDArray[np.bool_]) -> None:
        new = {name: column[chosen] for name, column in columns.items()}
        if self._columns:
            new = {name: np.concatenate([self._columns[name], new[name]]) for name in new}
        self._columns = new
        if len(new["row"]) > 2 * self.max_rows:
            self._columns = self.finish()

    def finish(self) -> Columns:
        order = np.lexsort((self._columns["row"], -self._columns[self.score]))[: self.max_rows]
        return {name: column[order] for name, column in self._columns.items()}


class _PairSums:
    """Sums over ordered pairs of a label and another class, at most ``max_pairs`` of them.

    A pair's key is label << 32 | class. Its two sums are of p'_b and of sqrt(p'_a p'_b).
    """

    def __init__(self, images: npt.NDArray[np.int64], max_pairs: int) -> None:
        self.images, self.max_pairs = images, max_pairs
        self.left_out = 0.0
        self._keys, self._sums = np.empty(0, np.uint64), np.empty((2, 0))
        self._pending: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]] = []

    def add(self, view: Posteriors, labels: npt.NDArray[np.int64], weight: float) -> None:
        rank = np.arange(len(view.rows)) - view.offsets[view.rows]
        entries = np.flatnonzero((rank < _PAIR_ENTRIES) & (view.classes != labels[view.rows]))
        rows, log_probs = view.rows[entries], view.log_probs[entries]
        sums = np.exp([log_probs, (log_probs + view.log_own[rows]) / 2])
        large = sums.max(axis=0) >= _MIN_PAIR_MASS
        keys = labels[rows[large]].astype(np.uint64) << np.uint64(_CLASS_BITS)
        keys |= view.classes[entries[large]].astype(np.uint64)
        self._pending.append(_sum_by_key(keys, sums[:, large] * weight))
        if sum(len(keys) for keys, _ in self._pending) > min(_MAX_PENDING, self.max_pairs):
            self._merge()

    def _merge(self) -> None:
        keys, sums = zip((self._keys, self._sums), *self._pending, strict=True)
        self._pending = []
        self._keys, self._sums = _sum_by_key(np.concatenate(keys), np.concatenate(sums, axis=1))
        if len(self._keys) > self.max_pairs:
            largest = self._means(np.arange(len(self._keys))).max(axis=0)
            dropped = len(largest) - max(self.max_pairs // 2, 1)
            order = np.argpartition(largest, dropped - 1)
            self.left_out += float(largest[order[dropped - 1]])
            kept = np.sort(order[dropped:])
            self._keys, self._sums = self._keys[kept], self._sums[:, kept]

    def _means(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        labels = (self._keys[pairs] >> np.uint64(_CLASS_BITS)).astype(np.int64)
        means: npt.NDArray[np.float64] = self._sums[:, pairs] / self.images[labels]
        return means

    def finish(self, max_rows: int) -> Columns:
        """Pairs a < b that overlap, at most ``max_rows``, by descending overlap."""
        self._merge()
        bits = np.uint64(_CLASS_BITS)
        reversed_keys = (self._keys << bits) | (self._keys >> bits)
        _, forward, backward = np.intersect1d(
            self._keys, reversed_keys, assume_unique=True, return_indices=True
        )
        ascending = self._keys[forward] < self._keys[backward]
        forward, backward = forward[ascending], backward[ascending]
        there, back = self._means(forward), self._means(backward)
        overlap = np.sqrt(there[1] * back[1])
        order = np.argsort(-overlap, kind="stable")[:max_rows]
        return {
            "a": (self._keys[forward[order]] >> bits).astype(np.int64),
            "b": (self._keys[backward[order]] >> bits).astype(np.int64),
            "overlap": overlap[order],
            "mass_ab": there[0][order],
            "mass_ba": back[0][order],
        }


def _sum_by_key(
    keys: npt.NDArray[np.uint64], sums: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Distinct keys [n], ascending, with the ``sums`` [2, n] of equal ones added."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return distinct, np.add.reduceat(sums[:, order], starts, axis=1)


def examples(
    labels: npt.NDArray[np.int64],
    own: npt.NDArray[np.float32],
    classes: Iterable[int],
    count: int,
) -> dict[int, list[int]]:
    """Present rows of each class, at most ``count``, by descending ``own``."""
    chosen = np.array(sorted(set(classes)), np.int64)
    rows = np.flatnonzero(np.isin(labels, chosen) & (own >= 0))
    rows = rows[np.lexsort((rows, -own[rows], labels[rows]))]
    starts, stops = (np.searchsorted(labels[rows], chosen, side) for side in ("left", "right"))
    return {
        label: rows[start:stop][:count].tolist()
        for label, start, stop in zip(chosen.tolist(), starts, stops, strict=True)
    }


# --- tables ---------------------------------------------------------------------------------------


def _identities(
    found: Columns, samples: Samples, images: npt.NDArray[np.int64], own: npt.NDArray[np.float32]
) -> pa.Table:
    sides = {"a": found["a"], "b": found["b"]}
    best = examples(samples.labels, own, np.concatenate(list(sides.values())).tolist(), 1)
    keys = {
        f"key_{side}": samples.keys(best[label][0] for label in classes.tolist())
        for side, classes in sides.items()
    }
    return pa.table(
        sides
        | {f"images_{side}": images[classes] for side, classes in sides.items()}
        | {name: found[name] for name in ("overlap", "mass_ab", "mass_ba")}
        | {name: pa.array(column, pa.string()) for name, column in keys.items()}
    )


def _label_noise(found: Columns, samples: Samples, images: npt.NDArray[np.int64]) -> pa.Table:
    labels, others = samples.labels[found["row"]].tolist(), found["other"].tolist()
    assigned = set(zip(labels, others, strict=True))
    swapped = [(other, label) in assigned for label, other in zip(labels, others, strict=True)]
    return pa.table(
        _sample_columns(found["row"], samples, images)
        | {name: found[name] for name in ("own", "other", "other_prob")}
        | {
            "other_images": images[found["other"]],
            "lead": found["lead"],
            "swapped": pa.array(swapped, pa.bool_()),
        }
    )


def _sample_columns(
    rows: npt.NDArray[np.int64], samples: Samples, images: npt.NDArray[np.int64]
) -> dict[str, Any]:
    digests = [digest.tobytes() for digest in samples.digests[rows]]
    return {
        "row": rows,
        "key": pa.array(samples.keys(rows), pa.string()),
        "label": samples.labels[rows],
        "digest": pa.array(digests, pa.binary(DIGEST_BYTES)),
        "images": images[samples.labels[rows]],
    }
