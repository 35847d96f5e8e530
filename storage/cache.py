"""Reads a cache of targets, trusting nothing that its files say about themselves."""

import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gkd.storage import atomic, layout
from gkd.storage.chunks import check_chunks
from gkd.storage.errors import ConfigError, CorruptShardError, IncompleteCacheError
from gkd.storage.layout import ArrayLayout, Commit, Manifest, file_record
from gkd.storage.meaning import check_targets
from gkd.storage.spec import FORMAT, CacheSpec, View
from gkd.storage.targets import SparseTargets, offsets_from_sizes

DIGEST_BYTES = 16
MAX_METADATA_BYTES = 1 << 20
# Where a file stands: of a cache on disk, or at an address (gkd.storage.remote).
Place = Path | str
# Of a record's key: a path's length twice; of a sample's whole row, unpacked.
_MOST_KEY_BYTES = 8192
_MOST_ROW_BYTES = _MOST_KEY_BYTES + 1024
_MOST_BATCH_BYTES = 1 << 28
_SAMPLES_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("digest", pa.binary(DIGEST_BYTES)),
    ]
)


@dataclass(frozen=True)
class Samples:
    """What the N samples of a cache are.

    labels   int64 [N]
    digests  uint8 [N, 16]  of the encoded images, zero where not present
    present  bool  [N]      False where the sample was skipped and has no targets
    """

    cache: "Cache"
    labels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    present: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def keys(self, rows: Iterable[int]) -> list[str]:
        """Record keys of some rows, read from the shards that hold them."""
        tables: dict[int, pa.Table] = {}
        keys = []
        for row in rows:
            shard, place = divmod(int(row), self.cache.spec.shard_samples)
            if shard not in tables:
                tables[shard] = self.cache.read_samples(shard)
            keys.append(tables[shard]["key"][place].as_py())
        return keys


class Cache:
    """A cache opened for reading; ``Cache.open`` makes one.

    path      absolute path
    spec      what decided its bytes
    manifest  None where it is not finished
    """

    def __init__(self, path: Path, spec: CacheSpec, manifest: Manifest | None, id: str) -> None:
        self.path = path
        self.spec = spec
        self.manifest = manifest
        self._id = id

    @classmethod
    def open(cls, path: str | Path, *, complete: bool = True) -> Self:
        """Open a cache, checking all its metadata against format 1 before anything is used.

        With ``complete=False`` a cache that is still being written opens too.

        Raises:
            ConfigError: where ``path`` is no cache.
            IncompleteCacheError: where it is not finished.
            CorruptShardError: where its metadata or manifest is not that of its spec.
        """
        path = Path(path).absolute()
        spec = read_spec(path)
        for file, expected in layout.metadata_files(spec):
            found = _decode(_read_metadata(path, file), Any, path / file)
            _require_metadata(path / file, found, expected)
        if not (path / layout.MANIFEST).is_symlink() and not (path / layout.MANIFEST).exists():
            if complete:
                raise IncompleteCacheError(_incomplete(path, spec))
            return cls(path, spec, None, "")
        content = regular_file(path, layout.MANIFEST).read_bytes()
        manifest = parse_manifest(content, path / layout.MANIFEST, spec)
        files = [file for file, _ in layout.metadata_files(spec)]
        files += [layout.CARD] if layout.CARD in manifest.files else []
        for file in files:
            if manifest.files.get(file) != file_record(regular_file(path, file)):
                _corrupt(path / file, f"its size or sha256 is not the one in {layout.MANIFEST}")
        return cls(path, spec, manifest, hashlib.sha256(content).hexdigest())

    @property
    def id(self) -> str:
        """Hex sha256 of the manifest, which vouches for every byte of the cache.

        Raises:
            IncompleteCacheError: where the cache is not finished.
        """
        if self.manifest is None:
            raise IncompleteCacheError(_incomplete(self.path, self.spec))
        return self._id

    def commit(self, shard: int) -> Commit:
        """The commit record of a shard.

        Raises:
            CorruptShardError: where it is missing, damaged or not the one of the manifest.
        """
        path = self.path / layout.commit_file(shard)
        if self.manifest is not None:
            regular_file(self.path, layout.commit_file(shard))
            if atomic.sha256_file(path) != self.manifest.shards[shard].commit:
                _corrupt(path, "its sha256 is not the one in manifest.json")
        return read_commit(self.path, self.spec, shard)

    def shard_file(self, shard: int, file: str, commit: Commit) -> Path:
        """Path of a file of a shard, after its presence and size were checked."""
        path = regular_file(self.path, file)
        expected, size = commit.files[file].bytes, path.stat().st_size
        if size != expected:
            _corrupt(path, f"expected {expected} bytes, got {size}")
        return path

    def require_files(self) -> None:
        """See that every file of every shard is there and has its size, reading none of them.

        Raises:
            CorruptShardError: at the first that is missing, cut or a link; at a commit record that
                is damaged.
        """
        for shard in range(self.spec.num_shards):
            commit = self.commit(shard)
            for file in commit.files:
                self.shard_file(shard, file, commit)

    def read_shard(self, shard: int, view: View) -> SparseTargets:
        """Targets of all samples of a shard, in row order.

        Raises:
            CorruptShardError: where a file is missing, damaged or says what cannot be.
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
                _corrupt(
                    self.path / arrays[name].shard_file(shard),
                    f"class {rows[name].max()} where there are {self.spec.num_classes}",
                )
        return SparseTargets(offsets_from_sizes(sizes), **rows)

    def read_sizes(self, shard: int, view: View) -> npt.NDArray[np.uint16]:
        """Group sizes of all samples of a shard, in row order; 0 for a skipped one.

        Raises:
            CorruptShardError: where the file is missing, damaged or says what cannot be.
        """
        return self._sizes(shard, view, self.commit(shard))

    def read_verified(self, shard: int, view: View) -> SparseTargets:
        """``read_shard``, with all files held against their hashes and their meaning checked.

        What ``gkd targets verify --deep`` finds in a view of a shard is found here, but for masses
        of different temperatures and draws that do not fit the groups.

        Raises:
            CorruptShardError: where a file is missing, damaged or says what cannot be.
        """
        commit = self.commit(shard)
        for file in layout.view_files(self.spec, shard, view, commit.views[view].entries):
            path = self.shard_file(shard, file, commit)
            if atomic.sha256_file(path) != commit.files[file].sha256:
                _corrupt(path, "its sha256 is not the one in its commit record")
        targets = self.read_shard(shard, view)
        table = self.read_samples(shard)
        labels, present = table["label"].to_numpy(), table["digest"].is_valid().to_numpy()
        for name, sample, problem in check_targets(self.spec, targets, labels, present):
            file = layout.arrays(self.spec, view)[name].shard_file(shard)
            row = self.spec.shard_rows(shard).start + sample
            _corrupt(self.path / file, f"row {row}: {problem}")
        return targets

    def _sizes(self, shard: int, view: View, commit: Commit) -> npt.NDArray[np.uint16]:
        entries = commit.views[view].entries
        array = layout.arrays(self.spec, view)["sizes"]
        sizes = self._read_row(shard, array, commit, entries, len(self.spec.shard_rows(shard)))
        if sizes.max(initial=0) > self.spec.max_group or sizes.sum(dtype=np.int64) != entries:
            _corrupt(
                self.path / array.shard_file(shard),
                f"group sizes above {self.spec.max_group}, or not {entries} in all",
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
            _corrupt(path, f"it cannot be decoded ({error})", error)
        return values

    def read_samples(self, shard: int) -> pa.Table:
        """Table of a shard's samples: row, key, label, digest (null where skipped).

        Raises:
            CorruptShardError: where the file is missing, damaged or not that of the shard's rows.
        """
        commit = self.commit(shard)
        path = self.shard_file(shard, layout.samples_file(shard), commit)
        rows = self.spec.shard_rows(shard)
        # In pyarrow's own memory: its threads may drop the file a little after the read, and one
        # that drops Python's memory while the interpreter ends aborts it (apache/arrow#34314).
        with pa.OSFile(str(path)) as source:
            content = source.read_buffer()
        if hashlib.sha256(content).hexdigest() != commit.files[layout.samples_file(shard)].sha256:
            _corrupt(path, "its sha256 is not the one in its commit record")
        try:
            with pq.ParquetFile(pa.BufferReader(content)) as file:
                told = file.metadata
                if told.num_rows != len(rows) or file.schema_arrow != _SAMPLES_SCHEMA:
                    _corrupt(path, f"expected {len(rows)} rows of {_SAMPLES_SCHEMA.names}")
                size = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
                if size > len(rows) * _MOST_ROW_BYTES:
                    _corrupt(path, f"{size:,} bytes unpacked for {len(rows):,} samples")
                table = _unpack(path, file, size)
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            _corrupt(path, f"it cannot be decoded ({error})", error)
        if not np.array_equal(table["row"].to_numpy(), np.arange(rows.start, rows.stop)):
            _corrupt(path, f"its rows are not {rows.start} to {rows.stop - 1}")
        if table["key"].null_count or table["label"].null_count:
            _corrupt(path, "a sample without key or label")
        without = table["key"].filter(table["digest"].is_null()).to_pylist()
        if sorted(without) != sorted(commit.skipped):
            _corrupt(path, "samples without digest are not those skipped by the commit record")
        return table

    def samples(self) -> Samples:
        """Labels and digests of all samples."""
        n = self.spec.num_samples
        samples = Samples(
            self, np.empty(n, np.int64), np.zeros((n, DIGEST_BYTES), np.uint8), np.empty(n, bool)
        )
        for shard in range(self.spec.num_shards):
            rows = self.spec.shard_rows(shard)
            place = slice(rows.start, rows.stop)
            table = self.read_samples(shard)
            samples.labels[place] = table["label"].to_numpy()
            samples.present[place] = table["digest"].is_valid().to_numpy()
            samples.digests[place] = digests_of(table)
        return samples


def digests_of(table: pa.Table) -> npt.NDArray[np.uint8]:
    """Digests uint8 [n, 16] of a table of samples, zero where there is none."""
    column = table["digest"].combine_chunks().fill_null(bytes(DIGEST_BYTES))
    raw = np.frombuffer(column.buffers()[1], np.uint8)
    start = column.offset * DIGEST_BYTES
    return raw[start : start + len(column) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)


def regular_file(root: Path, file: str) -> Path:
    """Path of a file of the cache that is really there: no link on the way, nothing special.

    Raises:
        CorruptShardError: naming the path that is missing, a link or no file.
    """
    path, mode = root, 0
    for part in Path(file).parts:
        path = path / part
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            _corrupt(path, "missing", error)
        if stat.S_ISLNK(mode):
            _corrupt(path, "a symbolic link, which a cache never has")
    if not stat.S_ISREG(mode):
        _corrupt(path, "not a file")
    return path


def read_spec(path: Path) -> CacheSpec:
    """The spec in a cache's root ``zarr.json``.

    Raises:
        ConfigError: where ``path`` is no cache of a format that this version reads.
        CorruptShardError: where it is one but its spec cannot be.
    """
    if not (path / layout.METADATA).is_file():
        raise ConfigError(
            f"{path}: expected a cache of targets (a folder with {layout.METADATA}), got "
            + ("another folder" if path.is_dir() else "a file" if path.exists() else "nothing")
            + "; check the path"
        )
    return parse_spec(_read_metadata(path, layout.METADATA), path / layout.METADATA)


def parse_spec(content: bytes, place: Place) -> CacheSpec:
    """The spec in the bytes of a root ``zarr.json``, which stands at ``place``.

    Raises:
        ConfigError: where it is no cache of a format that this version reads.
        CorruptShardError: where it is one but its spec cannot be.
    """
    root = _decode(content, Any, place)
    attributes = root.get("attributes") if isinstance(root, dict) else None
    cache = str(place).removesuffix(f"/{layout.METADATA}")
    if not isinstance(attributes, dict) or "format" not in attributes:
        raise ConfigError(f"{cache}: a Zarr store, but no cache of targets; check the path")
    if attributes["format"] != FORMAT:
        raise ConfigError(
            f"{cache}: expected a cache of format {FORMAT}, got {attributes['format']!r}; "
            "update gkd to read it"
        )
    try:
        return msgspec.convert(attributes, CacheSpec)
    except msgspec.ValidationError as error:
        _corrupt(place, f"its spec cannot be: {error}", error)


def parse_manifest(content: bytes, place: Place, spec: CacheSpec) -> Manifest:
    """A manifest from its bytes, checked against the spec.

    Raises:
        CorruptShardError: where it is damaged or the manifest of another spec.
    """
    manifest: Manifest = _decode(content, Manifest, place)
    if not layout.is_whole_manifest(content, manifest):
        _corrupt(place, "its sha256 is not the one that it names")
    if manifest.format != spec.format or manifest.spec != layout.spec_digest(spec):
        _corrupt(place, f"the manifest of another spec than the one in {layout.METADATA}")
    expected = [spec.shard_rows(shard) for shard in range(len(manifest.shards))]
    if (
        len(manifest.shards) != spec.num_shards
        or manifest.num_samples != spec.num_samples
        or any((r.start, r.stop) != s.rows for r, s in zip(expected, manifest.shards, strict=True))
        or any(shard.entries.keys() != set(spec.views) for shard in manifest.shards)
    ):
        _corrupt(place, "its shards are not those of the spec")
    return manifest


def committed_shards(path: Path) -> list[int]:
    """Shards of a cache, finished or not, that have a commit record, ascending."""
    return sorted(int(p.stem) for p in (path / "commits").glob("*.json") if p.stem.isdecimal())


def read_commit(path: Path, spec: CacheSpec, shard: int) -> Commit:
    """A commit record, checked against what the spec says the shard must have.

    Raises:
        CorruptShardError: where it is missing or not the record of this shard.
    """
    place = regular_file(path, layout.commit_file(shard))
    return parse_commit(place.read_bytes(), place, spec, shard)


def parse_commit(content: bytes, place: Place, spec: CacheSpec, shard: int) -> Commit:
    """A commit record from its bytes, checked against what the spec says the shard must have.

    Raises:
        CorruptShardError: where it is not the record of this shard.
    """
    commit: Commit = _decode(content, Commit, place)
    rows = spec.shard_rows(shard)
    if (commit.format, commit.shard, commit.rows) != (spec.format, shard, (rows.start, rows.stop)):
        _corrupt(place, f"not the record of shard {shard}, rows {rows.start} to {rows.stop - 1}")
    if commit.views.keys() != set(spec.views):
        _corrupt(place, f"expected views {', '.join(spec.views)}, got {', '.join(commit.views)}")
    for view, record in commit.views.items():
        if record.entries > len(rows) * spec.max_group or record.truncated > len(rows):
            _corrupt(place, f"{view}: more entries or cut groups than {len(rows)} samples can have")
    entries: dict[View, int] = {view: record.entries for view, record in commit.views.items()}
    if commit.files.keys() != set(layout.shard_files(spec, shard, entries)):
        _corrupt(place, "its list of files is not that of a shard of this cache")
    if len(commit.skipped) > len(rows):
        _corrupt(place, f"{len(commit.skipped)} skipped samples of {len(rows)}")
    return commit


def _require_metadata(path: Path, found: Any, expected: dict[str, Any]) -> None:
    if found == expected:
        return
    keys = found.keys() | expected.keys() if isinstance(found, dict) else []
    for key in sorted(keys):
        if found.get(key) != expected.get(key):
            _corrupt(path, f"{key}: expected {expected.get(key)!r}, got {found.get(key)!r}")
    _corrupt(path, f"expected an object, got {type(found).__name__}")


def _read_metadata(root: Path, file: str) -> bytes:
    path = regular_file(root, file)
    size = path.stat().st_size
    if size > MAX_METADATA_BYTES:
        _corrupt(path, f"{size} bytes are too many for metadata")
    return path.read_bytes()


def _decode(content: bytes, kind: Any, place: Place) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        _corrupt(place, f"no such JSON as format 1 has there: {error}", error)


def _incomplete(path: Path, spec: CacheSpec) -> str:
    written = len(committed_shards(path))
    return (
        f"{path}: {written} of {spec.num_shards} shards are written and {layout.MANIFEST} is not; "
        "run the same `gkd cache-teacher` or `gkd targets pull` again to go on"
    )


def _unpack(path: Path, file: pq.ParquetFile, size: int) -> pa.Table:
    """A table of samples of ``size`` bytes, its keys looked at before many are written out.

    Neighbouring keys share what they begin with, so few bytes may mean many; none is longer than
    all bytes together.
    """
    rows = max(1, _MOST_BATCH_BYTES // max(size, 1))
    batches = []
    for batch in file.iter_batches(batch_size=rows):
        lengths = pc.call_function("binary_length", [batch["key"]])
        longest = pc.call_function("max", [lengths]).as_py() or 0
        if longest > _MOST_KEY_BYTES:
            _corrupt(path, f"a record key of {longest:,} bytes")
        batches.append(batch)
    return pa.Table.from_batches(batches, _SAMPLES_SCHEMA)


def _corrupt(place: Place, what: str, cause: BaseException | None = None) -> NoReturn:
    raise CorruptShardError(f"{place}: {what}", _remedy(place)) from cause


def _remedy(place: Place) -> str:
    if isinstance(place, str):
        return "push the cache there again from a whole copy"
    pull = "get it again into the same folder with `gkd targets pull`, which mends it, or "
    if place.name == layout.METADATA:
        return pull + "make it again in another folder"
    records = f"this shard's commit record and {layout.MANIFEST}"
    if place.name in (layout.MANIFEST, layout.CARD):
        records = layout.MANIFEST
    return pull + f"delete {records} and run the same `gkd cache-teacher` again"
