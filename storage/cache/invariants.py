"""Checks that targets are a possible prediction of a teacher.

Hashes prove that bytes are those that were written; invariants prove that what was written is
consistent. They are checked before any target of a cache is used; ``gkd targets verify --deep``
also compares masses of all temperatures, and draws, with the groups.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import CacheSpec, DrawsSpec
from gkd.storage.cache.targets import (
    MAX_CODE,
    STEPS_PER_OCTAVE,
    Draws,
    SparseTargets,
    at_temperature,
    decode_log_probs,
    in_blocks,
)

# Half a step of the codes is 3.4e-4 of a probability; the rest is the teacher's own rounding.
MASS_TOLERANCE = 6e-4
LOG_MASS_TOLERANCE = 1e-6
HALF_STEP = math.log(2) / STEPS_PER_OCTAVE / 2
# Of a log-probability that the teacher computes twice, by different sums.
ROUNDING = 1e-3
# Few enough to sort within a core's cache.
_BLOCK_ENTRIES = 1 << 16
# A tail of less mass may as well be empty.
_MIN_LOG_MASS = -80.0

# Array, first sample concerned, and what is wrong.
Problem = tuple[str, int, str]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def check_invariants(
    spec: CacheSpec,
    targets: SparseTargets,
    labels: npt.NDArray[np.int64],
    present: Bools,
    *,
    deep: bool = False,
) -> Iterator[Problem]:
    """Invariants that targets [n] violate.

    Group sizes are 1 or more if ``present`` and else 0; classes are unique within a sample and
    include its label; codes ascend; secondary masses are numbers of at most 1; group and secondary
    mass sum to 1 at ``group_temperature`` if that is stored. ``deep``: the secondary mass at every
    other temperature is that of some tail of classes, and draws fit the groups.
    """
    filled = targets.sizes > 0
    if (filled != present).any():
        yield (
            "sizes",
            int((filled != present).argmax()),
            "an empty group, or one of a skipped sample",
        )
        return
    for name, masses in targets.arrays().items():
        if name in ("secondary", "draw_secondary"):
            wrong = ~(masses.reshape(len(targets), -1) <= LOG_MASS_TOLERANCE).all(axis=1)
            if wrong.any():
                yield name, int(wrong.argmax()), "a log mass above 0 or not a number"
                return
    found: set[str] = set()
    for block in in_blocks(targets.offsets, _BLOCK_ENTRIES):
        here = slice(block.start, block.stop)
        for name, sample, problem in _check_groups(
            spec, targets.slice(block), labels[here], deep=deep
        ):
            if problem not in found:
                found.add(problem)
                yield name, block.start + sample, problem
    if deep and spec.draws is not None:
        yield from _check_draws(spec, spec.draws, targets, present)


def _check_groups(
    spec: CacheSpec, targets: SparseTargets, labels: npt.NDArray[np.int64], *, deep: bool
) -> Iterator[Problem]:
    sizes, indices, codes = targets.sizes, targets.indices, targets.log2_probs
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return
    samples = _sample_of_each(targets)
    keys = np.sort(samples << 32 | indices)
    repeated = keys[1:] == keys[:-1]
    if repeated.any():
        yield "indices", int(keys[1:][repeated][0] >> 32), "a class twice in a group"

    with_label = np.zeros(len(sizes), bool)
    with_label[samples[indices == labels[samples]]] = True
    if not with_label[filled].all():
        yield "indices", int(filled[~with_label[filled]][0]), "its label is not in its group"

    ascending = (codes[1:] < codes[:-1]) & (samples[1:] == samples[:-1])
    if ascending.any():
        yield "log2_probs", int(samples[1:][ascending][0]), "probabilities that do not descend"

    others = [t for t in spec.temperatures if deep and t != spec.group_temperature]
    groups = _Groups(codes, sizes[filled])
    secondary = targets.secondary[filled].astype(np.float64)
    for wrong, problem in _check_masses(spec, groups, secondary, others):
        if wrong.any():
            yield "secondary", int(filled[wrong.argmax()]), problem


class _Groups:
    """The groups of some samples, none of them empty; ``sizes`` int64 [n]."""

    def __init__(self, codes: npt.NDArray[np.uint16], sizes: npt.NDArray[np.int64]) -> None:
        self.sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._peaks = codes[self._starts]
        # Relative to the first of the group, which alone could underflow.
        self._below = codes - np.repeat(self._peaks, sizes)
        self._clamped = np.add.reduceat(codes == MAX_CODE, self._starts, dtype=np.int64)

    def log_totals(self, exponent: float) -> tuple[Floats, Floats]:
        """Bounds of the log of the sum of p^exponent over each group, by the codes."""
        weights = _weights(exponent)
        totals = np.add.reduceat(weights.take(self._below), self._starts)
        shift = self._peaks * (-np.log(2.0) / STEPS_PER_OCTAVE * exponent)
        # A clamped code stands for any probability from 0 on.
        clamped = self._clamped * weights[MAX_CODE - self._peaks.astype(np.intp)]
        with np.errstate(divide="ignore"):
            lower = np.log(np.maximum(totals - clamped, 0)) + shift
        lower[self._clamped == self.sizes] = -np.inf
        return lower, np.log(totals) + shift


@functools.lru_cache(maxsize=16)
def _weights(exponent: float) -> Floats:
    """p^exponent of every code, float64 [65536]."""
    weights: Floats = np.exp2(np.arange(MAX_CODE + 1) * (-exponent / STEPS_PER_OCTAVE))
    return weights


def _check_masses(
    spec: CacheSpec, groups: _Groups, secondary: Floats, others: Sequence[float]
) -> Iterator[tuple[Bools, str]]:
    """Which masses [n, t] cannot be those of the groups, bool [n], and why.

    In units of p at the group's temperature g, the m classes outside a group have s together. At
    g / a they have sum p^a, which is s^a if one class holds all of it, m^(1 - a) s^a if all hold
    the same, and between these for every other tail; the group has the sum of its own p^a.
    Codes are accurate to ``MASS_TOLERANCE``, and p^a then to a times that.
    """
    inside = np.exp(groups.log_totals(1.0)[1])
    if spec.group_temperature in spec.temperatures:
        log_tail = secondary[:, spec.temperatures.index(spec.group_temperature)]
        wrong = ~(np.abs(inside + np.exp(log_tail) - 1) <= MASS_TOLERANCE)
        yield wrong, "group and secondary mass that do not sum to 1"
        lower, upper = log_tail - MASS_TOLERANCE, log_tail + MASS_TOLERANCE
    else:
        yield ~(inside <= 1 + MASS_TOLERANCE), "a group mass above 1"
        with np.errstate(divide="ignore"):
            lower = np.log(np.maximum(1 - inside - MASS_TOLERANCE, 0))
            upper = np.log(np.maximum(1 - inside + MASS_TOLERANCE, 0))
    upper = np.maximum(upper, _MIN_LOG_MASS)
    log_classes = np.log(np.maximum(spec.num_classes - groups.sizes, 1))
    for temperature in others:
        power = spec.group_temperature / temperature
        spread = (1 - power) * log_classes
        inside_lower, inside_upper = groups.log_totals(power)
        slack = MASS_TOLERANCE * max(power, 1)
        low = _share(power * lower + np.minimum(spread, 0), inside_upper + slack)
        high = _share(power * upper + np.maximum(spread, 0), inside_lower - slack)
        mass = np.exp(secondary[:, spec.temperatures.index(temperature)])
        wrong = (mass < low * (1 - slack) - LOG_MASS_TOLERANCE) | (
            mass > high * (1 + slack) + LOG_MASS_TOLERANCE
        )
        yield wrong, f"a secondary mass at {temperature:g} that no tail of classes has"


def _share(outside: Floats, inside: Floats) -> Floats:
    """Share of the first of two log masses in their sum."""
    return np.exp(-np.logaddexp(0, inside - outside))


def _check_draws(
    spec: CacheSpec, drawn: DrawsSpec, targets: SparseTargets, present: Bools
) -> Iterator[Problem]:
    """Invariants that the draws of targets [n] violate.

    Those of a skipped sample are zeros. A class has one code, that of its entry if it has one, and
    the distinct classes of a sample have at most the mass of what they were drawn from. Draws from
    a group that is stored completely are in it, and the mass outside it is the stored one.
    """
    draws = targets.draws
    assert draws is not None
    for name, values in targets.arrays().items():
        if name.startswith("draw"):
            wrong = (values.reshape(len(values), -1) != 0).any(1) & ~present
            if wrong.any():
                yield name, int(wrong.argmax()), "draws of a skipped sample"

    order = np.argsort(draws.classes, axis=1, kind="stable")
    classes = np.take_along_axis(draws.classes, order, 1)
    codes = np.take_along_axis(draws.log2_probs, order, 1)
    again = classes[:, 1:] == classes[:, :-1]
    wrong = (again & (codes[:, 1:] != codes[:, :-1])).any(1)
    if wrong.any():
        yield "draw_log2_probs", int(wrong.argmax()), "a class with two probabilities"

    first = np.concatenate([np.ones((len(classes), 1), bool), ~again], 1)
    # The code of a probability below 2^-64 stands for a larger one.
    probs = np.exp(decode_log_probs(codes), dtype=np.float64) * (codes < MAX_CODE)
    mass, available = (probs * first).sum(1), np.ones(len(classes))
    if draws.secondary is not None:
        available = -np.expm1(np.minimum(draws.secondary.astype(np.float64), 0))
    wrong = present & ~(mass <= available * (1 + HALF_STEP) + ROUNDING)
    if wrong.any():
        yield "draw_log2_probs", int(wrong.argmax()), "distinct classes of more mass than there is"

    entries = _entry_of_each_draw(spec, targets, draws)
    complete = present & (targets.sizes < spec.max_group)
    wrong = complete & (entries < 0).any(1)
    if drawn.source == "primary" and wrong.any():
        yield "draws", int(wrong.argmax()), "a class outside the group that it was drawn from"
    if draws.secondary is not None:
        # Compared as masses: the log of almost nothing is arbitrary.
        column = targets.secondary[:, spec.temperatures.index(drawn.temperature)]
        mass, stored = (np.exp(log, dtype=np.float64) for log in (draws.secondary, column))
        equal = np.abs(mass - stored) <= ROUNDING
        wrong = present & ~(equal | (~complete & (mass <= stored)))
        if wrong.any():
            yield "draw_secondary", int(wrong.argmax()), "not the mass outside its group"
    yield from _check_draw_codes(spec, drawn, targets, draws, entries)


def _check_draw_codes(
    spec: CacheSpec,
    drawn: DrawsSpec,
    targets: SparseTargets,
    draws: Draws,
    entries: npt.NDArray[np.int64],
) -> Iterator[Problem]:
    log_probs = at_temperature(
        targets,
        drawn.temperature,
        group_temperature=spec.group_temperature,
        temperatures=spec.temperatures,
    ).log_probs
    # The group's own rounding grows with the ratio; a clamped entry distorts all others.
    ratio = spec.group_temperature / drawn.temperature
    clamped = np.zeros(len(targets), bool)
    clamped[_sample_of_each(targets)[targets.log2_probs == MAX_CODE]] = True
    rows, columns = np.nonzero((entries >= 0) & ~clamped[:, None])
    found = decode_log_probs(draws.log2_probs[rows, columns])
    stored = np.maximum(log_probs[entries[rows, columns]], -2 * HALF_STEP * MAX_CODE)
    wrong = ~(np.abs(found - stored) <= HALF_STEP * (1 + 2 * ratio) + ROUNDING)
    if wrong.any():
        yield "draw_log2_probs", int(rows[wrong][0]), "not the probability of its entry"


def _entry_of_each_draw(
    spec: CacheSpec, targets: SparseTargets, draws: Draws
) -> npt.NDArray[np.int64]:
    """Position among all entries of each drawn class, int64 [n, d], -1 for none."""
    entries = _sample_of_each(targets) * spec.num_classes + targets.indices
    wanted = np.arange(len(targets))[:, None] * spec.num_classes + draws.classes.astype(np.int64)
    if not len(entries):
        return np.full(wanted.shape, -1)
    order = np.argsort(entries, kind="stable")
    found = order[np.searchsorted(entries, wanted, sorter=order).clip(max=len(entries) - 1)]
    return np.where(entries[found] == wanted, found, -1)


def _sample_of_each(targets: SparseTargets) -> npt.NDArray[np.int64]:
    """The sample of each entry, int64 [E]."""
    return np.repeat(np.arange(len(targets), dtype=np.int64), targets.sizes)
