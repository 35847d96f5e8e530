"""The metadata of a cache at an address, none of which is trusted."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit, FileRecord, Manifest
from gkd.storage.cache.metadata import MAX_METADATA_BYTES, parse_commit, parse_manifest, parse_spec
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.errors import ConfigError, CorruptShardError, IncompleteCacheError
from gkd.storage.sharing.remote import Remote
from gkd.storage.sharing.transfer import WORKERS
from gkd.storage.util.parallel import for_each
from gkd.storage.util.progress import progress

MAX_RECORD_BYTES = 1 << 28
_QUIET_SHARDS = 64
_PUSH_AGAIN = "ask the cache's owner to push it again"


@dataclass(frozen=True)
class RemoteCache:
    """A finished cache at an address; ``content`` is the bytes of its manifest."""

    remote: Remote
    spec: CacheSpec
    manifest: Manifest
    content: bytes

    @classmethod
    def open(cls, remote: Remote) -> Self:
        """Read spec and manifest and check them as ``Cache.open`` does.

        Raises:
            ConfigError: if no cache is there, or the address does not work.
            IncompleteCacheError: if it is not finished, or the connection failed.
            CorruptShardError: if spec or manifest are invalid.
        """
        root = remote.read(layout.METADATA, MAX_METADATA_BYTES)
        if root is None:
            raise ConfigError(
                path=remote.address,
                expected="a target cache",
                got=f"no {layout.METADATA}",
                remedy="check bucket, folder and endpoint",
            )
        spec = parse_spec(root, remote.location(layout.METADATA))
        content = remote.read(layout.MANIFEST, MAX_RECORD_BYTES)
        if content is None:
            raise IncompleteCacheError(
                f"the push of this cache is not finished, it has no {layout.MANIFEST}",
                path=remote.address,
                remedy="its owner resumes with the same `gkd targets push`",
            )
        manifest = parse_manifest(content, remote.location(layout.MANIFEST), spec)
        for file, metadata in layout.metadata_files(spec):
            if manifest.files.get(file) != record_of(layout.encode_json(metadata)):
                raise CorruptShardError(
                    f"{file} is not what the spec requires",
                    path=remote.location(layout.MANIFEST),
                    remedy=_PUSH_AGAIN,
                )
        return cls(remote, spec, manifest, content)

    @property
    def id(self) -> str:
        """Hex sha256 of the manifest."""
        return record_of(self.content).sha256

    def commits(self, shards: Iterable[int] | None = None) -> dict[int, Commit]:
        """Commit records of ``shards``, by default of all, checked against the manifest.

        Raises:
            CorruptShardError: if one is missing, or not that in the manifest.
        """
        chosen = range(self.spec.num_shards) if shards is None else sorted(shards)
        found: dict[int, Commit] = {}
        with progress("commits", len(chosen), "shards", quiet_below=_QUIET_SHARDS) as advance:

            def read(shard: int) -> None:
                found[shard] = self._commit(shard)
                advance()

            for_each(read, chosen, workers=WORKERS)
        return {shard: found[shard] for shard in chosen}

    def card(self) -> bytes | None:
        """The cache's ``README.md``, None without one."""
        record = self.manifest.files.get(layout.CARD)
        return None if record is None else self._read(layout.CARD, record.sha256)

    def _commit(self, shard: int) -> Commit:
        file = layout.commit_file(shard)
        content = self._read(file, self.manifest.shards[shard].commit)
        commit = parse_commit(content, self.remote.location(file), self.spec, shard)
        if layout.encode_json(commit) != content:
            raise CorruptShardError(
                "expected JSON exactly as format 1 writes it",
                path=self.remote.location(file),
                remedy="ask the cache's owner to make it with gkd",
            )
        return commit

    def _read(self, file: str, sha256: str) -> bytes:
        content = self.remote.read(file, MAX_RECORD_BYTES)
        if content is None or record_of(content).sha256 != sha256:
            problem = "missing" if content is None else "its sha256 is not that in manifest.json"
            raise CorruptShardError(problem, path=self.remote.location(file), remedy=_PUSH_AGAIN)
        return content


def record_of(content: bytes) -> FileRecord:
    """Size and hash of a file's content."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
