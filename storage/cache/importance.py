"""Drawn classes as targets, weighted so that they are unbiased.

Of a sample, n classes were drawn with replacement from a group G (all classes, or the primary
group before truncation) by p_j / a, a = sum_G p. Let P be the entries that are exact (none, or
the stored group), rho = a - sum_P p the mass of the rest of G, m how many of the n draws fell into
it, and c_j how often class j is among these m. Then entry j stands for

    r_j = 1 in P;   r_j = rho / pi * c_j / (m p_j) in the rest,   pi = 1 - (1 - rho/a)^n

classes. pi is the chance that any draw falls into the rest. Given that some do, E[c_j/m] is
p_j/rho, so that E[r_j] = 1 for every class of G, and for any f, without bias whatever n is,

    E[sum_j r_j p_j f_j] = sum_G p_j f_j

Without P this is r_j = a c_j / (n p_j): the counts. With P it is a stratified sample whose second
stratum has its exact mass.
"""

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.cache.targets import (
    SparseTargets,
    TargetBatch,
    decode_log_probs,
    offsets_from_sizes,
)

_CLASS_BITS = 32


def drawn_targets(
    targets: SparseTargets, draws: DrawsSpec, exact: TargetBatch | None = None
) -> TargetBatch:
    """The draws of samples as entries at the draws' temperature, each class once.

    ``exact`` are the stored groups of the same samples at that temperature, whose entries come
    first and unchanged; the draws then stand for the rest. A skipped sample has no entry.
    """
    assert targets.draws is not None
    batch = len(targets)
    log_outside = np.full(batch, -np.inf, np.float32)
    if targets.draws.secondary is not None:
        log_outside = targets.draws.secondary
    mass = np.maximum(-np.expm1(log_outside.astype(np.float64)), np.finfo(np.float32).tiny)
    rest = mass
    rows = np.repeat(np.arange(batch), draws.count)
    keys = _keys(rows, targets.draws.classes.reshape(-1))
    inside = (targets.sizes > 0)[rows]
    if exact is not None:
        rest = np.exp(exact.log_secondary.astype(np.float64)) - np.exp(log_outside)
        known = _keys(np.repeat(np.arange(batch), targets.sizes), targets.indices)
        inside &= ~np.isin(keys, known)
    rest = np.clip(rest, np.finfo(np.float32).tiny, mass)
    keys, first, counts = np.unique(keys[inside], return_index=True, return_counts=True)
    rows = keys >> _CLASS_BITS
    log_probs = decode_log_probs(targets.draws.log2_probs.reshape(-1)[inside][first])
    fallen = np.bincount(rows, counts, minlength=batch)
    with np.errstate(divide="ignore"):  # if the rest is everything, some draw falls into it
        chance = -np.expm1(draws.count * np.log1p(-rest / mass))
    stands_for = (rest / chance)[rows] * counts / fallen[rows]
    drawn = TargetBatch(
        offsets=offsets_from_sizes(np.bincount(rows, minlength=batch)),
        indices=keys & ((1 << _CLASS_BITS) - 1),
        log_probs=log_probs,
        log_secondary=log_outside,
        log_weights=np.log(stands_for).astype(np.float32) - log_probs,
    )
    return drawn if exact is None else _concat(exact, drawn)


def _keys(rows: npt.NDArray[np.int64], classes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    return (rows << _CLASS_BITS) | classes


def _concat(exact: TargetBatch, drawn: TargetBatch) -> TargetBatch:
    """Entries of both, sample by sample, the exact ones first; masses of the drawn ones."""
    sizes = np.diff(exact.offsets), np.diff(drawn.offsets)
    rows = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in sizes])
    order = np.argsort(rows, kind="stable")
    assert drawn.log_weights is not None
    unweighted = np.zeros(len(exact.indices), np.float32)
    return TargetBatch(
        offsets=offsets_from_sizes(sizes[0] + sizes[1]),
        indices=np.concatenate([exact.indices, drawn.indices])[order],
        log_probs=np.concatenate([exact.log_probs, drawn.log_probs])[order],
        log_secondary=drawn.log_secondary,
        log_weights=np.concatenate([unweighted, drawn.log_weights])[order],
    )
