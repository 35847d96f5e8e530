"""Reads what a cache says of itself, and believes none of it unseen: spec, manifest, commits."""

import stat
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit, Manifest
from gkd.storage.cache.spec import FORMAT, CacheSpec, View
from gkd.storage.errors import ConfigError, CorruptShardError

MAX_METADATA_BYTES = 1 << 20
# Where a file stands: of a cache on disk, or at an address (gkd.storage.sharing.remote).
Place = Path | str


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
        except (FileNotFoundError, NotADirectoryError) as error:
            corrupt(path, "missing", error)
        if stat.S_ISLNK(mode):
            corrupt(path, "a symbolic link, which a cache never has")
    if not stat.S_ISREG(mode):
        corrupt(path, "not a file")
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
        corrupt(place, f"its spec cannot be: {error}", error)


def parse_manifest(content: bytes, place: Place, spec: CacheSpec) -> Manifest:
    """A manifest from its bytes, checked against the spec.

    Raises:
        CorruptShardError: where it is damaged or the manifest of another spec.
    """
    manifest: Manifest = _decode(content, Manifest, place)
    if not layout.is_whole_manifest(content, manifest):
        corrupt(place, "its sha256 is not the one that it names")
    if manifest.format != spec.format or manifest.spec != layout.spec_digest(spec):
        corrupt(place, f"the manifest of another spec than the one in {layout.METADATA}")
    expected = [spec.shard_rows(shard) for shard in range(len(manifest.shards))]
    if (
        len(manifest.shards) != spec.num_shards
        or manifest.num_samples != spec.num_samples
        or any((r.start, r.stop) != s.rows for r, s in zip(expected, manifest.shards, strict=True))
        or any(shard.entries.keys() != set(spec.views) for shard in manifest.shards)
    ):
        corrupt(place, "its shards are not those of the spec")
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
        corrupt(place, f"not the record of shard {shard}, rows {rows.start} to {rows.stop - 1}")
    if commit.views.keys() != set(spec.views):
        corrupt(place, f"expected views {', '.join(spec.views)}, got {', '.join(commit.views)}")
    for view, record in commit.views.items():
        if record.entries > len(rows) * spec.max_group or record.truncated > len(rows):
            corrupt(place, f"{view}: more entries or cut groups than {len(rows)} samples can have")
    entries: dict[View, int] = {view: record.entries for view, record in commit.views.items()}
    if commit.files.keys() != set(layout.shard_files(spec, shard, entries)):
        corrupt(place, "its list of files is not that of a shard of this cache")
    if len(commit.skipped) > len(rows):
        corrupt(place, f"{len(commit.skipped)} skipped samples of {len(rows)}")
    return commit


def check_metadata(path: Path, spec: CacheSpec) -> None:
    """See that the metadata of groups and arrays is what the spec makes it.

    Raises:
        CorruptShardError: naming the file and key that is not.
    """
    for file, expected in layout.metadata_files(spec):
        _require_metadata(
            path / file, _decode(_read_metadata(path, file), Any, path / file), expected
        )


def _require_metadata(path: Path, found: Any, expected: dict[str, Any]) -> None:
    if found == expected:
        return
    keys = found.keys() | expected.keys() if isinstance(found, dict) else []
    for key in sorted(keys):
        if found.get(key) != expected.get(key):
            corrupt(path, f"{key}: expected {expected.get(key)!r}, got {found.get(key)!r}")
    corrupt(path, f"expected an object, got {type(found).__name__}")


def _read_metadata(root: Path, file: str) -> bytes:
    path = regular_file(root, file)
    size = path.stat().st_size
    if size > MAX_METADATA_BYTES:
        corrupt(path, f"{size} bytes are too many for metadata")
    return path.read_bytes()


def _decode(content: bytes, kind: Any, place: Place) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        corrupt(place, f"no such JSON as format 1 has there: {error}", error)


def incomplete(path: Path, spec: CacheSpec) -> str:
    """What to say of a cache that is not finished."""
    written = len(committed_shards(path))
    return (
        f"{path}: {written} of {spec.num_shards} shards are written and {layout.MANIFEST} is not; "
        "run the same `gkd cache-teacher` or `gkd targets pull` again to resume"
    )


def corrupt(place: Place, what: str, cause: BaseException | None = None) -> NoReturn:
    """Say what is wrong with a file of a cache, and what mends it.

    Raises:
        CorruptShardError: always.
    """
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
