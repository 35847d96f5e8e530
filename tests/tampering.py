"""What an attacker can do to a cache: change it and make all its hashes fit again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from gkd.storage import layout
from gkd.storage.cache import Cache, read_spec
from gkd.storage.layout import Commit


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its start."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rehash(path: Path) -> None:
    """Make commit records and manifest vouch for the files as they are now."""
    spec = read_spec(path)
    commits = []
    for shard in range(spec.num_shards):
        place = path / layout.commit_file(shard)
        commit = msgspec.json.decode(place.read_bytes(), type=Commit)
        files = {file: layout.file_record(path / file) for file in commit.files}
        commit = msgspec.structs.replace(commit, files=files)
        place.write_bytes(layout.encode_json(commit))
        commits.append((commit, layout.file_record(place)))
    files = {file: layout.file_record(path / file) for file, _ in layout.metadata_files(spec)}
    (path / layout.MANIFEST).write_bytes(layout.manifest_content(spec, files, commits))


def rewrite_row(cache: Cache, array: str, shard: int, values: Any) -> None:
    """Write other values into an array, with all checksums right."""
    view, name = array.split("/")
    place = layout.arrays(cache.spec, view)[name]  # type: ignore[arg-type]
    (cache.path / place.shard_file(shard)).unlink()
    place.open(cache.path, writable=True)[shard, : len(values)] = values
    rehash(cache.path)
