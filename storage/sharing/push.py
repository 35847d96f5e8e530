"""Sends a cache to an fsspec address, so that half of one is never taken for a whole."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gkd.storage.cache import layout
from gkd.storage.cache.layout import FileRecord, file_record
from gkd.storage.cache.metadata import regular_file
from gkd.storage.cache.places import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError, CorruptShardError, GkdError, SpecMismatchError
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import MAX_RECORD_BYTES, WORKERS, record_of
from gkd.storage.sharing.transfer import Tally, TransferSummary, named, shard_files, tally_of
from gkd.storage.util.parallel import for_each

# Written before all else at an address that is pushed to: the id of the cache that it is for.
CLAIM = ".cache-id"
_MAX_CLAIM_BYTES = 100


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
    ours = [*(file for file, _ in layout.metadata_files(cache.spec)), layout.CARD]
    metadata = {file: cache.manifest.files[file] for file in ours if file in cache.manifest.files}
    data = metadata | shard_files(commits)
    records = {layout.commit_file(k): record_of(layout.encode_json(c)) for k, c in commits.items()}
    check = read_back or remote.folder is not None
    with tally_of("push", data | records) as tally, _while_it_stands(remote):
        for part in (data, records):
            _send_all(cache.path, remote, part, tally, read_back=check)
        manifest = regular_file(cache.path, layout.MANIFEST).read_bytes()
        _require_claim(remote, cache.id)
        remote.write(layout.MANIFEST, manifest)
        if remote.read(layout.MANIFEST, len(manifest)) != manifest:
            raise CorruptShardError(_damaged_there(remote.place(layout.MANIFEST)))
    return tally.summary(remote, cache.path, cache.id, time.monotonic() - began)


def _claim(remote: Remote, cache_id: str) -> None:
    """Make sure that the address is free or this cache's, and take it."""
    if remote.folder is not None:
        require_outside_caches(remote.folder, may_be_one=True)
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
    if remote.size(CLAIM) is None:  # a copy that came another way has none
        strangers = remote.names() if manifest is None else []
        if strangers:
            raise SpecMismatchError(
                f"{remote.address}: expected nothing, or what a push of this cache put there, got "
                f"{named(strangers)}; choose another address, or delete what is there"
            )
        remote.write(CLAIM, f"{cache_id}\n".encode())
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
    tally: Tally,
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
