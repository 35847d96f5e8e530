"""The teacher's signal as a value: primary groups of samples, and the mass outside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError

STEPS_PER_OCTAVE = 1024
MAX_CODE = 65535
# Above this mean group size copying slices is faster than one gather of all entries (measured).
_SLICED_GROUP = 256
_PACKED = ("indices", "log2_probs")


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
class Draws:
    """Classes drawn with replacement for each of n samples, d classes a sample (``DrawsSpec``).

    classes     uint32  [n, d]
    log2_probs  uint16  [n, d]  codes of their probabilities among all classes
    secondary   float32 [n]     natural log of the mass outside the group that they were drawn
                                from; None if they were drawn from all classes
    """

    classes: npt.NDArray[np.uint32]
    log2_probs: npt.NDArray[np.uint16]
    secondary: npt.NDArray[np.float32] | None = None

    def first(self, count: int) -> "Draws":
        """The first ``count`` draws of each sample, which are draws of the same distribution."""
        return Draws(self.classes[:, :count], self.log2_probs[:, :count], self.secondary)


@dataclass(frozen=True)
class SparseTargets:
    """Primary groups of n samples, E entries in all, as stored.

    The entries of sample i are ``offsets[i]:offsets[i + 1]``, in descending order of probability.

    offsets     int64   [n + 1]
    indices     uint32  [E]      classes
    log2_probs  uint16  [E]      codes of p(group_temperature), see ``encode_log_probs``
    secondary   float32 [n, t]   natural log of the mass outside the group at each temperature
    draws       d classes drawn for each sample; None if the cache has none
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.uint32]
    log2_probs: npt.NDArray[np.uint16]
    secondary: npt.NDArray[np.float32]
    draws: Draws | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Group size of each sample, int64 [n]."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def from_arrays(
        cls, offsets: npt.NDArray[np.int64], arrays: Mapping[str, npt.NDArray[Any]]
    ) -> "SparseTargets":
        """Targets from their arrays by their names in format 1 (``storage/FORMAT.md``)."""
        draws = None
        if "draws" in arrays:
            draws = Draws(arrays["draws"], arrays["draw_log2_probs"], arrays.get("draw_secondary"))
        return cls(offsets, arrays["indices"], arrays["log2_probs"], arrays["secondary"], draws)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by their names in format 1, without ``offsets``."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "indices": self.indices,
            "log2_probs": self.log2_probs,
            "secondary": self.secondary,
        }
        if self.draws is not None:
            arrays["draws"] = self.draws.classes
            arrays["draw_log2_probs"] = self.draws.log2_probs
            if self.draws.secondary is not None:
                arrays["draw_secondary"] = self.draws.secondary
        return arrays

    def slice(self, rows: range) -> "SparseTargets":
        """Consecutive samples, as views of these arrays."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        first, last = offsets[0], offsets[-1]
        return self._select(
            offsets - first,
            lambda values: values[first:last],
            lambda values: values[rows.start : rows.stop],
        )

    def take(self, rows: npt.NDArray[np.int64]) -> "SparseTargets":
        """The samples ``rows`` [B], each in 0..n-1, in that order."""
        starts = _take(self.offsets, rows)
        sizes = _take(self.offsets, rows + 1) - starts
        offsets = offsets_from_sizes(sizes)
        if offsets[-1] > len(rows) * _SLICED_GROUP:
            spans = list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))

            def entries(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
                return np.concatenate([values[start:stop] for start, stop in spans])
        else:
            positions = (starts - offsets[:-1]).repeat(sizes)
            positions += np.arange(offsets[-1])

            def entries(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
                return _take(values, positions)

        return self._select(offsets, entries, lambda values: _take(values, rows))

    def scatter(self, rows: npt.NDArray[np.int64], count: int) -> "SparseTargets":
        """``count`` samples, these at the ascending ``rows`` [n] and the others empty."""

        def spread(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            spread = np.zeros((count, *values.shape[1:]), values.dtype)
            spread[rows] = values
            return spread

        return self._select(offsets_from_sizes(spread(self.sizes)), lambda values: values, spread)

    def renumber(self, numbers: npt.NDArray[np.uint32]) -> "SparseTargets":
        """The targets with class c replaced by ``numbers[c]``, for ``numbers`` [C]."""
        draws = self.draws and replace(self.draws, classes=numbers[self.draws.classes])
        return replace(self, indices=numbers[self.indices], draws=draws)

    @classmethod
    def concat(cls, parts: Sequence["SparseTargets"]) -> "SparseTargets":
        """The samples of one or more parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        arrays = [part.arrays() for part in parts]
        return cls.from_arrays(
            offsets_from_sizes(np.concatenate([part.sizes for part in parts])),
            {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]},
        )

    def _select(
        self,
        offsets: npt.NDArray[np.int64],
        of_entries: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
        of_samples: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    ) -> "SparseTargets":
        arrays = {
            name: (of_entries if name in _PACKED else of_samples)(values)
            for name, values in self.arrays().items()
        }
        return SparseTargets.from_arrays(offsets, arrays)


def _take(values: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    # The rows are known to be in range; "clip" avoids the copy that checking them again takes.
    return values.take(rows, axis=0, mode="clip")


@dataclass(frozen=True)
class TargetBatch:
    """The loss's input: groups with their probabilities at the loss's temperature T.

    offsets        int64   [B + 1]
    indices        int64   [E]    classes, within a sample unique
    log_probs      float32 [E]    natural log of p_j(T)
    log_secondary  float32 [B]    natural log of the mass outside the group, -inf for none
    log_weights    float32 [E]    if entries were drawn: natural log of how many classes of the
                                  group each stands for, see ``gkd.storage.cache.importance``
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
        ConfigError: if the secondary mass was not stored at ``temperature``.
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
    # A stored 0 is a group without measurable mass, whose log must still be finite.
    nearly_all = np.minimum(log_secondary.astype(np.float64), -np.finfo(np.float32).tiny)
    log_primary = np.log(-np.expm1(nearly_all)).astype(np.float32)
    return TargetBatch(
        offsets=targets.offsets,
        indices=targets.indices.astype(np.int64),
        log_probs=log_weights + (log_primary - log_total).astype(np.float32).repeat(sizes),
        log_secondary=log_secondary,
    )
