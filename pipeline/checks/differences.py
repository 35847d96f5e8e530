"""Differences of stored targets from dense logits, each quantity by its definition in float64."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.spec import CacheSpec
from gkd.storage.cache.targets import MAX_CODE, STEPS_PER_OCTAVE, SparseTargets, decode_log_probs

STEP = math.log(2) / STEPS_PER_OCTAVE
MIN_LOG_PROB = -MAX_CODE * STEP
# Largest change of a cosine that another machine, batch size or kernel may cause.
COSINE_ROUNDING = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Differences:
    """The largest differences between stored and recomputed targets, in natural logs.

    membership  by how much the probabilities would have to change for the stored group to be the
                primary group
    log_probs   of the group's probabilities
    secondary   of the mass outside the group, by temperature
    draws       of the probabilities of drawn classes, of the mass outside the group they are drawn
                from, and by how much these classes would have to move to be in it; 0 without draws
    """

    membership: float
    log_probs: float
    secondary: Mapping[str, float]
    draws: float = 0.0

    def exceed(self, allowed: "Differences") -> bool:
        """Whether one of them is above what is allowed, or NaN."""
        return not bool((self.values() <= allowed.values()).all())

    def values(self) -> npt.NDArray[np.float64]:
        """All of them, the secondary masses last."""
        return np.array([self.membership, self.log_probs, self.draws, *self.secondary.values()])


def largest(found: Sequence[Differences]) -> Differences:
    """The maximum of each kind of difference."""
    membership, log_probs, draws, *masses = np.max([d.values() for d in found], axis=0).tolist()
    secondary = dict(zip(found[0].secondary, masses, strict=True))
    return Differences(membership, log_probs, secondary, draws)


def allowed_differences(spec: CacheSpec) -> Differences:
    """Half a step of the stored codes, and the effect of rounded cosines on a log-probability.

    A change d of all cosines changes log p(T) by at most 2 * scale * d / T: the logit and the sum.
    """
    cosine = COSINE_ROUNDING[spec.precision]

    def rounding(temperature: float) -> float:
        return 2 * spec.scale * cosine / temperature

    at_group = STEP / 2 + rounding(spec.group_temperature)
    secondary = {f"{t:g}": STEP / 2 + rounding(t) for t in spec.temperatures}
    draws = 0.0 if spec.draws is None else STEP / 2 + rounding(spec.draws.temperature)
    return Differences(at_group, at_group, secondary, draws)


def compare(
    spec: CacheSpec, stored: SparseTargets, label: int, logits: npt.NDArray[np.float64]
) -> Differences:
    """Differences of one sample's stored targets from its recomputed logits float64 [C]."""
    group = stored.indices.astype(np.int64)
    log_probs = _log_softmax(logits / spec.group_temperature)
    return Differences(
        membership=group_gap(
            log_probs, group, label, threshold=spec.threshold, max_group=spec.max_group
        ),
        log_probs=_largest_error(stored.log2_probs, log_probs[group]),
        secondary={
            f"{t:g}": _distance(float(mass), _log_mass_outside(logits / t, group))
            for t, mass in zip(spec.temperatures, stored.secondary[0], strict=True)
        },
        draws=_draws_difference(spec, stored, label, logits),
    )


def _draws_difference(
    spec: CacheSpec, stored: SparseTargets, label: int, logits: npt.NDArray[np.float64]
) -> float:
    if spec.draws is None:
        return 0.0
    assert stored.draws is not None
    scaled = logits / spec.draws.temperature
    log_probs = _log_softmax(scaled)
    drawn = log_probs[stored.draws.classes[0].astype(np.int64)]
    difference = _largest_error(stored.draws.log2_probs[0], drawn)
    if stored.draws.secondary is None:
        return difference
    mass = float(stored.draws.secondary[0])
    outside = min(
        max(
            _distance(mass, _log_mass_outside(scaled, group)),
            float(log_probs[group].min() - drawn.min()),
        )
        for group in _untruncated_groups(spec, label, logits)
    )
    return max(difference, outside)


def _largest_error(codes: npt.NDArray[np.uint16], log_probs: npt.NDArray[np.float64]) -> float:
    exact = np.maximum(log_probs, MIN_LOG_PROB)
    return float(np.abs(decode_log_probs(codes) - exact).max())


def _untruncated_groups(
    spec: CacheSpec, label: int, logits: npt.NDArray[np.float64]
) -> Iterator[npt.NDArray[np.int64]]:
    """The primary group without ``max_group``, and its variants by rounding at the threshold."""
    order = np.argsort(-logits, kind="stable")
    masses = np.exp(_log_softmax(logits[order] / spec.group_temperature)).cumsum()
    rounding = COSINE_ROUNDING[spec.precision]
    needed = int(np.searchsorted(masses, spec.threshold)) + 1 if spec.threshold else 0
    sizes = [min(needed, len(order))]
    if needed > 1 and masses[needed - 2] > spec.threshold - rounding:
        sizes.append(needed - 1)
    if 0 < needed < len(order) and masses[needed - 1] < spec.threshold + rounding:
        sizes.append(needed + 1)
    for size in sizes:
        group = order[:size]
        yield group if label in group else np.append(group, label)


def draw_log_probs(
    spec: CacheSpec, label: int, logits: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Log-probabilities [C] of a draw, -inf for classes that cannot be drawn."""
    assert spec.draws is not None
    scaled = logits / spec.draws.temperature
    if spec.draws.source == "primary":
        outside = np.ones(len(logits), bool)
        outside[next(_untruncated_groups(spec, label, logits))] = False
        scaled = np.where(outside, -np.inf, scaled)
    return _log_softmax(scaled)


def group_gap(
    log_probs: npt.NDArray[np.float64],
    group: npt.NDArray[np.int64],
    label: int,
    *,
    threshold: float,
    max_group: int,
) -> float:
    """By how much log-probabilities [C] would have to change to make ``group`` the primary group.

    Without the label the group must be a prefix of the classes by descending probability: no class
    outside has a higher probability than one inside. The prefix must reach the threshold, and must
    not reach it without its last class, unless ``max_group`` truncated it. 0 if all this holds.
    """
    if label not in group:
        return math.inf
    outside = log_probs.copy()
    outside[group] = -math.inf
    others = group[group != label]
    gap = max(0.0, float(outside.max() - log_probs[others].min())) if len(others) else 0.0

    inside = np.sort(np.exp(log_probs[group]))[::-1]
    prefixes = [inside]
    if log_probs[label] == log_probs[group].min():
        prefixes.append(inside[:-1])  # the label was added to a prefix without it
    # A truncated group may be too short.
    needed = -math.inf if len(group) == max_group else threshold
    return gap + min(
        max(0.0, float(prefix[:-1].sum()) - threshold, needed - float(prefix.sum()))
        for prefix in prefixes
    )


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()))


def _log_mass_outside(logits: npt.NDArray[np.float64], group: npt.NDArray[np.int64]) -> float:
    """Natural log of the softmax's mass outside the group, summed over the classes outside."""
    terms = np.exp(logits - logits.max())
    total = terms.sum()
    terms[group] = 0.0
    outside = terms.sum()
    return math.log(outside / total) if outside > 0 else -math.inf


def _distance(left: float, right: float) -> float:
    # Masses this small underflow in a float64 sum and count as zero.
    return 0.0 if max(left, right) < -700 else abs(left - right)
