"""Writes a cache shard by shard; an interruption leaves only complete shards."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.layout import ArrayLayout, Commit, ViewRecord, file_record
from gkd.storage.cache.metadata import corrupt, read_commit, read_spec
from gkd.storage.cache.samples import ShardSamples, write_samples
from gkd.storage.cache.spec import NAME_FIELDS, CacheSpec, View, resume_hints
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import (
    ConfigError,
    CorruptShardError,
    IncompleteCacheError,
    SpecMismatchError,
)
from gkd.storage.util.files import (
    delete_temporaries,
    disk_errors,
    publish_dir,
    sync_path,
    write_file,
)
from gkd.storage.util.input_files import read_small
from gkd.storage.util.text import describe_differences


class CacheWriter:
    """A cache being made at ``path``, created or resumed.

    Any number of processes may write to one path; each writes the shards that
    ``pending(rank, world_size)`` gives it. The commit record of a shard is its last file and the
    only proof that it exists. ``guard`` is called before a shard is written and again before it
    is committed; it raises to stop the writing.

    Raises:
        SpecMismatchError: if ``path`` holds a cache of another spec, apart from ``software``.
        ConfigError: if ``path`` is something else, or cannot be written.
    """

    def __init__(
        self, path: Path, spec: CacheSpec, *, guard: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path.absolute()
        self.spec = spec
        self._guard = guard
        if _is_free(self.path):
            with disk_errors(self.path):
                _create(self.path, spec)
        _require_same_spec(self.path, read_spec(self.path), spec)
        for folder, names, _ in os.walk(self.path):
            for name in names:
                if (Path(folder) / name).is_symlink():
                    corrupt(
                        Path(folder) / name, "a link to another folder, which no cache contains"
                    )

    def pending(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Shards that ``rank`` has yet to write, ascending.

        These include shards with a damaged commit record or with files of another size.
        """
        mine = self.spec.sharding.of_rank(rank, world_size)
        return [shard for shard in mine if not self._is_committed(shard)]

    def write_shard(
        self,
        shard: int,
        views: Mapping[View, SparseTargets],
        samples: ShardSamples,
        *,
        truncated: Mapping[View, int],
    ) -> None:
        """Write one shard and commit it; ``truncated`` counts groups that were cut to size.

        Raises:
            ValueError: if the arguments do not follow the spec, or the shard is committed.
            ConfigError: if the disk is full or read-only, or the cache is gone; nothing of the
                shard is left then.
        """
        if self._is_committed(shard):
            raise ValueError(f"shard {shard} is committed already")
        _check_samples(self.spec, shard, samples)
        for view in self.spec.views:
            _check_targets(self.spec, views[view], samples, view)
        if not (self.path / layout.METADATA).exists():
            raise ConfigError(
                path=self.path,
                expected="the cache that was begun here",
                got="nothing",
                remedy="move it back and run the same command again to resume",
            )
        self._guard()
        with disk_errors(self.path):
            try:
                self._delete_leftovers(shard)
                commit = self._write_files(shard, views, samples, truncated)
                self._guard()
                write_file(self.path / layout.commit_file(shard), layout.encode_json(commit))
            except OSError:
                # On a full disk this makes room again.
                if not self._is_committed(shard):
                    self._delete_leftovers(shard)
                raise

    def _write_files(
        self,
        shard: int,
        views: Mapping[View, SparseTargets],
        samples: ShardSamples,
        truncated: Mapping[View, int],
    ) -> Commit:
        """Write all files of a shard except its commit record, which is returned."""
        for view in self.spec.views:
            arrays = views[view].arrays() | {"sizes": views[view].sizes}
            for array in layout.arrays(self.spec, view).values():
                _write_row(self.path, array, shard, arrays[array.name])
        write_samples(self.path / layout.samples_file(shard), self.spec.shard_rows(shard), samples)

        entries: dict[View, int] = {view: len(views[view].indices) for view in self.spec.views}
        files = layout.shard_files(self.spec, shard, entries)
        _sync(self.path, files)
        rows = self.spec.shard_rows(shard)
        return Commit(
            format=self.spec.format,
            shard=shard,
            rows=(rows.start, rows.stop),
            views={
                view: ViewRecord(entries[view], int(truncated[view])) for view in self.spec.views
            },
            skipped={samples.keys[i]: reason for i, reason in samples.skipped.items()},
            files={file: file_record(self.path / file) for file in files},
        )

    def finish(self) -> str:
        """Publish the manifest once all shards are committed; the cache's id.

        Raises:
            IncompleteCacheError: if shards are missing.
            ConfigError: if the disk is full or read-only.
        """
        missing = self.pending()
        if missing:
            raise IncompleteCacheError(
                f"{len(missing)} of {self.spec.num_shards} shards are not written, the first is "
                f"{missing[0]}",
                path=self.path,
                remedy="run the same command again to resume",
            )
        # The spec on disk, not ours: a resumed run may have other software versions.
        spec = read_spec(self.path)
        files = [path for path, _ in layout.metadata_files(spec)]
        if (self.path / layout.CARD).exists():
            files.append(layout.CARD)
        commits = [
            (
                read_commit(self.path, spec, shard),
                file_record(self.path / layout.commit_file(shard)),
            )
            for shard in range(spec.num_shards)
        ]
        content = layout.manifest_content(
            spec, {file: file_record(self.path / file) for file in files}, commits
        )
        manifest = self.path / layout.MANIFEST
        if not manifest.is_file() or read_small(manifest) != content:
            with disk_errors(self.path):
                delete_temporaries(self.path, layout.MANIFEST)
                write_file(manifest, content)
        return hashlib.sha256(content).hexdigest()

    def _is_committed(self, shard: int) -> bool:
        if not (self.path / layout.commit_file(shard)).exists():
            return False
        try:
            commit = read_commit(self.path, self.spec, shard)
        except CorruptShardError:
            return False
        return all(
            (self.path / file).is_file() and (self.path / file).stat().st_size == record.bytes
            for file, record in commit.files.items()
        )

    def _delete_leftovers(self, shard: int) -> None:
        (self.path / layout.commit_file(shard)).unlink(missing_ok=True)
        for view in self.spec.views:
            for array in layout.arrays(self.spec, view).values():
                shutil.rmtree(self.path / array.path / "c" / str(shard), ignore_errors=True)
        (self.path / layout.samples_file(shard)).unlink(missing_ok=True)
        delete_temporaries(self.path / "commits", Path(layout.commit_file(shard)).name)


def require_writable(path: Path, spec: CacheSpec, *, unknown: Collection[str] = ()) -> None:
    """Raise what ``CacheWriter`` would raise at ``path``, without creating anything.

    For a caller with long work ahead of its writer. Fields of the spec in ``unknown``, such as
    ``centers.sha256``, are not compared.

    Raises:
        SpecMismatchError: if ``path`` holds a cache of another spec.
        ConfigError: if ``path`` is something else.
    """
    if not _is_free(path):
        _require_same_spec(path, read_spec(path), spec, unknown)


def _is_free(path: Path) -> bool:
    """Whether there is nothing or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _create(path: Path, spec: CacheSpec) -> None:
    """Publish the cache's metadata, unless another process has done so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with publish_dir(path) as folder:
            for file, content in layout.metadata_files(spec):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(layout.encode_json(content))
            for name in ("samples", "commits"):
                (folder / name).mkdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _require_same_spec(
    path: Path, stored: CacheSpec, wanted: CacheSpec, unknown: Collection[str] = ()
) -> None:
    differences = describe_differences(
        stored,
        wanted,
        old_name="the cache has",
        new_name="this run has",
        ignore={*NAME_FIELDS, *unknown},
    )
    if differences:
        raise SpecMismatchError(
            "a cache made with other settings:\n  "
            + "\n  ".join(sorted(differences))
            + resume_hints(differences),
            path=path,
            remedy="use the cache's settings to resume it, or choose another folder",
        )


def _check_samples(spec: CacheSpec, shard: int, samples: ShardSamples) -> None:
    n = len(spec.shard_rows(shard))
    shapes = (len(samples.keys), samples.labels.shape, samples.digests.shape)
    if shapes != (n, (n,), (n, 16)):
        raise ValueError(f"shard {shard} has {n} samples, got keys, labels and digests {shapes}")


def _check_targets(
    spec: CacheSpec, targets: SparseTargets, samples: ShardSamples, view: View
) -> None:
    """Stop a faulty run before it has cost a GPU-day."""
    n, sizes, entries = len(samples.keys), targets.sizes, len(targets.indices)
    arrays = targets.arrays()
    for array in layout.arrays(spec, view).values():
        if array.name == "sizes":
            continue
        values = arrays.get(array.name)
        found = None if values is None else (values.dtype, values.shape)
        expected = (array.dtype, (entries,) if array.packed else (n, *array.shape[2:]))
        if found != expected:
            raise ValueError(f"{array.path}: expected {expected}, got {found}")
    if len(targets) != n or targets.offsets[0] != 0 or targets.offsets[-1] != entries:
        raise ValueError(f"{view}: offsets do not cover {n} samples and {entries} entries")
    skipped = np.zeros(n, bool)
    skipped[list(samples.skipped)] = True
    if sizes.min() < 0 or sizes.max() > spec.max_group or not np.array_equal(sizes == 0, skipped):
        raise ValueError(f"{view}: sizes outside 1..{spec.max_group}, or 0 for no skipped sample")
    if entries and targets.indices.max() >= spec.num_classes:
        raise ValueError(f"{view}: index {targets.indices.max()} of {spec.num_classes} classes")


def _write_row(path: Path, array: ArrayLayout, shard: int, values: npt.NDArray[Any]) -> None:
    # Inner chunks that are never written cost nothing.
    if len(values):
        array.open(path, writable=True)[shard, : len(values)] = values.astype(
            array.dtype, copy=False
        )


def _sync(root: Path, files: Iterable[str]) -> None:
    """Make files durable, and the entries of all folders above them."""
    folders: set[Path] = set()
    for file in files:
        sync_path(root / file)
        folders.update((root / file).relative_to(root).parents)
    for folder in folders:
        sync_path(root / folder)
