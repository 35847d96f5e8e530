"""Proves that a cache is whole, or names every file that is not."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from gkd.storage.cache import layout
from gkd.storage.cache.invariants import check_invariants
from gkd.storage.cache.layout import Commit, FileRecord, Manifest, file_record
from gkd.storage.cache.metadata import committed_shards, read_commit, read_spec, regular_file
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.errors import ConfigError, CorruptShardError
from gkd.storage.util.files import sha256_file
from gkd.storage.util.progress import progress
from gkd.storage.util.torchrun_env import all_cores

_MAX_WORKERS = 8

Level = Literal["quick", "hashes", "deep"]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one file, its path relative to the cache."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at and what was found.

    ``files`` and ``bytes`` are those of the shards, ``entries`` are summed over the views.
    """

    path: Path
    level: Level
    shards: int
    files: int
    bytes: int
    entries: int
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass(frozen=True)
class _ShardReport:
    files: int
    bytes: int
    entries: int
    faults: tuple[Fault, ...]


def verify(path: str | Path, *, level: Level = "deep", workers: int | None = None) -> VerifyReport:
    """Check every file of a cache against the manifest and the commit records.

    quick   manifest, commit records and metadata; of all other files that they are there and have
            their sizes
    hashes  every byte of every file: finds whatever happened to the cache since it was written
    deep    every array is decoded too and its meaning checked (``check_invariants``), and the
            tables of samples: finds what a writer did wrong, or somebody who made the hashes fit
            again

    Threads go over the shards; each holds one view of one shard. Where all else is right, files
    that are no part of the cache are faults as well.

    Raises:
        ConfigError: where ``path`` is no cache at all. Anything else is a fault of the report.
    """
    path = Path(path).absolute()
    try:
        spec = read_spec(path)
    except (ConfigError, CorruptShardError) as error:
        if isinstance(error, ConfigError) and not (path / layout.MANIFEST).exists():
            raise
        problem = _problem(error, path / layout.METADATA)
        fault = Fault(layout.METADATA, f"{problem} (nothing else could be checked)")
        return VerifyReport(path, level, 0, 0, 0, 0, (fault,))

    manifest, faults = _read_manifest(path, spec)
    metadata_faults = list(_metadata_faults(path, spec, manifest))
    faults += metadata_faults
    if any(fault.file == layout.METADATA for fault in metadata_faults):
        faults.append(Fault(layout.METADATA, "what it describes could not be checked"))
        return VerifyReport(path, level, 0, 0, 0, 0, tuple(faults))

    shards = range(spec.num_shards) if manifest else committed_shards(path)
    cache = Cache(path, spec, None, "")
    reports = list(_verify_shards(cache, manifest, shards, level, workers))
    faults += [fault for report in reports for fault in report.faults]
    if manifest and not faults:
        faults += _stray_faults(cache, manifest)
    return VerifyReport(
        path=path,
        level=level,
        shards=len(shards),
        files=sum(report.files for report in reports),
        bytes=sum(report.bytes for report in reports),
        entries=sum(report.entries for report in reports),
        faults=tuple(sorted(faults, key=lambda fault: fault.file)),
    )


def _verify_shards(
    cache: Cache,
    manifest: Manifest | None,
    shards: Sequence[int],
    level: Level,
    workers: int | None,
) -> Iterator[_ShardReport]:
    workers = workers or min(_MAX_WORKERS, all_cores())
    with (
        progress("verify", len(shards), "shards") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        jobs = [pool.submit(_verify_shard, cache, manifest, shard, level) for shard in shards]
        try:
            for job in as_completed(jobs):
                yield job.result()
                advance()
        finally:
            # After an interrupt or an error, what has not begun must not run.
            pool.shutdown(cancel_futures=True)


def _read_manifest(path: Path, spec: CacheSpec) -> tuple[Manifest | None, list[Fault]]:
    """The manifest where it is whole, and what is wrong with it."""
    if not os.path.lexists(path / layout.MANIFEST):
        done = f"{len(committed_shards(path))} of {spec.num_shards} shards are written"
        again = "run the same `gkd cache-teacher` or `gkd targets pull` again to resume"
        return None, [Fault(layout.MANIFEST, f"not finished: {done}; {again}")]
    try:
        content = regular_file(path, layout.MANIFEST).read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
    except CorruptShardError as error:
        return None, [Fault(layout.MANIFEST, _problem(error, path / layout.MANIFEST))]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, [Fault(layout.MANIFEST, f"damaged: {error}")]
    if not layout.is_whole_manifest(content, manifest):
        return None, [Fault(layout.MANIFEST, "damaged: its sha256 is not the one that it names")]
    if len(manifest.shards) != spec.num_shards:
        lies = f"{len(manifest.shards)} shards, the spec has {spec.num_shards}"
        return None, [Fault(layout.MANIFEST, lies)]
    return manifest, []


def _metadata_faults(path: Path, spec: CacheSpec, manifest: Manifest | None) -> Iterator[Fault]:
    """Files of no shard, against the manifest and against what the spec makes of them."""
    expected = dict(layout.metadata_files(spec))
    known = manifest.files if manifest else {}
    for file in sorted(expected.keys() | known.keys() & {layout.CARD}):
        found = _file_fault(path, file, known.get(file))
        if found:
            yield found
        elif file in expected and (path / file).read_bytes() != layout.encode_json(expected[file]):
            yield Fault(file, "not the metadata that the spec asks for")
    if manifest and known.keys() - {layout.CARD} != expected.keys():
        yield Fault(layout.MANIFEST, "its files are not those of the spec")


def _stray_faults(cache: Cache, manifest: Manifest) -> Iterator[Fault]:
    """Files that the manifest does not vouch for; hidden ones are nobody's data."""
    known = {layout.MANIFEST, *manifest.files}
    for shard in range(cache.spec.num_shards):
        known |= {layout.commit_file(shard), *cache.commit(shard).files}
    for place in cache.path.rglob("*"):
        file = place.relative_to(cache.path)
        if file.as_posix() in known or any(part.startswith(".") for part in file.parts):
            continue
        if place.is_symlink() or not place.is_dir():
            yield Fault(
                file.as_posix(), "no part of the cache, but a Zarr reader may take it for one"
            )


def _problem(error: ConfigError | CorruptShardError, place: Path) -> str:
    """An error as a line of the report, which names the file itself and has no remedy."""
    fault = error.fault if isinstance(error, CorruptShardError) else str(error)
    return fault.removeprefix(f"{place}: ")


def _file_fault(
    path: Path, file: str, expected: FileRecord | None, *, hashed: bool = True
) -> Fault | None:
    """What is wrong with a file's presence, size or, where ``hashed``, its hash."""
    try:
        place = regular_file(path, file)
        size = place.stat().st_size
        if expected is not None and size != expected.bytes:
            return Fault(file, f"expected {expected.bytes} bytes, got {size}")
        if expected is None or not hashed:
            return None
        sha256 = sha256_file(place)
    except CorruptShardError as error:
        return Fault(file, _problem(error, path / file))
    except OSError as error:
        return Fault(file, f"cannot be read ({error})")
    if sha256 == expected.sha256:
        return None
    return Fault(file, f"damaged: expected sha256 {expected.sha256}, got {sha256}")


def _verify_shard(
    cache: Cache, manifest: Manifest | None, shard: int, level: Level
) -> _ShardReport:
    commit_path = layout.commit_file(shard)
    try:
        commit = read_commit(cache.path, cache.spec, shard)
        commit_record = file_record(cache.path / commit_path)
    except CorruptShardError as error:
        return _ShardReport(
            1, 0, 0, (Fault(commit_path, _problem(error, cache.path / commit_path)),)
        )
    if manifest and manifest.shards[shard].commit != commit_record.sha256:
        fault = Fault(commit_path, f"damaged: its sha256 is not the one in {layout.MANIFEST}")
        return _ShardReport(1, commit_record.bytes, 0, (fault,))

    faults = [
        found
        for file, expected in commit.files.items()
        if (found := _file_fault(cache.path, file, expected, hashed=level != "quick"))
    ]
    if level == "deep":
        faults += _content_faults(cache, shard, commit, {fault.file for fault in faults})
    return _ShardReport(
        files=1 + len(commit.files),
        bytes=commit_record.bytes + sum(record.bytes for record in commit.files.values()),
        entries=sum(record.entries for record in commit.views.values()),
        faults=tuple(faults),
    )


def _content_faults(cache: Cache, shard: int, commit: Commit, damaged: set[str]) -> Iterator[Fault]:
    """What is wrong with the meaning of a shard's files, those that are damaged left out."""
    samples_file = layout.samples_file(shard)
    if samples_file in damaged:
        return
    try:
        table = cache.read_samples(shard)
    except CorruptShardError as error:
        yield Fault(samples_file, _problem(error, cache.path / samples_file))
        return
    present = table["digest"].is_valid().to_numpy()
    start = cache.spec.shard_rows(shard).start
    for view in cache.spec.views:
        entries = commit.views[view].entries
        files = layout.view_files(cache.spec, shard, view, entries)
        if damaged & files.keys():
            continue
        try:
            targets = cache.read_shard(shard, view)
        except CorruptShardError as error:
            named = [file for file in files if str(cache.path / file) in str(error)]
            file = named[0] if named else layout.commit_file(shard)
            yield Fault(file, _problem(error, cache.path / file))
            continue
        labels = table["label"].to_numpy()
        problems = check_invariants(cache.spec, targets, labels, present, deep=True)
        for name, sample, problem in problems:
            file = layout.arrays(cache.spec, view)[name].shard_file(shard)
            yield Fault(file, f"row {start + sample}: {problem}")
