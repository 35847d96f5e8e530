"""Sends a cache to an fsspec address; an incomplete copy is never taken for a complete one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gkd.storage.cache import layout
from gkd.storage.cache.layout import file_record
from gkd.storage.cache.metadata import read_regular, regular_file, require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError, CorruptShardError, SpecMismatchError
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.remote_cache import MAX_RECORD_BYTES, record_of
from gkd.storage.sharing.transfer import TransferSummary, shard_files, transfer
from gkd.storage.util.files import delete_temporaries_below
from gkd.storage.util.text import first_few

# The first file of a push: the id of the cache that the address now belongs to.
CLAIM = ".cache-id"
_MAX_CLAIM_BYTES = 100


def push(
    path: str | Path,
    address: str,
    *,
    options: Mapping[str, Any] | None = None,
    read_back: bool = False,
) -> TransferSummary:
    """Send a finished cache to an address, or resume an interrupted push of it.

    A file counts as sent if its size there is right; with ``read_back``, and always if the address
    is a local folder, if its sha256 is. Each file is checked against its hash before it is sent.

    Raises:
        IncompleteCacheError: if the cache is not finished, or the connection failed.
        CorruptShardError: if a file is damaged, here or after it was sent.
        SpecMismatchError: if the address holds another cache or other files.
        ConfigError: if the address, its credentials or its bucket do not work.
    """
    cache = Cache.open(path)
    assert cache.manifest is not None
    commits = {shard: cache.commit(shard) for shard in range(cache.spec.num_shards)}
    remote = Remote(address, options)
    _claim(remote, cache.id)
    # Names come from the spec alone: a hostile manifest could name any file of this machine.
    names = [*(file for file, _ in layout.metadata_files(cache.spec)), layout.CARD]
    data = {file: cache.manifest.files[file] for file in names if file in cache.manifest.files}
    data |= shard_files(commits)
    records = {layout.commit_file(k): record_of(layout.encode_json(c)) for k, c in commits.items()}
    files = data | records
    read_back = read_back or remote.folder is not None

    def has_arrived(file: str) -> bool:
        record = files[file]
        return remote.size(file) == record.bytes and (
            not read_back or remote.sha256(file) == record.sha256
        )

    def send(file: str) -> None:
        source = regular_file(cache.path, file)
        if file_record(source) != files[file]:
            raise CorruptShardError(
                "not sent, as its size or sha256 is not that in this cache's records",
                path=source,
                remedy="`gkd targets verify` lists the faults, a pull into the folder repairs them",
            )
        remote.send(source, file, copying.advance)
        if not has_arrived(file):
            raise _damaged_on_arrival(remote, file)

    if remote.folder is not None and remote.folder.is_dir():
        delete_temporaries_below(remote.folder)
    with transfer("push", files) as copying:
        for part in (data, records):
            copying.copy(part, is_copied=has_arrived, copy=send)
        _require_claim(remote, cache.id)
        manifest = read_regular(cache.path, layout.MANIFEST)
        remote.write(layout.MANIFEST, manifest)
        if remote.read(layout.MANIFEST, len(manifest)) != manifest:
            raise _damaged_on_arrival(remote, layout.MANIFEST)
    return copying.summary(remote.address, cache.path, cache.id)


def _claim(remote: Remote, cache_id: str) -> None:
    """Check that the address is empty or belongs to this cache, and claim it."""
    if remote.folder is not None:
        require_outside_caches(remote.folder, may_be_cache=True)
    elif (parent := remote.nearest_parent_with(CLAIM)) is not None:
        raise ConfigError(
            f"inside the cache {parent}, which it would damage",
            path=remote.address,
            remedy="choose an address outside of it",
        )
    manifest = remote.read(layout.MANIFEST, MAX_RECORD_BYTES)
    if manifest is not None and record_of(manifest).sha256 != cache_id:
        raise _not_free(remote, cache_id, f"the cache {record_of(manifest).sha256}")
    if remote.size(CLAIM) is None:
        # Without a claim only a complete copy of this cache, made in another way, may be there.
        if manifest is None and (names := remote.names()):
            raise _not_free(remote, cache_id, first_few(names))
        remote.write(CLAIM, f"{cache_id}\n".encode())
    _require_claim(remote, cache_id)


def _require_claim(remote: Remote, cache_id: str) -> None:
    claim = remote.read(CLAIM, _MAX_CLAIM_BYTES) or b"unknown"
    found = claim.decode("ascii", "replace").strip()
    if found != cache_id:
        raise _not_free(remote, cache_id, f"a push of the cache {found}")


def _not_free(remote: Remote, cache_id: str, found: str) -> SpecMismatchError:
    return SpecMismatchError(
        path=remote.address,
        expected=f"an empty folder or a push of the cache {cache_id}",
        got=found,
        remedy="choose another address, or delete what is there",
    )


def _damaged_on_arrival(remote: Remote, file: str) -> CorruptShardError:
    return CorruptShardError(
        "differs from what was sent",
        path=remote.location(file),
        remedy="run the same command again, which sends it again",
    )
