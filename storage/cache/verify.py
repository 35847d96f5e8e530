"""Proves that a cache is complete and undamaged, or names every file that is not."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gkd.storage.cache import layout
from gkd.storage.cache.invariants import check_invariants
from gkd.storage.cache.layout import Commit, FileRecord, Manifest, file_record
from gkd.storage.cache.metadata import (
    committed_shards,
    incomplete,
    parse_manifest,
    read_commit,
    read_regular,
    read_spec,
    regular_file,
)
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.errors import ConfigError, CorruptShardError
from gkd.storage.util.files import sha256_file
from gkd.storage.util.parallel import ordered_map
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
    """What was checked and what was found.

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
        """Whether there is no fault."""
        return not self.faults


@dataclass(frozen=True)
class _ShardReport:
    files: int
    bytes: int
    entries: int
    faults: tuple[Fault, ...]


def verify(path: str | Path, *, level: Level = "deep", workers: int | None = None) -> VerifyReport:
    """Check every file of a cache against the manifest and the commit records.

    quick   manifest, commit records and metadata; presence and size of all other files
    hashes  every byte of every file: finds any damage since the cache was written
    deep    decodes every array and table too and checks their invariants (``check_invariants``):
            finds what a writer did wrong, or who changed data together with its hashes

    Shards are checked by threads, each of which holds one view of one shard. If nothing else is
    wrong, files that do not belong to the cache are faults as well.

    Raises:
        ConfigError: if ``path`` is not a cache. Anything else is a fault in the report.
    """
    path = Path(path).absolute()
    try:
        spec = read_spec(path)
    except (ConfigError, CorruptShardError) as error:
        if isinstance(error, ConfigError) and not (path / layout.MANIFEST).exists():
            raise
        fault = Fault(layout.METADATA, f"{error.problem} (nothing else could be checked)")
        return VerifyReport(path, level, 0, 0, 0, 0, (fault,))

    manifest, faults = _read_manifest(path, spec)
    metadata_faults = list(_metadata_faults(path, spec, manifest))
    faults += metadata_faults
    if any(fault.file == layout.METADATA for fault in metadata_faults):
        faults.append(Fault(layout.METADATA, "what it describes could not be checked"))
        return VerifyReport(path, level, 0, 0, 0, 0, tuple(faults))

    shards = range(spec.num_shards) if manifest else committed_shards(path)
    cache = Cache(path, spec, None, "")
    check = functools.partial(_verify_shard, cache, manifest, level=level)
    reports = []
    with progress("verify", len(shards), "shards") as advance:
        for report in ordered_map(check, shards, workers=workers or min(_MAX_WORKERS, all_cores())):
            reports.append(report)
            advance()
    faults += [fault for report in reports for fault in report.faults]
    if manifest and not faults:
        faults += _foreign_files(cache, manifest)
    return VerifyReport(
        path=path,
        level=level,
        shards=len(shards),
        files=sum(report.files for report in reports),
        bytes=sum(report.bytes for report in reports),
        entries=sum(report.entries for report in reports),
        faults=tuple(sorted(faults, key=lambda fault: fault.file)),
    )


def _read_manifest(path: Path, spec: CacheSpec) -> tuple[Manifest | None, list[Fault]]:
    if not os.path.lexists(path / layout.MANIFEST):
        error = incomplete(path, spec)
        return None, [Fault(layout.MANIFEST, f"{error.problem}; {error.remedy}")]
    try:
        content = read_regular(path, layout.MANIFEST)
        return parse_manifest(content, path / layout.MANIFEST, spec), []
    except CorruptShardError as error:
        return None, [Fault(layout.MANIFEST, error.problem)]


def _metadata_faults(path: Path, spec: CacheSpec, manifest: Manifest | None) -> Iterator[Fault]:
    """Faults of the files that belong to no shard."""
    expected = dict(layout.metadata_files(spec))
    known = manifest.files if manifest else {}
    for file in sorted(expected.keys() | known.keys() & {layout.CARD}):
        fault = _file_fault(path, file, known.get(file))
        if fault:
            yield fault
        elif file in expected and read_regular(path, file) != layout.encode_json(expected[file]):
            yield Fault(file, "not the metadata that follows from the spec")
    if manifest and known.keys() - {layout.CARD} != expected.keys():
        yield Fault(layout.MANIFEST, "its files are not those of the spec")


def _foreign_files(cache: Cache, manifest: Manifest) -> Iterator[Fault]:
    """Files that the manifest does not cover; hidden ones are not read by anybody."""
    known = {layout.MANIFEST, *manifest.files}
    for shard in range(cache.spec.num_shards):
        known |= {layout.commit_file(shard), *cache.commit(shard).files}
    for path in cache.path.rglob("*"):
        file = path.relative_to(cache.path)
        if file.as_posix() in known or any(part.startswith(".") for part in file.parts):
            continue
        if path.is_symlink() or not path.is_dir():
            yield Fault(
                file.as_posix(), "not a part of the cache, but a Zarr reader may take it for one"
            )


def _file_fault(
    path: Path, file: str, expected: FileRecord | None, *, hashed: bool = True
) -> Fault | None:
    """What is wrong with a file's presence, its size or, if ``hashed``, its hash."""
    try:
        found = regular_file(path, file)
        size = found.stat().st_size
        if expected is not None and size != expected.bytes:
            return Fault(file, f"expected {expected.bytes} bytes, got {size}")
        sha256 = sha256_file(found) if hashed and expected is not None else None
    except CorruptShardError as error:
        return Fault(file, error.problem)
    except OSError as error:
        return Fault(file, f"cannot be read ({error})")
    if expected is None or sha256 in (None, expected.sha256):
        return None
    return Fault(file, f"damaged: expected sha256 {expected.sha256}, got {sha256}")


def _verify_shard(
    cache: Cache, manifest: Manifest | None, shard: int, *, level: Level
) -> _ShardReport:
    commit_file = layout.commit_file(shard)
    try:
        commit = read_commit(cache.path, cache.spec, shard)
        record = file_record(cache.path / commit_file)
    except CorruptShardError as error:
        return _ShardReport(1, 0, 0, (Fault(commit_file, error.problem),))
    if manifest and manifest.shards[shard].commit != record.sha256:
        fault = Fault(commit_file, f"damaged: its sha256 is not that in {layout.MANIFEST}")
        return _ShardReport(1, record.bytes, 0, (fault,))

    found = (
        _file_fault(cache.path, file, expected, hashed=level != "quick")
        for file, expected in commit.files.items()
    )
    faults = [fault for fault in found if fault]
    if level == "deep":
        faults += _content_faults(cache, shard, commit, {fault.file for fault in faults})
    return _ShardReport(
        files=1 + len(commit.files),
        bytes=record.bytes + sum(file.bytes for file in commit.files.values()),
        entries=sum(view.entries for view in commit.views.values()),
        faults=tuple(faults),
    )


def _content_faults(cache: Cache, shard: int, commit: Commit, damaged: set[str]) -> Iterator[Fault]:
    """What is wrong with the content of a shard's files, apart from the ``damaged`` ones."""
    if layout.samples_file(shard) in damaged:
        return
    try:
        table = cache.read_samples(shard)
    except CorruptShardError as error:
        yield _fault(cache, error)
        return
    labels, present = table["label"].to_numpy(), table["digest"].is_valid().to_numpy()
    start = cache.spec.shard_rows(shard).start
    for view in cache.spec.views:
        if damaged & layout.view_files(cache.spec, shard, view, commit.views[view].entries).keys():
            continue
        try:
            targets = cache.read_shard(shard, view)
        except CorruptShardError as error:
            yield _fault(cache, error)
            continue
        problems = check_invariants(cache.spec, targets, labels, present, deep=True)
        for name, sample, problem in problems:
            file = layout.arrays(cache.spec, view)[name].shard_file(shard)
            yield Fault(file, f"row {start + sample}: {problem}")


def _fault(cache: Cache, error: CorruptShardError) -> Fault:
    assert isinstance(error.path, Path)
    return Fault(error.path.relative_to(cache.path).as_posix(), error.problem)
