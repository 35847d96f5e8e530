"""A cache at an address, as far as its metadata tell, none of which is trusted."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit, FileRecord, Manifest
from gkd.storage.cache.metadata import MAX_METADATA_BYTES, parse_commit, parse_manifest, parse_spec
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.errors import ConfigError, CorruptShardError, IncompleteCacheError
from gkd.storage.sharing.remote import Remote
from gkd.storage.util.parallel import for_each
from gkd.storage.util.progress import progress

MAX_RECORD_BYTES = 1 << 28
WORKERS = 8
_QUIET_SHARDS = 64


@dataclass(frozen=True)
class RemoteView:
    """Figures of one view that need no array; ``array_bytes`` is the size of each array."""

    view: View
    samples: int
    skipped: int
    entries: int
    truncated: int
    mean_size: float
    array_bytes: dict[str, int]
    bytes_per_sample: float


@dataclass(frozen=True)
class RemoteStats:
    """Figures of a cache at an address; ``bytes`` is every file that its manifest vouches for."""

    address: str
    id: str
    num_samples: int
    num_classes: int
    bytes: int
    bytes_per_sample: float
    views: tuple[RemoteView, ...]


@dataclass(frozen=True)
class RemoteCache:
    """A finished cache at an address; ``content`` is its manifest's bytes."""

    remote: Remote
    spec: CacheSpec
    manifest: Manifest
    content: bytes

    @classmethod
    def open(cls, remote: Remote) -> Self:
        """Read spec and manifest and check them as ``Cache.open`` does, the spec before all else.

        Raises:
            ConfigError: where no cache is there, or the address does not work.
            IncompleteCacheError: where it is not finished, or the connection failed.
            CorruptShardError: where spec or manifest cannot be.
        """
        root = remote.read(layout.METADATA, MAX_METADATA_BYTES)
        if root is None:
            raise ConfigError(
                f"{remote.address}: expected a cache of targets, got nothing with a "
                f"{layout.METADATA}; check bucket, folder and endpoint"
            )
        spec = parse_spec(root, remote.place(layout.METADATA))
        content = remote.read(layout.MANIFEST, MAX_RECORD_BYTES)
        if content is None:
            raise IncompleteCacheError(
                f"{remote.address}: a cache whose push is not finished, it has no "
                f"{layout.MANIFEST}; whoever has it runs the same `gkd targets push` again"
            )
        manifest = parse_manifest(content, remote.place(layout.MANIFEST), spec)
        for file, metadata in layout.metadata_files(spec):
            if manifest.files.get(file) != record_of(layout.encode_json(metadata)):
                raise CorruptShardError(
                    f"{remote.place(layout.MANIFEST)}: {file} is not what the spec makes of it; "
                    "ask the cache's owner to push it again"
                )
        return cls(remote, spec, manifest, content)

    @property
    def id(self) -> str:
        """Hex sha256 of the manifest."""
        return hashlib.sha256(self.content).hexdigest()

    def commits(self, shards: Iterable[int] | None = None) -> dict[int, Commit]:
        """Commit records of some shards, by default of all, held against the manifest.

        Raises:
            CorruptShardError: where one is missing, or not the one of the manifest.
        """
        chosen = range(self.spec.num_shards) if shards is None else sorted(shards)
        found: dict[int, Commit] = {}
        with progress("commit records", len(chosen), "shards", quiet_below=_QUIET_SHARDS) as tell:

            def read(shard: int) -> None:
                found[shard] = self._commit(shard)
                tell()

            for_each(read, chosen, workers=WORKERS)
        return {shard: found[shard] for shard in chosen}

    def card(self) -> bytes | None:
        """The cache's ``README.md``, None where it has none."""
        record = self.manifest.files.get(layout.CARD)
        return None if record is None else self._read(layout.CARD, record.sha256)

    def _commit(self, shard: int) -> Commit:
        file = layout.commit_file(shard)
        content = self._read(file, self.manifest.shards[shard].commit)
        commit = parse_commit(content, self.remote.place(file), self.spec, shard)
        if layout.encode_json(commit) != content:
            raise CorruptShardError(
                f"{self.remote.place(file)}: not JSON as format 1 writes it; ask the cache's "
                "owner to make it with gkd"
            )
        return commit

    def _read(self, file: str, sha256: str) -> bytes:
        content = self.remote.read(file, MAX_RECORD_BYTES)
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            found = "missing" if content is None else "its sha256 is not the one in manifest.json"
            raise CorruptShardError(
                f"{self.remote.place(file)}: {found}; ask the cache's owner to push it again"
            )
        return content


def record_of(content: bytes) -> FileRecord:
    """Size and hash of a file's content."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def remote_stats(cache: RemoteCache) -> RemoteStats:
    """What manifest and commit records tell: no quantiles and no masses, which need the arrays."""
    commits = list(cache.commits().values())
    size, samples = cache.manifest.bytes, cache.spec.num_samples
    return RemoteStats(
        address=cache.remote.address,
        id=cache.id,
        num_samples=samples,
        num_classes=cache.spec.num_classes,
        bytes=size,
        bytes_per_sample=size / samples,
        views=tuple(_view(cache, commits, view) for view in cache.spec.views),
    )


def _view(cache: RemoteCache, commits: Sequence[Commit], view: View) -> RemoteView:
    array_bytes: dict[str, int] = {}
    for commit in commits:
        files = layout.view_files(cache.spec, commit.shard, view, commit.views[view].entries)
        for file, array in files.items():
            array_bytes[array.name] = array_bytes.get(array.name, 0) + commit.files[file].bytes
    samples = cache.spec.num_samples - cache.manifest.skipped
    entries = sum(commit.views[view].entries for commit in commits)
    return RemoteView(
        view=view,
        samples=samples,
        skipped=cache.manifest.skipped,
        entries=entries,
        truncated=sum(commit.views[view].truncated for commit in commits),
        mean_size=entries / max(samples, 1),
        array_bytes=array_bytes,
        bytes_per_sample=sum(array_bytes.values()) / cache.spec.num_samples,
    )
