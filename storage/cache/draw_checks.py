"""What draws say that cannot be, told without the teacher."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import CacheSpec, DrawsSpec
from gkd.storage.cache.targets import (
    MAX_CODE,
    STEPS_PER_OCTAVE,
    SparseTargets,
    at_temperature,
    decode_log_probs,
)

HALF_STEP = math.log(2) / STEPS_PER_OCTAVE / 2
# What the teacher's own rounding, in other sums, may make of a log-probability.
ROUNDING = 1e-3


def check_draws(
    spec: CacheSpec, targets: SparseTargets, present: npt.NDArray[np.bool_]
) -> Iterator[tuple[str, int, str]]:
    """What the draws of targets [n] say that cannot be: array, first sample, problem.

    A skipped sample has zeros. A class has one code, that of its entry where it is one, and the
    distinct classes of a sample have at most all mass, or their group's. Those drawn from a group
    that is stored whole are in it, and the mass outside it is the stored one.
    """
    if spec.draws is None:
        return
    assert targets.draws is not None
    draws, codes = targets.draws.classes, targets.draws.log2_probs
    for name in ("draws", "draw_log2_probs", "draw_secondary"):
        values = targets.arrays().get(name)
        if values is not None and (wrong := values[~present] != 0).any():
            where = np.flatnonzero(~present)[wrong.reshape(len(wrong), -1).any(1)]
            yield name, int(where[0]), "draws of a sample that was skipped"

    order = np.argsort(draws, axis=1, kind="stable")
    classes = np.take_along_axis(draws, order, 1)
    their_codes = np.take_along_axis(codes, order, 1)
    again = classes[:, 1:] == classes[:, :-1]
    wrong = (again & (their_codes[:, 1:] != their_codes[:, :-1])).any(1)
    if wrong.any():
        yield "draw_log2_probs", int(wrong.argmax()), "a class with two probabilities"

    first = np.concatenate([np.ones((len(draws), 1), bool), ~again], 1)
    # Codes of what is below 2^-64 stand for more than it.
    probs = np.exp(decode_log_probs(their_codes), dtype=np.float64) * (their_codes < MAX_CODE)
    mass, most = (probs * first).sum(1), np.ones(len(draws))
    if targets.draws.secondary is not None:
        most = -np.expm1(np.minimum(targets.draws.secondary.astype(np.float64), 0))
    wrong = present & ~(mass <= most * (1 + HALF_STEP) + ROUNDING)
    if wrong.any():
        yield (
            "draw_log2_probs",
            int(wrong.argmax()),
            "distinct classes with more mass than there is",
        )
    yield from _check_entries(spec, spec.draws, targets, present)


def _check_entries(
    spec: CacheSpec, draws: DrawsSpec, targets: SparseTargets, present: npt.NDArray[np.bool_]
) -> Iterator[tuple[str, int, str]]:
    """Draws against the stored entries."""
    assert targets.draws is not None
    found = _entry_of_each(spec, targets)
    whole = present & (targets.sizes < spec.max_group)
    if draws.source == "primary" and (wrong := whole & (found < 0).any(1)).any():
        yield "draws", int(wrong.argmax()), "a class that is not in the group it was drawn from"
    column = targets.secondary[:, spec.temperatures.index(draws.temperature)]
    outside = targets.draws.secondary
    if outside is not None:
        # As a mass: the log of next to nothing may be any.
        mass, stored = np.exp(outside, dtype=np.float64), np.exp(column, dtype=np.float64)
        equal = np.abs(mass - stored) <= ROUNDING
        wrong = present & ~(equal | (~whole & (mass <= stored)))
        if wrong.any():
            yield "draw_secondary", int(wrong.argmax()), "another mass than is outside its group"

    log_probs = at_temperature(
        targets,
        draws.temperature,
        group_temperature=spec.group_temperature,
        temperatures=spec.temperatures,
    ).log_probs
    # The group's own rounding grows with the ratio; what was clamped tells nothing of the others.
    ratio = spec.group_temperature / draws.temperature
    clamped = np.zeros(len(targets), bool)
    clamped[np.repeat(np.arange(len(targets)), targets.sizes)[targets.log2_probs == MAX_CODE]] = (
        True
    )
    rows, places = np.nonzero((found >= 0) & ~clamped[:, None])
    drawn = decode_log_probs(targets.draws.log2_probs[rows, places])
    stored = log_probs[found[rows, places]]
    away = np.abs(drawn - np.maximum(stored, -2 * HALF_STEP * MAX_CODE))
    wrong = ~(away <= HALF_STEP * (1 + 2 * ratio) + ROUNDING)
    if wrong.any():
        yield "draw_log2_probs", int(rows[wrong][0]), "another probability than its entry's"


def _entry_of_each(spec: CacheSpec, targets: SparseTargets) -> npt.NDArray[np.int64]:
    """Place among all entries of each drawn class, int64 [n, d], -1 where it is none."""
    assert targets.draws is not None
    samples = np.repeat(np.arange(len(targets), dtype=np.int64), targets.sizes)
    entries = samples * spec.num_classes + targets.indices
    wanted = np.arange(len(targets))[:, None] * spec.num_classes + targets.draws.classes.astype(
        np.int64
    )
    if not len(entries):
        return np.full(wanted.shape, -1)
    order = np.argsort(entries, kind="stable")
    places = order[np.searchsorted(entries, wanted, sorter=order).clip(max=len(entries) - 1)]
    return np.where(entries[places] == wanted, places, -1)
