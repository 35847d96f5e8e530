"""Writes a cache shard by shard, so that any interruption leaves whole shards or nothing."""

import errno
import hashlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gkd.storage.cache import layout
from gkd.storage.cache.layout import ArrayLayout, Commit, ViewRecord, file_record
from gkd.storage.cache.metadata import read_commit, read_spec
from gkd.storage.cache.spec import CacheSpec, View, settings_of
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
    sync_file,
    sync_folder,
    write_file,
)


@dataclass(frozen=True)
class ShardSamples:
    """What the samples of one shard are, n of them in row order.

    keys     record keys, unique within the data set
    labels   int64 [n]
    digests  uint8 [n, 16]  of the encoded images
    skipped  position within the shard -> why the sample has no targets; such a sample has group
             size 0, secondary 0 and no digest
    """

    keys: Sequence[str]
    labels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]


class CacheWriter:
    """A cache being made at ``path``: created, or gone on with where it stands.

    Any number of processes may hold a writer on one path; each writes the shards that
    ``pending(rank, world_size)`` gives it. The commit record of a shard is its last file and the
    only proof that it is there. ``guard`` is called before anything of a shard is written and
    again before it is committed; what it raises stops the writing.

    Raises:
        SpecMismatchError: where ``path`` holds a cache of another spec (``software`` aside).
        ConfigError: where ``path`` is something else, or cannot be written.
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

    def pending(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Shards that ``rank`` has still to write, ascending.

        One whose commit record is damaged, or whose files are not there with their sizes, is to be
        written again.
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
        """Write one shard and commit it; ``truncated`` counts the groups cut at ``max_group``.

        Raises:
            ValueError: where the arguments are not what the spec says, or the shard is committed.
            ConfigError: where the disk is full or closed, or the cache is not there any more;
                nothing of the shard is left then.
        """
        if self._is_committed(shard):
            raise ValueError(f"shard {shard} is committed already")
        _check_samples(self.spec, shard, samples)
        for view in self.spec.views:
            _check_targets(self.spec, views[view], samples, view)
        if not (self.path / layout.METADATA).exists():
            raise ConfigError(
                f"{self.path}: expected the cache that was begun here, found it gone; put it back "
                "to where it was, and run the same command again to resume"
            )
        self._guard()
        with disk_errors(self.path):
            try:
                self._delete_leftovers(shard)
                commit = self._write_files(shard, views, samples, truncated)
                self._guard()
                write_file(self.path / layout.commit_file(shard), layout.encode_json(commit))
            except OSError:
                # A full disk has room again for others, and what is half is gone.
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
        """Write all files of a shard but its commit record, which is returned."""
        for view in self.spec.views:
            arrays = views[view].arrays() | {"sizes": views[view].sizes}
            for array in layout.arrays(self.spec, view).values():
                _write_row(self.path, array, shard, arrays[array.name])
        _write_samples(self.path / layout.samples_file(shard), self.spec.shard_rows(shard), samples)

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
            IncompleteCacheError: where shards are missing.
            ConfigError: where the disk is full or closed.
        """
        missing = self.pending()
        if missing:
            raise IncompleteCacheError(
                f"{self.path}: {len(missing)} of {self.spec.num_shards} shards are not written, "
                f"the first is {missing[0]}; run the same command again to resume"
            )
        # The spec on disk, not ours: software versions may differ where a run was gone on with.
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
        if not manifest.is_file() or manifest.read_bytes() != content:
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
    """Refuse what ``CacheWriter`` would refuse at ``path``, creating nothing.

    For a caller with long work ahead of its writer; fields of the spec in ``unknown``, such as
    ``centers.sha256``, are not known yet and not compared.

    Raises:
        SpecMismatchError: where ``path`` holds a cache of another spec.
        ConfigError: where ``path`` is something else.
    """
    if not _is_free(path):
        _require_same_spec(path, read_spec(path), spec, unknown)


def delete_leftovers(path: Path) -> None:
    """Delete what killed writers left beside the cache ``path`` on its way into place.

    For a process that knows that no other one is creating the cache (``lock.WriteLock``).
    """
    with disk_errors(path.parent):
        delete_temporaries(path.parent, path.name)


def _is_free(path: Path) -> bool:
    """Whether nothing stands there but perhaps an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _create(path: Path, spec: CacheSpec) -> None:
    """Make the cache's metadata beside ``path`` and rename it into place, unless another did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        for file, content in layout.metadata_files(spec):
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            (aside / file).write_bytes(layout.encode_json(content))
        for folder in ("samples", "commits"):
            (aside / folder).mkdir()
        _sync(aside, [file for file, _ in layout.metadata_files(spec)])
        # A rename onto a folder that is not empty fails, so of several ranks exactly one wins.
        aside.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _require_same_spec(
    path: Path, stored: CacheSpec, wanted: CacheSpec, unknown: Collection[str] = ()
) -> None:
    theirs, ours = settings_of(stored), settings_of(wanted)
    differences = [
        f"  {field}: the cache has {theirs.get(field)!r}, this run {ours.get(field)!r}"
        for field in sorted((theirs.keys() | ours.keys()) - set(unknown))
        if theirs.get(field) != ours.get(field)
    ]
    if differences:
        raise SpecMismatchError(
            f"{path} holds a cache made with other settings:\n"
            + "\n".join(differences)
            + "\nRun again with the cache's settings to go on with it, or choose another folder."
        )


def _check_samples(spec: CacheSpec, shard: int, samples: ShardSamples) -> None:
    n = len(spec.shard_rows(shard))
    shapes = (len(samples.keys), samples.labels.shape, samples.digests.shape)
    if shapes != (n, (n,), (n, 16)):
        raise ValueError(f"shard {shard} has {n} samples, got keys, labels and digests {shapes}")


def _check_targets(
    spec: CacheSpec, targets: SparseTargets, samples: ShardSamples, view: View
) -> None:
    """A GPU-day is cheaper to stop here than to find spoilt later."""
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
        raise ValueError(f"{view}: sizes outside 1..{spec.max_group}, or 0 where none is skipped")
    if entries and targets.indices.max() >= spec.num_classes:
        raise ValueError(f"{view}: index {targets.indices.max()} of {spec.num_classes} classes")


def _write_row(path: Path, array: ArrayLayout, shard: int, values: npt.NDArray[Any]) -> None:
    # Only what there is: inner chunks that are never written cost nothing.
    if len(values):
        array.open(path, writable=True)[shard, : len(values)] = values.astype(
            array.dtype, copy=False
        )


def _write_samples(path: Path, rows: range, samples: ShardSamples) -> None:
    present = np.ones(len(rows), bool)
    present[list(samples.skipped)] = False
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16),
        len(rows),
        [
            pa.py_buffer(np.packbits(present, bitorder="little")),
            pa.py_buffer(np.ascontiguousarray(samples.digests, np.uint8)),
        ],
    )
    table = pa.table(
        {
            "row": np.arange(rows.start, rows.stop, dtype=np.int64),
            "key": pa.array(samples.keys, pa.string()),
            "label": np.asarray(samples.labels, np.int64),
            "digest": digests,
        }
    )
    # Every option that shapes the bytes is given, so that they do not follow pyarrow's defaults.
    pq.write_table(
        table,
        path,
        row_group_size=len(rows),
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={
            "row": "DELTA_BINARY_PACKED",
            "key": "DELTA_BYTE_ARRAY",
            "label": "DELTA_BINARY_PACKED",
            "digest": "PLAIN",
        },
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )


def _sync(root: Path, files: Iterable[str]) -> None:
    """Make files durable, and the entries of all folders that lead to them."""
    folders: set[Path] = set()
    for file in files:
        sync_file(root / file)
        folders.update((root / file).relative_to(root).parents)
    for folder in folders:
        sync_folder(root / folder)
