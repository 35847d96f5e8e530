"""What targets say, held against what a teacher can have said.

Hashes prove that bytes are those that were written; this proves that what was written can be. It
is asked before any target of a cache is used; ``gkd targets verify --deep`` also holds masses of
all temperatures and draws against groups.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.draw_checks import check_draws
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.targets import (
    MAX_CODE,
    STEPS_PER_OCTAVE,
    SparseTargets,
    in_blocks,
    offsets_from_sizes,
)

# Half a step of the codes is 3.4e-4 of a probability; the rest is the teacher's own rounding.
MASS_TOLERANCE = 6e-4
LOG_MASS_TOLERANCE = 1e-6
# Small enough for a core's cache: sorting is most of the work.
_BLOCK_ENTRIES = 1 << 16
# Spreads neighbours over the whole range, by Fibonacci hashing.
_GOLDEN = np.uint32(2654435769)
_MOST_ROUNDS = 16
# Mass below which a tail may count as none.
_LEAST_LOG_MASS = -80.0


def check_invariants(
    spec: CacheSpec,
    targets: SparseTargets,
    labels: npt.NDArray[np.int64],
    present: npt.NDArray[np.bool_],
    *,
    deep: bool = False,
) -> Iterator[tuple[str, int, str]]:
    """What targets [n] say that cannot be: array, first sample, problem.

    Group sizes are 1 or more where ``present`` and 0 elsewhere; classes are unique within a
    sample and hold its label; codes ascend; secondary masses are at most 1 and no NaN; at
    ``group_temperature``, where that is stored, group and secondary mass are 1 together. ``deep``:
    that at each other one is such as some tail of classes gives, and draws are as ``check_draws``
    says.
    """
    filled = targets.sizes > 0
    if (filled != present).any():
        yield "sizes", int((filled != present).argmax()), "an empty group, or one of a skipped"
        return
    wrong = ~(targets.secondary <= LOG_MASS_TOLERANCE)
    if wrong.any():
        yield "secondary", int(wrong.any(axis=1).argmax()), "a log mass above 0 or not a number"
        return
    if targets.draws is not None and targets.draws.secondary is not None:
        wrong = ~(targets.draws.secondary <= LOG_MASS_TOLERANCE)
        if wrong.any():
            yield "draw_secondary", int(wrong.argmax()), "a log mass above 0 or not a number"
            return
    found: set[str] = set()
    for block in in_blocks(targets.offsets, _BLOCK_ENTRIES):
        for name, sample, problem in _check_block(spec, targets, labels, block, deep=deep):
            if problem not in found:
                found.add(problem)
                yield name, block.start + sample, problem
    if deep:
        yield from check_draws(spec, targets, present)


def _check_block(
    spec: CacheSpec,
    targets: SparseTargets,
    labels: npt.NDArray[np.int64],
    block: range,
    *,
    deep: bool,
) -> Iterator[tuple[str, int, str]]:
    offsets = targets.offsets[block.start : block.stop + 1]
    sizes = np.diff(offsets)
    entries = slice(offsets[0], offsets[-1])
    indices, codes = targets.indices[entries], targets.log2_probs[entries]
    samples = np.repeat(np.arange(len(sizes)), sizes)
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return

    if _may_repeat(indices, sizes):
        keyed = np.sort(samples << 32 | indices)
        twice = keyed[1:] == keyed[:-1]
        if twice.any():
            yield "indices", int(keyed[1:][twice][0] >> 32), "a class twice in a group"

    with_label = np.zeros(len(sizes), bool)
    block_labels = labels[block.start : block.stop]
    with_label[samples[indices == np.repeat(block_labels, sizes)]] = True
    if not with_label[filled].all():
        yield "indices", int(filled[~with_label[filled]][0]), "its label is not in its group"

    falls = (codes[1:] < codes[:-1]) & (samples[1:] == samples[:-1])
    if falls.any():
        yield "log2_probs", int(samples[1:][falls][0]), "probabilities that do not descend"

    secondary = targets.secondary[block.start : block.stop][filled].astype(np.float64)
    groups = _Groups(codes, sizes[filled])
    others = [t for t in spec.temperatures if deep and t != spec.group_temperature]
    for wrong, problem in _mass_faults(spec, groups, secondary, others):
        if wrong.any():
            yield "secondary", int(filled[wrong.argmax()]), problem


def _may_repeat(indices: npt.NDArray[np.uint32], sizes: npt.NDArray[np.int64]) -> bool:
    """Whether a class may be twice in a group of ``sizes``; never wrong where it says no.

    Sorting tells, at several times the cost of all else here. Instead the entries of each group are
    hashed into a table of its own. Where some meet in one place the last written is compared with
    the others, which are then hashed again without it.
    """
    bits = np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.uint32) + np.uint32(2)
    starts = offsets_from_sizes(np.int64(1) << bits.astype(np.int64))
    places = np.repeat(starts[:-1], sizes)
    places += (indices * _GOLDEN) >> np.repeat(np.uint32(32) - bits, sizes)
    table = np.empty(starts[-1], np.int32)
    left = np.arange(len(indices), dtype=np.int32)
    for _ in range(_MOST_ROUNDS):
        table[places] = left
        stayed = table[places]
        lost = np.flatnonzero(stayed != left)
        if not len(lost):
            return False
        if (indices[left[lost]] == indices[stayed[lost]]).any():
            return True
        left, places = left[lost], places[lost]
    return True


class _Groups:
    """The groups of some samples, none of them empty; ``sizes`` int64 [n]."""

    def __init__(self, codes: npt.NDArray[np.uint16], sizes: npt.NDArray[np.int64]) -> None:
        self.sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._peaks = codes[self._starts]
        # Of weights far below 1 even the first of a group could vanish.
        self._below = codes - np.repeat(self._peaks, sizes)
        ends = self._starts + sizes - 1
        self._clamped = np.flatnonzero(codes[ends] == MAX_CODE)
        self._clamps = np.zeros(len(sizes))
        if len(self._clamped):
            counts = np.add.reduceat(codes == MAX_CODE, self._starts, dtype=np.int64)
            self._clamps = counts.astype(np.float64)

    def log_totals(
        self, exponent: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Least and most log of the sum of p^exponent over each group, by the codes."""
        weights = _weights(exponent)
        totals = np.add.reduceat(weights.take(self._below), self._starts)
        scale = -np.log(2.0) / STEPS_PER_OCTAVE * exponent
        most = np.log(totals) + self._peaks * scale
        least = most
        if len(self._clamped):
            # What is clamped may be anything from 0 on.
            clamped = self._clamps * weights[MAX_CODE - self._peaks.astype(np.intp)]
            with np.errstate(divide="ignore"):
                least = np.log(np.maximum(totals - clamped, 0)) + self._peaks * scale
            least[self._clamps == self.sizes] = -np.inf
        return least, most


@functools.lru_cache(maxsize=16)
def _weights(exponent: float) -> npt.NDArray[np.float64]:
    """p^exponent of every code, float64 [65536]."""
    weights: npt.NDArray[np.float64] = np.exp2(
        np.arange(MAX_CODE + 1) * (-exponent / STEPS_PER_OCTAVE)
    )
    return weights


def _mass_faults(
    spec: CacheSpec,
    groups: _Groups,
    secondary: npt.NDArray[np.float64],
    others: Sequence[float],
) -> Iterator[tuple[npt.NDArray[np.bool_], str]]:
    """Where masses [n, t] cannot be those of the groups, bool [n], and what that means.

    In units of p at the group's temperature g, the m classes outside a group have s together. At
    g / a they have sum p^a, which is s^a where one class holds all of it and m^(1 - a) s^a where
    all hold the same, and in between for every other tail; the group has the sum of its own p^a.
    Codes are right to ``MASS_TOLERANCE``, and p^a then to a times that.
    """
    inside = np.exp(groups.log_totals(1.0)[1])
    if spec.group_temperature in spec.temperatures:
        log_tail = secondary[:, spec.temperatures.index(spec.group_temperature)]
        wrong = ~(np.abs(inside + np.exp(log_tail) - 1) <= MASS_TOLERANCE)
        yield wrong, "group and secondary mass that are not 1 together"
        least, most = log_tail - MASS_TOLERANCE, log_tail + MASS_TOLERANCE
    else:
        yield ~(inside <= 1 + MASS_TOLERANCE), "a group of more than all mass"
        with np.errstate(divide="ignore"):
            least, most = (
                np.log(np.maximum(1 - inside + slack, 0))
                for slack in (-MASS_TOLERANCE, MASS_TOLERANCE)
            )
    most = np.maximum(most, _LEAST_LOG_MASS)
    log_classes = np.log(np.maximum(spec.num_classes - groups.sizes, 1))
    for temperature in others:
        column = spec.temperatures.index(temperature)
        power = spec.group_temperature / temperature
        spread = (1 - power) * log_classes
        inside_least, inside_most = groups.log_totals(power)
        slack = MASS_TOLERANCE * max(power, 1)
        low = _share(power * least + np.minimum(spread, 0), inside_most + slack)
        high = _share(power * most + np.maximum(spread, 0), inside_least - slack)
        mass = np.exp(secondary[:, column])
        wrong = (mass < low * (1 - slack) - LOG_MASS_TOLERANCE) | (
            mass > high * (1 + slack) + LOG_MASS_TOLERANCE
        )
        yield wrong, f"a secondary mass at {temperature:g} that no tail of classes gives"


def _share(
    outside: npt.NDArray[np.float64], inside: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Share of the first of two log masses in both."""
    return np.exp(-np.logaddexp(0, inside - outside))
