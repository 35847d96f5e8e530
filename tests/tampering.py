"""Damages and forges caches, as an attacker may who also updates all hashes."""

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
    """Update commit records and manifest to the files as they are now."""
    spec = read_spec(path)
    commits = []
    for shard in range(spec.num_shards):
        file = path / layout.commit_file(shard)
        commit = msgspec.json.decode(file.read_bytes(), type=Commit)
        files = {name: layout.file_record(path / name) for name in commit.files}
        commit = msgspec.structs.replace(commit, files=files)
        file.write_bytes(layout.encode_json(commit))
        commits.append((commit, layout.file_record(file)))
    files = {file: layout.file_record(path / file) for file, _ in layout.metadata_files(spec)}
    (path / layout.MANIFEST).write_bytes(layout.manifest_content(spec, files, commits))


def rewrite_row(cache: Cache, array: str, shard: int, values: Any) -> None:
    """Write other values into an array and update all checksums."""
    view, name = array.split("/")
    array_layout = layout.arrays(cache.spec, view)[name]  # type: ignore[arg-type]
    (cache.path / array_layout.shard_file(shard)).unlink()
    array_layout.open(cache.path, writable=True)[shard, : len(values)] = values
    rehash(cache.path)


def _shift_sizes(targets: SparseTargets) -> np.ndarray:
    sizes = targets.sizes.copy()
    wide = int(sizes.argmax())
    sizes[[wide, wide + 1]] += [-1, 1]
    return sizes


def _repeat_class(targets: SparseTargets) -> np.ndarray:
    indices = targets.indices.copy()
    indices[1] = indices[0]
    return indices


def _hide_label(targets: SparseTargets) -> np.ndarray:
    # Each class plus one: still unique, but the first label is no longer in its group.
    return (targets.indices + 1) % 50


def _exceed_classes(targets: SparseTargets) -> np.ndarray:
    indices = targets.indices.copy()
    indices[0] = 50
    return indices


def _ascend(targets: SparseTargets) -> np.ndarray:
    return targets.log2_probs[::-1]


def _mass_above_1(targets: SparseTargets) -> np.ndarray:
    secondary = targets.secondary.copy()
    secondary[3, 0] = 0.1
    return secondary


def _not_a_number(targets: SparseTargets) -> np.ndarray:
    secondary = targets.secondary.copy()
    secondary[3, 2] = np.nan
    return secondary


def _swap_masses(targets: SparseTargets) -> np.ndarray:
    return targets.secondary[:, [1, 0, 2]]


# Inconsistent content for a cache of ``tests.caches.make_cache``: the array, and its values made of
# the correct targets of a shard.
FORGERIES: dict[str, tuple[str, Callable[[SparseTargets], np.ndarray]]] = {
    "sizes shifted": ("sizes", _shift_sizes),
    "a repeated class": ("indices", _repeat_class),
    "labels missing": ("indices", _hide_label),
    "a class out of range": ("indices", _exceed_classes),
    "order ascending": ("log2_probs", _ascend),
    "a mass above 1": ("secondary", _mass_above_1),
    "a mass that is not a number": ("secondary", _not_a_number),
    "temperatures swapped": ("secondary", _swap_masses),
}


def forge(cache: Cache, forgery: str, shard: int, view: Any) -> None:
    """Write one of ``FORGERIES`` into a cache and update all hashes."""
    array, made = FORGERIES[forgery]
    rewrite_row(cache, f"{view}/{array}", shard, made(cache.read_shard(shard, view)))
