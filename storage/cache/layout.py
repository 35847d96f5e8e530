"""Format 1 on disk (FORMAT.md): paths, Zarr metadata, commit records and the manifest."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import numpy as np
import zarr
from msgspec import Meta
from zarr.storage import LocalStore, StorePath

from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.util.files import sha256_file

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigParams
    from zarr.core.metadata.v3 import ArrayMetadataJSON_V3

INNER_CHUNK = 65536
PACKED = ("indices", "log2_probs")
METADATA = "zarr.json"
MANIFEST = "manifest.json"
CARD = "README.md"

_NO_SHA256 = "0" * 64

Count = Annotated[int, Meta(ge=0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hex sha256 of one file."""

    bytes: Count
    sha256: Sha256


def file_record(path: Path) -> FileRecord:
    """The record of a file as it is on disk."""
    return FileRecord(path.stat().st_size, sha256_file(path))


class ViewRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Entries of one view in one shard, and how many groups ``max_group`` truncated."""

    entries: Count
    truncated: Count


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last file written of a shard, and the only proof that the shard exists.

    ``rows`` is half open; ``skipped`` maps record keys to reasons; ``files`` maps the path of
    every file of the shard, relative to the cache, to its size and hash.
    """

    format: int
    shard: Count
    rows: tuple[Count, Count]
    views: dict[View, ViewRecord]
    skipped: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def entries(self) -> dict[View, int]:
        """Entries of each view."""
        return {view: record.entries for view, record in self.views.items()}


class ShardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard in the manifest; ``commit`` is the sha256 of its commit record."""

    commit: Sha256
    rows: tuple[Count, Count]
    entries: dict[View, Count]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last file written of a cache; its sha256 is the cache's id.

    ``spec`` is the digest of the spec without ``software``; ``files`` are those outside the
    shards; ``bytes`` is the size of everything that the manifest covers; ``self_sha256`` is the
    sha256 of the manifest's own bytes with 64 zeros in its place, so that a damaged manifest is
    recognised before anything else is compared with it.
    """

    format: int
    spec: Sha256
    files: dict[str, FileRecord]
    shards: tuple[ShardRecord, ...]
    num_samples: Count
    skipped: Count
    entries: dict[View, Count]
    truncated: dict[View, Count]
    bytes: Count
    self_sha256: Sha256


def encode_json(value: Any) -> bytes:
    """Deterministic, indented JSON of a struct or of builtins."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n"


def spec_digest(spec: CacheSpec) -> str:
    """Hex sha256 of the spec without its software versions, which do not decide the arrays."""
    fields = msgspec.to_builtins(spec)
    del fields["software"]
    return hashlib.sha256(msgspec.json.encode(fields, order="deterministic")).hexdigest()


@dataclass(frozen=True)
class ArrayLayout:
    """One Zarr array, with a row for each shard of samples.

    If ``packed``, the row holds the entries of all samples one after the other in one Zarr shard
    file of inner chunks; else it is one chunk with a fixed position for each sample.
    """

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    packed: bool

    @property
    def name(self) -> str:
        """Last part of the path, which is its name in ``SparseTargets.arrays``."""
        return self.path.rpartition("/")[2]

    def shard_file(self, shard: int) -> str:
        """Path of the file that holds one row, relative to the cache."""
        return f"{self.path}/c/{shard}" + "/0" * (len(self.shape) - 1)

    def metadata(self) -> dict[str, Any]:
        """Content of the array's ``zarr.json``."""
        codecs: list[dict[str, Any]] = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {
                "name": "blosc",
                "configuration": {
                    "typesize": self.dtype.itemsize,
                    "cname": "zstd",
                    "clevel": 3,
                    "shuffle": "bitshuffle",
                    "blocksize": 0,
                },
            },
            {"name": "crc32c"},
        ]
        if self.packed:
            sharding = {
                "chunk_shape": [1, INNER_CHUNK],
                "codecs": codecs,
                "index_codecs": [codecs[0], codecs[2]],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1, *self.shape[1:]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if self.dtype.kind == "f" else 0,
            "codecs": codecs,
            "attributes": {},
            "storage_transformers": [],
        }

    def open(self, root: Path, *, writable: bool = False) -> zarr.Array[Any]:
        """The array in the cache at ``root``, by our own metadata and never by that on disk."""
        store = StorePath(LocalStore(root, read_only=not writable), self.path)
        # Chunks of zeros are written too: an absent one must never be data.
        config: ArrayConfigParams = {"write_empty_chunks": True}
        metadata = cast("ArrayMetadataJSON_V3", self.metadata())
        return zarr.Array(zarr.AsyncArray(metadata, store, config))


def packed_width(spec: CacheSpec) -> int:
    """Length of a packed row: S * max_group, rounded up to complete inner chunks."""
    return math.ceil(spec.shard_samples * spec.max_group / INNER_CHUNK) * INNER_CHUNK


def arrays(spec: CacheSpec, view: View) -> dict[str, ArrayLayout]:
    """The arrays of one view, by name."""
    samples = (spec.num_shards, spec.shard_samples)
    entries = (spec.num_shards, packed_width(spec))
    layouts: list[tuple[str, type[np.generic], tuple[int, ...]]] = [
        ("indices", np.uint32, entries),
        ("log2_probs", np.uint16, entries),
        ("sizes", np.uint16, samples),
        ("secondary", np.float32, (*samples, len(spec.temperatures))),
    ]
    if spec.draws is not None:
        layouts.append(("draws", np.uint32, (*samples, spec.draws.count)))
        layouts.append(("draw_log2_probs", np.uint16, (*samples, spec.draws.count)))
        if spec.draws.source == "primary":
            layouts.append(("draw_secondary", np.float32, samples))
    return {
        name: ArrayLayout(f"{view}/{name}", np.dtype(dtype), shape, name in PACKED)
        for name, dtype, shape in layouts
    }


def metadata_files(spec: CacheSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path, relative to the cache, and content of every ``zarr.json``."""
    yield METADATA, _group(msgspec.json.decode(msgspec.json.encode(spec)))
    for view in spec.views:
        yield f"{view}/{METADATA}", _group({})
        for layout in arrays(spec, view).values():
            yield f"{layout.path}/{METADATA}", layout.metadata()


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def samples_file(shard: int) -> str:
    """Path of a shard's table of samples."""
    return f"samples/{shard:06d}.parquet"


def commit_file(shard: int) -> str:
    """Path of a shard's commit record."""
    return f"commits/{shard:06d}.json"


def view_files(spec: CacheSpec, shard: int, view: View, entries: int) -> dict[str, ArrayLayout]:
    """Path of every file that one view of a shard must have, and the array it belongs to."""
    return {
        layout.shard_file(shard): layout
        for layout in arrays(spec, view).values()
        if entries or not layout.packed
    }


def shard_files(spec: CacheSpec, shard: int, entries: dict[View, int]) -> list[str]:
    """Path of every file that a shard must have, except its commit record."""
    return [
        *(path for view in spec.views for path in view_files(spec, shard, view, entries[view])),
        samples_file(shard),
    ]


def manifest_content(
    spec: CacheSpec, files: dict[str, FileRecord], commits: list[tuple[Commit, FileRecord]]
) -> bytes:
    """The bytes of a finished cache's manifest from the records of all its files.

    ``files`` are those outside the shards; ``commits`` has each commit record, in order, with
    the record of its own file.
    """
    manifest = Manifest(
        format=spec.format,
        spec=spec_digest(spec),
        files=files,
        shards=tuple(
            ShardRecord(
                commit=record.sha256,
                rows=commit.rows,
                entries=commit.entries,
            )
            for commit, record in commits
        ),
        num_samples=spec.num_samples,
        skipped=sum(len(commit.skipped) for commit, _ in commits),
        entries={
            view: sum(commit.views[view].entries for commit, _ in commits) for view in spec.views
        },
        truncated={
            view: sum(commit.views[view].truncated for commit, _ in commits) for view in spec.views
        },
        bytes=sum(record.bytes for record in files.values())
        + sum(
            record.bytes + sum(file.bytes for file in commit.files.values())
            for commit, record in commits
        ),
        self_sha256=_NO_SHA256,
    )
    content = encode_json(manifest)
    return encode_json(
        msgspec.structs.replace(manifest, self_sha256=hashlib.sha256(content).hexdigest())
    )


def has_its_own_sha256(content: bytes, manifest: Manifest) -> bool:
    """Whether the sha256 of a manifest's bytes is its ``self_sha256``."""
    blank = content.replace(manifest.self_sha256.encode(), _NO_SHA256.encode())
    return hashlib.sha256(blank).hexdigest() == manifest.self_sha256
