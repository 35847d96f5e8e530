"""Reads a cache of targets and verifies everything that its files say about themselves."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gkd.storage.cache import layout
from gkd.storage.cache.chunks import check_chunks
from gkd.storage.cache.invariants import check_invariants
from gkd.storage.cache.layout import ArrayLayout, Commit, Manifest, file_record
from gkd.storage.cache.metadata import (
    check_metadata,
    corrupt,
    incomplete,
    parse_commit,
    parse_manifest,
    read_regular,
    read_spec,
    regular_file,
)
from gkd.storage.cache.samples import digests_of, parse_samples
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.targets import SparseTargets, offsets_from_sizes
from gkd.storage.records.images import DIGEST_BYTES
from gkd.storage.util.files import sha256_file


@dataclass(frozen=True)
class Samples:
    """The N samples of a cache.

    labels   int64 [N]
    digests  uint8 [N, 16]  of the encoded images, zero if not present
    present  bool  [N]      False if the sample was skipped and has no targets
    """

    cache: "Cache"
    labels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    present: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def keys(self, rows: Iterable[int]) -> list[str]:
        """Record keys of rows, with one shard's table in memory at a time."""
        shards, offsets = np.divmod(np.fromiter(rows, np.int64), self.cache.spec.shard_samples)
        keys = np.empty(len(shards), object)
        for shard in np.unique(shards).tolist():
            inside = shards == shard
            table = self.cache.read_samples(shard)
            keys[inside] = table["key"].take(offsets[inside]).to_pylist()
        return list(keys)


class Cache:
    """A cache opened for reading; ``Cache.open`` makes one.

    path      absolute path
    spec      the settings that decided its bytes
    manifest  None if it is not finished
    """

    def __init__(self, path: Path, spec: CacheSpec, manifest: Manifest | None, id: str) -> None:
        self.path = path
        self.spec = spec
        self.manifest = manifest
        self._id = id

    @classmethod
    def open(cls, path: str | Path, *, complete: bool = True) -> Self:
        """Open a cache after checking all its metadata against format 1.

        With ``complete=False`` a cache that is still being written opens too.

        Raises:
            ConfigError: if ``path`` is not a cache.
            IncompleteCacheError: if it is not finished.
            CorruptShardError: if its metadata or manifest is not that of its spec.
        """
        path = Path(path).absolute()
        spec = read_spec(path)
        check_metadata(path, spec)
        if not (path / layout.MANIFEST).is_symlink() and not (path / layout.MANIFEST).exists():
            if complete:
                raise incomplete(path, spec)
            return cls(path, spec, None, "")
        content = read_regular(path, layout.MANIFEST)
        manifest = parse_manifest(content, path / layout.MANIFEST, spec)
        files = [file for file, _ in layout.metadata_files(spec)]
        files += [layout.CARD] if layout.CARD in manifest.files else []
        for file in files:
            if manifest.files.get(file) != file_record(regular_file(path, file)):
                corrupt(path / file, f"its size or sha256 is not that in {layout.MANIFEST}")
        return cls(path, spec, manifest, hashlib.sha256(content).hexdigest())

    @property
    def id(self) -> str:
        """Hex sha256 of the manifest, which covers every byte of the cache.

        Raises:
            IncompleteCacheError: if the cache is not finished.
        """
        if self.manifest is None:
            raise incomplete(self.path, self.spec)
        return self._id

    def commit(self, shard: int) -> Commit:
        """The commit record of a shard.

        Raises:
            CorruptShardError: if it is missing, damaged or not that of the manifest.
        """
        file = layout.commit_file(shard)
        path, content = self.path / file, read_regular(self.path, file)
        expected = None if self.manifest is None else self.manifest.shards[shard].commit
        if expected not in (None, hashlib.sha256(content).hexdigest()):
            corrupt(path, f"its sha256 is not that in {layout.MANIFEST}")
        commit = parse_commit(content, path, self.spec, shard)
        if self.manifest is not None and self.manifest.shards[shard].entries != commit.entries:
            corrupt(
                self.path / layout.MANIFEST,
                f"the entries of shard {shard} are not those of its commit record",
            )
        return commit

    def shard_file(self, shard: int, file: str, commit: Commit) -> Path:
        """Path of a file of a shard, after checking its presence and size."""
        path = regular_file(self.path, file)
        expected, size = commit.files[file].bytes, path.stat().st_size
        if size != expected:
            corrupt(path, f"expected {expected} bytes, got {size}")
        return path

    def require_files(self) -> None:
        """Check presence and size of every file of every shard, without reading them.

        Raises:
            CorruptShardError: at the first file that is missing, truncated or a link, or commit
                record that is damaged.
        """
        for shard in range(self.spec.num_shards):
            commit = self.commit(shard)
            for file in commit.files:
                self.shard_file(shard, file, commit)

    def read_shard(self, shard: int, view: View) -> SparseTargets:
        """Targets of all samples of a shard, in row order.

        Raises:
            CorruptShardError: if a file is missing, damaged or inconsistent.
        """
        commit = self.commit(shard)
        entries = commit.views[view].entries
        n = len(self.spec.shard_rows(shard))
        arrays = layout.arrays(self.spec, view)
        sizes = self._sizes(shard, view, commit)
        rows = {
            name: self._read_row(shard, array, commit, entries, entries if array.packed else n)
            for name, array in arrays.items()
            if name != "sizes"
        }
        for name in rows.keys() & {"indices", "draws"}:
            if rows[name].max(initial=0) >= self.spec.num_classes:
                corrupt(
                    self.path / arrays[name].shard_file(shard),
                    f"class {rows[name].max()} of {self.spec.num_classes} classes",
                )
        return SparseTargets.from_arrays(offsets_from_sizes(sizes), rows)

    def read_sizes(self, shard: int, view: View) -> npt.NDArray[np.uint16]:
        """Group sizes of all samples of a shard, in row order; 0 for a skipped one.

        Raises:
            CorruptShardError: if the file is missing, damaged or inconsistent.
        """
        return self._sizes(shard, view, self.commit(shard))

    def read_verified(self, shard: int, view: View) -> SparseTargets:
        """``read_shard`` with all files verified against their hashes and invariants checked.

        It finds what ``gkd targets verify --deep`` finds in a view of a shard, apart from masses
        of several temperatures and draws that are inconsistent with the groups.

        Raises:
            CorruptShardError: if a file is missing, damaged or inconsistent.
        """
        commit = self.commit(shard)
        for file in layout.view_files(self.spec, shard, view, commit.views[view].entries):
            path = self.shard_file(shard, file, commit)
            if sha256_file(path) != commit.files[file].sha256:
                corrupt(path, "its sha256 is not that in its commit record")
        targets = self.read_shard(shard, view)
        table = self.read_samples(shard)
        labels, present = table["label"].to_numpy(), table["digest"].is_valid().to_numpy()
        for name, sample, problem in check_invariants(self.spec, targets, labels, present):
            file = layout.arrays(self.spec, view)[name].shard_file(shard)
            row = self.spec.shard_rows(shard).start + sample
            corrupt(self.path / file, f"row {row}: {problem}")
        return targets

    def _sizes(self, shard: int, view: View, commit: Commit) -> npt.NDArray[np.uint16]:
        entries = commit.views[view].entries
        array = layout.arrays(self.spec, view)["sizes"]
        sizes = self._read_row(shard, array, commit, entries, len(self.spec.shard_rows(shard)))
        if sizes.max(initial=0) > self.spec.max_group or sizes.sum(dtype=np.int64) != entries:
            corrupt(
                self.path / array.shard_file(shard),
                f"group sizes above {self.spec.max_group}, or a sum other than {entries}",
            )
        return sizes

    def _read_row(
        self, shard: int, array: ArrayLayout, commit: Commit, entries: int, count: int
    ) -> npt.NDArray[Any]:
        if not count:
            return np.zeros((0, *array.shape[2:]), array.dtype)
        path = self.shard_file(shard, array.shard_file(shard), commit)
        check_chunks(path, array, entries)
        try:
            values: npt.NDArray[Any] = np.asarray(array.open(self.path)[shard, :count])
        except (ValueError, RuntimeError, OSError) as error:
            corrupt(path, f"it cannot be decoded ({error})", error)
        return values

    def read_samples(self, shard: int) -> pa.Table:
        """Table of a shard's samples: row, key, label, digest (null if skipped).

        Raises:
            CorruptShardError: if the file is missing, damaged or not that of the shard's rows.
        """
        commit = self.commit(shard)
        path = self.shard_file(shard, layout.samples_file(shard), commit)
        # Into pyarrow's own memory: its threads may release the file shortly after the read, and
        # releasing Python's memory while the interpreter exits aborts it (apache/arrow#34314).
        with pa.OSFile(str(path)) as source:
            content = source.read_buffer()
        if hashlib.sha256(content).hexdigest() != commit.files[layout.samples_file(shard)].sha256:
            corrupt(path, "its sha256 is not that in its commit record")
        return parse_samples(content, path, self.spec.shard_rows(shard), commit.skipped)

    def samples(self) -> Samples:
        """Labels and digests of all samples."""
        n = self.spec.num_samples
        samples = Samples(
            self, np.empty(n, np.int64), np.zeros((n, DIGEST_BYTES), np.uint8), np.empty(n, bool)
        )
        for shard in range(self.spec.num_shards):
            rows = self.spec.shard_rows(shard)
            here = slice(rows.start, rows.stop)
            table = self.read_samples(shard)
            samples.labels[here] = table["label"].to_numpy()
            samples.present[here] = table["digest"].is_valid().to_numpy()
            samples.digests[here] = digests_of(table)
        return samples
