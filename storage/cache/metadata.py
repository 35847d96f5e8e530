"""Reads the metadata of a cache (spec, manifest, commit records) and verifies all of it."""

import stat
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit, Manifest
from gkd.storage.cache.spec import FORMAT, CacheSpec
from gkd.storage.errors import ConfigError, CorruptShardError, IncompleteCacheError
from gkd.storage.util.input_files import SMALL, describe_foreign, read_small

MAX_METADATA_BYTES = 1 << 20
# Of a file: its path in a cache on disk, or its address (gkd.storage.sharing.remote).
Location = Path | str


def require_outside_caches(path: Path, *, may_be_cache: bool = False) -> None:
    """Refuse an output path inside a cache, which a foreign file would damage.

    With ``may_be_cache`` the path itself may be a cache, for a command that resumes it.

    Raises:
        ConfigError: naming the cache.
    """
    resolved = path.absolute().resolve()
    for folder in resolved.parents if may_be_cache else (resolved, *resolved.parents):
        if _is_cache(folder):
            raise ConfigError(
                f"inside the cache {folder}, which it would damage",
                path=path,
                remedy="choose a path outside of it",
            )


def _is_cache(folder: Path) -> bool:
    if not (folder / layout.METADATA).is_file():
        return False
    try:
        read_spec(folder)
    except CorruptShardError:
        return True  # a damaged one
    except ConfigError:
        return False  # another Zarr store
    return True


def regular_file(root: Path, file: str) -> Path:
    """Path of a file of the cache ``root``, after checking that nothing on it is a link.

    Raises:
        CorruptShardError: if the file is missing, special, or behind a symbolic link.
    """
    path, mode = root, 0
    for part in Path(file).parts:
        path = path / part
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            corrupt(path, "missing", error)
        if stat.S_ISLNK(mode):
            corrupt(path, "a symbolic link, which no cache contains")
    if not stat.S_ISREG(mode):
        corrupt(path, "not a file")
    return path


def read_spec(path: Path) -> CacheSpec:
    """The spec in a cache's root ``zarr.json``.

    Raises:
        ConfigError: if ``path`` is not a cache of a format that this version reads.
        CorruptShardError: if it is one with an invalid spec.
    """
    if not (path / layout.METADATA).is_file():
        got = "another folder" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise ConfigError(
            path=path,
            expected=f"a cache of targets (a folder with {layout.METADATA})",
            got=got,
            remedy="check the path",
        )
    return parse_spec(
        read_regular(path, layout.METADATA, MAX_METADATA_BYTES), path / layout.METADATA
    )


def parse_spec(content: bytes, location: Location) -> CacheSpec:
    """The spec in the bytes of a root ``zarr.json`` at ``location``.

    Raises:
        ConfigError: if it is not that of a cache of a format that this version reads.
        CorruptShardError: if the spec is invalid.
    """
    root = _decode(content, Any, location)
    attributes = root.get("attributes") if isinstance(root, dict) else None
    cache = str(location).removesuffix(f"/{layout.METADATA}")
    if not isinstance(attributes, dict) or "format" not in attributes:
        raise ConfigError(
            "a Zarr store, but not a cache of targets", path=cache, remedy="check the path"
        )
    if attributes["format"] != FORMAT:
        raise ConfigError(
            path=cache,
            expected=f"a cache of format {FORMAT}",
            got=repr(attributes["format"]),
            remedy="update gkd to read it",
        )
    try:
        return msgspec.convert(attributes, CacheSpec)
    except msgspec.ValidationError as error:
        corrupt(location, f"an invalid spec: {error}", error)


def parse_manifest(content: bytes, location: Location, spec: CacheSpec) -> Manifest:
    """A manifest from its bytes, checked against the spec.

    Raises:
        CorruptShardError: if it is damaged or the manifest of another spec.
    """
    manifest: Manifest = _decode(content, Manifest, location)
    if not layout.has_its_own_sha256(content, manifest):
        corrupt(location, "damaged: its sha256 is not its self_sha256")
    if manifest.format != spec.format or manifest.spec != layout.spec_digest(spec):
        corrupt(location, f"the manifest of another spec than that in {layout.METADATA}")
    expected = [spec.shard_rows(shard) for shard in range(spec.num_shards)]
    if (
        [(rows.start, rows.stop) for rows in expected] != [s.rows for s in manifest.shards]
        or manifest.num_samples != spec.num_samples
        or any(shard.entries.keys() != set(spec.views) for shard in manifest.shards)
        or manifest.entries
        != {view: sum(shard.entries[view] for shard in manifest.shards) for view in spec.views}
    ):
        corrupt(location, "its shards are not those of the spec")
    return manifest


def committed_shards(path: Path) -> list[int]:
    """Shards of a cache, finished or not, that have a commit record, ascending."""
    return sorted(int(p.stem) for p in (path / "commits").glob("*.json") if p.stem.isdecimal())


def read_commit(path: Path, spec: CacheSpec, shard: int) -> Commit:
    """A commit record, checked against the spec.

    Raises:
        CorruptShardError: if it is missing or not the record of this shard.
    """
    file = layout.commit_file(shard)
    return parse_commit(read_regular(path, file), path / file, spec, shard)


def parse_commit(content: bytes, location: Location, spec: CacheSpec, shard: int) -> Commit:
    """A commit record from its bytes, checked against the spec.

    Raises:
        CorruptShardError: if it is not the record of this shard.
    """
    commit: Commit = _decode(content, Commit, location)
    rows = spec.shard_rows(shard)
    if (commit.format, commit.shard, commit.rows) != (spec.format, shard, (rows.start, rows.stop)):
        corrupt(location, f"not the record of shard {shard}, rows {rows.start} to {rows.stop - 1}")
    if commit.views.keys() != set(spec.views):
        corrupt(location, f"expected views {', '.join(spec.views)}, got {', '.join(commit.views)}")
    for view, record in commit.views.items():
        if record.entries > len(rows) * spec.max_group or record.truncated > len(rows):
            corrupt(
                location, f"{view}: more entries or truncated groups than {len(rows)} samples allow"
            )
    if commit.files.keys() != set(layout.shard_files(spec, shard, commit.entries)):
        corrupt(location, "its list of files is not that of a shard of this cache")
    if len(commit.skipped) > len(rows):
        corrupt(location, f"{len(commit.skipped)} skipped samples of {len(rows)}")
    return commit


def check_metadata(path: Path, spec: CacheSpec) -> None:
    """Check the metadata of all groups and arrays against the spec.

    Raises:
        CorruptShardError: naming the file and the key that differs.
    """
    for file, expected in layout.metadata_files(spec):
        found = _decode(read_regular(path, file, MAX_METADATA_BYTES), Any, path / file)
        if not isinstance(found, dict):
            corrupt(path / file, f"expected an object, got {type(found).__name__}")
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                corrupt(
                    path / file, f"{key}: expected {expected.get(key)!r}, got {found.get(key)!r}"
                )


def read_regular(root: Path, file: str, limit: int = SMALL) -> bytes:
    """Content of a file of the cache ``root``.

    Raises:
        CorruptShardError: as ``regular_file``, and if it has more than ``limit`` bytes.
    """
    path = regular_file(root, file)
    size = path.stat().st_size
    if size > limit:
        corrupt(path, f"{size} bytes are too many for metadata")
    return read_small(path, limit, follow_links=False)


def _decode(content: bytes, kind: Any, location: Location) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        foreign = describe_foreign(content[:512])
        got = foreign.found if foreign else error
        corrupt(location, f"not the JSON that format 1 has there: {got}", error)


def incomplete(path: Path, spec: CacheSpec) -> IncompleteCacheError:
    """The error for a cache that has no manifest."""
    written = len(committed_shards(path))
    return IncompleteCacheError(
        f"not finished: {written} of {spec.num_shards} shards are written, no {layout.MANIFEST}",
        path=path,
        remedy="run the same `gkd cache-teacher` or `gkd targets pull` again to resume",
    )


def corrupt(location: Location, problem: str, cause: BaseException | None = None) -> NoReturn:
    """Report a damaged file of a cache, with the way to repair it.

    Raises:
        CorruptShardError: always.
    """
    raise CorruptShardError(problem, path=location, remedy=_remedy(location)) from cause


def _remedy(location: Location) -> str:
    if isinstance(location, str):
        return "push the cache there again from a complete copy"
    pull = "repair it by `gkd targets pull` into the same folder, or "
    if location.name == layout.METADATA:
        return pull + "make it again in another folder"
    records = f"this shard's commit record and {layout.MANIFEST}"
    if location.name in (layout.MANIFEST, layout.CARD):
        records = layout.MANIFEST
    return pull + f"delete {records} and run the same `gkd cache-teacher` again"
