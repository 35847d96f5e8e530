"""Flips single bits of all files of a cache and checks that each flip is detected."""

from pathlib import Path

import numpy as np

from gkd.storage.cache import layout
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.verify import Level, verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import GkdError
from gkd.storage.reading.mmap_store import materialise
from tests.caches import make_spec, write_shard
from tests.tampering import flip_bit


def make_small_cache(path: Path) -> Path:
    """A finished cache of three shards with a card."""
    writer = CacheWriter(path, make_spec(num_samples=50, shard_samples=20))
    for shard in writer.pending():
        write_shard(writer, shard, skipped={41: "no image"})
    (path / layout.CARD).write_text("# Faces\n")
    writer.finish()
    return path


def every_file(path: Path) -> list[str]:
    """All files of a cache, by their paths in it."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def unnoticed_flips(
    path: Path, work: Path, *, flips: int, seed: int, level: Level = "hashes"
) -> list[str]:
    """Flip ``flips`` random bits, one at a time, over all files in turn; the undetected ones.

    Verify must name the file and no other, and training must refuse the cache.
    """
    rng = np.random.default_rng(seed)
    unnoticed = []
    files: list[str] = []
    for number in range(flips):
        files = files or rng.permutation(every_file(path)).tolist()
        file = files.pop()
        bit = int(rng.integers((path / file).stat().st_size * 8))
        flip_bit(path / file, bit)
        named = {fault.file for fault in verify(path, level=level, workers=1).faults}
        if named != {file}:
            unnoticed.append(f"{file}, bit {bit}: verify named {named}")
        if trains(path, work / str(number)):
            unnoticed.append(f"{file}, bit {bit}: training accepted it")
        flip_bit(path / file, bit)
    if not verify(path).ok or not trains(path, work / "intact"):
        unnoticed.append("the intact cache was refused")
    return unnoticed


def trains(path: Path, folder: Path) -> bool:
    """Whether everything that training reads of a cache is accepted."""
    try:
        cache = Cache.open(path)
        cache.samples()
        materialise(cache, folder=folder)
    except GkdError:
        return False
    return True
