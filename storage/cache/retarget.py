"""A stricter cache out of a cache, without its teacher.

    group   the prefix of the stored one that reaches the lower threshold, and the label, at most
            the smaller max_group; the order of classes is the stored one
    cut     sum of p_j(T) over the classes that leave the group
    secondary'(T) = secondary(T) + cut(T), added as logs, at each temperature that stays

Probabilities at ``group_temperature`` do not depend on the group, so their codes stay as they are.
Draws stand in drawing order, so the first of them are draws too; those of the primary group are of
what the stored threshold gives, whatever ``max_group`` leaves of it.
All else is exact to the stored precision of a probability (3.4e-4 at ``group_temperature``,
more by group_temperature / T at another): a group whose mass lies that near the threshold may
differ by the classes in question from what the teacher would give.
"""

import functools
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.cache.card import write_card
from gkd.storage.cache.layout import Commit
from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.reader import Cache, digests_of
from gkd.storage.cache.spec import CacheSpec, DerivedSpec, DrawsSpec, View
from gkd.storage.cache.targets import (
    SparseTargets,
    at_temperature,
    decode_log_probs,
    in_blocks,
    offsets_from_sizes,
)
from gkd.storage.cache.writer import CacheWriter, ShardSamples, delete_leftovers
from gkd.storage.errors import ConfigError
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.progress import progress
from gkd.storage.util.torchrun_env import all_cores

_MAX_WORKERS = 4
# Entries worked on at once: a shard of large groups has tens of millions.
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
    """Derive the cache ``out`` with stricter settings, or go on with it; its id.

    Settings that are not given stay as they are, and so do ``licence`` and ``note``, words for the
    card.

    Raises:
        ConfigError: for settings that the stored groups cannot answer exactly, with the reason, or
            where another process writes ``out``.
        SpecMismatchError: where ``out`` is a cache of other settings, or of another source.
        CorruptShardError: where ``cache`` is damaged.
    """
    spec = stricter_spec(
        cache,
        threshold=threshold,
        max_group=max_group,
        temperatures=temperatures,
        group_temperature=group_temperature,
        draws=draws,
    )
    out = out.absolute()
    require_outside_caches(out, may_be_cache=True)
    with WriteLock(out) as lock:
        delete_leftovers(out)
        writer = CacheWriter(out, spec, guard=lock.check)
        pending = writer.pending()
        done = spec.num_shards - len(pending)
        workers = min(_MAX_WORKERS, all_cores())
        with progress("retarget", spec.num_shards, "shards", done) as advance:
            for _ in ordered_map(
                functools.partial(_derive, cache, writer), pending, workers=workers
            ):
                advance()
        write_card(out, licence=licence, note=note, sources=[cache.path])
        return writer.finish()


def _derive(cache: Cache, writer: CacheWriter, shard: int) -> None:
    commit, spec = cache.commit(shard), writer.spec
    samples = shard_samples(cache, shard, commit)
    groups: dict[View, CutGroups] = {
        view: cut_groups(cache.read_verified(shard, view), samples.labels, cache.spec, spec)
        for view in spec.views
    }
    views: dict[View, SparseTargets] = {view: groups[view].targets for view in spec.views}
    truncated: dict[View, int] = {
        view: _count_truncated(groups[view], commit.views[view].truncated, cache.spec, spec)
        for view in spec.views
    }
    writer.write_shard(shard, views, samples, truncated=truncated)


def stricter_spec(
    cache: Cache,
    *,
    threshold: float | None = None,
    max_group: int | None = None,
    temperatures: tuple[float, ...] | None = None,
    group_temperature: float | None = None,
    draws: int | None = None,
) -> CacheSpec:
    """The spec of the cache with stricter settings; ``draws`` 0 leaves them out.

    Raises:
        ConfigError: for settings that the stored groups cannot answer exactly, with the reason.
    """
    old = cache.spec
    kept_draws = old.draws if draws is None else _fewer_draws(cache, draws)
    chosen = old.temperatures if temperatures is None else temperatures
    unknown = [f"{t:g}" for t in chosen if t not in old.temperatures]
    if unknown:
        stored = ", ".join(f"{t:g}" for t in old.temperatures)
        _refuse(
            cache,
            f"--temperatures {','.join(unknown)}",
            f"the mass outside the groups was stored at {stored} only",
        )
    if kept_draws is not None and kept_draws.temperature not in chosen:
        _refuse(
            cache,
            f"--temperatures {','.join(f'{t:g}' for t in chosen)}",
            f"its draws are at {kept_draws.temperature:g}, which has to stay one of them, and "
            "--draws 0 leaves them out",
        )
    new = msgspec.structs.replace(
        old,
        threshold=old.threshold if threshold is None else threshold,
        max_group=old.max_group if max_group is None else max_group,
        temperatures=chosen,
        draws=kept_draws,
        derived=DerivedSpec("retarget", (cache.id,)),
        software=old.software | software_versions(),
    )
    if group_temperature not in (None, old.group_temperature):
        _refuse(
            cache,
            f"--group-temperature {group_temperature:g}",
            f"groups were selected, and probabilities stored, at {old.group_temperature:g}; at "
            "another temperature their stored precision is not enough to select by",
        )
    if new.threshold > old.threshold:
        _refuse(
            cache,
            f"--threshold {new.threshold:g}",
            f"groups end where their mass reaches {old.threshold:g}, and classes behind that were "
            "not stored",
        )
    assert cache.manifest is not None
    truncated = sum(cache.manifest.truncated.values())
    if new.max_group > old.max_group and truncated:
        _refuse(
            cache,
            f"--max-group {new.max_group}",
            f"{truncated:,} groups were cut at {old.max_group}, and what was cut off was not "
            "stored",
        )
    if new.threshold < old.threshold and new.draws is not None and new.draws.source == "primary":
        _refuse(
            cache,
            f"--threshold {new.threshold:g}",
            f"its {new.draws.count} draws a sample are of the groups that reach "
            f"{old.threshold:g}, and --draws 0 leaves them out",
        )
    return new


def _fewer_draws(cache: Cache, count: int) -> DrawsSpec | None:
    stored = cache.spec.draws
    if count < 0:
        raise ConfigError(f"--draws: expected 0 or more, got {count}; give another number")
    if count == 0:
        return None
    if stored is None or count > stored.count:
        held = 0 if stored is None else stored.count
        _refuse(cache, f"--draws {count}", f"{held} classes a sample were drawn")
    return msgspec.structs.replace(stored, count=count)


def _refuse(cache: Cache, asked: str, reason: str) -> NoReturn:
    raise ConfigError(
        f"{asked}: {cache.path} cannot answer that exactly: {reason}; ask for less, or run "
        "`gkd cache-teacher` with these settings"
    )


@dataclass(frozen=True)
class CutGroups:
    """Smaller groups; ``full_sizes`` int64 [n] are those before the cap, where that is known.

    reached  bool [n], whether a stored group held enough mass for the threshold
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

    # The first classes, or the label in the place of the last of them.
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
    """Mass of the classes before each entry [E], and of each whole group [n], as it was cut."""
    log_probs = decode_log_probs(targets.log2_probs)
    if spec.group_temperature in spec.temperatures:
        # The stored secondary mass is sharper than the sum of rounded probabilities.
        log_probs = _log_probs(targets, spec.group_temperature, spec)
    probs = np.exp(log_probs, dtype=np.float64)
    total = np.bincount(samples, probs, minlength=len(targets)).astype(np.float64)
    # Sums over a shard stay below 2^24: in float64 their differences are good to 1e-8.
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
    """Groups that the cap of ``new`` cut, of which the cap of ``old`` had cut ``before``."""
    if new.max_group >= old.max_group:
        # The cap cuts what it cut before, less the groups that a lower threshold ends sooner.
        return (
            min(before, int((~groups.reached).sum())) if new.threshold < old.threshold else before
        )
    return int((groups.full_sizes > new.max_group).sum())


def software_versions() -> dict[str, str]:
    """Versions of what writes a derived cache."""
    return {package: version(package) for package in ("gkd", "numpy", "zarr")}


def shard_samples(cache: Cache, shard: int, commit: Commit) -> ShardSamples:
    """What the samples of a shard are, as a writer takes it."""
    table = cache.read_samples(shard)
    keys = table["key"].to_pylist()
    skipped = np.flatnonzero(table["digest"].is_null().to_numpy())
    return ShardSamples(
        keys,
        table["label"].to_numpy(),
        digests_of(table),
        {place: commit.skipped[keys[place]] for place in skipped.tolist()},
    )
