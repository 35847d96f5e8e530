"""Sends caches to fsspec addresses and gets them from there, so that a half is never a whole.

Both ways the manifest is the last file. A copy that was broken off is gone on with by the same
call: what stands already, and is right, is not copied again.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gkd.storage import atomic, layout
from gkd.storage.cache import Cache
from gkd.storage.card import views_note
from gkd.storage.disk import disk_errors, require_room
from gkd.storage.errors import ConfigError, CorruptShardError, GkdError, SpecMismatchError
from gkd.storage.layout import Commit, FileRecord, ViewRecord, file_record
from gkd.storage.lock import WriteLock
from gkd.storage.metadata import parse_spec, regular_file
from gkd.storage.parallel import for_each
from gkd.storage.places import require_outside_caches
from gkd.storage.progress import Advance, progress
from gkd.storage.remote import Remote
from gkd.storage.remote_cache import MAX_RECORD_BYTES, WORKERS, RemoteCache, record_of
from gkd.storage.spec import VIEWS, CacheSpec, DerivedSpec, View

# Written before all else at an address that is pushed to: the id of the cache that it is for.
CLAIM = ".cache-id"
_MAX_CLAIM_BYTES = 100
_MEGABYTE = 1_000_000
_NAMED = 3  # wrong shards or files listed in a message


@dataclass(frozen=True)
class TransferSummary:
    """What a push or pull did.

    ``whole`` says whether all of a cache stands at the target now, ``id`` is the cache's then;
    ``files`` and ``bytes`` are those asked for, ``copied_files`` and ``copied_bytes`` those that
    did not stand there already.
    """

    address: str
    path: Path
    id: str | None
    whole: bool
    files: int
    bytes: int
    copied_files: int
    copied_bytes: int
    seconds: float


def push(
    path: str | Path,
    address: str,
    *,
    options: Mapping[str, Any] | None = None,
    read_back: bool = False,
) -> TransferSummary:
    """Send a finished cache to an address, or go on where an earlier push of it stopped.

    A file there is taken as sent where its size is right; with ``read_back``, and always where the
    address is a folder, where its sha256 is. Each file is held against its hash before it is sent.

    Raises:
        IncompleteCacheError: where the cache is not finished, or the connection failed.
        CorruptShardError: where a file is damaged, here or after it was sent.
        SpecMismatchError: where the address holds another cache, or anything that no push of this
            one put there.
        ConfigError: where the address, its credentials or its bucket do not work.
    """
    began = time.monotonic()
    cache = Cache.open(path)
    assert cache.manifest is not None
    commits = {shard: cache.commit(shard) for shard in range(cache.spec.num_shards)}
    remote = Remote(address, options)
    _claim(remote, cache.id)
    # Names from the spec alone: a manifest may have others, of files that are nobody's business.
    named = [*(file for file, _ in layout.metadata_files(cache.spec)), layout.CARD]
    metadata = {file: cache.manifest.files[file] for file in named if file in cache.manifest.files}
    data = metadata | _shard_files(commits)
    records = {layout.commit_file(k): record_of(layout.encode_json(c)) for k, c in commits.items()}
    check = read_back or remote.folder is not None
    with _tally("push", data | records) as tally, _while_it_stands(remote):
        for part in (data, records):
            _send_all(cache.path, remote, part, tally, read_back=check)
        manifest = regular_file(cache.path, layout.MANIFEST).read_bytes()
        _require_claim(remote, cache.id)
        remote.write(layout.MANIFEST, manifest)
        if remote.read(layout.MANIFEST, len(manifest)) != manifest:
            raise CorruptShardError(_damaged_there(remote.place(layout.MANIFEST)))
    return tally.summary(remote, cache.path, cache.id, time.monotonic() - began)


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
    _require_place_for(path, spec)
    commits = {k: _with_views_of(spec, c) for k, c in source.commits(chosen).items()}
    written = _metadata(source, spec)
    manifest = None
    if shards is None:
        manifest = _manifest(source, spec, written, commits)
    _require_same_cache(path, commits, manifest)
    data = _shard_files(commits)
    _require_space(path, data)
    with WriteLock(path), disk_errors(path), _tally("pull", data) as tally:
        # What a killed pull left on its way into place.
        for inside in _folders(path):
            atomic.delete_asides(inside)
        _write_all(path, written)
        for folder in ("samples", "commits"):
            (path / folder).mkdir(exist_ok=True)
        for_each(
            lambda file: _fetch(source.remote, path, file, data[file], tally), data, workers=WORKERS
        )
        _write_all(path, {layout.commit_file(k): layout.encode_json(c) for k, c in commits.items()})
        if manifest is not None:
            _write_all(path, {layout.MANIFEST: manifest})
    cache = Cache.open(path, complete=manifest is not None)
    found = None if cache.manifest is None else cache.id
    return tally.summary(source.remote, path, found, time.monotonic() - began)


class _Tally:
    """Counts what is copied, by several threads at once, and shows it in megabytes."""

    def __init__(self, advance: Advance, files: Mapping[str, FileRecord]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._files = len(files)
        self._bytes = sum(record.bytes for record in files.values())
        self._done = self._told = 0
        self._copied_files = self._copied_bytes = 0

    def advance(self, amount: int) -> None:
        """So many bytes more are there."""
        with self._lock:
            self._done += amount
            whole = -(-self._done // _MEGABYTE) if self._done == self._bytes else 0
            ahead = max(whole, self._done // _MEGABYTE) - self._told
            if ahead > 0:
                self._told += ahead
                self._advance(ahead)

    def copied(self, record: FileRecord) -> None:
        """One more file was copied."""
        with self._lock:
            self._copied_files += 1
            self._copied_bytes += record.bytes

    def summary(
        self, remote: Remote, path: Path, id: str | None, seconds: float
    ) -> TransferSummary:
        return TransferSummary(
            address=remote.address,
            path=path,
            id=id,
            whole=id is not None,
            files=self._files,
            bytes=self._bytes,
            copied_files=self._copied_files,
            copied_bytes=self._copied_bytes,
            seconds=seconds,
        )


@contextmanager
def _tally(what: str, files: Mapping[str, FileRecord]) -> Iterator[_Tally]:
    total = sum(record.bytes for record in files.values())
    with progress(what, -(-total // _MEGABYTE), "MB") as advance:
        yield _Tally(advance, files)


def _shard_files(commits: Mapping[int, Commit]) -> dict[str, FileRecord]:
    return {file: record for commit in commits.values() for file, record in commit.files.items()}


# ------------------------------------------------------------------------------- push


def _claim(remote: Remote, cache_id: str) -> None:
    """Make sure that the address is free or this cache's, and take it."""
    if remote.folder is not None:
        require_outside_caches(remote.folder)
    elif (around := remote.around(CLAIM)) is not None:
        raise ConfigError(
            f"{remote.address}: inside the cache {around}, which would not be whole any more; name "
            "a place outside of it"
        )
    manifest = remote.read(layout.MANIFEST, MAX_RECORD_BYTES)
    if manifest is not None and record_of(manifest).sha256 != cache_id:
        raise SpecMismatchError(
            f"{remote.address}: holds another cache, with id {record_of(manifest).sha256}; choose "
            "another address, or delete what is there"
        )
    if manifest is None and remote.size(CLAIM) is None:
        strangers = remote.names()
        if strangers:
            raise SpecMismatchError(
                f"{remote.address}: expected nothing, or what a push of this cache put there, got "
                f"{_named(strangers)}; choose another address, or delete what is there"
            )
        remote.write(CLAIM, f"{cache_id}\n".encode())
    if manifest is None:
        _require_claim(remote, cache_id)


def _require_claim(remote: Remote, cache_id: str) -> None:
    claim = remote.read(CLAIM, _MAX_CLAIM_BYTES)
    found = "none" if claim is None else claim.decode("ascii", "replace").strip()
    if found != cache_id:
        raise SpecMismatchError(
            f"{remote.address}: expected a push of the cache {cache_id} alone, found one of the "
            f"cache {found} begun there; choose another address, or delete what is there"
        )


@contextmanager
def _while_it_stands(remote: Remote) -> Iterator[None]:
    """Say of a failure that the place is gone, where that is why: backends tell a hundred ways."""
    try:
        yield
    except GkdError as error:
        try:
            gone = remote.size(CLAIM) is None
        except GkdError:
            raise error from None  # nothing there answers, and the first failure says it
        if gone:
            raise ConfigError(
                f"{remote.address}: gone while the cache was sent, with its bucket or folder; see "
                "who deleted it, make it again, then run the same command again"
            ) from error
        raise


def _send_all(
    path: Path,
    remote: Remote,
    files: Mapping[str, FileRecord],
    tally: _Tally,
    *,
    read_back: bool,
) -> None:
    def arrived(file: str) -> bool:
        record = files[file]
        return remote.size(file) == record.bytes and (
            not read_back or remote.sha256(file) == record.sha256
        )

    def send(file: str) -> None:
        if arrived(file):
            tally.advance(files[file].bytes)
            return
        content = regular_file(path, file)
        if file_record(content) != files[file]:
            raise CorruptShardError(
                f"{content}: its size or sha256 is not the one of this cache, so it is not sent; "
                "`gkd targets verify` lists every fault, a pull into the folder mends them"
            )
        remote.send(content, file, tally.advance)
        if not arrived(file):
            raise CorruptShardError(_damaged_there(remote.place(file)))
        tally.copied(files[file])

    for_each(send, files, workers=WORKERS)


def _damaged_there(place: str) -> str:
    return f"{place}: not what was sent; run the same command again, it will be sent again"


# ------------------------------------------------------------------------------- pull


def _with_views(source: RemoteCache, views: Sequence[View] | None) -> CacheSpec:
    if views is None or set(views) == set(source.spec.views):
        return source.spec
    chosen = tuple(view for view in VIEWS if view in views)
    if not chosen or len(chosen) < len(views) or not set(chosen) <= set(source.spec.views):
        raise ConfigError(
            f"{source.remote.address}: views: expected some of {', '.join(source.spec.views)}, "
            f"got {', '.join(views) or 'none'}"
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
            f"{source.spec.num_shards - 1}, got {_named(wrong)}"
        )
    return sorted(set(shards))


def _named(each: Sequence[int] | Sequence[str]) -> str:
    more = f" and {len(each) - _NAMED:,} more" if len(each) > _NAMED else ""
    return (", ".join(map(str, each[:_NAMED])) or "none") + more


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


def _require_place_for(path: Path, spec: CacheSpec) -> None:
    """Refuse a folder with anything but this cache, or the beginning of it."""
    root = path / layout.METADATA
    if root.exists():
        found = parse_spec(regular_file(path, layout.METADATA).read_bytes(), root)
        if found != spec:
            raise SpecMismatchError(
                f"{path}: holds another cache, or other views of it; choose another folder"
            )
    elif path.exists() and (
        not path.is_dir() or any(not each.name.startswith(".") for each in path.iterdir())
    ):
        raise ConfigError(f"{path}: expected a folder for the cache, got something else there")


def _require_same_cache(path: Path, commits: Mapping[int, Commit], manifest: bytes | None) -> None:
    """Refuse a folder with shards of another cache of the same spec."""
    place = path / layout.MANIFEST
    if manifest is not None and place.exists():
        if regular_file(path, layout.MANIFEST).read_bytes() != manifest:
            raise SpecMismatchError(_other_cache(place))
        return
    for shard, commit in commits.items():
        place = path / layout.commit_file(shard)
        if place.exists() and place.read_bytes() != layout.encode_json(commit):
            raise SpecMismatchError(_other_cache(place))


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


def _fetch(remote: Remote, path: Path, file: str, record: FileRecord, tally: _Tally) -> None:
    if _is_right(path, file, record):
        tally.advance(record.bytes)
        return
    target = path / file
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.written_aside(target) as aside:
            remote.fetch(file, aside, record.bytes, tally.advance)
            if file_record(aside) != record:
                raise CorruptShardError(
                    f"{remote.place(file)}: what came is not what its commit record says; run the "
                    "same command again, and where it stays so ask the cache's owner to push it "
                    "again with --read-back"
                )
    tally.copied(record)


def _write_all(path: Path, files: Mapping[str, bytes]) -> None:
    for file, content in files.items():
        if not _is_right(path, file, record_of(content)):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            atomic.write_file(path / file, content)
