"""Targets as memory-mapped files for training: made once per node, shared by all its processes."""

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import filelock
import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage import atomic, layout
from gkd.storage.cache import Cache
from gkd.storage.errors import ConfigError, CorruptShardError
from gkd.storage.progress import progress
from gkd.storage.spec import VIEWS, CacheSpec, View
from gkd.storage.targets import SparseTargets, offsets_from_sizes

DESCRIPTION = "store.json"
_WARM_BLOCK = 1 << 24
_MAX_WORKERS = 8
# Above this mean group size copying slices beats one gather of all entries (measured).
_SLICE_ENTRIES = 256


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cache_id: str
    views: tuple[View, ...]
    spec: CacheSpec


class TargetStore:
    """Targets of all samples in memory-mapped files; made by ``materialise``.

    The rows of the views follow each other: sample i of the v-th view is row ``v * N + i``. Pickles
    as its path, and a fork shares the maps.

    offsets    int64   [V * N + 1]
    indices    uint32  [E]
    log2_probs uint16  [E]
    secondary  float32 [V * N, t]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        description = msgspec.json.decode((path / DESCRIPTION).read_bytes(), type=_Description)
        self.spec = description.spec
        self.cache_id = description.cache_id
        self.views = description.views
        self._offsets = self._map("offsets")
        self._indices = self._map("indices")
        self._log2_probs = self._map("log2_probs")
        self._secondary = self._map("secondary")
        self._draws = self._map("draws") if self.spec.draws else None
        self._draw_log2_probs = self._map("draw_log2_probs") if self.spec.draws else None
        n = self.spec.num_samples
        # First row of the original and of the flipped view.
        self._first_rows = np.array(
            [self.views.index(view) * n if view in self.views else -1 for view in VIEWS]
        )

    def __reduce__(self) -> tuple[type["TargetStore"], tuple[Path]]:
        return TargetStore, (self.path,)

    def __len__(self) -> int:
        return self.spec.num_samples

    def lookup(self, rows: npt.NDArray[np.int64], flipped: npt.NDArray[np.bool_]) -> SparseTargets:
        """Targets of samples ``rows`` [B], each of the view that ``flipped`` [B] says.

        A sample that the cache skipped has an empty group.

        Raises:
            IndexError: where a row is not one of the cache's samples.
            ConfigError: where a view is asked for that was not materialised.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a cache of {len(self)} samples")
        first = self._first_rows[np.asarray(flipped, np.intp)]
        if len(first) and first.min() < 0:
            raise ConfigError(
                f"{self.path}: targets of the {' and '.join(self.views)} view only; train without "
                "random flips, or cache again with --views original,flipped"
            )
        places = first + rows
        starts = _take(self._offsets, places)
        offsets = offsets_from_sizes(_take(self._offsets, places + 1) - starts)
        return SparseTargets(
            offsets,
            *self._entries(starts, offsets),
            _take(self._secondary, places),
            None if self._draws is None else _take(self._draws, places),
            None if self._draw_log2_probs is None else _take(self._draw_log2_probs, places),
        )

    def _entries(
        self, starts: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
        if offsets[-1] > len(starts) * _SLICE_ENTRIES:
            stops = starts + np.diff(offsets)
            slices = [slice(*span) for span in zip(starts.tolist(), stops.tolist(), strict=True)]
            return (
                np.concatenate([self._indices[s] for s in slices]),
                np.concatenate([self._log2_probs[s] for s in slices]),
            )
        places = np.repeat(starts - offsets[:-1], np.diff(offsets))
        places += np.arange(offsets[-1])
        return _take(self._indices, places), _take(self._log2_probs, places)

    def _map(self, name: str) -> npt.NDArray[Any]:
        # A plain array on the map: slices of np.memmap itself are slow to make.
        return np.asarray(np.load(self.path / f"{name}.npy", mmap_mode="r"))


def _take(array: npt.NDArray[Any], places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    # The places are inside already; "clip" spares the copy that checking them again takes.
    return array.take(places, axis=0, mode="clip")


def materialise(
    cache: Cache, *, folder: Path | None = None, views: Sequence[View] | None = None
) -> TargetStore:
    """The cache's targets as memory-mapped files, made now or found from before.

    They stand in ``<folder>/<cache id>/<views>``; ``folder`` is by default ``$GKD_CACHE_DIR`` or
    ``~/.cache/gkd``. The cache's files are held against their hashes while they are copied. One
    process makes them while others wait for it.

    Raises:
        ConfigError: where the disk has no room, or a view is not in the cache.
        CorruptShardError: where the cache is damaged.
        IncompleteCacheError: where the cache is not finished.
    """
    chosen: tuple[View, ...] = tuple(view for view in VIEWS if view in (views or cache.spec.views))
    if not set(chosen) <= set(cache.spec.views):
        raise ConfigError(
            f"{cache.path}: expected views {', '.join(chosen)}, the cache has "
            f"{', '.join(cache.spec.views)}; cache again with --views {','.join(chosen)}"
        )
    home = (folder or _default_folder()).absolute() / cache.id
    home.mkdir(parents=True, exist_ok=True)
    target = home / "+".join(chosen)
    with filelock.FileLock(home / "lock"):
        found = target.exists()
        if not found:
            # Nobody else is at work here, so what lies about was left by one that died.
            for leftover in home.glob(".*"):
                shutil.rmtree(leftover)
            _build(cache, chosen, target)
    if found:
        _warm(target)
    return TargetStore(target)


def _default_folder() -> Path:
    chosen = os.environ.get("GKD_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "gkd"


def _build(cache: Cache, views: tuple[View, ...], target: Path) -> None:
    sizes = _array_shapes(cache, views)
    _require_space(
        target.parent,
        sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in sizes.values()),
    )
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        arrays = {
            name: np.lib.format.open_memmap(aside / f"{name}.npy", "w+", dtype, shape)
            for name, (dtype, shape) in sizes.items()
        }
        arrays["offsets"][0] = 0
        _copy(cache, views, arrays)
        for array in arrays.values():
            array.flush()
        del arrays
        description = _Description(cache.id, views, cache.spec)
        atomic.write_file(aside / DESCRIPTION, layout.encode_json(description))
        aside.rename(target)
        atomic.sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _array_shapes(
    cache: Cache, views: tuple[View, ...]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    assert cache.manifest is not None
    rows = cache.spec.num_samples * len(views)
    entries = sum(shard.entries[view] for shard in cache.manifest.shards for view in views)
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        array.name: (array.dtype, (entries,) if array.packed else (rows, *array.shape[2:]))
        for array in layout.arrays(cache.spec, views[0]).values()
        if array.name != "sizes"
    }
    return {"offsets": (np.dtype(np.int64), (rows + 1,)), **shapes}


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: expected {needed / 1e9:,.2f} GB of free disk for the targets, got "
            f"{free / 1e9:,.2f} GB; make room, or set GKD_CACHE_DIR to a larger disk"
        )


def _copy(cache: Cache, views: tuple[View, ...], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Copy every shard of every view to its place, threads side by side."""
    assert cache.manifest is not None
    jobs = []
    first_entry = 0
    with (
        progress("materialise", len(views) * cache.spec.num_shards, "shards") as advance,
        ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool,
    ):
        try:
            for number, view in enumerate(views):
                for shard, record in enumerate(cache.manifest.shards):
                    first_row = number * cache.spec.num_samples + record.rows[0]
                    jobs.append(
                        pool.submit(_copy_shard, cache, view, shard, arrays, first_row, first_entry)
                    )
                    first_entry += record.entries[view]
            for job in as_completed(jobs):
                job.result()
                advance()
        finally:
            pool.shutdown(cancel_futures=True)


def _copy_shard(
    cache: Cache,
    view: View,
    shard: int,
    arrays: Mapping[str, npt.NDArray[Any]],
    first_row: int,
    first_entry: int,
) -> None:
    commit = cache.commit(shard)
    for file in layout.view_files(cache.spec, shard, view, commit.views[view].entries):
        path = cache.shard_file(shard, file, commit)
        if atomic.sha256_file(path) != commit.files[file].sha256:
            raise CorruptShardError(
                f"{path}: its sha256 is not the one in its commit record; get the cache again, "
                "`gkd targets verify` lists every fault"
            )
    targets = cache.read_shard(shard, view)
    rows = slice(first_row, first_row + len(targets))
    entries = slice(first_entry, first_entry + len(targets.indices))
    for name, array in arrays.items():
        if name == "offsets":
            array[first_row + 1 : rows.stop + 1] = targets.offsets[1:] + first_entry
        else:
            packed = name in ("indices", "log2_probs")
            array[entries if packed else rows] = getattr(targets, name)


def _warm(target: Path) -> None:
    """Read everything once: random reads of cold files would take minutes to do the same."""
    files = list(target.glob("*.npy"))
    size = sum(file.stat().st_size for file in files)
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return
    buffer = bytearray(_WARM_BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
