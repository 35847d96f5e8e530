"""Reads the teacher's mind: shared identities, labels in doubt and hard images, from a cache alone.

With p' of ``gkd.storage.analysis.posteriors``, the prediction without the label's margin:

    identities   of classes a and b, mass_ab = mean of p'_b over the images x of a and their views,
                 B_ab = mean of sqrt(p'_a p'_b), and overlap = sqrt(B_ab B_ba). An image that is
                 torn between two classes counts, one that simply belongs to the other does not:
                 so overlap tells one person under two labels from a wrong label.
    label noise  lead = c_o - c_y in cosines, mean of the views, o being the class that leads by
                 most of those that come first beside the label in a view: above 0 the teacher
                 takes the image for o. In a view that does not hold it, o counts as far as its
                 absence allows, but leads by no more than in the other.
    hard images  claim = the larger of p'_y and p'_o, means of the views: below 1/2 no class has the
                 image. captured = the mass of all classes that the cache tells of, entropy in nats,
                 both means of the views.

Memory: 29 bytes a sample, one shard, ``most`` rows a list, and at most ``MOST_PAIRS`` sums over
ordered pairs of classes. Of a sample and view the first 16 entries count towards pairs, and of
these what has p' or sqrt(p'_y p') of 1e-4. Where there are more pairs, those with the least means
so far are dropped; ``left_out`` is what the mass or B of a pair can have lost thereby, mostly 0.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gkd.storage.analysis.posteriors import Beliefs
from gkd.storage.cache.reader import DIGEST_BYTES, Cache, Samples
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.target_arrays import cut_out
from gkd.storage.cache.targets import SparseTargets, in_blocks
from gkd.storage.util.progress import progress

MOST_ROWS = 100_000
MOST_PAIRS = 1 << 23
_ENTRIES = 16  # of a sample and view
_LEAST = 1e-4
_BLOCK_ENTRIES = 1 << 22
_CLASS_BITS = 32
_PENDING = 1 << 22
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Confusions:
    """What was found; every list has the worst first.

    identities   a, b, images_a, images_b, overlap, mass_ab, mass_ba, key_a, key_b: the keys are of
                 the image that the teacher is surest of
    label_noise  row, key, label, digest, images (of the label), own (p' of the label), other,
                 other_prob (its p'), other_images, lead, swapped: an image of ``other`` in this
                 list is taken for ``label``
    hard         row, key, label, digest, images, claim, captured, entropy, likeliest
    own          float32 [N]  p' of each sample's label, mean of the views; -1 where skipped
    images       int64 [C]    samples of each class that have targets
    left_out     what a pair's figures can lack because there were too many pairs
    """

    samples: Samples
    identities: pa.Table
    label_noise: pa.Table
    hard: pa.Table
    own: npt.NDArray[np.float32]
    images: npt.NDArray[np.int64]
    left_out: float

    def examples(self, classes: Iterable[int], count: int) -> dict[int, list[int]]:
        """Rows of each class, at most ``count``, those first that the teacher is surest of."""
        chosen = np.array(sorted(set(classes)), np.int64)
        return _examples(self.samples.labels, self.own, chosen, count)


def confusions(cache: Cache, *, most: int = MOST_ROWS, most_pairs: int = MOST_PAIRS) -> Confusions:
    """Go through a finished cache once, shard by shard; at most ``most`` rows a list.

    Raises:
        CorruptShardError: where the cache is damaged.
    """
    spec, samples = cache.spec, cache.samples()
    images = np.bincount(samples.labels[samples.present], minlength=spec.num_classes)
    own = np.full(spec.num_samples, -1, np.float32)
    pairs = _Pairs(images, most_pairs)
    noise, hard = _Top("lead", most), _Top("doubt", most)
    with progress("read the teacher's mind", spec.num_shards, "shards") as advance:
        for shard in range(spec.num_shards):
            views = [cache.read_verified(shard, view) for view in spec.views]
            for block in _blocks(views):
                rows = spec.shard_rows(shard)[block.start : block.stop]
                labels = samples.labels[rows.start : rows.stop]
                read = [Beliefs.of(cut_out(targets, block), labels, spec) for targets in views]
                for beliefs in read:
                    pairs.add(beliefs, labels, 1 / len(read))
                found = _judge(read, labels, spec)
                found["row"] = np.arange(rows.start, rows.stop)
                kept = samples.present[rows.start : rows.stop]
                own[rows.start : rows.stop][kept] = found["own"][kept]
                noise.add(found, kept & (found["lead"] > 0))
                hard.add(found, kept & (found["claim"] < 0.5))
            advance()
    shared = pairs.finish(most)
    return Confusions(
        samples,
        _identities(shared, samples, images, own),
        _label_noise(noise.finish(), samples, images),
        _hard(hard.finish(), samples, images),
        own,
        images,
        pairs.left_out,
    )


def _blocks(views: Sequence[SparseTargets]) -> Iterator[range]:
    """Ranges of samples with few enough entries and draws in all views."""
    offsets = np.sum([targets.offsets for targets in views], axis=0)
    draws = views[0].draws
    if draws is not None:
        offsets = offsets + len(views) * draws.shape[1] * np.arange(len(offsets))
    return in_blocks(offsets, _BLOCK_ENTRIES)


def _judge(views: Sequence[Beliefs], labels: npt.NDArray[np.int64], spec: CacheSpec) -> Columns:
    """What some samples are taken for; columns of undefined value where they were skipped."""
    with np.errstate(invalid="ignore"):
        own = np.mean([np.exp(view.log_own) for view in views], axis=0)
        lead = np.full(len(labels), -np.inf)
        other, other_prob = np.full(len(labels), -1), np.zeros(len(labels))
        for candidate in [view.top_others(labels) for view in views]:
            leads, probs = _against_label(views, candidate, spec)
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


def _against_label(
    views: Sequence[Beliefs], wanted: npt.NDArray[np.int64], spec: CacheSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of one class a sample: how far its cosine is above the label's, and its p'; view means."""
    held = np.stack([view.log_probs_of(wanted) - view.log_own for view in views])
    least = np.fmin.reduce(held)
    bounds = np.stack([view.log_absent - view.log_own for view in views])
    ratios = np.where(np.isnan(held), np.minimum(bounds, least), held)
    probs = np.exp(ratios + np.stack([view.log_own for view in views])).mean(axis=0)
    return spec.group_temperature / spec.scale * ratios.mean(axis=0), probs


class _Top:
    """The rows with the highest ``score``, kept while columns of all rows go by."""

    def __init__(self, score: str, most: int) -> None:
        self.score, self.most = score, most
        self._columns: Columns = {}

    def add(self, columns: Columns, chosen: npt.NDArray[np.bool_]) -> None:
        new = {name: column[chosen] for name, column in columns.items()}
        if self._columns:
            new = {name: np.concatenate([self._columns[name], new[name]]) for name in new}
        self._columns = new
        if len(new["row"]) > 2 * self.most:
            self._columns = self.finish()

    def finish(self) -> Columns:
        order = np.lexsort((self._columns["row"], -self._columns[self.score]))[: self.most]
        return {name: column[order] for name, column in self._columns.items()}


class _Pairs:
    """Sums over ordered pairs of a label and another class, at most ``most`` of them."""

    def __init__(self, images: npt.NDArray[np.int64], most: int) -> None:
        self.images, self.most = images, most
        self.left_out = 0.0
        self._keys = np.empty(0, np.uint64)
        self._sums = np.empty((2, 0))  # of p'_b and of sqrt(p'_a p'_b)
        self._pending: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]] = []

    def add(self, beliefs: Beliefs, labels: npt.NDArray[np.int64], weight: float) -> None:
        rows = beliefs.rows
        first = np.arange(len(rows)) - beliefs.offsets[rows] < _ENTRIES
        places = np.flatnonzero(first & (beliefs.classes != labels[rows]))
        rows = rows[places]
        log_probs = beliefs.log_probs[places]
        sums = np.exp([log_probs, (log_probs + beliefs.log_own[rows]) / 2])
        kept = sums.max(axis=0) >= _LEAST
        rows, places = rows[kept], places[kept]
        keys = labels[rows].astype(np.uint64) << np.uint64(_CLASS_BITS)
        keys |= beliefs.classes[places].astype(np.uint64)
        self._pending.append(_added_up(keys, sums[:, kept] * weight))
        if sum(len(keys) for keys, _ in self._pending) > min(_PENDING, self.most):
            self._merge()

    def _merge(self) -> None:
        parts = [(self._keys, self._sums), *self._pending]
        self._pending = []
        self._keys, self._sums = _added_up(
            np.concatenate([keys for keys, _ in parts]),
            np.concatenate([sums for _, sums in parts], axis=1),
        )
        if len(self._keys) > self.most:
            means = (self._sums / self._images_of(self._keys)).max(axis=0)
            cut = len(means) - max(self.most // 2, 1)
            order = np.argpartition(means, cut - 1)
            self.left_out += float(means[order[cut - 1]])
            kept = np.sort(order[cut:])
            self._keys, self._sums = self._keys[kept], self._sums[:, kept]

    def _images_of(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return self.images[(keys >> np.uint64(_CLASS_BITS)).astype(np.int64)]

    def finish(self, most: int) -> Columns:
        """Pairs a < b that overlap, at most ``most``, by descending overlap."""
        self._merge()
        bits = np.uint64(_CLASS_BITS)
        turned = (self._keys << bits) | (self._keys >> bits)
        ahead = np.flatnonzero(self._keys < turned)
        places = np.searchsorted(self._keys, turned[ahead])
        inside = places < len(self._keys)
        ahead, places = ahead[inside], places[inside]
        mutual = self._keys[places] == turned[ahead]
        ahead, places = ahead[mutual], places[mutual]
        there, back = (
            self._sums[:, chosen] / self._images_of(self._keys[chosen])
            for chosen in (ahead, places)
        )
        overlap = np.sqrt(there[1] * back[1])
        order = np.argsort(-overlap, kind="stable")[:most]
        ahead = ahead[order]
        return {
            "a": (self._keys[ahead] >> bits).astype(np.int64),
            "b": (turned[ahead] >> bits).astype(np.int64),
            "overlap": overlap[order],
            "mass_ab": there[0][order],
            "mass_ba": back[0][order],
        }


def _added_up(
    keys: npt.NDArray[np.uint64], sums: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Keys [n] ascending and once each, with the ``sums`` [2, n] of equal ones added."""
    order = np.argsort(keys, kind="stable")
    keys, sums = keys[order], sums[:, order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    return keys[starts], np.add.reduceat(sums, starts, axis=1) if len(starts) else sums


# --- tables ---------------------------------------------------------------------------------------


def _identities(
    found: Columns, samples: Samples, images: npt.NDArray[np.int64], own: npt.NDArray[np.float32]
) -> pa.Table:
    classes = np.unique([found["a"], found["b"]])
    best = {each: rows[0] for each, rows in _examples(samples.labels, own, classes, 1).items()}
    keys = keys_of(samples, best.values())
    columns: Mapping[str, Any] = {
        "a": found["a"],
        "b": found["b"],
        "images_a": images[found["a"]],
        "images_b": images[found["b"]],
        **{name: found[name] for name in ("overlap", "mass_ab", "mass_ba")},
        "key_a": pa.array([keys[best[each]] for each in found["a"].tolist()], pa.string()),
        "key_b": pa.array([keys[best[each]] for each in found["b"].tolist()], pa.string()),
    }
    return pa.table(columns)


def _label_noise(found: Columns, samples: Samples, images: npt.NDArray[np.int64]) -> pa.Table:
    labels = samples.labels[found["row"]]
    taken_for = set(zip(labels.tolist(), found["other"].tolist(), strict=True))
    swapped = [
        (other, label) in taken_for
        for label, other in zip(labels.tolist(), found["other"].tolist(), strict=True)
    ]
    return pa.table(
        _sample_columns(found["row"], samples, images)
        | {name: found[name] for name in ("own", "other", "other_prob")}
        | {
            "other_images": images[found["other"]],
            "lead": found["lead"],
            "swapped": pa.array(swapped, pa.bool_()),
        }
    )


def _hard(found: Columns, samples: Samples, images: npt.NDArray[np.int64]) -> pa.Table:
    names = ("claim", "captured", "entropy", "likeliest")
    return pa.table(
        _sample_columns(found["row"], samples, images) | {name: found[name] for name in names}
    )


def _sample_columns(
    rows: npt.NDArray[np.int64], samples: Samples, images: npt.NDArray[np.int64]
) -> dict[str, Any]:
    keys = keys_of(samples, rows.tolist())
    digests = [digest.tobytes() for digest in samples.digests[rows]]
    return {
        "row": rows,
        "key": pa.array([keys[row] for row in rows.tolist()], pa.string()),
        "label": samples.labels[rows],
        "digest": pa.array(digests, pa.binary(DIGEST_BYTES)),
        "images": images[samples.labels[rows]],
    }


def keys_of(samples: Samples, rows: Iterable[int]) -> dict[int, str]:
    """Record keys of some rows, one shard's table in memory at a time."""
    keys: dict[int, str] = {}
    ascending = np.unique(np.fromiter(rows, np.int64))
    shards = ascending // samples.cache.spec.shard_samples
    for part in np.split(ascending, np.flatnonzero(np.diff(shards)) + 1):
        keys.update(zip(part.tolist(), samples.keys(part), strict=True))
    return keys


def _examples(
    labels: npt.NDArray[np.int64],
    own: npt.NDArray[np.float32],
    classes: npt.NDArray[np.int64],
    count: int,
) -> dict[int, list[int]]:
    rows = np.flatnonzero(np.isin(labels, classes) & (own >= 0))
    rows = rows[np.lexsort((rows, -own[rows], labels[rows]))]
    starts = np.searchsorted(labels[rows], classes)
    stops = np.searchsorted(labels[rows], classes, side="right")
    return {
        each: rows[start : min(stop, start + count)].tolist()
        for each, start, stop in zip(classes.tolist(), starts.tolist(), stops.tolist(), strict=True)
    }
