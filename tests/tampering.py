"""What an attacker can do to a cache: change it and make all its hashes fit again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit
from gkd.storage.cache.metadata import read_spec
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.targets import SparseTargets


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


def _shift_sizes(targets: SparseTargets) -> np.ndarray:
    sizes = targets.sizes.copy()
    wide = int(sizes.argmax())
    sizes[[wide, wide + 1]] += [-1, 1]
    return sizes


def _double_class(targets: SparseTargets) -> np.ndarray:
    indices = targets.indices.copy()
    indices[1] = indices[0]
    return indices


def _hide_label(targets: SparseTargets) -> np.ndarray:
    # Every class one on: unique as before, and the first label is in its group no more.
    return (targets.indices + 1) % 50


def _go_beyond(targets: SparseTargets) -> np.ndarray:
    indices = targets.indices.copy()
    indices[0] = 50
    return indices


def _rise(targets: SparseTargets) -> np.ndarray:
    return targets.log2_probs[::-1]


def _mass_above(targets: SparseTargets) -> np.ndarray:
    secondary = targets.secondary.copy()
    secondary[3, 0] = 0.1
    return secondary


def _no_number(targets: SparseTargets) -> np.ndarray:
    secondary = targets.secondary.copy()
    secondary[3, 2] = np.nan
    return secondary


def _swap_masses(targets: SparseTargets) -> np.ndarray:
    return targets.secondary[:, [1, 0, 2]]


# What somebody may write into a cache of ``tests.caches.make_cache`` who makes all hashes fit:
# the array that lies, and what it is made of the true targets of a shard.
LIES: dict[str, tuple[str, Callable[[SparseTargets], np.ndarray]]] = {
    "sizes shifted": ("sizes", _shift_sizes),
    "a class twice": ("indices", _double_class),
    "labels missing": ("indices", _hide_label),
    "a class beyond the last": ("indices", _go_beyond),
    "order ascending": ("log2_probs", _rise),
    "a mass above 1": ("secondary", _mass_above),
    "a mass that is no number": ("secondary", _no_number),
    "temperatures swapped": ("secondary", _swap_masses),
}


def tell_lie(cache: Cache, lie: str, shard: int, view: Any) -> None:
    """Write one of ``LIES`` into a cache, with all hashes right."""
    array, made = LIES[lie]
    rewrite_row(cache, f"{view}/{array}", shard, made(cache.read_shard(shard, view)))
