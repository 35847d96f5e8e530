"""Gets a cache or a part of one from an fsspec address and checks every file against its hash."""

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
    read_regular,
    regular_file,
    require_outside_caches,
)
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, CacheSpec, DerivedSpec, View
from gkd.storage.errors import ConfigError, CorruptShardError, SpecMismatchError
from gkd.storage.sharing.remote import Advance, Remote
from gkd.storage.sharing.remote_cache import RemoteCache, record_of
from gkd.storage.sharing.transfer import (
    WORKERS,
    TransferSummary,
    shard_files,
    total_bytes,
    transfer,
)
from gkd.storage.util.files import (
    delete_temporaries_below,
    disk_errors,
    make_below,
    publish_file,
    require_room,
    write_file,
)
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.text import first_few


def pull(
    address: str,
    path: str | Path,
    *,
    shards: Sequence[int] | None = None,
    views: Sequence[View] | None = None,
    options: Mapping[str, Any] | None = None,
) -> TransferSummary:
    """Get a cache from an address, or resume an interrupted pull of it.

    Every file is checked against its hash before it gets its name, and existing files are hashed
    again. So a pull into a damaged copy repairs it.

    With ``shards`` only those are copied, without a manifest: the folder is an unfinished cache,
    and a pull of all shards completes it. With ``views`` the result is a complete cache of these
    views alone, with its own spec and id.

    Raises:
        IncompleteCacheError: if the cache there is not finished, or the connection failed.
        CorruptShardError: if the cache there is damaged or invalid.
        SpecMismatchError: if ``path`` holds another cache.
        ConfigError: if the address, credentials or bucket do not work, a shard or view does not
            exist, ``path`` is something else, another run writes it, or the disk is full or closed.
    """
    path = Path(path).absolute()
    source = RemoteCache.open(Remote(address, options))
    spec = _spec_of_views(source, views)
    chosen = _chosen_shards(source, shards)
    existing = {shard for shard in committed_shards(path) if shard < spec.num_shards}
    known = {
        shard: _commit_of_views(spec, commit)
        for shard, commit in source.commits(existing.union(chosen)).items()
    }
    commits = {shard: known[shard] for shard in chosen}
    metadata = _metadata(source, spec)
    manifest = _manifest(source, spec, metadata, commits) if shards is None else None
    require_outside_caches(path, may_be_cache=True)
    _require_same_cache(path, spec, known, manifest)
    records = {layout.commit_file(k): layout.encode_json(c) for k, c in commits.items()}
    last = {} if manifest is None else {layout.MANIFEST: manifest}
    contents = metadata | records | last
    data = shard_files(commits)
    files = data | {file: record_of(content) for file, content in contents.items()}
    missing = {file: record for file, record in data.items() if not _has_size(path / file, record)}
    require_room(path, total_bytes(missing), "pull into a folder on another disk")

    def get(file: str) -> None:
        target = make_below(path, file)
        if file in contents:
            write_file(target, contents[file])
            copying.advance(len(contents[file]))
        else:
            _fetch(source.remote, file, path, files[file], copying.advance)

    with WriteLock(path), disk_errors(path), transfer("pull", files) as copying:
        delete_temporaries_below(path)
        # The root's zarr.json comes first: a later pull knows the folder by it.
        for part in (metadata, data, records, last):
            copying.copy(
                part,
                is_copied=lambda file: _is_right(path, file, files[file]),
                copy=get,
                workers=1 if part is metadata else WORKERS,
            )
    cache = Cache.open(path, complete=manifest is not None)
    id = None if cache.manifest is None else cache.id
    return copying.summary(source.remote.address, path, id)


def _spec_of_views(source: RemoteCache, views: Sequence[View] | None) -> CacheSpec:
    if views is None or sorted(views) == sorted(source.spec.views):
        return source.spec
    chosen = tuple(view for view in VIEWS if view in views)
    if not chosen or len(chosen) < len(views) or not set(chosen) <= set(source.spec.views):
        raise ConfigError(
            "views",
            path=source.remote.address,
            expected=f"one or more of {', '.join(source.spec.views)}, each once",
            got=", ".join(views) or "none",
            remedy="leave --views out for all",
        )
    derived = DerivedSpec("views", (source.id,))
    return msgspec.structs.replace(source.spec, views=chosen, derived=derived)


def _chosen_shards(source: RemoteCache, shards: Sequence[int] | None) -> Sequence[int]:
    if shards is None:
        return range(source.spec.num_shards)
    wrong = [shard for shard in shards if not 0 <= shard < source.spec.num_shards]
    if wrong or not shards:
        raise ConfigError(
            "shards",
            path=source.remote.address,
            expected=f"one or more of 0 to {source.spec.num_shards - 1}",
            got=first_few(wrong),
            remedy="leave --shards out for all",
        )
    return sorted(set(shards))


def _commit_of_views(spec: CacheSpec, commit: Commit) -> Commit:
    """The commit record of the same shard in a cache of the spec's views alone."""
    views: dict[View, ViewRecord] = {view: commit.views[view] for view in spec.views}
    entries: dict[View, int] = {view: views[view].entries for view in spec.views}
    files = {file: commit.files[file] for file in layout.shard_files(spec, commit.shard, entries)}
    return msgspec.structs.replace(commit, views=views, files=files)


def _metadata(source: RemoteCache, spec: CacheSpec) -> dict[str, bytes]:
    """All files that belong to no shard, the root's ``zarr.json`` first; names are our own."""
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


def _require_same_cache(
    path: Path, spec: CacheSpec, commits: Mapping[int, Commit], manifest: bytes | None
) -> None:
    """Refuse a folder with anything but this cache or a part of it.

    Damaged records do not count, as the pull writes them again, but one intact record of this
    cache must be there.
    """
    root = path / layout.METADATA
    if not root.exists():
        if path.exists() and (
            not path.is_dir() or any(not item.name.startswith(".") for item in path.iterdir())
        ):
            raise ConfigError(
                path=path,
                expected="an empty or new folder, or a copy of this cache",
                got="something else",
                remedy="name another",
            )
        return
    expected: dict[str, Any] = {layout.METADATA: spec}
    if manifest is not None:
        expected[layout.MANIFEST] = parse_manifest(manifest, layout.MANIFEST, spec)
    expected |= {layout.commit_file(shard): commit for shard, commit in commits.items()}
    intact = False
    for file, record in expected.items():
        if not (path / file).exists():
            continue
        content = read_regular(path, file)
        try:
            if file == layout.METADATA:
                found: Any = parse_spec(content, root)
            elif file == layout.MANIFEST:
                found = parse_manifest(content, path / file, spec)
            else:
                found = parse_commit(content, path / file, spec, record.shard)
        except CorruptShardError:
            continue
        if found != record:
            raise _other_cache(path / file)
        intact = True
    if not intact:
        raise _other_cache(root)


def _other_cache(file: Path) -> SpecMismatchError:
    return SpecMismatchError(
        "damaged, or from another cache or other views of it",
        path=file,
        remedy="choose another folder, or delete this one and run the same command again",
    )


def _has_size(path: Path, record: FileRecord) -> bool:
    return path.exists() and path.stat().st_size == record.bytes


def _is_right(path: Path, file: str, record: FileRecord) -> bool:
    try:
        found = regular_file(path, file)
    except CorruptShardError:
        return False
    return _has_size(found, record) and file_record(found) == record


def _fetch(remote: Remote, file: str, path: Path, record: FileRecord, advance: Advance) -> None:
    target = path / file
    with disk_errors(target), publish_file(target) as temporary:
        remote.fetch(file, temporary, record.bytes, advance)
        if file_record(temporary) != record:
            raise CorruptShardError(
                "its size or sha256 is not that in its commit record",
                path=remote.location(file),
                remedy="run the same command again; if that does not help, ask the cache's owner "
                "to push it again with --read-back",
            )
