"""Derives a stricter cache from a cache, without its teacher.

    group   the prefix of the stored one that reaches the lower threshold, and the label, at most
            the smaller max_group; the order of classes is the stored one
    cut     sum of p_j(T) over the classes that leave the group
    secondary'(T) = secondary(T) + cut(T), added as logs, at each temperature that is kept

Probabilities at ``group_temperature`` do not depend on the group, so their codes are kept.
Draws are stored in drawing order, so the first of them are draws too; those of the primary group
are of the group at the stored threshold, whatever ``max_group`` leaves of it.
Everything else is exact to the stored precision of a probability (3.4e-4 at
``group_temperature``, more by group_temperature / T at another): a group whose mass is that close
to the threshold may differ from the teacher's by the classes in question.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.cache.derive import (
    DerivedShard,
    derive,
    software_versions,
)
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import CacheSpec, DerivedSpec, DrawsSpec, View
from gkd.storage.cache.targets import (
    SparseTargets,
    at_temperature,
    decode_log_probs,
    in_blocks,
    offsets_from_sizes,
)
from gkd.storage.errors import ConfigError
from gkd.storage.util.torchrun_env import all_cores

_MAX_WORKERS = 4
# Entries processed at once: a shard of large groups has tens of millions.
_BLOCK_ENTRIES = 1 << 22


def retarget(
    cache: Cache,
    out: Path,
    *,
    threshold: float | None = None,
    max_group: int | None = None,
    temperatures: tuple[float, ...] | None = None,
    group_temperature: float | None = None,
    draws: int | None = None,
    licence: str | None = None,
    note: str | None = None,
) -> str:
    """Derive the cache ``out`` with stricter settings, or resume it, and return its id.

    Settings that are not given are kept, and so are ``licence`` and ``note`` of the card.

    Raises:
        ConfigError: if the stored groups do not determine the result exactly, with the reason, or
            if another process writes ``out``.
        SpecMismatchError: if ``out`` is a cache of other settings, or of another source.
        CorruptShardError: if ``cache`` is damaged.
    """
    spec = stricter_spec(
        cache,
        threshold=threshold,
        max_group=max_group,
        temperatures=temperatures,
        group_temperature=group_temperature,
        draws=draws,
    )
    return derive(
        "retarget",
        [cache],
        out,
        spec,
        functools.partial(_derive_shard, cache, spec),
        workers=min(_MAX_WORKERS, all_cores()),
        licence=licence,
        note=note,
    )


def _derive_shard(cache: Cache, spec: CacheSpec, shard: int) -> DerivedShard:
    commit = cache.commit(shard)
    samples = ShardSamples.from_table(cache.read_samples(shard), commit.skipped)
    groups: dict[View, CutGroups] = {
        view: cut_groups(cache.read_verified(shard, view), samples.labels, cache.spec, spec)
        for view in spec.views
    }
    return DerivedShard(
        {view: groups[view].targets for view in spec.views},
        samples,
        {
            view: _count_truncated(groups[view], commit.views[view].truncated, cache.spec, spec)
            for view in spec.views
        },
    )


def stricter_spec(
    cache: Cache,
    *,
    threshold: float | None = None,
    max_group: int | None = None,
    temperatures: tuple[float, ...] | None = None,
    group_temperature: float | None = None,
    draws: int | None = None,
) -> CacheSpec:
    """The spec of the cache with stricter settings; ``draws`` 0 removes them.

    Raises:
        ConfigError: if the stored groups do not determine the result exactly, with the reason.
    """
    old = cache.spec
    new = msgspec.structs.replace(
        old,
        threshold=old.threshold if threshold is None else threshold,
        max_group=old.max_group if max_group is None else max_group,
        derived=DerivedSpec("retarget", (cache.id,)),
        software=old.software | software_versions(),
    )
    kept = old.temperatures if temperatures is None else temperatures
    kept_draws = old.draws if draws is None else _first_draws(old, draws)
    if group_temperature is None:
        group_temperature = old.group_temperature
    for option, reason in _obstacles(cache, new, kept, kept_draws, group_temperature, draws):
        raise ConfigError(
            f"{option}: {cache.path} does not determine that exactly: {reason}",
            remedy="ask for less, or run `gkd cache-teacher` with these settings",
        )
    return msgspec.structs.replace(new, temperatures=kept, draws=kept_draws)


def _first_draws(spec: CacheSpec, count: int) -> DrawsSpec | None:
    if count < 0:
        raise ConfigError(f"--draws: expected 0 or more, got {count}; give another number")
    if count == 0 or spec.draws is None:
        return None
    return msgspec.structs.replace(spec.draws, count=count)


def _obstacles(
    cache: Cache,
    new: CacheSpec,
    temperatures: tuple[float, ...],
    draws: DrawsSpec | None,
    group_temperature: float,
    asked_draws: int | None,
) -> Iterator[tuple[str, str]]:
    """Options that the stored groups cannot satisfy, with the reason."""
    old = cache.spec
    assert cache.manifest is not None
    stored_draws = old.draws.count if old.draws else 0
    if asked_draws is not None and asked_draws > stored_draws:
        yield f"--draws {asked_draws}", f"{stored_draws} classes a sample were drawn"
    missing = [temperature for temperature in temperatures if temperature not in old.temperatures]
    if missing:
        stored = _listed(old.temperatures, ", ")
        yield (
            f"--temperatures {_listed(missing)}",
            f"the mass outside the groups was stored at {stored} only",
        )
    if draws is not None and draws.temperature not in temperatures:
        yield (
            f"--temperatures {_listed(temperatures)}",
            f"its draws are at {draws.temperature:g}, which must remain one of them; --draws 0 "
            "removes them",
        )
    if group_temperature != old.group_temperature:
        yield (
            f"--group-temperature {group_temperature:g}",
            f"groups were selected, and probabilities stored, at {old.group_temperature:g}; their "
            "stored precision is too low to select at another temperature",
        )
    if new.threshold > old.threshold:
        yield (
            f"--threshold {new.threshold:g}",
            f"groups end where their mass reaches {old.threshold:g}, and the classes after that "
            "were not stored",
        )
    truncated = sum(cache.manifest.truncated.values())
    if new.max_group > old.max_group and truncated:
        yield (
            f"--max-group {new.max_group}",
            f"{truncated:,} groups were truncated at {old.max_group}, and the rest of them was not "
            "stored",
        )
    if new.threshold < old.threshold and draws is not None and draws.source == "primary":
        yield (
            f"--threshold {new.threshold:g}",
            f"its {draws.count} draws a sample are from the groups that reach {old.threshold:g}; "
            "--draws 0 removes them",
        )


def _listed(numbers: Iterable[float], separator: str = ",") -> str:
    return separator.join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class CutGroups:
    """Smaller groups.

    full_sizes  int64 [n], group sizes before the cap, if known
    reached     bool [n], whether the stored group has enough mass for the threshold
    """

    targets: SparseTargets
    full_sizes: npt.NDArray[np.int64]
    reached: npt.NDArray[np.bool_]


def cut_groups(
    targets: SparseTargets, labels: npt.NDArray[np.int64], old: CacheSpec, new: CacheSpec
) -> CutGroups:
    """Groups of ``old`` cut down to the settings of ``new``; ``labels`` int64 [n]."""
    blocks = list(in_blocks(targets.offsets, _BLOCK_ENTRIES))
    parts = [
        _cut_block(targets.slice(rows), labels[rows.start : rows.stop], old, new) for rows in blocks
    ]
    return CutGroups(
        SparseTargets.concat([part.targets for part in parts]),
        np.concatenate([part.full_sizes for part in parts]),
        np.concatenate([part.reached for part in parts]),
    )


def _cut_block(
    targets: SparseTargets, labels: npt.NDArray[np.int64], old: CacheSpec, new: CacheSpec
) -> CutGroups:
    sizes, starts = targets.sizes, targets.offsets[:-1]
    samples = np.repeat(np.arange(len(targets)), sizes)
    ranks = np.arange(len(samples)) - starts[samples]
    is_label = targets.indices == labels[samples]

    prefix = sizes.copy()
    reached = np.ones(len(targets), bool)
    if new.threshold < old.threshold:
        before, total = _masses(targets, samples, old)
        prefix = np.bincount(samples[before < new.threshold], minlength=len(targets))
        reached = (total >= new.threshold) | (sizes == 0)
    label_ranks = np.zeros(len(targets), np.int64)
    label_ranks[samples[is_label]] = ranks[is_label]
    full_sizes = np.minimum(prefix + (label_ranks >= prefix), sizes)
    capped = np.minimum(full_sizes, new.max_group)

    # The first classes, with the label instead of the last of them if it is not among them.
    others = capped - (label_ranks >= capped - 1)
    keep = np.where(is_label, True, ranks < others[samples])
    kept_sizes = np.bincount(samples[keep], minlength=len(targets))
    return CutGroups(
        SparseTargets(
            offsets_from_sizes(kept_sizes),
            targets.indices[keep],
            targets.log2_probs[keep],
            _secondary(targets, samples, ~keep, old, new),
            targets.draws.first(new.draws.count) if targets.draws and new.draws else None,
        ),
        full_sizes,
        reached,
    )


def _masses(
    targets: SparseTargets, samples: npt.NDArray[np.int64], spec: CacheSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mass of the classes before each entry [E], and of each stored group [n]."""
    log_probs = decode_log_probs(targets.log2_probs)
    if spec.group_temperature in spec.temperatures:
        # The stored secondary mass is more precise than the sum of rounded probabilities.
        log_probs = _log_probs(targets, spec.group_temperature, spec)
    probs = np.exp(log_probs, dtype=np.float64)
    total = np.bincount(samples, probs, minlength=len(targets)).astype(np.float64)
    # Sums over a shard are below 2^24: in float64 their differences are accurate to 1e-8.
    running = np.concatenate([[0.0], np.cumsum(probs)])
    before = running[:-1] - running[targets.offsets[:-1]][samples]
    return before, total


def _log_probs(
    targets: SparseTargets, temperature: float, spec: CacheSpec
) -> npt.NDArray[np.float32]:
    return at_temperature(
        targets,
        temperature,
        group_temperature=spec.group_temperature,
        temperatures=spec.temperatures,
    ).log_probs


def _secondary(
    targets: SparseTargets,
    samples: npt.NDArray[np.int64],
    cut: npt.NDArray[np.bool_],
    old: CacheSpec,
    new: CacheSpec,
) -> npt.NDArray[np.float32]:
    """Log mass outside the smaller groups, float32 [n, temperatures of ``new``]."""
    columns = []
    for temperature in new.temperatures:
        column = targets.secondary[:, old.temperatures.index(temperature)].astype(np.float64)
        if cut.any():
            log_cut = _log_probs(targets, temperature, old)[cut].astype(np.float64)
            mass = np.bincount(samples[cut], np.exp(log_cut), minlength=len(targets))
            with np.errstate(divide="ignore"):
                grown = np.logaddexp(column, np.log(mass))
            column = np.where(mass > 0, np.minimum(grown, 0), column)
        columns.append(column)
    return np.stack(columns, 1).astype(np.float32)


def _count_truncated(groups: CutGroups, before: int, old: CacheSpec, new: CacheSpec) -> int:
    """Groups that the cap of ``new`` truncates; that of ``old`` truncated ``before``."""
    if new.max_group >= old.max_group:
        # The same as before, except for groups that end earlier by a lower threshold.
        return (
            min(before, int((~groups.reached).sum())) if new.threshold < old.threshold else before
        )
    return int((groups.full_sizes > new.max_group).sum())
