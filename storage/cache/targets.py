"""The teacher's signal as a value: primary groups of some samples, and what is left outside."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError

STEPS_PER_OCTAVE = 1024
MAX_CODE = 65535


def encode_log_probs(log_probs: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Natural-log probabilities to codes q with p = 2^(-q/1024); below 2^-64: clamped."""
    codes = np.rint(np.asarray(log_probs, np.float64) * (-STEPS_PER_OCTAVE / np.log(2.0)))
    clipped: npt.NDArray[np.uint16] = np.clip(codes, 0, MAX_CODE).astype(np.uint16)
    return clipped


def decode_log_probs(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Codes to natural-log probabilities, float32."""
    return codes.astype(np.float32) * np.float32(-np.log(2.0) / STEPS_PER_OCTAVE)


def offsets_from_sizes(sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Group sizes [n] to offsets int64 [n + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def in_blocks(offsets: npt.NDArray[np.int64], entries: int) -> Iterator[range]:
    """Ranges of samples with about ``entries`` entries each, for offsets [n + 1]."""
    start, n = 0, len(offsets) - 1
    while start < n:
        stop = int(np.searchsorted(offsets, offsets[start] + entries, side="right")) - 1
        stop = max(start + 1, min(stop, n))
        yield range(start, stop)
        start = stop


@dataclass(frozen=True)
class SparseTargets:
    """Primary groups of n samples, E entries in all, as stored.

    Entries of sample i stand at ``offsets[i]:offsets[i + 1]``, by descending probability.

    offsets      int64   [n + 1]
    indices      uint32  [E]      classes
    log2_probs   uint16  [E]      codes of p(group_temperature), see ``encode_log_probs``
    secondary    float32 [n, t]   natural log of the mass outside the group at each temperature
    draws            uint32  [n, d]   optional: classes drawn with replacement (``DrawsSpec``)
    draw_log2_probs  uint16  [n, d]   and the codes of their probabilities
    draw_secondary   float32 [n]      optional: natural log of the mass outside the group that they
                                      were drawn from
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.uint32]
    log2_probs: npt.NDArray[np.uint16]
    secondary: npt.NDArray[np.float32]
    draws: npt.NDArray[np.uint32] | None = None
    draw_log2_probs: npt.NDArray[np.uint16] | None = None
    draw_secondary: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Group size of each sample, int64 [n]."""
        return self.offsets[1:] - self.offsets[:-1]


@dataclass(frozen=True)
class TargetBatch:
    """What the loss takes: groups with their probabilities at the loss's temperature T.

    offsets        int64   [B + 1]
    indices        int64   [E]    classes, within a sample unique
    log_probs      float32 [E]    natural log of p_j(T)
    log_secondary  float32 [B]    natural log of the mass outside the group, -inf for none
    log_weights    float32 [E]    only where entries are drawn ones: natural log of how many classes
                                  of the group each stands for, see ``gkd.storage.cache.importance``
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    log_secondary: npt.NDArray[np.float32]
    log_weights: npt.NDArray[np.float32] | None = None


def at_temperature(
    targets: SparseTargets,
    temperature: float,
    *,
    group_temperature: float,
    temperatures: tuple[float, ...],
) -> TargetBatch:
    """Stored groups to probabilities at another stored temperature.

    log p_j(T) = log a(T) + log_softmax_P((group_temperature / T) * log p_j)
    a(T) = 1 - secondary(T)

    Raises:
        ConfigError: where the secondary mass was not stored at ``temperature``.
    """
    if temperature not in temperatures:
        stored = ", ".join(f"{t:g}" for t in temperatures)
        raise ConfigError(
            f"kd.temperature: the cache holds the secondary mass at {stored}, got {temperature:g}; "
            "choose one of these or cache again with --temperatures"
        )
    log_secondary = targets.secondary[:, temperatures.index(temperature)]
    log_weights = decode_log_probs(targets.log2_probs) * np.float32(group_temperature / temperature)
    sizes = targets.sizes
    filled = np.flatnonzero(sizes)
    starts = targets.offsets[filled]
    log_total = np.zeros(len(targets), np.float32)
    if len(starts):
        # Entries descend, so the first of a group is its maximum.
        peak = log_weights[starts]
        log_weights -= peak.repeat(sizes[filled])
        log_total[filled] = np.log(np.add.reduceat(np.exp(log_weights), starts))
    # A stored 0 means a group without measurable mass: its log must still be finite.
    nearly_all = np.minimum(log_secondary.astype(np.float64), -np.finfo(np.float32).tiny)
    log_primary = np.log(-np.expm1(nearly_all)).astype(np.float32)
    return TargetBatch(
        offsets=targets.offsets,
        indices=targets.indices.astype(np.int64),
        log_probs=log_weights + (log_primary - log_total).astype(np.float32).repeat(sizes),
        log_secondary=log_secondary,
    )
