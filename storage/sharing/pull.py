"""Gets a cache, or a part of one, from an fsspec address, every file held against its hash."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gkd.storage.cache import layout
from gkd.storage.cache.card import views_note
from gkd.storage.cache.layout import Commit, FileRecord, ViewRecord, file_record
from gkd.storage.cache.metadata import (
    committed_shards,
    parse_commit,
    parse_manifest,
    parse_spec,
    regular_file,
)
from gkd.storage.cache.places import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, CacheSpec, DerivedSpec, View
from gkd.storage.errors import ConfigError, CorruptShardError, SpecMismatchError
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import WORKERS, RemoteCache, record_of
from gkd.storage.sharing.transfer import Tally, TransferSummary, named, shard_files, tally_of
from gkd.storage.util.files import (
    delete_temporaries,
    disk_errors,
    publish_file,
    require_room,
    write_file,
)
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.parallel import for_each


def pull(
    address: str,
    path: str | Path,
    *,
    shards: Sequence[int] | None = None,
    views: Sequence[View] | None = None,
    options: Mapping[str, Any] | None = None,
) -> TransferSummary:
    """Get a cache from an address, or go on where an earlier pull of it stopped.

    Every file is held against its hash before it gets its name, and those that stand already
    are hashed again. So a pull into a damaged copy mends it.

    With ``shards`` only those, without a manifest: the folder is an unfinished cache, opens as one
    and is finished by a pull of all. With ``views`` a cache of its own is made of these views,
    whole, with a spec and an id of its own.

    Raises:
        IncompleteCacheError: where the cache there is not finished, or the connection failed.
        CorruptShardError: where the cache there is damaged, or what it says cannot be.
        SpecMismatchError: where ``path`` holds another cache.
        ConfigError: where address, credentials or bucket do not work, there is no such shard or
            view, ``path`` is something else, another run writes it, or the disk is full or closed.
    """
    began = time.monotonic()
    path = Path(path).absolute()
    source = RemoteCache.open(Remote(address, options))
    spec = _with_views(source, views)
    chosen = _chosen_shards(source, shards)
    known = _require_place_for(path, spec)
    standing = {shard for shard in committed_shards(path) if shard < spec.num_shards}
    every = {
        shard: _with_views_of(spec, commit)
        for shard, commit in source.commits(sorted(standing.union(chosen))).items()
    }
    commits = {shard: every[shard] for shard in chosen}
    written = _metadata(source, spec)
    manifest = None
    if shards is None:
        manifest = _manifest(source, spec, written, commits)
    if not _require_same_cache(path, spec, every, manifest) and not known:
        raise SpecMismatchError(_other_cache(path / layout.METADATA))
    data = shard_files(commits)
    records = {layout.commit_file(k): layout.encode_json(c) for k, c in commits.items()}
    own = written | records | ({} if manifest is None else {layout.MANIFEST: manifest})
    _require_space(path, data)
    told = data | {file: record_of(content) for file, content in own.items()}
    require_outside_caches(path, may_be_one=True)
    with WriteLock(path), disk_errors(path), tally_of("pull", told) as tally:
        # What a killed pull left on its way into place.
        for inside in _folders(path):
            delete_temporaries(inside)
        _write_all(path, written, tally)
        for folder in ("samples", "commits"):
            (path / folder).mkdir(exist_ok=True)
        for_each(
            lambda file: _fetch(source.remote, path, file, data[file], tally), data, workers=WORKERS
        )
        _write_all(path, records, tally)
        if manifest is not None:
            _write_all(path, {layout.MANIFEST: manifest}, tally)
    cache = Cache.open(path, complete=manifest is not None)
    found = None if cache.manifest is None else cache.id
    return tally.summary(source.remote, path, found, time.monotonic() - began)


def _with_views(source: RemoteCache, views: Sequence[View] | None) -> CacheSpec:
    if views is None or sorted(views) == sorted(source.spec.views):
        return source.spec
    chosen = tuple(view for view in VIEWS if view in views)
    if not chosen or len(chosen) < len(views) or not set(chosen) <= set(source.spec.views):
        known = ", ".join(source.spec.views)
        raise ConfigError(
            f"{source.remote.address}: views: expected some of {known}, each once, got "
            f"{', '.join(views) or 'none'}; leave --views out for all"
        )
    derived = DerivedSpec("views", (source.id,))
    return msgspec.structs.replace(source.spec, views=chosen, derived=derived)


def _chosen_shards(source: RemoteCache, shards: Sequence[int] | None) -> Sequence[int]:
    if shards is None:
        return range(source.spec.num_shards)
    wrong = [shard for shard in shards if not 0 <= shard < source.spec.num_shards]
    if wrong or not shards:
        raise ConfigError(
            f"{source.remote.address}: shards: expected some of 0 to "
            f"{source.spec.num_shards - 1}, got {named(wrong)}; leave --shards out for all"
        )
    return sorted(set(shards))


def _with_views_of(spec: CacheSpec, commit: Commit) -> Commit:
    """The commit record that a cache of the spec's views alone has."""
    views: dict[View, ViewRecord] = {view: commit.views[view] for view in spec.views}
    entries: dict[View, int] = {view: views[view].entries for view in spec.views}
    files = {file: commit.files[file] for file in layout.shard_files(spec, commit.shard, entries)}
    return msgspec.structs.replace(commit, views=views, files=files)


def _metadata(source: RemoteCache, spec: CacheSpec) -> dict[str, bytes]:
    """Every file of no shard, the root's ``zarr.json`` first. None of the names is from there."""
    files = {file: layout.encode_json(content) for file, content in layout.metadata_files(spec)}
    card = source.card()
    if card is not None and spec.views != source.spec.views:
        card += (
            f"\nThis copy holds the {' and '.join(spec.views)} view of the cache {source.id} alone "
            f"(`gkd targets pull --views {','.join(spec.views)}`). {views_note(spec)}\n"
        ).encode()
    return files if card is None else files | {layout.CARD: card}


def _manifest(
    source: RemoteCache,
    spec: CacheSpec,
    metadata: Mapping[str, bytes],
    commits: Mapping[int, Commit],
) -> bytes:
    if spec.views == source.spec.views:
        return source.content
    return layout.manifest_content(
        spec,
        {file: record_of(content) for file, content in metadata.items()},
        [(commit, record_of(layout.encode_json(commit))) for commit in commits.values()],
    )


def _require_place_for(path: Path, spec: CacheSpec) -> bool:
    """Refuse a folder with anything but this cache, or the beginning of it.

    Whether that is certain: not where the root's ``zarr.json`` is damaged.
    """
    root = path / layout.METADATA
    if root.exists():
        try:
            found = parse_spec(regular_file(path, layout.METADATA).read_bytes(), root)
        except CorruptShardError:
            return False
        if found != spec:
            raise SpecMismatchError(
                f"{path}: holds another cache, or other views of it; choose another folder"
            )
    elif path.exists() and (
        not path.is_dir() or any(not each.name.startswith(".") for each in path.iterdir())
    ):
        raise ConfigError(
            f"{path}: expected a folder for the cache, got something else there; name another"
        )
    return True


def _require_same_cache(
    path: Path, spec: CacheSpec, commits: Mapping[int, Commit], manifest: bytes | None
) -> bool:
    """Refuse a folder with shards of another cache of the same spec; whether it has any of this.

    A record that is damaged is nobody's, and will be written again.
    """
    place = path / layout.MANIFEST
    if manifest is not None and place.exists():
        content = regular_file(path, layout.MANIFEST).read_bytes()
        if content == manifest:
            return True
        with contextlib.suppress(CorruptShardError):
            parse_manifest(content, place, spec)
            raise SpecMismatchError(_other_cache(place))
    found = False
    for shard, commit in commits.items():
        place = path / layout.commit_file(shard)
        if not place.exists():
            continue
        content = regular_file(path, layout.commit_file(shard)).read_bytes()
        if content == layout.encode_json(commit):
            found = True
            continue
        with contextlib.suppress(CorruptShardError):
            parse_commit(content, place, spec, shard)
            raise SpecMismatchError(_other_cache(place))
    return found


def _other_cache(place: Path) -> str:
    return (
        f"{place}: of another cache, or damaged; choose another folder, or delete this one and "
        "run the same command again"
    )


def _require_space(path: Path, files: Mapping[str, FileRecord]) -> None:
    needed = sum(
        record.bytes
        for file, record in files.items()
        if not (path / file).exists() or (path / file).stat().st_size != record.bytes
    )
    require_room(path, needed, "pull into a folder on another disk")


def _folders(path: Path) -> list[Path]:
    """A cache's folder and all in it; behind a link is somebody else's."""
    inside = (each for each in path.rglob("*") if each.is_dir() and not each.is_symlink())
    return [path, *inside]


def _is_right(path: Path, file: str, record: FileRecord) -> bool:
    try:
        found = regular_file(path, file)
    except CorruptShardError:
        return False
    return found.stat().st_size == record.bytes and file_record(found) == record


def _fetch(remote: Remote, path: Path, file: str, record: FileRecord, tally: Tally) -> None:
    if _is_right(path, file, record):
        tally.advance(record.bytes)
        return
    target = path / file
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(target) as aside:
            remote.fetch(file, aside, record.bytes, tally.advance)
            if file_record(aside) != record:
                raise CorruptShardError(
                    f"{remote.place(file)}: what came is not what its commit record says; run the "
                    "same command again, and where it stays so ask the cache's owner to push it "
                    "again with --read-back"
                )
    tally.copied(record)


def _write_all(path: Path, files: Mapping[str, bytes], tally: Tally) -> None:
    for file, content in files.items():
        record = record_of(content)
        if not _is_right(path, file, record):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            write_file(path / file, content)
            tally.copied(record)
        tally.advance(record.bytes)
