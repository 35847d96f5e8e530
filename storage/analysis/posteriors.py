"""The teacher's posterior of each sample: its stored prediction without the label's margin.

A cache holds p = softmax(z / T) at T = group_temperature, z_j = scale * (c_j - margin * [j = y]).
The margin serves training and would bias an analysis. With m = scale * margin / T, exactly,

    p'_j = p_j / Z,   p'_y = p_y e^m / Z,   Z = 1 + p_y (e^m - 1)
    c_j - c_y = (T / scale) (log p'_j - log p'_y)

so a cache gives the difference of two cosines although it stores no cosine.

Drawn classes are entries too. Their probabilities are known at the draws' temperature D. Relative
to the first class t of the group, which is known at both temperatures,

    log p_j(T) = log p_t(T) + (D / T) (log p_j(D) - log p_t(D))
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.targets import (
    SparseTargets,
    at_temperature,
    decode_log_probs,
    offsets_from_sizes,
)

_CLASS_BITS = 32


@dataclass(frozen=True)
class Posteriors:
    """p' of n samples with E entries in all; a sample's classes descend, except for its label.

    offsets     int64   [n + 1]
    rows        int64   [E]   the sample of each entry
    classes     int64   [E]
    log_probs   float64 [E]   natural log of p'
    log_own     float64 [n]   log p' of the label; -inf if the sample was skipped
    log_rest    float64 [n]   log of the sum of p' over all classes without an entry
    log_absent  float64 [n]   upper bound on log p' of any class without an entry
    """

    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]
    log_own: npt.NDArray[np.float64]
    log_rest: npt.NDArray[np.float64]
    log_absent: npt.NDArray[np.float64]

    @classmethod
    def from_targets(
        cls, targets: SparseTargets, labels: npt.NDArray[np.int64], spec: CacheSpec
    ) -> Self:
        """Posteriors of stored targets; each group must contain its label, ``labels`` int64 [n]."""
        count, temperature = len(targets), spec.group_temperature
        rows = np.repeat(np.arange(count), targets.sizes)
        classes = targets.indices.astype(np.int64)
        if temperature in spec.temperatures:
            # The stored secondary mass is more precise than the sum of rounded probabilities.
            log_probs, log_rest = _at(targets, temperature, spec)
        else:
            log_probs = decode_log_probs(targets.log2_probs).astype(np.float64)
            log_rest = _log(1.0 - _sums(rows, np.exp(log_probs), count))
        log_absent = log_rest.copy()
        others = classes != labels[rows]
        np.minimum.at(log_absent, rows[others], log_probs[others])
        if spec.draws is not None:
            keys, drawn = _drawn(targets, log_probs, log_rest, spec)
            rows = np.concatenate([rows, keys >> _CLASS_BITS])
            classes = np.concatenate([classes, keys & ((1 << _CLASS_BITS) - 1)])
            log_probs = np.concatenate([log_probs, drawn])
            order = np.lexsort((-log_probs, rows))
            rows, classes, log_probs = rows[order], classes[order], log_probs[order]
            mass = _sums(keys >> _CLASS_BITS, np.exp(drawn), count)
            log_rest = _log(np.exp(log_rest) - mass)
            log_absent = np.minimum(log_absent, log_rest)

        is_label = classes == labels[rows]
        log_own = np.full(count, -np.inf)
        log_own[rows[is_label]] = np.minimum(log_probs[is_label], 0)
        gain = spec.scale * spec.margin / temperature
        log_z = np.logaddexp(_log(-np.expm1(log_own)), log_own + gain)
        return cls(
            offsets=offsets_from_sizes(np.bincount(rows, minlength=count)),
            rows=rows,
            classes=classes,
            log_probs=log_probs + gain * is_label - log_z[rows],
            log_own=log_own + gain - log_z,
            log_rest=log_rest - log_z,
            log_absent=log_absent - log_z,
        )

    def top_others(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The likeliest class of each sample other than its label, int64 [n]; -1 if none."""
        found = np.full(len(labels), -1)
        starts, stops = self.offsets[:-1], self.offsets[1:]
        for entry in (starts + 1, starts):  # at most one of the two is the label
            exists = np.flatnonzero(entry < stops)
            classes = self.classes[entry[exists]]
            other = classes != labels[exists]
            found[exists[other]] = classes[other]
        return found

    def log_probs_of(self, classes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """log p' of one class a sample, ``classes`` int64 [n]; NaN if it has no entry."""
        found = np.full(len(classes), np.nan)
        hit = self.classes == classes[self.rows]
        found[self.rows[hit]] = self.log_probs[hit]
        return found

    def entropy(self) -> npt.NDArray[np.float64]:
        """Entropy in nats, float64 [n]; all classes without an entry count as one."""
        parts = -np.exp(self.log_probs) * self.log_probs
        rest = np.exp(self.log_rest)
        rest = rest * np.where(rest > 0, -self.log_rest, 0)
        return _sums(self.rows, parts, len(rest)) + rest


def _at(
    targets: SparseTargets, temperature: float, spec: CacheSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    batch = at_temperature(
        targets,
        temperature,
        group_temperature=spec.group_temperature,
        temperatures=spec.temperatures,
    )
    return batch.log_probs.astype(np.float64), batch.log_secondary.astype(np.float64)


def _drawn(
    targets: SparseTargets,
    log_probs: npt.NDArray[np.float64],
    log_rest: npt.NDArray[np.float64],
    spec: CacheSpec,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Drawn classes that the group lacks, as sample << 32 | class, and their log p(T)."""
    assert spec.draws is not None
    assert targets.draws is not None
    filled = np.flatnonzero(targets.sizes)
    keys = (filled[:, None] << _CLASS_BITS) | targets.draws.classes[filled]
    keys, first = np.unique(keys, return_index=True)
    rows = np.repeat(np.arange(len(targets)), targets.sizes)
    new = ~np.isin(keys, (rows << _CLASS_BITS) | targets.indices)
    codes = targets.draws.log2_probs[filled].reshape(-1)[first][new]
    keys = keys[new]

    softened, _ = _at(targets, spec.draws.temperature, spec)
    ratio = spec.draws.temperature / spec.group_temperature
    base = np.zeros(len(targets))
    top = targets.offsets[:-1][filled]
    base[filled] = log_probs[top] - ratio * softened[top]
    rows = keys >> _CLASS_BITS
    drawn = base[rows] + ratio * decode_log_probs(codes).astype(np.float64)
    return keys, np.minimum(drawn, log_rest[rows])


def _sums(
    rows: npt.NDArray[np.int64], values: npt.NDArray[np.float64], count: int
) -> npt.NDArray[np.float64]:
    return np.bincount(rows, values, minlength=count).astype(np.float64)


def _log(mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Natural log; -inf if rounding made the mass zero or negative."""
    with np.errstate(divide="ignore"):
        logs: npt.NDArray[np.float64] = np.log(np.maximum(mass, 0))
    return logs
